"""One micro-batch through the model, with the head replaced by ours inside the head's own forward.

    score      no gradient: segment sums [m]                                     one forward, head 2NHV
    backward   segment sums [m] and the gradients of a loss whose slope by each  one forward and backward, head 6NHV
               sum is a function of that sum alone                               (4NHV when the head is frozen)

``backward`` makes the gradient of the hidden states inside the forward, while the chunk's logits are there, and starts
autograd from the hidden states afterwards; the logits never enter a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..bound import ops as bound_ops
from ..bound.segments import SegmentBound
from ..head.engine import Head, Segments, one_pass, score
from ..head.ops import scatter_rows
from ..head.options import LogitTransform
from ..head.parallel import local_parts
from ..models import HeadSpec, capture_head, without_gradient
from .sink import HeadSink

Roots = list[tuple[Tensor, Tensor]]  # (tensor, its gradient): where autograd goes on


class Called(Protocol):
    """The model of a micro-batch and its conventions."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def head(self) -> HeadSpec: ...

    @property
    def transform(self) -> LogitTransform: ...

    @property
    def backend(self) -> str: ...


class Batch(Protocol):
    """A micro-batch: what the model sees, and the rows to score in their segments. A :class:`MaskDraw` is one."""

    @property
    def noisy_ids(self) -> Tensor: ...  # [1, m, T]

    @property
    def rows(self) -> Tensor: ...  # [N] into m*T

    @property
    def targets(self) -> Tensor: ...  # [N]

    @property
    def segment_offsets(self) -> Tensor: ...  # [S+1]

    @property
    def host_offsets(self) -> Sequence[int]: ...

    @property
    def segment_weight(self) -> Tensor: ...  # S numbers


def call_model(called: Called, batch: Batch, consume: Callable[[Tensor], Any], kwargs: dict[str, Any]) -> Any:
    """One forward with ``consume(hidden [m, T, H])`` in place of the head; what it returned, after the head's hooks."""
    with capture_head(called.model, called.head, consume) as capture:
        called.model(input_ids=batch.noisy_ids[0], **kwargs)
    return capture.value


def score_segments(called: Called, batch: Batch, kwargs: dict[str, Any]) -> Tensor:
    """Weighted log-probability sum of each segment ``[S]``, without gradient."""

    def consume(hidden: Tensor) -> Tensor:
        stats = score(_head(called, hidden, batch), batch.host_offsets)
        return bound_ops.segment_sum(stats[2], batch.segment_offsets, batch.segment_weight.flatten(), called.backend)

    with without_gradient():
        return call_model(called, batch, consume, kwargs)


def backward_segments(
    called: Called, batch: Batch, bound: SegmentBound, sink: HeadSink, kwargs: dict[str, Any], distinct: bool = True
) -> tuple[Tensor, Roots]:
    """Sums ``[S]``, and the (tensor, gradient) pairs from which autograd is to go on: the caller starts it.

    The head's own weight and bias either went into ``sink`` or are among the pairs. ``distinct``: no row repeats.
    """
    done: dict[str, Tensor] = {}
    roots: Roots = []

    def consume(hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "the model ran its head without autograd, so no gradient could reach the layers below: use "
                "checkpointing with use_reentrant=False or around layers only, and no torch.no_grad in the forward"
            )
        head = _head(called, hidden, batch)
        into = sink.gradients(head, hidden.requires_grad)
        segments = Segments(batch.segment_offsets, batch.host_offsets, batch.segment_weight.flatten())
        done["sums"] = one_pass(head, segments, bound, into)
        if head.shard is not None:
            into.weight, into.bias = head.shard.as_parameter(into.weight), head.shard.as_parameter(into.bias)
        if into.hidden is not None:
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            done["grad"] = scatter_rows(into.hidden, head.rows, flat, unique=distinct).view(hidden.shape)
        if sink.sharded:
            return sink.carry(hidden, done.get("grad"), into)
        roots.extend(sink.roots(into))
        return hidden

    with torch.enable_grad():
        value = call_model(called, batch, consume, kwargs)
    if sink.sharded and value.requires_grad:
        roots.append((value, torch.ones_like(value)))
    elif "grad" in done:
        roots.append((value, done["grad"]))
    return done["sums"], roots


def _head(called: Called, hidden: Tensor, batch: Batch) -> Head:
    module: Any = called.head.module
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and flat.dtype != torch.float64:
        flat = flat.to(torch.get_autocast_dtype(device))
    elif flat.dtype != module.weight.dtype:
        raise TypeError(
            f"the model's hidden states are {flat.dtype} but its head's weight is {module.weight.dtype}; "
            "load the model in one dtype or run under torch.autocast"
        )
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    flat, weight, bias, shard = local_parts(flat, module.weight.detach(), bias, called.head.tp_group)
    rows = batch.rows - called.head.shift if called.head.shift else batch.rows
    return Head(flat, weight, bias, rows, batch.targets, called.transform, called.backend, shard)
