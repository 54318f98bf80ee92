"""The bound as the one-pass head meets it: segment by segment, while the sums of others do not exist yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import engine
from .ops import spread


@dataclass(frozen=True)
class SegmentBound:
    """``loss = - sum_s term_s / divisor`` over the segments of B sequences with n samples each, ``shape = (B, n)``."""

    advantages: Tensor  # [B]
    old: Tensor | None  # [B, n]
    length: Tensor | None  # [B]
    clip: tuple[float, float, float]  # low, high, dual
    divisor: float  # G * (samples per sequence in the whole step)
    shape: tuple[int, int]
    backend: str

    @classmethod
    def linear(cls, slopes: Tensor, backend: str) -> SegmentBound:
        """The loss ``sum_s slopes_s * sum_s`` of any number of segments: an on-policy bound with n = 1."""
        return cls(slopes, None, None, (math.inf,) * 3, -1.0, (slopes.shape[0], 1), backend)

    def samples(self, b: int, lo: int, hi: int) -> SegmentBound:
        """Samples lo..hi-1 of sequence b alone."""
        return replace(
            self,
            advantages=self.advantages[b : b + 1],
            old=None if self.old is None else self.old[b : b + 1, lo:hi],
            length=None if self.length is None else self.length[b : b + 1],
            shape=(1, hi - lo),
        )

    @property
    def known(self) -> bool:
        """On-policy the ratio is 1 whatever the sums, so every coefficient is known before the head runs."""
        return self.old is None

    def slopes(self, first: int, last: int, sums: Tensor) -> Tensor:
        """d loss / d sum of the segments first..last-1; to the bound each is a sequence of one sample."""
        sequence = torch.arange(first, last, device=sums.device) // self.shape[1]
        old = None if self.old is None else self.old.flatten()[first:last, None].to(sums.dtype)
        length = None if self.length is None else self.length[sequence]
        if self.known:  # the sums may not be there yet
            sums = torch.zeros_like(sums)
        bound = engine("bound", self.backend).bound
        _, slope = bound(sums[:, None], self.advantages[sequence], old, length, *self.clip)
        return slope[:, 0] / -self.divisor

    def value(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (scalar, summed in fp64), log-probability sums and slopes ``[B, n]``."""
        logprob = sums.view(self.shape)
        old = None if self.old is None else self.old.to(sums.dtype)
        term, slope = engine("bound", self.backend).bound(logprob, self.advantages, old, self.length, *self.clip)
        return -(term.sum(dtype=torch.float64) / self.divisor).to(sums.dtype), logprob, slope


@dataclass(frozen=True)
class RowSegments:
    """The segments first..last-1, whose rows are begin..end-1 of all rows, and the bound over all segments."""

    offsets: Tensor  # [last - first + 1] int64, counted over all rows
    weight: Tensor  # [last - first] fp32, of a row's log-probability
    begin: int
    end: int
    first: int
    last: int
    bound: SegmentBound

    def sum_up(self, logprob: Tensor, sums: Tensor) -> None:
        """Fills ``sums`` [last - first] from the rows' ``logprob`` [end - begin]."""
        kernels = engine("bound", self.bound.backend)
        sums.copy_(kernels.segment_sum(logprob, self.offsets - self.begin, self.weight))

    def row_gradients(self, sums: Tensor) -> Tensor:
        """d loss / d log-probability of each row, from its segment's sum (not looked at when the slope is known)."""
        slope = self.bound.slopes(self.first, self.last, sums)
        return spread(slope * self.weight.to(sums.dtype), self.offsets, self.end - self.begin)
