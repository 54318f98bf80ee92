"""What the scripts of the GPU suite share: common options, a time budget, and a record that a kill cannot lose.

A script measures *cases*, one row of JSON each, most valuable first. Every finished row is on disk before the next case
begins, a case that fails is a row too, and `--resume` skips the rows that are there. `gpu_suite.py` runs the scripts as
processes; each also runs by itself. `--dry-run` goes through every line of code with tiny shapes on whatever device
there is, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import environment, is_out_of_memory

OK, FAILED, OUT_OF_MEMORY, NO_TIME = "ok", "failed", "out of memory", "no time left"


def make_parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write, row by row [none]")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out that are ok, run only the others")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after this long [no limit]")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds of a case [%(default)s]")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu [%(default)s]")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, one round, on the CPU without a GPU")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed and checked; a mistake ends the program with a usage message."""
    given = parser.parse_args(arguments)
    if given.dry_run:
        given.rounds = 1
        if not torch.cuda.is_available():
            given.device = "cpu"
    if given.rounds < 1 or given.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    if given.resume and given.out is None:
        parser.error("--resume needs --out")
    try:
        device = torch.device(given.device)
    except RuntimeError:
        parser.error(f"--device: {given.device!r} is not a device; write cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(
            f"--device: {given.device} asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "--dry-run needs none"
        )
    if given.out is not None and not given.out.absolute().parent.is_dir():
        parser.error(f"--out: {given.out.absolute().parent} is not a directory")
    given.device = device
    return given


class Record:
    """The rows of one script, on disk after every one of them (when there is an --out)."""

    def __init__(self, benchmark: str, options: argparse.Namespace) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path, self._device = options.out, options.device
        self._end = time.monotonic() + options.seconds
        self._head = {"benchmark": benchmark, "dry_run": options.dry_run}
        self._earlier: list[dict[str, Any]] = []  # environments of the runs that earlier rows come from
        if options.resume and self._path.exists():
            before = json.loads(self._path.read_text())
            if before["benchmark"] != benchmark or before["dry_run"] != options.dry_run:
                raise ValueError(f"{self._path} holds {before['benchmark']!r} (dry run: {before['dry_run']}), not this")
            self.rows = [row for row in before["rows"] if row["status"] == OK]
            self._earlier = [*before["earlier_environments"], before["environment"]]
        self._environment = environment(self._device)

    def measure(self, case: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add the row ``case | run()``; a failure is a row with its message. Skips a case that a resumed file holds."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in case.items()):
                return row
        row = case | self._outcome(run)
        self.rows.append(row)
        self.write()
        return row

    def _outcome(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if time.monotonic() > self._end:
            return {"status": NO_TIME}
        try:
            return {"status": OK, **run()}
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            message = f"{type(error).__name__}: {error}".split("\n")[0]
            return {"status": OUT_OF_MEMORY if is_out_of_memory(error) else FAILED, "message": message}
        finally:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def failed(self) -> bool:
        """Whether a case failed otherwise than by a lack of memory or time."""
        return any(row["status"] == FAILED for row in self.rows)

    def write(self) -> None:
        """Replace the file by one that holds every row so far."""
        if self._path is None:
            return
        document = {
            **self._head,
            "environment": self._environment,
            "earlier_environments": self._earlier,
            "rows": self.rows,
        }
        aside = self._path.with_name(self._path.name + ".part")
        aside.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(aside, self._path)
