"""The vocabulary head on a GPU: fraction of the bare GEMMs' rate, memory, errors, against what others offer.

    python benchmarks/head.py --out head.json              # LLaDA's and Dream's heads, the most telling cases first
    python benchmarks/head.py --plot head.json head.png    # bars, from that file
    python benchmarks/head.py --dry-run                    # every line of it with tiny shapes, on a CPU

A case is a head, a number of masked rows and a mode: "trained" (loss, d hidden, d weight; 6NHV FLOPs), "frozen" (no
d weight; 4NHV), "forward" (log-probabilities; 2NHV). Its variants are the products alone (the ceiling), bgpo_kernels
with several workspaces, and plain torch and other libraries where they are installed. All of them are first compared
with fp64 and then timed interleaved. In the cases with "full" rows the others get what their users give them, every
position of prompt and response, four times as many.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _head.case import run_case
from _head.problem import NHV, Size
from _head.report import lines
from _head.variants import catalogue, families
from _measure import GIB, KIB, MIB
from _script import Record, make_parser, parse

HEADS = {"llada": (4096, 126464), "dream": (3584, 152064)}
TINY_HEADS = {"llada": (64, 1000), "dream": (48, 1003)}  # one that no tile divides
ROWS, TINY_ROWS = (4096, 1024, 16384), (64, 32, 96)  # the most telling first
RESPONSE, TINY_RESPONSE = 512, 16
WORKSPACES, TINY_WORKSPACES = (GIB, 4 * GIB), (128 * KIB, MIB)
SMALL_WORKSPACE, TINY_SMALL_WORKSPACE = 64 * MIB, 64 * KIB  # at the first number of rows only
COLUMNS = ("masked", "full")
CASE_SECONDS, SHARES = 15.0, 20
_UNITS = {"": 1, "kib": KIB, "mib": MIB, "gib": GIB}


def byte_size(text: str) -> int:
    """Bytes of "64MiB", "1GiB" or a plain number."""
    found = re.fullmatch(r"(\d+)\s*([kmg]ib|)", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 64MiB, 1GiB or bytes")
    return int(found[1]) * _UNITS[found[2]]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed and checked options, defaults filled in."""
    parser = make_parser(*(__doc__ or "").split("\n\n", 1))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="[both]")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="masked rows [4096 1024 16384]")
    parser.add_argument("--modes", nargs="+", choices=NHV, default=list(NHV), help="[all]")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS),
                        help="what peers get; full: all positions, at the first two --rows only [both]")  # fmt: skip
    parser.add_argument("--variants", nargs="+", metavar="FAMILY", help="beside the bare GEMMs [all]; a wrong name "
                        "lists them")  # fmt: skip
    parser.add_argument("--workspaces", nargs="+", type=byte_size, metavar="SIZE",
                        help="the default one first [1GiB 4GiB, and 64MiB at the first number of rows]")  # fmt: skip
    parser.add_argument("--case-seconds", type=float, metavar="S", help="fewer rounds (but 10) where a case would be "
                        f"timed for longer [{CASE_SECONDS:g}, or a {SHARES}th of --seconds]")  # fmt: skip
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("FILE", "PNG"), help="draw a record; measures nothing")
    given = parser.parse_args(arguments)
    if given.plot is not None:
        return given
    given = parse(parser, arguments)
    tiny = given.dry_run
    given.sizes = TINY_HEADS if tiny else HEADS
    given.response = TINY_RESPONSE if tiny else RESPONSE
    given.rows = given.rows or list(TINY_ROWS if tiny else ROWS)
    if given.case_seconds is None:
        given.case_seconds = min(CASE_SECONDS, given.seconds / SHARES)
    if given.case_seconds <= 0:
        parser.error("--case-seconds must be positive")
    for rows in given.rows:
        if rows < given.response or rows % given.response:
            parser.error(f"--rows: {rows} is not a multiple of {given.response}, the tokens of a response")
    given.small = () if given.workspaces else (TINY_SMALL_WORKSPACE if tiny else SMALL_WORKSPACE,)
    given.workspaces = given.workspaces or list(TINY_WORKSPACES if tiny else WORKSPACES)
    known = families(given.device)
    if given.variants is not None and (unknown := [name for name in given.variants if name not in known]):
        parser.error(f"--variants: no {', '.join(unknown)} here; there are {', '.join(known)}")
    return given


def cases(given: argparse.Namespace) -> list[tuple[Size, bool]]:
    """Sizes and whether peers get all positions, the most telling first."""
    found = [
        (_turn(place, column == "full", mode), Size(head, *given.sizes[head], rows, given.response, mode))
        for place, rows in enumerate(given.rows)
        for column in COLUMNS
        if column in given.columns and not (column == "full" and place > 1)
        for mode in NHV
        if mode in given.modes
        for head in HEADS
        if head in given.heads
    ]
    return [(size, turn in FULL_TURNS) for turn, size in sorted(found, key=lambda case: case[0])]


FULL_TURNS = (1, 3)


def _turn(place: int, full: bool, mode: str) -> int:
    """When a case comes, by the place of its rows in --rows: the first with peers on them, what a training step costs
    peers on all positions, the second, the rest of all positions, further rows."""
    if full:
        return 1 if place == 0 and mode == "trained" else 3
    return {0: 0, 1: 2}.get(place, 4)


def measure(record: Record, given: argparse.Namespace, size: Size, full: bool) -> dict[str, Any]:
    """The row of one case, measured now or taken from the record."""
    first = given.rows[0] == size.N
    workspaces = [*given.workspaces, *(given.small if first else ())]
    # torch.compile takes seconds for every shape: by default only where it tells most, and where shapes are real.
    compiled = (first and not full and not given.dry_run) or "torch-compile" in (given.variants or ())
    case = {
        "head": size.head, "H": size.H, "V": size.V, "N": size.N, "mode": size.mode, "rows": COLUMNS[full],
        "workspaces": workspaces[:1] if full else workspaces, "families": given.variants or "all",
    }  # fmt: skip
    name = f"{size.head} N={size.N} {size.mode} {COLUMNS[full]}"

    def run() -> dict[str, Any]:
        chosen = catalogue(given.device, workspaces, full, compiled, given.variants)
        if given.device.type == "cpu":  # Triton's interpreter takes a second a call: enough of it in a few cases
            chosen = [v for v in chosen if v.family != "ours-triton" or (first and v.workspace == workspaces[0])]
        return run_case(size, chosen, given.device, given.rounds, given.case_seconds, lambda text: say(name, text))

    return record.measure(case, run)


def say(case: str, text: str) -> None:
    """Progress, apart from the table."""
    print(f"[{case}] {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for; the exit status is 1 if something of ours failed or was wrong."""
    given = options(arguments)
    if given.plot is not None:
        from _head.plot import draw  # matplotlib is only needed here

        try:
            draw(*given.plot)
        except (OSError, ValueError, KeyError) as error:
            print(f"head: --plot: {error}", file=sys.stderr)
            return 2
        return 0
    try:
        record = Record("head", given)
    except (OSError, ValueError, KeyError) as error:
        print(f"head: --resume: {error}", file=sys.stderr)
        return 2
    if given.dry_run:
        print("dry run: tiny shapes, numbers mean nothing")
        torch.set_num_threads(1)  # more would only wait for each other
    for size, full in cases(given):
        print("\n".join(lines(measure(record, given, size, full))), flush=True)
        print()
    record.write()
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
