"""BGPO's per-sample bound in plain torch: the specification.

With d_j = (ell_j - ell_old_j) / length and A the advantage of the sequence (arXiv 2510.11683, the lower bound):

    A >= 0:  term_j = A * min(1 + d_j, 1 + clip_high)                            from e^x >= 1 + x
    A <  0:  term_j = A * min(max(exp(d_j), 1 - clip_low), dual_clip)            from Jensen: e^(mean d) <= mean e^d
    slope_j = d term_j / d ell_j                                                 0 where a clip is active

and the loss is ``-sum(term) / (normalizer * n)``. A clip that is off is infinite. ``1 + d`` is computed as such: the
``exp(log(1 + d))`` of public code is NaN for d <= -1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(
    values: Tensor,  # [N] fp32 or fp64
    offsets: Tensor,  # [S+1] int64
    weight: Tensor,  # [S] fp32
) -> Tensor:
    """``weight_s * sum(values[offsets_s : offsets_s+1])`` -> [S], accumulated in fp64 in row order, rounded once."""
    count = (offsets[1:] - offsets[:-1]).cpu()
    segment = torch.repeat_interleave(torch.arange(len(count)), count).to(values.device)
    sums = torch.zeros(len(count), dtype=torch.float64, device=values.device)
    sums.index_add_(0, segment, values.double())
    return (weight.double() * sums).to(values.dtype)


def bound(
    logprob: Tensor,  # [B, n]
    advantages: Tensor,  # [B]
    old: Tensor | None,  # [B, n]
    length: Tensor | None,  # [B]
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """Bound term of each sample and its derivative with respect to ``logprob``: two ``[B, n]``."""
    advantage = advantages[:, None].to(logprob.dtype)
    scale = 1.0 if length is None else length[:, None].to(logprob.dtype)
    d = (logprob - (logprob.detach() if old is None else old)) / scale  # on-policy: 0 with the gradient of logprob
    linear = 1.0 + d
    ratio = torch.exp(d)
    positive = advantage >= 0
    term = advantage * torch.where(
        positive, linear.clamp(max=1.0 + clip_high), ratio.clamp(min=1.0 - clip_low).clamp(max=dual_clip)
    )
    outside = torch.where(positive, linear > 1.0 + clip_high, (ratio < 1.0 - clip_low) | (ratio > dual_clip))
    slope = torch.where(outside, 0.0, advantage * torch.where(positive, torch.ones_like(ratio), ratio) / scale)
    return term, slope
