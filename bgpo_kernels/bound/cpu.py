"""Segment sums and the bound on the compiled CPU engine: csrc/cpu/segments.cpp over csrc/bgpo/bound.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu
from ..native import address, dense


def segment_sum(values: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """As ``reference.segment_sum``."""
    values, offsets = values.contiguous(), offsets.contiguous()
    weight = weight.to(torch.float32).contiguous()
    out = torch.empty(weight.shape[0], dtype=values.dtype)
    call = _cpu.segment_sum_f64 if values.dtype == torch.float64 else _cpu.segment_sum_f32
    call(address(values), address(offsets), address(weight), weight.shape[0], address(out))
    return out


def bound(
    logprob: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    length: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """As ``reference.bound``."""
    logprob = logprob.contiguous()
    advantages = advantages.to(logprob.dtype).contiguous()
    old, length = dense(old, logprob.dtype), dense(length, torch.float32)
    term, slope = torch.empty_like(logprob), torch.empty_like(logprob)
    call = _cpu.bound_f64 if logprob.dtype == torch.float64 else _cpu.bound_f32
    call(
        address(logprob), address(advantages), address(old), address(length), *logprob.shape,
        clip_low, clip_high, dual_clip, address(term), address(slope),
    )  # fmt: skip
    return term, slope
