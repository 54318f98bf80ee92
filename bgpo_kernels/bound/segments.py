"""The bound as the one-pass head meets it: segment by segment, while the sums of others do not exist yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import engine


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

    @property
    def known(self) -> bool:
        """On-policy the ratio is 1 whatever the sums, so every coefficient is known before the head runs."""
        return self.old is None

    def coefficients(self, first: int, last: int, sums: Tensor) -> Tensor:
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
