"""The main job: what does a policy update cost as the number of Monte Carlo samples grows?

    python benchmarks/memory_vs_mc.py            # on this machine's CPU, under 5 minutes and 8 GiB on two cores
    python benchmarks/memory_vs_mc.py --help

Sweeps n_mc and compares the exact ELBO objective with all graphs kept (VRPO-OL), BGPO through this package, the exact
objective by replay, and BGPO written plainly. What is measured, and how, is in `benchmarks/README.md`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _memory_vs_mc.data import Tokens, load_tokens
from _memory_vs_mc.methods import METHODS
from _memory_vs_mc.options import Options, parse
from _memory_vs_mc.report import print_report, write_csv, write_json
from _memory_vs_mc.sweep import FAILED, OK, Point, PointFailed, sweep
from rich.console import Console
from tqdm import tqdm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status: 0, 1 when a point failed, 2 for a mistake in options or data."""
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width of its own: keep the table in one piece
    with tempfile.TemporaryDirectory(prefix="memory_vs_mc-") as directory:
        workdir = Path(directory)
        try:
            tokens = load_tokens(options, workdir)
        except (OSError, ValueError) as error:
            print(f"memory_vs_mc: {error}", file=sys.stderr)
            return 2
        console.print(_setting(options, tokens), highlight=False, soft_wrap=True)
        try:
            points = _measured(options, tokens, workdir)
        except PointFailed as error:
            print(f"memory_vs_mc: {error}", file=sys.stderr)
            return 1
    print_report(points, tokens, options, console)
    failed = [point for point in points if point.status == FAILED]
    for point in failed:
        which = f"{METHODS[point.method].title} at n_mc = {point.n_mc}"
        print(f"memory_vs_mc: {which} failed:\n{point.message}", file=sys.stderr)
    if options.json is not None:
        write_json(options.json, points, tokens, options)
    if options.csv is not None:
        write_csv(options.csv, points, tokens)
    plots = options.plot is not None and any(point.status == OK for point in points)
    if plots:
        from _memory_vs_mc.plot import draw  # matplotlib is only needed here

        draw(points, options, _setting(options, tokens), options.plot)
    for path in filter(None, (options.json, options.csv, options.plot if plots else None)):
        console.print(f"wrote {path}", highlight=False)
    return 1 if failed else 0


def _measured(options: Options, tokens: Tokens, workdir: Path) -> list[Point]:
    with tqdm(total=len(options.methods) * len(options.n_mc), unit="point", dynamic_ncols=True) as bar:
        so_far: list[Point] = []

        def report(point: Point) -> None:
            so_far.append(point)
            so_far.sort(key=lambda point: point.n_mc)
            if options.json is not None:  # a kill loses no finished point
                write_json(options.json, so_far, tokens, options)
            bar.set_postfix_str(f"{METHODS[point.method].title}, n_mc {point.n_mc}: {point.status}")
            bar.update()

        return sweep(options, tokens, workdir, report)


def _setting(options: Options, tokens: Tokens) -> str:
    lengths = sorted(set(tokens.attention_mask.sum(axis=1).tolist()))
    width = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    model = f"checkpoint {options.model.name}" if options.model else f"random {options.shape} model"
    return (
        f"{model}, {options.dtype} on {options.device}; {len(tokens.input_ids)} sequences of {width} tokens, "
        f"{options.response_tokens} of them response; one Monte Carlo sample at a time"
    )


if __name__ == "__main__":
    sys.exit(main())
