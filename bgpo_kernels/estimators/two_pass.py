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
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .dropout import DropoutSeeds
from .head_pass import Roots
from .micro_batch import GradientGuard, MicroBatches, Work, largest_magnitude
from .parallel import hooks_suspended
from .sink import HeadSink


class Scored(Work, Protocol):
    """Work whose micro-batches give scores, elements of one tensor, and can be run again with their coefficients."""

    name: ClassVar[str]  # of the public call, for messages

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

    def idle(g: int, lo: int, hi: int) -> Tensor:
        with seeds.at(g, lo):
            return scored.score(g, lo, hi)

    def body(g: int, lo: int, hi: int) -> None:
        scores[scored.place(g, lo, hi)] = idle(g, lo, hi)

    batches.run(list(range(len(batches.groups))), body, lambda: None, idle)
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

    def replay(g: int, lo: int, hi: int, slopes: Tensor) -> None:
        with seeds.at(g, lo):
            roots = scored.backward(g, lo, hi, slopes, sink)
        carry_on(roots)

    batches.run(
        list(range(len(wanted))),
        lambda g, lo, hi: replay(g, lo, hi, coefficients[scored.place(g, lo, hi)]),
        restart,
        idle=lambda g, lo, hi: replay(g, lo, hi, torch.zeros_like(coefficients[scored.place(g, lo, hi)])),
        wanted=lambda g, lo, hi: any(wanted[g][lo:hi]),
        pinned=seeds.drawn,
    )


def differentiable_scores(scored: Scored, batches: MicroBatches) -> Tensor:
    """All scores; under grad mode, differentiable at memory that does not depend on their number."""
    ranks, seeds = batches.ranks, DropoutSeeds(scored.model)
    with ranks.session():
        parameters = [p for p in scored.model.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not parameters:
            return score_all(scored, batches, seeds)
        ranks.check_gradients(own_backward=False)
        with ranks.together():
            scores = score_all(scored, batches, seeds)
    run = _Run(scored, batches, seeds, _autocast_options(scored.device.type), parameters, scores)
    # Sharded ones have no gradients to return: these are made, and reduced, while the parameters are gathered.
    inputs = [torch.zeros((), requires_grad=True)] if ranks.sharded else parameters
    return ranks.through(lambda: _TwoPass.apply(run, *inputs))


@dataclass(frozen=True)
class _Run:
    """What the first pass leaves to the second."""

    scored: Scored
    batches: MicroBatches
    seeds: DropoutSeeds
    autocast: dict[str, Any]
    parameters: list[nn.Parameter]
    scores: Tensor

    def again(
        self, grad: Tensor, sink: HeadSink, carry_on: Callable[[Roots], None], restart: Callable[[], None]
    ) -> None:
        """The second pass."""
        backward_all(self.scored, self.batches, self.seeds, grad, sink, carry_on, restart)

    def into_grad(self, grad: Tensor) -> None:
        """The second pass, all or nothing into .grad."""
        ranks = self.batches.ranks
        sink = HeadSink(self.scored.head.module, sharded=ranks.sharded)
        with self.conditions():
            guard = GradientGuard(self.scored.model, sink, ranks)
            with guard.accumulating():
                self.again(ranks.without_loss_scale(grad), sink, guard.backward, guard.clear)

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Those of the first pass."""
        with torch.autocast(**self.autocast), self.seeds.modes(), self.batches.ranks.session():
            yield


class _TwoPass(torch.autograd.Function):
    """Scored before, replays in backward; the parameters are inputs so that autograd knows what depends on them."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *_: Tensor) -> Tensor:
        ctx.run = run
        ctx.versions = [p._version for p in run.parameters]
        return run.scores.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run, parameters = ctx.run, ctx.run.parameters
        name, head = run.scored.name, run.scored.head.module
        if torch.is_grad_enabled():  # create_graph=True; the graph of the replays is gone by then
            raise RuntimeError(f"{name} cannot be differentiated twice")
        if ctx.versions != [p._version for p in parameters]:
            raise RuntimeError(
                f"parameters were modified in place between {name} and the backward of its result (an optimizer "
                f"step?): call backward first, or call {name} again"
            )
        ranks = run.batches.ranks
        if ranks.sharded:  # parameters are gathered and reduced by hooks that autograd.grad does not run
            ranks.after_what_is_under_way(lambda: run.into_grad(grad))
            return None, None
        sink, totals = HeadSink(head, through_autograd=True), _Totals(parameters)
        with run.conditions(), hooks_suspended(parameters), ranks.together():
            run.again(grad, sink, totals.add, totals.clear)
            return (None, *totals.finite(name))


class _Totals:
    """Sums of the parameters' gradients, apart from .grad."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self.clear()

    def clear(self) -> None:
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._owned = [False] * len(self._parameters)

    def add(self, roots: Roots) -> None:
        """Those of one micro-batch."""
        if not roots:
            return
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
