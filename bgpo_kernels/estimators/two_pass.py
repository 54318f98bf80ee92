"""Scores of a model whose graph holds numbers, not activations: scored now, run again in the backward.

The forward scores every micro-batch without gradient. The backward receives d loss / d score from whatever loss was
built on the scores, runs the micro-batches again one at a time, each with its known coefficients, and returns the
summed parameter gradients to autograd. Hooks, DistributedDataParallel and optimizers see one ordinary backward. The
price is one extra forward and, during backward, one set of gradients besides .grad.

What a score is (the ELBO estimate of a sample, the log-probability of a row) is the business of the ``Scored``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..models import HeadSpec
from .dropout import DropoutSeeds
from .head_pass import Roots
from .micro_batch import MicroBatches, Work, largest_magnitude
from .sink import HeadSink


class Scored(Work, Protocol):
    """Work whose micro-batches give scores, elements of one tensor, and can be run again with their coefficients."""

    name: ClassVar[str]  # of the public call, for messages

    @property
    def head(self) -> HeadSpec: ...

    def empty_scores(self) -> Tensor: ...

    def place(self, g: int, lo: int, hi: int) -> Any:
        """Index of a micro-batch's scores in the tensor of all."""

    def score(self, g: int, lo: int, hi: int) -> Tensor:
        """Scores of a micro-batch, without gradient."""

    def backward(self, g: int, lo: int, hi: int, coefficients: Tensor, sink: HeadSink) -> Roots:
        """Where autograd goes on for ``sum(coefficients * scores)`` of a micro-batch."""

    def wanted(self, coefficients: Tensor) -> list[list[bool]]:
        """Whether any of an item's scores has a coefficient, for the items of every group."""


def score_all(scored: Scored, batches: MicroBatches, seeds: DropoutSeeds) -> Tensor:
    """All scores, without gradient."""
    scores = scored.empty_scores()

    def body(g: int, lo: int, hi: int) -> None:
        with seeds.at(g, lo):
            scores[scored.place(g, lo, hi)] = scored.score(g, lo, hi)

    batches.run(list(range(len(batches.groups))), body, restart=lambda: None)
    return scores


def backward_all(
    scored: Scored,
    batches: MicroBatches,
    seeds: DropoutSeeds,
    coefficients: Tensor,  # d loss / d score, as the scores
    sink: HeadSink,
    carry_on: Callable[[Roots], None],
    restart: Callable[[], None],
) -> None:
    """Back-propagate every micro-batch with its coefficients; ``carry_on`` starts autograd for one of them."""
    wanted = scored.wanted(coefficients)

    def body(g: int, lo: int, hi: int) -> None:
        if not any(wanted[g][lo:hi]):
            return
        with seeds.at(g, lo):
            roots = scored.backward(g, lo, hi, coefficients[scored.place(g, lo, hi)], sink)
        if roots:
            carry_on(roots)

    batches.run(list(range(len(wanted))), body, restart, pinned=seeds.drawn)


def differentiable_scores(scored: Scored, batches: MicroBatches) -> Tensor:
    """All scores; under grad mode, differentiable at memory that does not depend on their number."""
    parameters = [p for p in scored.model.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and parameters:
        return _TwoPass.apply(scored, batches, *parameters)
    return score_all(scored, batches, DropoutSeeds(scored.model))


class _TwoPass(torch.autograd.Function):
    """Scores in forward, replays in backward; the parameters are inputs so that autograd knows what depends on them."""

    @staticmethod
    def forward(ctx: Any, scored: Scored, batches: MicroBatches, *parameters: Tensor) -> Tensor:
        ctx.scored, ctx.batches, ctx.parameters = scored, batches, parameters
        ctx.versions = [p._version for p in parameters]
        ctx.seeds = DropoutSeeds(scored.model)
        ctx.autocast = _autocast_options(scored.device.type)
        return score_all(scored, batches, ctx.seeds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scored, parameters = ctx.scored, ctx.parameters
        if torch.is_grad_enabled():  # create_graph=True; the graph of the replays is gone by then
            raise RuntimeError(f"{scored.name} cannot be differentiated twice")
        if ctx.versions != [p._version for p in parameters]:
            raise RuntimeError(
                f"parameters were modified in place between {scored.name} and the backward of its result (an optimizer "
                f"step?): call backward first, or call {scored.name} again"
            )
        totals = _Totals(parameters)
        sink = HeadSink(scored.model, scored.head.module, through_autograd=True)
        with torch.autocast(**ctx.autocast), ctx.seeds.modes(), _hooks_suspended(parameters):
            backward_all(scored, ctx.batches, ctx.seeds, grad, sink, totals.add, totals.clear)
        return (None, None, *totals.finite(scored.name))


class _Totals:
    """Sums of the parameters' gradients, apart from .grad."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        self._parameters = parameters
        self.clear()

    def clear(self) -> None:
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._owned = [False] * len(self._parameters)

    def add(self, roots: Roots) -> None:
        """Those of one micro-batch."""
        tensors, slopes = map(list, zip(*roots, strict=True))
        found = torch.autograd.grad(tensors, self._parameters, slopes, allow_unused=True)
        for i, new in enumerate(found):
            if new is None:
                continue
            total = self._sums[i]
            if total is None:  # may be expanded, or shared with another parameter: not ours to write to
                self._sums[i] = new
            elif self._owned[i]:
                total.add_(new)
            else:
                self._sums[i], self._owned[i] = total + new, True

    def finite(self, name: str) -> list[Tensor | None]:
        """The sums, or FloatingPointError."""
        present = [t for t in self._sums if t is not None]
        if present and not bool(torch.isfinite(largest_magnitude(present))):
            raise FloatingPointError(f"non-finite gradient of {name}: nothing reached .grad; skip this step")
        return self._sums


def _autocast_options(device_type: str) -> dict[str, Any]:
    """The autocast setting of the forward, on or off, for a backward that runs outside or inside one."""
    enabled = torch.is_autocast_enabled(device_type)
    return {"device_type": device_type, "dtype": torch.get_autocast_dtype(device_type), "enabled": enabled}


@contextmanager
def _hooks_suspended(parameters: tuple[Tensor, ...]) -> Iterator[None]:
    """Tensor hooks see the total in the caller's backward; the inner backwards would run them on every part as well."""
    hooks = [p._backward_hooks for p in parameters if p._backward_hooks]
    kept = [dict(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, entries in zip(hooks, kept, strict=True):
            h.update(entries)
