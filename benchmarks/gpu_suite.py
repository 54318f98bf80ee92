"""Everything that needs a GPU, verified and measured by one command in under ten minutes.

    python benchmarks/gpu_suite.py --out DIR                  # all parts
    python benchmarks/gpu_suite.py --out DIR --resume         # go on: what failed or did not finish
    python benchmarks/gpu_suite.py --out DIR --only head,step
    python benchmarks/gpu_suite.py --out DIR --dry-run        # every part with tiny shapes, on a CPU; no figures
    python benchmarks/gpu_suite.py --report DIR [--markdown]  # the table again, from the files alone

Parts, in order of worth: build (the compiled engines), tests (`pytest -m gpu`), sanitizer (compute-sanitizer), mask,
head, step, main (memory against n_mc). Each is a process with a limit of its own; one that fails, crashes or hangs
stops no other, and costs the row at work alone. DIR gets <part>.json, <part>.log and plots, suite.json and table.md.

CUDA_VISIBLE_DEVICES chooses the GPU. Exit status: 0 all finished well, 1 something failed or did not finish, 2 a
mistake in the options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _gpu_suite import table
from _gpu_suite.parts import Part, parts
from _gpu_suite.process import Stopped, stopped_by_signals
from _gpu_suite.suite import Plan, Refused, Suite, probe

SECONDS, DRY_SECONDS = 570.0, 3600.0  # a CPU takes longer for tiny shapes than a GPU for real ones
NAMES = tuple(part.name for part in parts())


def main(arguments: Sequence[str] | None = None, stand_ins: Sequence[Part] | None = None) -> int:
    """Run or report; `stand_ins` take the place of the parts in tests."""
    begin = time.monotonic()
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if given.report is not None:
            print(table.markdown(given.report) if given.markdown else table.text(given.report))
            return 0
        return _run(_plan(given, parts(given.build) if stand_ins is None else stand_ins), begin)
    except Refused as reason:
        parser.error(str(reason))


def _parser() -> argparse.ArgumentParser:
    summary, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go; made if it is not there")
    parser.add_argument("--only", metavar="LIST", help=f"parts to run, of {','.join(NAMES)} [all]")
    parser.add_argument("--skip", metavar="LIST", help="parts to leave out [none]")
    parser.add_argument("--resume", action="store_true", help="keep the finished parts of DIR, run the others again")
    parser.add_argument("--force", action="store_true", help="with --resume: also on another commit or device")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; on the CPU where there is no GPU")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"for everything [{SECONDS:.0f}; dry run {DRY_SECONDS:.0f}]"
    )
    parser.add_argument("--build", action="store_true", help="compile the engines first, into this Python")
    parser.add_argument("--report", type=Path, metavar="DIR", help="print the table of DIR; runs nothing")
    parser.add_argument("--markdown", action="store_true", help="with --report: as markdown")
    return parser


def _plan(given: argparse.Namespace, known: Sequence[Part]) -> Plan:
    """The checked plan; `Refused` where the options contradict each other."""
    if given.out is None:
        raise Refused("--out DIR (or --report DIR) is needed")
    if given.out.exists() and not given.out.is_dir():
        raise Refused(f"--out: {given.out} is not a directory")
    seconds = given.seconds if given.seconds is not None else DRY_SECONDS if given.dry_run else SECONDS
    if not 0 < seconds < float("inf"):
        raise Refused("--seconds must be a positive number")
    if given.force and not given.resume:
        raise Refused("--force belongs to --resume")
    if given.markdown:
        raise Refused("--markdown belongs to --report")
    names = [part.name for part in known]
    only, skip = (_names(option, getattr(given, option), names) for option in ("only", "skip"))
    chosen = [part for part in known if (not only or part.name in only) and part.name not in skip]
    if not chosen:
        raise Refused("--only and --skip leave nothing to run")
    return Plan(given.out.absolute(), chosen, seconds, given.dry_run, given.resume, given.force)


def _names(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise Refused(f"--{option}: {', '.join(map(repr, unknown))} is none of {', '.join(known)}")
    return names


def _run(plan: Plan, begin: float) -> int:
    suite = Suite(plan, probe(plan.dry_run), begin)
    finished = False
    with stopped_by_signals():
        try:
            finished = suite.run()
        except Stopped as reason:
            print(f"\n{reason}: stopped; --resume goes on from here", flush=True)
    (plan.out / "table.md").write_text(table.markdown(plan.out))
    print(f"\n{table.text(plan.out)}\n{time.monotonic() - begin:.0f} s in all; results are in {plan.out}", flush=True)
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
