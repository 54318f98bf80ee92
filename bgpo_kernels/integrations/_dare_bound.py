"""What DARE's BGPO update makes of its tensors per token: one number per sequence, and metrics. See ``dare.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation as check


def weights(masked: Tensor, share: Tensor) -> Tensor:
    """``[B, n]``, 1 / share of the masked tokens, which must agree within a sample."""
    highest = share.masked_fill(~masked, 0.0).amax(-1)
    lowest = share.masked_fill(~masked, torch.inf).amin(-1)
    differs = (highest != lowest) & masked.any(-1)
    if bool(differs.any()):
        at = differs.nonzero()[:4].tolist()
        raise ValueError(f"p_mask varies among the masked tokens of (sequence, sample) {at}; bgpo_update needs one")
    return torch.where(highest > 0, 1 / highest, 0.0)


def per_sequence(advantages: Tensor, counted: Tensor) -> Tensor:
    """``[B]`` fp32 from ``[B, R]``, which must agree within a sequence."""
    check.shape("advantages", advantages, tuple(counted.shape), " (as responses)")
    first = counted.int().argmax(-1, keepdim=True)
    own = advantages.gather(1, first)
    stray = (advantages != own) & counted
    if bool(stray.any()):
        raise ValueError(
            f"advantages vary within sequence(s) {stray.any(-1).nonzero()[:8, 0].tolist()}: BGPO has one per sequence"
        )
    return own[:, 0].float()


def aggregation(counted: Tensor, mode: str) -> Tensor:
    """Weights ``[B]`` of the sequences in verl's ``agg_loss`` of a loss that is constant within each."""
    tokens = counted.sum(-1)
    weights = {
        "token-mean": tokens / tokens.sum(),
        "seq-mean-token-sum": tokens / tokens.shape[0],
        "seq-mean-token-mean": torch.full_like(tokens, 1 / tokens.shape[0]),
        "seq-mean-token-sum-norm": tokens / counted.shape[1],
    }
    if mode not in weights:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(weights)}; got {mode!r}")
    return weights[mode]


def metrics(
    loss: Tensor, d: Tensor, advantages: Tensor, counted: Tensor, clip: tuple[float, float, float]
) -> dict[str, float]:
    """As ``compute_policy_loss_bgpo`` reports them; one read from the device."""
    low, high, dual = clip
    a = advantages[:, None].to(d.dtype)
    ratio = torch.where(a > 0, 1 + d, d.exp())
    plain, clipped = -a * ratio, -a * ratio.clamp(1 - low, 1 + high)
    share = (counted.sum(-1) / counted.sum()).to(d.dtype)  # verl's masked_mean of what is constant within a sequence

    def mean(values: Tensor) -> Tensor:
        return (share @ values.to(d.dtype)).mean()

    found = torch.stack([
        loss.to(d.dtype), mean(clipped > plain), mean(-d),
        mean((torch.maximum(plain, clipped) > -a * dual) & (a < 0)),
    ])  # fmt: skip
    names = ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, found.tolist(), strict=True))
