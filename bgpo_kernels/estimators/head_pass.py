"""One micro-batch through the model, with the head replaced by ours inside the head's own forward.

    score      no gradient: segment sums [m]                                     one forward, head 2NHV
    backward   segment sums [m] and the gradients of a loss whose slope by each  one forward and backward, head 6NHV
               sum is a function of that sum alone                               (4NHV when the head is frozen)

``backward`` makes the gradient of the hidden states inside the forward, while the chunk's logits are there, and starts
autograd from the hidden states afterwards; the logits never enter a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bound import ops as bound_ops
from ..bound.segments import SegmentBound
from ..head.engine import Head, Segments, one_pass, score
from ..head.ops import scatter_rows
from ..masks.draw import MaskDraw
from ..models import capture_head, without_gradient
from .problem import Problem
from .sink import HeadSink


def score_samples(problem: Problem, draw: MaskDraw) -> Tensor:
    """ELBO estimate of each sample ``[m]`` of a single-sequence draw, without gradient."""

    def consume(hidden: Tensor) -> Tensor:
        head = _head(problem, hidden, draw)
        stats = score(head, draw.host_offsets)
        return bound_ops.segment_sum(stats[2], draw.segment_offsets, draw.segment_weight.flatten(), problem.backend)

    with without_gradient(), capture_head(problem.model, problem.head, consume) as capture:
        problem.model(input_ids=draw.noisy_ids[0], **problem.forward_kwargs)
    return capture.value


def backward_samples(
    problem: Problem, draw: MaskDraw, bound: SegmentBound, sink: HeadSink
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Sums ``[m]``, and the (tensor, gradient) pairs from which autograd is to go on: the caller starts it.

    The head's own weight and bias either went into ``sink`` or are among the pairs.
    """
    done: dict[str, Tensor] = {}
    roots: list[tuple[Tensor, Tensor]] = []

    def consume(hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "the model ran its head without autograd, so no gradient could reach the layers below: use "
                "checkpointing with use_reentrant=False or around layers only, and no torch.no_grad in the forward"
            )
        head = _head(problem, hidden, draw)
        into = sink.gradients(head, hidden.requires_grad)
        segments = Segments(draw.segment_offsets, draw.host_offsets, draw.segment_weight.flatten())
        done["sums"] = one_pass(head, segments, bound, into)
        roots.extend(sink.roots(into))
        if into.hidden is not None:
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            done["grad"] = scatter_rows(into.hidden, head.rows, flat, unique=True).view(hidden.shape)
        return hidden

    with torch.enable_grad(), capture_head(problem.model, problem.head, consume) as capture:
        problem.model(input_ids=draw.noisy_ids[0], **problem.forward_kwargs)
    if "grad" in done:
        roots.append((capture.value, done["grad"]))
    return done["sums"], roots


def start_backward(roots: list[tuple[Tensor, Tensor]]) -> None:
    """Autograd from (tensor, gradient) pairs into .grad."""
    if roots:
        tensors, gradients = zip(*roots, strict=True)
        torch.autograd.backward(tensors, gradients)


def _head(problem: Problem, hidden: Tensor, draw: MaskDraw) -> Head:
    module: Any = problem.head.module
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
    rows = draw.rows - problem.head.shift if problem.head.shift else draw.rows
    return Head(
        flat, module.weight.detach(), None if bias is None else bias.detach(), rows, draw.targets,
        problem.transform, problem.backend,
    )  # fmt: skip
