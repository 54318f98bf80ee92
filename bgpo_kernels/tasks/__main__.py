"""`python -m bgpo_kernels.tasks`: write problems with scored candidate responses to a JSON-lines file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bgpo_kernels.tasks import SPLITS, TASKS, scored_candidates, write_records


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (default: the command line), write the file and say what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m bgpo_kernels.tasks",
        description="Write planning problems with scored candidate responses, one JSON object per line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", choices=sorted(TASKS), required=True, help="the family of problems")
    parser.add_argument("--count", type=_positive, default=8, help="number of problems")
    parser.add_argument("--candidates", type=_positive, default=4, help="responses per problem; some right, some wrong")
    parser.add_argument("--split", choices=SPLITS, default="train", help="training or held-out problems")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same file")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write (replaced if it exists)")
    options = parser.parse_args(arguments)
    records = scored_candidates(TASKS[options.task], options.count, options.candidates, options.seed, options.split)
    try:
        written = write_records(options.out, records)
    except OSError as error:
        parser.error(f"cannot write {options.out}: {error.strerror}")
    print(f"{options.out}: {options.count} {options.task} problems, {written} scored responses")
    return 0


if __name__ == "__main__":
    sys.exit(main())
