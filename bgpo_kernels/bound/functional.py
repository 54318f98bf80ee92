"""``bgpo_loss``: BGPO's objective from per-sample log-probabilities, and the statistics worth logging."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import validation as check
from ..backends import resolve
from . import ops


class BoundStats(NamedTuple):
    """What a training run wants to see of the bound; detached fp32 scalars on the device of the log-probabilities.

    With r_bj = exp(d_bj), d_bj the log-ratio of sample j of sequence b, and G the normalizer:
    """

    mean_ratio: Tensor  #: mean of r_bj over all samples
    clipped: Tensor  #: share of samples whose gradient a clip has set to zero
    max_abs_log_ratio: Tensor  #: max |d_bj|
    bound: Tensor  #: value of the lower bound without clipping, sum_b mean_j g_bj / G
    exact: Tensor  #: value of the exact objective, sum_b A_b exp(mean_j d_bj) / G
    gap: Tensor  #: exact - bound, never negative but for rounding
    effective_sample_size: Tensor  #: mean over sequences of (sum_j r)^2 / sum_j r^2, between 1 and n


class Clip(NamedTuple):
    """Clip limits as kernels take them; an option that is off is infinite."""

    low: float = math.inf
    high: float = math.inf
    dual: float = math.inf


def make_clip(clip_range: float | tuple[float, float] | None, dual_clip: float | None) -> Clip:
    """Validated clip limits.

    Raises:
        TypeError, ValueError: ``clip_range`` not a number in [0, 1] for the lower side, not >= 0 for the upper one, or
            ``dual_clip`` not above 1.
    """
    low = high = dual = math.inf
    if clip_range is not None:
        if isinstance(clip_range, tuple | list):
            if len(clip_range) != 2:
                raise ValueError(f"clip_range must be a number or a pair (low, high), got {clip_range!r}")
            low_given, high_given = clip_range
        else:
            low_given = high_given = clip_range
        low = check.number("clip_range (low)", low_given, 0.0, high=1.0)
        high = check.number("clip_range (high)", high_given, 0.0)
    if dual_clip is not None:
        dual = check.number("dual_clip", dual_clip, 1.0, exclusive=True)
    return Clip(low, high, dual)


def bgpo_loss(
    logprob: Tensor,
    advantages: Tensor,
    *,
    old_logprob: Tensor | None = None,
    length: Tensor | None = None,
    clip_range: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, BoundStats]:
    """Loss whose gradient is that of BGPO's lower bound, linear over the MC samples.

    With ``d_bj = (logprob_bj - old_bj) / length_b`` and A_b the advantage (arXiv 2510.11683)::

        g_bj = A_b (1 + d_bj)      if A_b >= 0        loss = - sum_bj g_bj / (normalizer * n)
        g_bj = A_b exp(d_bj)       if A_b <  0

    Clipping is PPO's on the same ratio, ``1 + d`` or ``exp(d)``: for A >= 0 at most ``1 + clip_range``, for A < 0 at
    least ``1 - clip_range`` and at most ``dual_clip``; a clipped sample has zero gradient.

    Args:
        logprob: ``[B, n]`` fp32 (or fp64), weighted log-probability of each sample, e.g. ``draw.reduce(logp)``.
        advantages: ``[B]`` float, one per sequence.
        old_logprob: ``[B, n]`` of the old policy on the same masks; None means on-policy (d = 0, ratio 1).
        length: ``[B]`` positive; divides both log-probabilities (length normalisation) when given.
        clip_range: epsilon, or (low, high).
        dual_clip: cap of the ratio for negative advantages, above 1.
        normalizer: number of sequences G in the whole optimizer step, B by default.

    Returns:
        The scalar loss, differentiable by ``logprob``, and detached :class:`BoundStats`.

    Raises:
        TypeError: wrong dtypes. ValueError: shapes that disagree, non-finite advantages or old log-probabilities,
            non-positive lengths or normalizer, a clip out of range.
    """
    check_bound_inputs(check.tensor("logprob", logprob), advantages, old_logprob, length)
    clip = make_clip(clip_range, dual_clip)
    scale = check.number("normalizer", logprob.shape[0] if normalizer is None else normalizer, 0.0, exclusive=True)
    backend = resolve("auto", logprob.device)
    old = None if old_logprob is None else old_logprob.detach().to(logprob.dtype)
    advantages = advantages.float()
    term, slope = ops.bound(logprob, advantages, old, length, *clip, backend)
    loss = -(term.sum(dtype=torch.float64) / (scale * logprob.shape[1])).to(logprob.dtype)
    return loss, bound_stats(logprob.detach(), advantages, old, length, slope.detach(), scale)


def check_bound_inputs(logprob: Tensor, advantages: Tensor, old_logprob: Tensor | None, length: Tensor | None) -> None:
    """Shapes, dtypes and finiteness of what enters the bound."""
    check.dtype("logprob", logprob, torch.float32, torch.float64)
    check.shape("logprob", logprob, ("B", "n"))
    if logprob.numel() == 0:
        raise ValueError(f"logprob [B, n] must hold at least one sample, got {list(logprob.shape)}")
    check_samples(advantages, old_logprob, length, logprob.shape, "logprob", logprob)


def check_samples(
    advantages: Tensor,
    old_logprob: Tensor | None,
    length: Tensor | None,
    shape: tuple[int, int] | torch.Size,
    other_name: str,
    other: Tensor,
) -> None:
    """What the bound takes besides log-probabilities ``[B, n]``, on the device of another tensor; one read in all."""
    batch, samples = shape
    suspects = [check_advantages(advantages, batch)]
    check.same_device("advantages", advantages, other_name, other)
    if old_logprob is not None:
        check_old_logprob(old_logprob, batch, samples)
        check.same_device("old_logprob", old_logprob, other_name, other)
        suspects.append(check.non_finite("old_logprob", old_logprob))
    if length is not None:
        check.dtype("length", check.tensor("length", length), torch.int64, torch.int32, torch.float32, torch.float64)
        check.shape("length", length, (batch,), " (one per sequence)")
        check.same_device("length", length, other_name, other)
        suspects += [check.non_finite("length", length), check.not_positive("length", length)]
    check.values(*suspects)


def check_advantages(advantages: Tensor, batch: int) -> check.Suspect:
    """One float per sequence; whether all are finite is left to ``check.values``."""
    check.dtype("advantages", check.tensor("advantages", advantages), torch.float32, torch.float64, torch.bfloat16,
                torch.float16)  # fmt: skip
    check.shape("advantages", advantages, (batch,), " (one per sequence)")
    return check.non_finite("advantages", advantages)


def check_old_logprob(old_logprob: Tensor, batch: int, samples: int) -> None:
    """Shape and dtype; finiteness is the caller's, who knows which sequences take part."""
    check.dtype("old_logprob", check.tensor("old_logprob", old_logprob), torch.float32, torch.float64)
    check.shape("old_logprob", old_logprob, (batch, samples), " (one per sequence and MC sample)")


