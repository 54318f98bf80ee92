"""One process per model and mode: a fresh allocator for each, and a crash of one loses nothing of the others.

A process is the same script with `--worker`. It writes its rows to a part of its own, which is merged into the record
while it runs, so that a kill of everything loses no finished row either. A resumed run hands it the rows it has.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import child_environment
from _script import FAILED, NO_TIME, OK, OUT_OF_MEMORY, Record

from .worker import SUBJECTS, cases

SCRIPT = Path(__file__).resolve().parent.parent / "step.py"
POLL_SECONDS = 0.5


def run_all(record: Record, options: argparse.Namespace, arguments: list[str]) -> None:
    """Measure every subject of `options.only`; `arguments` are those of the command line."""
    end = time.monotonic() + options.seconds
    for shape, mode in SUBJECTS:
        if (shape, mode) not in options.only:
            continue
        rows = [row for row in record.rows if (row["shape"], row["mode"]) == (shape, mode) and row["status"] == OK]
        wanted = cases(options, shape, mode)
        if all(any(wanted_row.items() <= row.items() for row in rows) for wanted_row in wanted):
            continue
        print(f"{shape}, {mode}", flush=True)
        left = end - time.monotonic()
        if left <= 0:
            failure: dict[str, Any] | None = {"status": NO_TIME}
        else:
            with tempfile.TemporaryDirectory(prefix="step-") as directory:
                part = Path(directory) / "part.json"
                _seed(part, record, [row for row in rows if row["measure"] != "start"], options.dry_run)
                command = [sys.executable, str(SCRIPT), *arguments, "--worker", f"{shape}:{mode}"]
                command += ["--out", str(part), "--resume", "--seconds", str(left)]
                failure = _run(command, part, record, shape, mode, options.dry_run)
        if failure is not None:
            record.rows.append({"shape": shape, "mode": mode, "measure": "process", **failure})
            record.write()


def _run(command: list[str], part: Path, record: Record, shape: str, mode: str, dry_run: bool) -> dict[str, Any] | None:
    """None, or how the process failed. Its rows are in the record either way."""
    # A dry run's tensors are tiny: there more threads would only wait for each other.
    process = subprocess.Popen(command, env=child_environment() | ({"OMP_NUM_THREADS": "1"} if dry_run else {}))
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            _merge(part, record, shape, mode)
    finally:
        process.kill()
        process.wait()
    _merge(part, record, shape, mode)
    if process.returncode == 0:
        return None
    if process.returncode == -signal.SIGKILL:
        return {"status": OUT_OF_MEMORY, "message": "killed by the system, as it does when the host's memory runs out"}
    return {"status": FAILED, "message": f"the process ended with status {process.returncode}; its error stands above"}


def _seed(part: Path, record: Record, rows: list[dict[str, Any]], dry_run: bool) -> None:
    """A part that a process can resume from."""
    head = {"benchmark": "step", "dry_run": dry_run, "environment": {}, "earlier_environments": []}
    part.write_text(json.dumps({**head, "rows": rows}))


def _merge(part: Path, record: Record, shape: str, mode: str) -> None:
    """The subject's rows in the record become those of the part; written when something is new."""
    found = json.loads(part.read_text())["rows"]
    others = [row for row in record.rows if (row["shape"], row["mode"]) != (shape, mode)]
    if [*others, *found] != record.rows:
        record.rows = [*others, *found]
        record.write()
