"""``elbo_logprob``: the drop-in. Differentiable ELBO estimates whose graph holds numbers, not activations.

The forward scores every sample without gradient. The backward receives d loss / d ell_bj from whatever loss was built
on the estimates, runs the samples again one micro-batch at a time, and returns the summed parameter gradients to
autograd. Hooks, DistributedDataParallel and optimizers see one ordinary backward. The price is one extra forward and,
during backward, one set of gradients besides .grad; ``bgpo_backward`` and ``replay_backward`` need neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.draw import MaskDraw
from ..masks.schedule import CountSchedule
from ..models import HeadSpec
from .dropout import DropoutSeeds
from .micro_batch import MicroBatches, largest_magnitude
from .problem import Problem, prepare
from .replay import Roots, backward_all, score_all
from .sink import HeadSink


def elbo_logprob(
    model: nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    n_mc: int = 16,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    scheme: str = "exact",
    schedule: str | CountSchedule = "stratified",
    mask_token_id: int | None = None,
    temperature: float = 1.0,
    per_sample: bool = False,
    micro_batch_tokens: int | None = None,
    draw: MaskDraw | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """Monte Carlo estimates of the evidence lower bound on log p(response | prompt), the stand-in for a log-likelihood.

    ``ell_bj = w_bj * sum_{i masked in sample j} log p(y_i | masked y, x)`` (see :func:`random_mask` for w), and the
    estimate is their mean over j. Under grad mode the result is differentiable by any later loss at memory that does
    not depend on n_mc; under ``torch.no_grad()`` it costs one forward per sample and no logits.

    Args:
        per_sample: return ``ell [B, n_mc]`` instead of the mean ``[B]``.
        Others: as :func:`bgpo_backward`.

    Returns:
        ``[B]`` or ``[B, n_mc]`` fp32 (fp64 for a model in fp64).

    Raises:
        As :func:`bgpo_backward`. In backward, before anything reaches .grad: FloatingPointError for a non-finite
        gradient; RuntimeError when parameters were changed since, under create_graph=True, and (from torch) for
        checkpointing with use_reentrant=True.
    """
    problem = prepare(
        model, input_ids, response_mask, n_mc=n_mc, seed=seed, attention_mask=attention_mask, sample_ids=sample_ids,
        scheme=scheme, schedule=schedule, mask_token_id=mask_token_id, temperature=temperature, draw=draw, head=head,
        backend=backend,
    )  # fmt: skip
    batches = MicroBatches(problem, micro_batch_tokens)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and parameters:
        samples = _Elbo.apply(problem, batches, *parameters)
    else:
        samples = score_all(problem, batches, DropoutSeeds(model))
    return samples if per_sample else samples.mean(-1)


class _Elbo(torch.autograd.Function):
    """Scores in forward, replays in backward; the parameters are inputs so that autograd knows what depends on them."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, batches: MicroBatches, *parameters: Tensor) -> Tensor:
        ctx.problem, ctx.batches, ctx.parameters = problem, batches, parameters
        ctx.versions = [p._version for p in parameters]
        ctx.seeds = DropoutSeeds(problem.model)
        ctx.autocast = _autocast_options(problem.device.type)
        return score_all(problem, batches, ctx.seeds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem, parameters = ctx.problem, ctx.parameters
        if torch.is_grad_enabled():  # create_graph=True; the graph of the replays is gone by then
            raise RuntimeError("elbo_logprob cannot be differentiated twice")
        if ctx.versions != [p._version for p in parameters]:
            raise RuntimeError(
                "parameters were modified in place between elbo_logprob and the backward of its result (an optimizer "
                "step?): call backward first, or call elbo_logprob again"
            )
        totals: list[Tensor | None] = [None] * len(parameters)
        owned = [False] * len(parameters)

        def carry_on(roots: Roots) -> None:
            tensors, slopes = map(list, zip(*roots, strict=True))
            found = torch.autograd.grad(tensors, parameters, slopes, allow_unused=True)
            for i, new in enumerate(found):
                if new is None:
                    continue
                total = totals[i]
                if total is None:  # may be expanded, or shared with another parameter: not ours to write to
                    totals[i] = new
                elif owned[i]:
                    total.add_(new)
                else:
                    totals[i], owned[i] = total + new, True

        def restart() -> None:
            totals[:] = [None] * len(parameters)
            owned[:] = [False] * len(parameters)

        sink = HeadSink(problem.model, problem.head.module, through_autograd=True)
        with torch.autocast(**ctx.autocast), ctx.seeds.modes(), _hooks_suspended(parameters):
            backward_all(problem, ctx.batches, ctx.seeds, grad, sink, carry_on, restart)
        present = [t for t in totals if t is not None]
        if present and not bool(torch.isfinite(largest_magnitude(present))):
            raise FloatingPointError("non-finite gradient of elbo_logprob: nothing reached .grad; skip this step")
        return (None, None, *totals)


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