def bound_stats(
    logprob: Tensor,  # [B, n]
    advantages: Tensor,  # [B]
    old: Tensor | None,  # [B, n]
    length: Tensor | None,  # [B]
    slope: Tensor,  # [B, n]
    normalizer: float,
) -> BoundStats:
    """Statistics of one step in fp64, returned as fp32 scalars; no host sync."""
    d = torch.zeros_like(logprob) if old is None else logprob - old
    d = d.double() if length is None else d.double() / length[:, None].double()
    a = advantages.double()
    ratio = d.exp()
    bound = torch.where(a[:, None] >= 0, 1.0 + d, ratio).mean(-1) @ a / normalizer
    exact = torch.where(a == 0, 0.0, d.mean(-1).exp() * a).sum() / normalizer  # 0 times an overflow is not NaN
    relative = (d - d.amax(-1, keepdim=True)).exp()  # neither overflows nor vanishes
    ess = relative.sum(-1).square() / relative.square().sum(-1)
    active = (a != 0)[:, None].expand_as(d)
    clipped = ((slope == 0) & active).sum() / active.sum().clamp(min=1)
    largest = d.abs().amax() if d.numel() else d.new_zeros(())
    values = (ratio.mean(), clipped, largest, bound, exact, exact - bound, ess.mean())
    return BoundStats(*(v.float() for v in values))
