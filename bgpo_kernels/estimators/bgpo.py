"""``bgpo_backward``: one optimizer step's gradient of BGPO's bound, one micro-batch of MC samples alive at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import validation as check
from ..bound import ops as bound_ops
from ..bound.functional import BoundStats, bound_stats, check_advantages, check_old_logprob, make_clip
from ..bound.segments import SegmentBound
from ..masks.draw import MaskDraw
from ..masks.schedule import CountSchedule
from ..models import HeadSpec
from .head_pass import backward_segments
from .micro_batch import GradientGuard, MicroBatches, assert_finite_logprob
from .problem import Problem, prepare
from .samples import Samples
from .sink import HeadSink


class BgpoStep(NamedTuple):
    """Result of :func:`bgpo_backward`; all detached."""

    loss: Tensor  #: scalar fp32
    logprob: Tensor  #: ``[B, n_mc] fp32`` ELBO estimates; NaN for sequences skipped for their zero advantage
    stats: BoundStats  #: over the sequences that took part


def bgpo_backward(
    model: nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    advantages: Tensor,
    *,
    old_logprob: Tensor | None = None,
    length_norm: bool = True,
    clip_range: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    normalizer: float | None = None,
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
) -> BgpoStep:
    """Accumulate into ``.grad`` the gradient of BGPO's loss (arXiv 2510.11683), at memory independent of n_mc.

    ``loss = - sum_b sum_j g_bj / (normalizer * n_mc)`` with ``g = A (1 + d)`` for A >= 0 and ``A exp(d)`` for A < 0,
    ``d_bj = (ell_bj - old_bj) / L_b`` (without ``/ L_b`` when ``length_norm=False``, the paper's form) and ``ell_bj``
    the ELBO estimate of masking j. Each sample is back-propagated alone; one forward and one backward per sample, the
    head in one pass (6NHV, 4NHV when frozen). On-policy (``old_logprob=None``) there is no old-policy pass at all.
    Sequences with zero advantage cost nothing. Padding never reaches the model and never changes a result.

    Args:
        model: any module whose head is found by ``get_output_embeddings()``, a registered adapter, or ``head``.
        input_ids: ``[B, T]`` int64, clean. response_mask: ``[B, T]`` bool, the tokens to score.
        advantages: ``[B]`` float.
        old_logprob: ``[B, n_mc]`` from ``elbo_logprob(..., per_sample=True)`` of the old policy with the same seed and
            ids; None: on-policy.
        clip_range, dual_clip, normalizer: as :func:`bgpo_loss`; normalizer defaults to B (pass the number of sequences
            of the whole optimizer step when it is cut into several calls).
        n_mc, seed, sample_ids, scheme, schedule, mask_token_id: as :func:`random_mask`; ``mask_token_id=None`` reads
            the model's config.
        attention_mask: ``[B, T]``, 0 marks padding on either side.
        temperature: divides the logits.
        micro_batch_tokens: tokens alive at once; None chooses by free memory and halves on out-of-memory.
        draw: explicit masks instead of seed, n_mc and scheme.
        head: the head module, or a ``models.HeadSpec``, of a model that has no ``get_output_embeddings``.

    Returns:
        :class:`BgpoStep`.

    Raises:
        TypeError, ValueError: see :func:`random_mask`, :func:`masked_logprob`, :func:`bgpo_loss`; a causal model, a
            head that is not known. FloatingPointError: a non-finite log-probability or gradient.
            On every exception ``.grad`` is as it was before the call.
    """
    problem = prepare(
        model, input_ids, response_mask, n_mc=n_mc, seed=seed, attention_mask=attention_mask, sample_ids=sample_ids,
        scheme=scheme, schedule=schedule, mask_token_id=mask_token_id, temperature=temperature, draw=draw, head=head,
        backend=backend,
    )  # fmt: skip
    batch, samples = input_ids.shape[0], problem.n_mc
    check.values(check_advantages(advantages, batch))
    check.same_device("advantages", advantages, "input_ids", input_ids)
    advantages = advantages.detach().float()
    host_advantages = advantages.tolist()
    active = [b for b in range(batch) if host_advantages[b] != 0.0]
    if old_logprob is not None:
        check_old_logprob(old_logprob, batch, samples)
        check.same_device("old_logprob", old_logprob, "input_ids", input_ids)
        old_logprob = old_logprob.detach()
        check.finite("old_logprob", old_logprob[active])
    bound = SegmentBound(
        advantages, old_logprob, problem.lengths() if length_norm else None, make_clip(clip_range, dual_clip),
        check.number("normalizer", batch if normalizer is None else normalizer, 0.0, exclusive=True) * samples,
        (batch, samples), problem.backend,
    )  # fmt: skip
    return _accumulate(problem, bound, active, micro_batch_tokens)


def _accumulate(problem: Problem, bound: SegmentBound, active: list[int], micro_batch_tokens: int | None) -> BgpoStep:
    samples, batches = Samples(problem), MicroBatches(problem, micro_batch_tokens)
    logprob = samples.empty_scores().fill_(torch.nan)

    with batches.ranks.session():
        sink = HeadSink(problem.head.module, sharded=batches.ranks.sharded)
        guard = GradientGuard(problem.model, sink, batches.ranks)

        def body(b: int, lo: int, hi: int) -> None:
            draw = problem.draw(b, lo, hi)
            sums, roots = backward_segments(problem, draw, bound.samples(b, lo, hi), sink, problem.forward_kwargs)
            logprob[b, lo:hi] = sums
            guard.backward(roots)

        def idle(b: int, lo: int, hi: int) -> None:
            guard.backward(samples.backward(b, lo, hi, torch.zeros_like(logprob[b, lo:hi]), sink))

        with guard.accumulating():
            batches.run(active, body, guard.clear, idle)
            scored = logprob[active]
            assert_finite_logprob(scored, [problem.sequences[b].sample_id for b in active])
    return BgpoStep(*_value(scored, bound, active, logprob))


def _value(
    scored: Tensor, bound: SegmentBound, active: list[int], logprob: Tensor
) -> tuple[Tensor, Tensor, BoundStats]:
    """Loss and statistics from the log-probabilities of the sequences that took part."""
    advantages = bound.advantages[active]
    old = None if bound.old is None else bound.old[active].to(scored.dtype)
    length = None if bound.length is None else bound.length[active]
    term, slope = bound_ops.bound(scored, advantages, old, length, *bound.clip, bound.backend)
    loss = -(term.sum(dtype=torch.float64) / bound.divisor).float()
    return loss, logprob, bound_stats(scored, advantages, old, length, slope, bound.divisor / bound.shape[1])
