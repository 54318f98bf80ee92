"""compute-sanitizer over every kernel once, at small sizes: `python -m _gpu_suite.sanitizer --out sanitizer.json`.

The tools in order of worth, each on `tests/gpu/sanitized.py`, which runs the kernels and checks their results. The last
row runs memcheck on a kernel that writes out of bounds on purpose: unless that is found, the other rows' zeros mean
nothing. A machine without the tool, or whose driver refuses it, is "not available" with the reason. In a dry run
without a GPU the script runs alone, on the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import ROOT
from _script import FAILED, NO_TIME, OK, Record, make_parser, parse

from _gpu_suite.process import Ended, last_line, run, stopped_by_signals, tail

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLANTED = Path(__file__).resolve().parent / "out_of_bounds.py"
NOT_AVAILABLE = "not available"
# Blocks of torch's caching allocator hide what lies beyond a tensor.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
_SUMMARY = re.compile(r"^={3,} ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
_RACES = re.compile(
    r"^={3,} RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.MULTILINE
)
_REFUSED = re.compile(r"^={3,} (.*Device not supported.*)", re.MULTILINE)
_FINDING = re.compile(r"^={3,} ((?!COMPUTE-SANITIZER|.*SUMMARY).*\S.*)", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all tools; 1 if one found an error."""
    parser = make_parser(*(__doc__ or "").split("\n\n", 1))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="[all]")
    parser.add_argument("--sanitizer", metavar="FILE", help="the tool [the one on the PATH or in CUDA_HOME]")
    parser.add_argument("--script", type=Path, default=ROOT / "tests" / "gpu" / "sanitized.py", metavar="FILE",
                        help="what it runs [tests/gpu/sanitized.py]")  # fmt: skip
    options = parse(parser, arguments)
    record = Record("sanitizer", options)
    with stopped_by_signals(), tempfile.TemporaryDirectory(prefix="sanitizer-") as folder:
        check = Check(options, Path(folder) if options.out is None else options.out.parent)
        for case, run_case in check.cases():
            row = record.measure(case, run_case)
            print(f"{case['tool']} on {case['program']}: {row['status']}  {row.get('message', '')}", flush=True)
    return int(record.failed)


class Check:
    """The tool, the programs it is given, and where its output goes."""

    def __init__(self, options: argparse.Namespace, logs: Path) -> None:
        self._options, self._logs = options, logs
        self._sanitizer = options.sanitizer or find_sanitizer()
        self._end = time.monotonic() + options.seconds

    def cases(self) -> list[tuple[dict[str, Any], Any]]:
        """Every case with what runs it."""
        if self._options.device.type == "cpu":
            return [({"tool": "none", "program": "kernels"}, self._rehearse)]
        real = [
            ({"tool": tool, "program": "kernels"}, self._runner(tool, self._options.script))
            for tool in self._options.tools
        ]
        return [*real, ({"tool": "memcheck", "program": "planted error"}, self._planted)]

    def _runner(self, tool: str, script: Path) -> Any:
        return lambda: self._sanitize(tool, script)

    def _sanitize(self, tool: str, script: Path) -> dict[str, Any]:
        if self._sanitizer is None:
            return {"status": NOT_AVAILABLE, "message": "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"}
        command = [self._sanitizer, "--tool", tool, "--target-processes", "application-only", "--print-limit", "30"]
        command += [sys.executable, str(script)]
        ended, output = self._run(command, f"sanitizer-{tool}-{script.stem}.log")
        return {**judge(ended, output), "seconds": ended.seconds, "command": command}

    def _planted(self) -> dict[str, Any]:
        row = self._sanitize("memcheck", PLANTED)
        if row["status"] in (NOT_AVAILABLE, NO_TIME):
            return row
        found = row.get("errors", 0) > 0
        message = f"found it: {row['first']}" if found else "the planted out-of-bounds write was not found"
        return row | {"status": OK if found else FAILED, "message": message}

    def _rehearse(self) -> dict[str, Any]:
        ended, output = self._run(
            [sys.executable, str(self._options.script), "--device", "cpu"], "sanitizer-rehearsal.log"
        )
        if not ended.in_time:
            return {"status": NO_TIME, "message": str(ended)}
        if ended.exit_code != 0:
            return {"status": FAILED, "message": f"{ended}: {last_line(output)}"}
        return {"message": "the script runs on the CPU; no kernel was checked", "seconds": ended.seconds}

    def _run(self, command: list[str], name: str) -> tuple[Ended, str]:
        """How a program ended and all that it printed."""
        log = self._logs / name
        log.unlink(missing_ok=True)
        ended = run(command, max(1.0, self._end - time.monotonic()), log, os.environ | ENVIRONMENT, grace=3.0)
        return ended, tail(log, size=1 << 24)


def find_sanitizer() -> str | None:
    """The tool on the PATH, else the toolkit's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))


def judge(ended: Ended, output: str) -> dict[str, Any]:
    """A row from what the tool printed: its own count of errors decides, and no count is no success."""
    refused = _REFUSED.search(output)
    if refused is not None:
        return {"status": NOT_AVAILABLE, "message": refused[1].strip()}
    summary, races = _SUMMARY.search(output), _RACES.search(output)
    errors = (int(summary[1]) if summary else 0) + (int(races[2]) if races else 0)
    first = next(iter(_FINDING.findall(output)), "")
    counts = {"errors": errors, "warnings": int(races[3]) if races else 0, "exit_code": ended.exit_code, "first": first}
    if errors:
        return {"status": FAILED, "message": f"{errors} errors, the first: {first}", **counts}
    if not ended.in_time:
        return {"status": NO_TIME, "message": f"{ended}" + (f"; it had said: {first}" if first else "")}
    if summary is None and races is None:
        return {"status": FAILED, "message": f"no summary of errors, {ended}: {first or last_line(output)}"}
    if ended.exit_code != 0:
        return {"status": FAILED, "message": f"no error found, but {ended}: {last_line(output)}", **counts}
    return {"status": OK, "message": "0 errors", **counts}


if __name__ == "__main__":
    sys.exit(main())
