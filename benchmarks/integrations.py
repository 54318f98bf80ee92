"""Every integration beside the plain computation of the trainer it serves: equality, memory and time.

    python benchmarks/integrations.py                       all trainers, on the CPU, a few minutes
    python benchmarks/integrations.py --only d1 espo        some of them
    python benchmarks/integrations.py --size tiny           every line of code in seconds; its figures mean nothing

For each trainer one process builds a small LLaDA-shaped model with LLaDA's vocabulary, computes one update's
log-probabilities and their gradient the trainer's way and through bgpo_kernels on the same masks, and compares. The
exit status is 1 when any pair differs by more than rounding or a process fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import child_environment

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _integrations.case import SIZES
from _integrations.report import FAILED, print_table, write_json, write_pages
from _integrations.worker import OK, trainers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen trainers, print the table, write the record."""
    options = _parse(arguments)
    rows: list[dict[str, Any]] = []
    for name in options.only:
        print(f"{name} ...", end=" ", flush=True)
        row = _in_a_process(name, options)
        print(row["status"], flush=True)
        rows.append(row)
        if options.out is not None:
            write_json(options.out, rows, options.size)
    print_table(rows)
    if options.pages:
        write_pages(rows)
    return 1 if any(row["status"] != OK for row in rows) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = trainers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="TRAINER", help=", ".join(known))
    parser.add_argument("--size", choices=list(SIZES), default="small", help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each way, interleaved [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write [none]")
    parser.add_argument("--pages", action="store_true", help="put the figures into docs/integrations")
    options = parser.parse_args(arguments)
    if options.pages and (options.out is None or options.size != "small"):
        parser.error("--pages needs --out and --size small: the pages show figures of a record")
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: {options.out.absolute().parent} is not a directory")
    return options


def _in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one trainer, measured in a fresh process; a failure of it is a row, too."""
    with tempfile.TemporaryDirectory(prefix="integrations-") as directory:
        result = Path(directory) / "row.json"
        command = [sys.executable, "-m", "_integrations.worker", name, options.size, str(options.rounds), str(result)]
        ran = subprocess.run(
            command,
            check=False,
            env=child_environment(),
            cwd=Path(__file__).resolve().parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        if ran.returncode == 0:
            return json.loads(result.read_text())
    sys.stderr.write(ran.stderr)
    last = ran.stderr.strip().split("\n")[-1] if ran.stderr.strip() else f"exit status {ran.returncode}"
    return {"trainer": name, "status": FAILED, "message": last}


if __name__ == "__main__":
    sys.exit(main())
