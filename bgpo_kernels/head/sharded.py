"""The head's two calls for a weight that is cut over ranks: as the registered ops of ``ops.py``, on shards.

They are autograd functions and no registered ops, since a process group is no argument of an op: a compiled model
breaks its graph here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bound.segments import SegmentBound
from ..masks.draw import MaskDraw
from . import ops
from .engine import Gradients, Head, Segments, gradients, one_pass, score


def sharded_statistics(head: Head, entropy: bool) -> Tensor:
    """As ``ops.head_statistics``: ``[4, N]``, rows 2 and 3 differentiable. 2NHV_r forward, up to 6NHV_r backward."""
    _agree(head)
    return _eagerly(_Statistics)(head.hidden, head.weight, head.bias, head, entropy)


def sharded_loss(
    head: Head, draw: MaskDraw, bound: SegmentBound, needs: tuple[bool, bool, bool], wide_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``ops.head_loss``: loss, logprob and slope, gradients in one pass over this rank's rows of the weight."""
    _agree(head)
    return _eagerly(_Loss)(head.hidden, head.weight, head.bias, head, draw, bound, needs, wide_weight)


def _eagerly(function: type[torch.autograd.Function]) -> Any:
    """Not as a decorator: making one imports the whole of torch's compiler, which ``import bgpo_kernels`` must not."""
    return torch.compiler.disable(function.apply)


def _agree(head: Head) -> None:
    assert head.shard is not None
    head.shard.check_agreement(head.capacity, head.targets, head.rows)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, entropy: bool) -> Tensor:
        stats = score(head, entropy=entropy)
        if not entropy:
            stats[3].zero_()
        ctx.entropy, ctx.rest = entropy, (head.rows, head.targets, head.transform, head.backend, head.shard)
        ctx.save_for_backward(stats, hidden, weight, bias)
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        stats, *inputs = ctx.saved_tensors
        head, needs = Head(*inputs, *ctx.rest), ctx.needs_input_grad[:3]
        into = Gradients(head, *needs)
        gradients(head, stats, grad_stats[2], grad_stats[3] if ctx.entropy else None, into)
        found = ops._finish(head, into, needs[0], needs[1], needs[2], unique=False)
        return (*(g if n else None for g, n in zip(found, needs, strict=True)), None, None)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        draw: MaskDraw,
        bound: SegmentBound,
        needs: tuple[bool, bool, bool],
        wide_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        into = Gradients(head, *needs)
        segments = Segments(draw.segment_offsets, draw.host_offsets, draw.segment_weight.flatten())
        loss, logprob, slope = bound.value(one_pass(head, segments, bound, into))
        grads = ops._finish(head, into, *needs, unique=True, wide_weight=wide_weight)
        ctx.mark_non_differentiable(logprob, slope)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads)
        ctx.num_inputs, ctx.main_grad = 8, getattr(weight, "main_grad", None) if wide_weight else None
        return loss, logprob, slope

    backward = staticmethod(ops._loss_backward)
