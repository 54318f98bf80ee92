"""A whole policy update on LLaDA-8B's and Dream-7B's shapes: `python benchmarks/step.py --out FILE`.

Random weights in bf16, sequences of 1,024 tokens of which 512 are response. For each model and way to train it (LoRA,
every parameter with and without gradient checkpointing), in a process of its own:

* Monte Carlo samples per second of `bgpo_backward`, interleaved with the plain update that public code does
  (`_step/plain.py`: target at least 1.5 times it) and with the same without its pass for the old policy;
* peak memory and throughput at every n_mc, the peak with one sample at a time (target: above weights and gradients at
  most 1 % more at the most samples than at the fewest);
* model FLOPs (`_step/flops.py`) against the rate of the bare matrix products on the same shapes in the same run;
* whether a whole optimizer step of the 8B model with an 8-bit AdamW fits 80 GiB.

Out of memory is a result. The most valuable cases come first; `--seconds` ends the run early and `--resume` goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _measure import environment
from _script import Record, make_parser, parse
from _step.processes import run_all
from _step.report import print_report
from _step.worker import SUBJECTS, Worker

NAMES = [f"{shape}:{mode}" for shape, mode in SUBJECTS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a case failed otherwise than by a lack of memory, time or an optional library."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(arguments)
    record = Record("step", options)
    if options.worker is not None:
        Worker(options, *_subject(options.worker)).run(record)
        return 0  # the rows say what failed
    run_all(record, options, arguments)
    record.write()
    if options.dry_run:
        print("dry run: the figures below mean nothing")
    print_report(record.rows)
    if options.plot is not None:
        _plot(record, options)
    return int(record.failed)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__.split("\n")[0], __doc__.split("\n", 2)[2])
    parser.set_defaults(rounds=3)
    parser.add_argument("--only", metavar="LIST", help=f"models and modes, of {', '.join(NAMES)} [all]")
    parser.add_argument("--sequences", type=int, default=2, help="of an update [%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of a sequence [%(default)s]")
    parser.add_argument("--response-tokens", type=int, default=512, help="of a sequence [%(default)s]")
    parser.add_argument("--n-mc", default="1,4,16,64", metavar="LIST", help="Monte Carlo samples [%(default)s]")
    parser.add_argument("--plain-n-mc", type=int, default=4, help="where the plain update runs beside [%(default)s]")
    parser.add_argument("--micro-batch-tokens", type=int, help="of throughput [as the package chooses]")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG to write [none]")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # measure this one here, in this process
    options = parse(parser, arguments)
    names = NAMES if options.only is None else [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"--only: {', '.join(map(repr, unknown))} is none of {', '.join(NAMES)}")
    options.only = [_subject(name) for name in names]
    counts = options.n_mc.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        parser.error(f"--n-mc: expected whole numbers of at least 1 with commas between, got {options.n_mc!r}")
    options.n_mc = [1, 2] if options.dry_run else sorted({int(count) for count in counts})
    for name in ("sequences", "prompt_tokens", "response_tokens", "plain_n_mc"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.micro_batch_tokens is not None and options.micro_batch_tokens < 1:
        parser.error("--micro-batch-tokens must be at least 1")
    if options.plot is not None and not options.plot.absolute().parent.is_dir():
        parser.error(f"--plot: {options.plot.absolute().parent} is not a directory")
    return options


def _subject(name: str) -> tuple[str, str]:
    shape, _, mode = name.partition(":")
    return shape, mode


def _plot(record: Record, options: argparse.Namespace) -> None:
    from _step.plot import draw  # matplotlib is only needed here

    document = {"rows": record.rows, "environment": environment(options.device), "dry_run": options.dry_run}
    if draw(document, options.plot):
        print(f"wrote {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
