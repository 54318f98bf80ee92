"""Cases for the kernel that makes dlogits from the bound: a chunk from the middle of a batch, against the reference."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bgpo_kernels.bound.segments import RowSegments, SegmentBound
from bgpo_kernels.head import reference
from bgpo_kernels.head.options import LogitTransform

OPEN, CLIPPED = (math.inf,) * 3, (0.2, 0.3, 3.0)
BATCH, SAMPLES, FIRST, BEGIN = 5, 3, 4, 7  # the chunk's first segment is the 4th of all, its first row the 7th
COUNTS = [3, 0, 300, 1, 0, 40, 2, 0, 5]  # rows of the chunk's segments


class Outcome(NamedTuple):
    dlogits: Tensor  # [C, V]
    grad: Tensor  # [C]
    sums: Tensor  # [segments]


class Case(NamedTuple):
    logits: Tensor  # [C, V] fp64
    targets: Tensor
    transform: LogitTransform
    offsets: Tensor
    weight: Tensor
    advantages: Tensor
    old: Tensor | None  # [B, n] fp64
    length: Tensor | None
    clip: tuple[float, float, float]

    def run(self, head: ModuleType, backend: str, logits: torch.dtype, out: torch.dtype, device: object) -> Outcome:
        """Statistics and the kernel on one backend's module; rows are 16-byte aligned, and ragged ones too."""
        acc = torch.float64 if logits == torch.float64 else torch.float32
        rows, vocab = self.logits.shape
        padded = torch.full((rows, vocab + (-vocab) % 8), torch.nan, dtype=logits, device=device)
        chunk = padded[:, :vocab].copy_(self.logits)
        targets, stats = self.targets.to(device), torch.empty(4, rows + 3, dtype=acc, device=device)[:, 2 : rows + 2]
        head.row_statistics(chunk, targets, None, self.transform, stats, False)
        old, length = (None if t is None else t.to(device) for t in (self.old, self.length))
        bound = SegmentBound(
            self.advantages.to(device), None if old is None else old.to(acc), length, self.clip, 24.0,
            (BATCH, SAMPLES), backend,
        )  # fmt: skip
        segments = RowSegments(
            self.offsets.to(device), self.weight.to(device), BEGIN, BEGIN + rows, FIRST, FIRST + len(COUNTS), bound
        )
        sums = torch.zeros(len(COUNTS), dtype=acc, device=device)
        dlogits, grad = head.bound_dlogits_(chunk, targets, None, self.transform, stats, segments, sums, out)
        assert dlogits.dtype == out and dlogits.data_ptr() == chunk.data_ptr()
        return Outcome(*(t.detach().cpu().clone() for t in (dlogits, grad, sums)))

    def exact(self) -> Outcome:
        """In fp64."""
        return self.run(reference, "reference", torch.float64, torch.float64, "cpu")


def make_case(vocab: int, old: bool, clip: tuple[float, float, float], transform: LogitTransform) -> Case:
    """Advantages of both signs and one 0; ratios around 1, some beyond every clip."""
    generator = torch.Generator().manual_seed(11)
    rows = sum(COUNTS)
    logits = torch.randn(rows, vocab, dtype=torch.float64, generator=generator).bfloat16().double() * 2
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    offsets = torch.tensor([0, *COUNTS]).cumsum(0) + BEGIN
    weight = torch.rand(len(COUNTS), generator=generator) + 0.5
    advantages = torch.tensor([0.5, 1.5, -0.75, 0.0, -2.0])
    length = torch.tensor([2.0, 3.0, 40.0, 5.0, 6.0])
    case = Case(logits, targets, transform, offsets, weight, advantages, None, length, clip)
    if not old:
        return case
    sums = torch.zeros(BATCH * SAMPLES, dtype=torch.float64)
    sums[FIRST : FIRST + len(COUNTS)] = case.exact().sums
    shift = torch.tensor([-0.1, 0.15, -0.4, 0.4, -1.5])[torch.arange(BATCH * SAMPLES) % 5]
    d = (shift * length.repeat_interleave(SAMPLES)).double()
    return case._replace(old=(sums - d).view(BATCH, SAMPLES))


def assert_right(got: Outcome, case: Case) -> None:
    """Within the rounding of the dtype it was computed in, of the exact result."""
    want = case.exact()
    acc = got.sums.dtype
    eps = torch.finfo(acc).eps
    torch.testing.assert_close(got.sums.double(), want.sums, rtol=300 * eps, atol=0)
    # exp(d) turns the absolute error of d, that of a sum of hundreds over a length, into a relative one
    torch.testing.assert_close(got.grad.double(), want.grad, rtol=1000 * eps, atol=0)
    narrow = torch.finfo(got.dlogits.dtype).eps
    scale = want.grad.abs().max().item()
    torch.testing.assert_close(got.dlogits.double(), want.dlogits, rtol=narrow + 1000 * eps, atol=200 * eps * scale)
    dead = want.grad == 0
    assert dead.any() and (got.dlogits[dead] == 0).all()
