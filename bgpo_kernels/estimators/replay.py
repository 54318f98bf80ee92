"""Exact gradients of any objective of the per-sample ELBO estimates, at memory independent of n_mc.

``grad f(ell) = sum_bj (df/d ell_bj) grad ell_bj``: a first pass without gradient gives the numbers ell_bj, the
objective's own backward gives the coefficients, and a second pass back-propagates the samples one micro-batch at a
time, with known coefficients and hence one pass over the head. The cost beyond BGPO's bound is one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..masks.draw import MaskDraw
from ..masks.schedule import CountSchedule
from ..models import HeadSpec
from .dropout import DropoutSeeds
from .micro_batch import GradientGuard, MicroBatches, assert_finite_logprob
from .problem import prepare
from .samples import Samples
from .sink import HeadSink
from .two_pass import backward_all, score_all


class ReplayStep(NamedTuple):
    """Result of :func:`replay_backward`; detached."""

    loss: Tensor  #: the objective's value, scalar
    logprob: Tensor  #: ``[B, n_mc] fp32`` ELBO estimates


def replay_backward(
    model: nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    n_mc: int = 16,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    scheme: str = "exact",
    schedule: str | CountSchedule = "stratified",
    mask_token_id: int | None = None,
    temperature: float = 1.0,
    micro_batch_tokens: int | None = None,
    draw: MaskDraw | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> ReplayStep:
    """Accumulate into ``.grad`` the exact gradient of ``objective(ell)``, whatever the objective, in two passes.

    Args:
        objective: takes the ELBO estimates ``[B, n_mc]`` fp32 (requires grad) and returns the scalar to minimise.
            Samples to which it gives a zero derivative are not run a second time.
        Others: as :func:`bgpo_backward`.

    Returns:
        :class:`ReplayStep`.

    Raises:
        As :func:`bgpo_backward`; ValueError when the objective does not return a scalar that depends on its argument.
    """
    problem = prepare(
        model, input_ids, response_mask, n_mc=n_mc, seed=seed, attention_mask=attention_mask, sample_ids=sample_ids,
        scheme=scheme, schedule=schedule, mask_token_id=mask_token_id, temperature=temperature, draw=draw, head=head,
        backend=backend,
    )  # fmt: skip
    batches = MicroBatches(problem, micro_batch_tokens)
    samples, seeds, ranks = Samples(problem), DropoutSeeds(model), batches.ranks
    with ranks.session():
        sink = HeadSink(problem.head.module, sharded=ranks.sharded)
        guard = GradientGuard(model, sink, ranks)
        with ranks.together():
            scores = score_all(samples, batches, seeds)
            assert_finite_logprob(scores, [s.sample_id for s in problem.sequences])
            loss, coefficients = _differentiate(objective, scores)
        with guard.accumulating():
            backward_all(samples, batches, seeds, coefficients, sink, guard.backward, guard.clear)
    return ReplayStep(loss, scores)


def _differentiate(objective: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Value of the objective and its derivative by every score ``[B, n]``."""
    leaf = scores.clone().requires_grad_()
    with torch.enable_grad():
        loss = objective(leaf)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"objective must return a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError("objective's result does not depend on its argument by a differentiable path")
    (slope,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss), allow_unused=True)
    if slope is None:
        raise ValueError("objective's result does not depend on its argument")
    if not bool(torch.isfinite(slope).all() & torch.isfinite(loss).all()):
        raise FloatingPointError(
            f"objective is {loss.item()}, or its derivative is not finite: nothing was added to .grad; skip this step"
        )
    return loss.detach().reshape(()), slope
