"""Segment sums and the bound on the CUDA kernels: csrc/cuda/segments.cu over csrc/bgpo/bound.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda
from ..native import address, dense, stream


def segment_sum(values: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """As ``reference.segment_sum``, added by 256 threads and a tree, not row by row: fixed order, rounded once."""
    values, offsets = values.contiguous(), offsets.contiguous()
    weight = weight.to(torch.float32).contiguous()
    out = torch.empty(weight.shape[0], dtype=values.dtype, device=values.device)
    call = _cuda.segment_sum_f64 if values.dtype == torch.float64 else _cuda.segment_sum_f32
    call(_cuda.Queue(*stream(out)), address(values), address(offsets), address(weight), weight.shape[0], address(out))
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
    call = _cuda.bound_f64 if logprob.dtype == torch.float64 else _cuda.bound_f32
    call(
        _cuda.Queue(*stream(term)), address(logprob), address(advantages), address(old), address(length),
        *logprob.shape, clip_low, clip_high, dual_clip, address(term), address(slope),
    )  # fmt: skip
    return term, slope
