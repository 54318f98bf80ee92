"""Registered ops of the head: ``head_statistics`` (any upstream gradient per row) and ``head_loss`` (one pass).

``backend="reference"`` here means the same chunked engine with the row kernels in plain torch; the public functions
serve that name with plain autograd instead (``reference.py``). Empty tensors stand for gradients that were not asked
for: an op's schema has no optional outputs.
"""

from __future__ import annotations

from typing import Sequence  # noqa: UP035  torch 2.6 reads schemas from typing's own

import torch
from torch import Tensor

from ..bound.segments import SegmentBound
from .engine import Gradients, Head, Segments, gradients, one_pass, score
from .options import LogitTransform


def _head(hidden, weight, bias, rows, targets, scale, softcap, temperature, backend) -> Head:
    return Head(hidden, weight, bias, rows, targets, LogitTransform(scale, softcap or None, temperature), backend)


def scatter_rows(grad_rows: Tensor, rows: Tensor | None, like: Tensor, unique: bool) -> Tensor:
    """Gradient of ``hidden [R, H]`` from those of its gathered rows ``[N, H]``; repeats add up in fp32, in order."""
    if rows is None:
        return grad_rows.to(like.dtype)
    if unique:
        return torch.zeros_like(like).index_copy_(0, rows, grad_rows.to(like.dtype))
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = torch.zeros(like.shape, dtype=wide, device=like.device)
    return add_at(out, rows, grad_rows.to(wide)).to(like.dtype)


