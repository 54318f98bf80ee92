"""What the head should cost on a GPU, by counting: `python benchmarks/predict.py --tflops R --terabytes B`.

A model without a fitted number, to be held against measurements. Give it the two rates measured in the same run as the
times it is compared with: what the vendor's GEMM reaches at these shapes, and what a copy moves (bytes read + written).
Nothing overlaps in it, except that a GEMM's own operands come for free; so it should err on the slow side.

    forward    per panel of 512 rows       2 P H V FLOPs
    statistics per chunk of C rows         4 C V bytes                             fp32 logits read
    dlogits                                6 C V bytes                             read, and written as bf16
    dX                                     2 C H V FLOPs
    dW         (trained head only)         2 C H V FLOPs, 8 V H bytes              fp32 sum read, written (4 at first)

Chunks hold what the workspace holds in whole panels. `fraction` is the time of the bare GEMMs over all rows, without
padding, over the predicted time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PANEL = 512
HEADS = {"LLaDA": (4096, 126464), "Dream": (3584, 152064)}
ROWS = (1024, 4096, 16384)
GIB = 1 << 30


@dataclass(frozen=True)
class Rates:
    """Of one device, in units per second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """N rows against a head."""

    rows: int
    width: int
    vocab: int
    mode: str  # "trained", "frozen" or "forward"
    workspace: int  # bytes

    @property
    def gemms(self) -> int:
        """Products that nobody can avoid."""
        return {"trained": 3, "frozen": 2, "forward": 1}[self.mode]

    @property
    def _capacity(self) -> int:
        return max(1, self.workspace // (4 * self.vocab))

    @property
    def panel(self) -> int:
        """Rows of a forward product."""
        return min(PANEL, 1 << (self._capacity.bit_length() - 1))

    @property
    def chunks(self) -> list[int]:
        """Rows of every chunk, on-policy: full but the last."""
        capacity = self._capacity - self._capacity % self.panel
        return [min(capacity, self.rows - begin) for begin in range(0, self.rows, capacity)]

    def bare(self, rates: Rates) -> float:
        """Seconds of the products alone."""
        return self.gemms * self._product(self.rows) / rates.flops

    def seconds(self, rates: Rates) -> float:
        """Predicted seconds of the whole call."""
        return sum(self._chunk(rows, index == 0, rates) for index, rows in enumerate(self.chunks))

    def _product(self, rows: int) -> float:
        return 2.0 * rows * self.width * self.vocab

    def _chunk(self, rows: int, first: bool, rates: Rates) -> float:
        padded = math.ceil(rows / self.panel) * self.panel
        flops, moved = self._product(padded), 4.0 * rows * self.vocab
        if self.mode != "forward":
            flops, moved = flops + self._product(rows), moved + 6.0 * rows * self.vocab
        if self.mode == "trained":
            flops, moved = flops + self._product(rows), moved + (4.0 if first else 8.0) * self.vocab * self.width
        return flops / rates.flops + moved / rates.bytes


def table(rates: Rates, workspaces: Sequence[int] = (GIB, 4 * GIB)) -> Iterator[str]:
    """Markdown, one line per head, number of rows and mode."""
    sizes = [f"{size / GIB:g} GiB" for size in workspaces]
    yield f"| head | N | mode | bare GEMMs, ms | {' | '.join(f'{s}: ms | fraction' for s in sizes)} |"
    yield "|---" * (4 + 2 * len(sizes)) + "|"
    for name, (width, vocab) in HEADS.items():
        for rows in ROWS:
            for mode in ("trained", "frozen", "forward"):
                cases = [Case(rows, width, vocab, mode, size) for size in workspaces]
                bare = cases[0].bare(rates)
                cells = [f"{case.seconds(rates) * 1e3:.2f} | {bare / case.seconds(rates):.2f}" for case in cases]
                yield f"| {name} | {rows} | {mode} | {bare * 1e3:.2f} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table for given rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, required=True, help="bf16 GEMM rate, 10^12 FLOP/s, as measured")
    parser.add_argument("--terabytes", type=float, required=True, help="memory rate, 10^12 bytes/s, as measured")
    given = parser.parse_args(arguments)
    if given.tflops <= 0 or given.terabytes <= 0:
        parser.error("both rates must be positive")
    print("\n".join(table(Rates(given.tflops * 1e12, given.terabytes * 1e12))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
