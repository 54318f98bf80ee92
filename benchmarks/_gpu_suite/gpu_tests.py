"""The GPU tests as rows, one a test: `python -m _gpu_suite.gpu_tests --out tests.json`.

pytest runs in a process of its own and reports test by test (`live`). A test that crashes that process, hangs, or
leaves a dead CUDA context is a failed row, and the tests after it run in a new process. A dry run without a GPU
rehearses the tests on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import ROOT
from _script import FAILED, NO_TIME, OK, Record, make_parser, parse

from _gpu_suite.parts import BENCHMARKS
from _gpu_suite.process import Ended, run, stopped_by_signals

DONE = (OK, FAILED, "skipped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all tests; 1 if one failed, or if none passed."""
    parser = make_parser(*(__doc__ or "").split("\n\n", 1))
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", metavar="PATH", help="what pytest runs [tests]")
    parser.add_argument("--test-seconds", type=float, default=90.0, metavar="S", help="a test that takes longer hangs "
                        "[%(default)s]")  # fmt: skip
    options = parse(parser, arguments)
    with stopped_by_signals():
        return Tests(options).run()


class Tests:
    """The rows so far, and the processes that add to them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._record = Record("tests", options)
        self._rows = {row["test"]: row for row in self._record.rows}
        self._end = time.monotonic() + options.seconds
        self._chosen: list[str] = []
        self._running: tuple[str, float] | None = None  # a test that has started, and when
        self._read = 0  # bytes of the present process's events

    def run(self) -> int:
        with tempfile.TemporaryDirectory(prefix="gpu_tests-") as folder:
            for turn in range(1000):  # every turn but the last finishes at least one test
                before = len(self._rows)
                ended = self._one_process(Path(folder) / f"events-{turn}")
                waiting = [test for test in self._chosen if test not in self._rows]
                if not waiting or time.monotonic() > self._end or len(self._rows) == before:
                    break
                print(f"pytest ended ({ended}); {len(waiting)} tests go on in a new process", flush=True)
        self._rows |= {test: {"test": test, "status": NO_TIME} for test in waiting}
        if not any(row["status"] == OK for row in self._rows.values()):
            self._add("(all)", {"status": FAILED, "message": f"no test passed; pytest: {ended}"})
        self._write()
        return int(self._record.failed)

    def _one_process(self, events: Path) -> Ended:
        """Run pytest on the tests without a row; whatever it was at when it ended has failed."""
        events.touch()
        events.with_name(events.name + ".done").write_text("\n".join(self._rows))
        self._read, self._running = 0, None
        left = self._end - time.monotonic()
        options = ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-v", "--tb=short", "-m", "gpu"]
        options += ["--continue-on-collection-errors", *(["--rehearse"] if self._options.device.type == "cpu" else [])]
        command = [sys.executable, "-m", "_gpu_suite.live", str(events), str(left), *options]
        command.append(str(self._options.tests.absolute()))
        ended = run(command, float("inf"), cwd=BENCHMARKS, watch=lambda _: self._follow(events), grace=3.0)
        self._follow(events)
        if self._running is not None:
            test, _ = self._running
            self._add(test, {"status": FAILED, "message": str(ended) if ended.in_time else "it hung"})
            self._write()
        return ended

    def _follow(self, events: Path) -> bool:
        """Take in what has been reported since; True when a test has taken too long."""
        with events.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._read += len(lines)
        for line in lines.splitlines():
            self._take(json.loads(line))
        if lines:
            self._write()
        return self._running is not None and time.monotonic() - self._running[1] > self._options.test_seconds

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "chosen":
            self._chosen = event["tests"]
        elif kind == "start":
            self._running = (event["test"], time.monotonic())
        else:
            self._add(event["test"], event)
            self._running = None

    def _add(self, test: str, row: dict[str, Any]) -> None:
        self._rows[test] = {"test": test, **row}

    def _write(self) -> None:
        self._record.rows = list(self._rows.values())
        self._record.write()


if __name__ == "__main__":
    sys.exit(main())