def add_at(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``out[index] += values`` with repeats, the same bits every run: each of torch's ways is atomic on one device."""
    if out.device.type == "cpu":
        return out.index_add_(0, index, values)
    return out.index_put_((index,), values, accumulate=True)


@torch.library.custom_op("bgpo_kernels::head_statistics", mutates_args=())
def head_statistics(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    rows: Tensor | None,  # [N]
    targets: Tensor,  # [N]
    scale: float,
    softcap: float,  # 0: off
    temperature: float,
    entropy: bool,
    backend: str,
) -> Tensor:
    """``[4, N]``: max and sum of exp of the transformed logits, log-probability of the target, entropy (or zeros)."""
    head = _head(hidden, weight, bias, rows, targets, scale, softcap, temperature, backend)
    stats = score(head, entropy=entropy)
    if not entropy:
        stats[3].zero_()
    return stats


@head_statistics.register_fake
def _(hidden, weight, bias, rows, targets, scale, softcap, temperature, entropy, backend):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(4, targets.shape[0], dtype=dtype)


@torch.library.custom_op("bgpo_kernels::head_statistics_backward", mutates_args=())
def head_statistics_backward(
    grad_stats: Tensor,  # [4, N]; rows 2 and 3 are read
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float,
    temperature: float,
    entropy: bool,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from recomputed logits."""
    head = _head(hidden, weight, bias, rows, targets, scale, softcap, temperature, backend)
    into = Gradients(head, need_hidden, need_weight, need_bias)
    gradients(head, stats, grad_stats[2], grad_stats[3] if entropy else None, into)
    return _finish(head, into, need_hidden, need_weight, need_bias, unique=False)


def _finish(
    head: Head,
    into: Gradients,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    unique: bool,
    wide_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtypes of their inputs; zeros where no row contributed, empty where not wanted."""
    grad_hidden, grad_weight, grad_bias = (head.hidden.new_empty(0) for _ in range(3))  # outputs may not alias
    if need_hidden:
        assert into.hidden is not None
        grad_hidden = scatter_rows(into.hidden, head.rows, head.hidden, unique)
    if need_weight:
        dtype = head.stats_dtype if wide_weight else head.weight.dtype
        grad_weight = torch.zeros_like(head.weight, dtype=dtype) if into.weight is None else into.weight.to(dtype)
    if need_bias and head.bias is not None:
        total = into.bias if into.bias is not None else torch.zeros_like(head.bias)
        grad_bias = total.to(head.bias.dtype)
    return grad_hidden, grad_weight, grad_bias


def empty_or(needed: bool, like: Tensor | None, hidden: Tensor) -> Tensor:
    """Fake gradient of ``like``."""
    return torch.empty_like(like) if needed and like is not None else hidden.new_empty(0)


@head_statistics_backward.register_fake
def _(grad_stats, stats, hidden, weight, bias, rows, targets, scale, softcap, temperature, entropy, backend,
      need_hidden, need_weight, need_bias):  # fmt: skip
    return (
        empty_or(need_hidden, hidden, hidden),
        empty_or(need_weight, weight, hidden),
        empty_or(need_bias, bias, hidden),
    )


def _statistics_setup(ctx, inputs, output) -> None:
    hidden, weight, bias, rows, targets, *ctx.options = inputs
    ctx.save_for_backward(output, hidden, weight, bias, rows, targets)


def _statistics_backward(ctx, grad_stats):
    stats, hidden, weight, bias, rows, targets = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = head_statistics_backward(grad_stats, stats, hidden, weight, bias, rows, targets, *ctx.options, *needs)
    grads = [g if n else None for g, n in zip(found, needs, strict=True)]
    return (*grads, None, None, None, None, None, None, None)


head_statistics.register_autograd(_statistics_backward, setup_context=_statistics_setup)


@torch.library.custom_op("bgpo_kernels::head_loss", mutates_args=())
def head_loss(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    rows: Tensor,  # [N], distinct
    targets: Tensor,  # [N]
    offsets: Tensor,  # [S+1]
    host_offsets: Sequence[int],
    segment_weight: Tensor,  # [B, n]
    advantages: Tensor,  # [B]
    old: Tensor | None,  # [B, n]
    length: Tensor | None,  # [B]
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    normalizer: float,
    scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    wide_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprob [B, n], slope [B, n], and the gradients of the loss by hidden, weight and bias) in one pass.

    ``wide_weight``: the weight's gradient as it was accumulated, fp32 even where the weight is narrower.
    """
    head = _head(hidden, weight, bias, rows, targets, scale, softcap, temperature, backend)
    batch, samples = segment_weight.shape
    bound = SegmentBound(advantages, old, length, (clip_low, clip_high, dual_clip), normalizer * samples,
                         (batch, samples), backend)  # fmt: skip
    into = Gradients(head, need_hidden, need_weight, need_bias)
    segments = Segments(offsets, host_offsets, segment_weight.flatten())
    sums = one_pass(head, segments, bound, into)
    loss, logprob, slope = bound.value(sums)
    grads = _finish(head, into, need_hidden, need_weight, need_bias, unique=True, wide_weight=wide_weight)
    return loss, logprob, slope, *grads


@head_loss.register_fake
def _(hidden, weight, bias, rows, targets, offsets, host_offsets, segment_weight, advantages, old, length, clip_low,
      clip_high, dual_clip, normalizer, scale, softcap, temperature, backend, need_hidden, need_weight,
      need_bias, wide_weight):  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    grad_weight = empty_or(need_weight, weight, hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(segment_weight.shape, dtype=dtype),
        hidden.new_empty(segment_weight.shape, dtype=dtype),
        empty_or(need_hidden, hidden, hidden),
        grad_weight.to(dtype) if wide_weight and need_weight else grad_weight,
        empty_or(need_bias, bias, hidden),
    )


def _loss_setup(ctx, inputs, output) -> None:
    _loss, logprob, slope, *grads = output
    ctx.mark_non_differentiable(logprob, slope, *grads)
    ctx.set_materialize_grads(False)  # or autograd would fill a [V, H] of zeros for the output that is dW
    ctx.save_for_backward(*grads)
    ctx.num_inputs, wide_weight = len(inputs), inputs[-1]
    ctx.main_grad = getattr(inputs[1], "main_grad", None) if wide_weight else None  # not on a tracer's stand-in


def _loss_backward(ctx, grad_loss, *_unused):
    if grad_loss is None:  # only the outputs without gradients were used
        return (None,) * ctx.num_inputs
    # Scaled in place: autograd then adopts them as .grad, and no second [V, H] exists. A graph that is kept for another
    # backward must keep them as they are, though.
    in_place = type(grad_loss) is Tensor and not torch.compiler.is_compiling() and not _graph_is_kept()
    found = [g.mul_(grad_loss) if in_place else g * grad_loss for g in ctx.saved_tensors]
    grads = [g if n else None for g, n in zip(found, ctx.needs_input_grad[:3], strict=True)]
    if ctx.main_grad is not None:
        ctx.main_grad.add_(grads[1])
        grads[1] = None
    return (*grads, *(None,) * (ctx.num_inputs - 3))


def _graph_is_kept() -> bool:
    """Whether the running backward retains its graph; yes, if this torch cannot tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


head_loss.register_autograd(_loss_backward, setup_context=_loss_setup)
