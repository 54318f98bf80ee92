"""Registered ops of the bound: ``segment_sum`` and ``bound``, each with fake implementation and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import engine


@torch.library.custom_op("bgpo_kernels::segment_sum", mutates_args=())
def segment_sum(values: Tensor, offsets: Tensor, weight: Tensor, backend: str) -> Tensor:
    """``weight_s * sum_{i in segment s} values_i`` -> [S]; fp64 accumulation in row order, rounded once."""
    return engine("bound", backend).segment_sum(values, offsets, weight)


@segment_sum.register_fake
def _(values: Tensor, offsets: Tensor, weight: Tensor, backend: str) -> Tensor:
    return values.new_empty(weight.shape[0])


def _segment_sum_setup(ctx, inputs, output) -> None:
    values, offsets, weight, _backend = inputs
    ctx.save_for_backward(offsets, weight)
    ctx.num_rows, ctx.dtype = values.shape[0], values.dtype


def _segment_sum_backward(ctx, grad):
    offsets, weight = ctx.saved_tensors
    return spread(grad * weight.to(grad.dtype), offsets, ctx.num_rows), None, None, None


def spread(per_segment: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Value of each row's segment, ``[S] -> [N]``; no host sync, since the number of rows is known."""
    return torch.repeat_interleave(per_segment, offsets[1:] - offsets[:-1], output_size=num_rows)


segment_sum.register_autograd(_segment_sum_backward, setup_context=_segment_sum_setup)


@torch.library.custom_op("bgpo_kernels::bound", mutates_args=())
def bound(
    logprob: Tensor,  # [B, n]
    advantages: Tensor,  # [B]
    old: Tensor | None,  # [B, n]
    length: Tensor | None,  # [B]
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Bound term of each sample and its derivative by ``logprob``, ``[B, n]`` each (see ``reference.bound``)."""
    return engine("bound", backend).bound(logprob, advantages, old, length, clip_low, clip_high, dual_clip)


@bound.register_fake
def _(logprob, advantages, old, length, clip_low, clip_high, dual_clip, backend):
    return torch.empty_like(logprob), torch.empty_like(logprob)


def _bound_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _bound_backward(ctx, grad_term, _grad_slope):
    (slope,) = ctx.saved_tensors
    return grad_term * slope, None, None, None, None, None, None, None


bound.register_autograd(_bound_backward, setup_context=_bound_setup)
