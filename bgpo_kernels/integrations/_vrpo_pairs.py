"""Mean ELBO estimates of preference pairs, and DPO's logit of them; part of ``vrpo``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import validation as check
from ..estimators import elbo_logprob
from ..masks import CountSchedule, MaskDraw
from ..models import HeadSpec
from ._common import content_ids


def sequence_elbos(
    model: nn.Module,
    input_ids: Tensor,
    completion_mask: Tensor,
    *,
    n_mc: int = 8,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    schedule: str | CountSchedule = "stratified",
    scheme: str = "exact",
    mask_token_id: int | None = None,
    draw: MaskDraw | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean ELBO estimates ``[B]`` of sequences, on masks that any model gets for the same seed.

    Args:
        input_ids: ``[B, T]``. completion_mask: ``[B, T]`` of 0 and 1 or bool, the tokens to score.
        attention_mask: ``[B, T]``, 0 is padding, on either side.
        sample_ids: ``[B]`` int64; default: from the tokens themselves.
        draw: explicit masks, instead of seed, n_mc and scheme.
        Others: as :func:`bgpo_kernels.elbo_logprob`.
    """
    check.shape("input_ids", check.tensor("input_ids", input_ids), ("B", "T"))
    check.shape("completion_mask", check.tensor("completion_mask", completion_mask), tuple(input_ids.shape))
    ids = content_ids(input_ids, attention_mask) if sample_ids is None else sample_ids
    return elbo_logprob(
        model, input_ids, completion_mask.bool(), n_mc=n_mc, seed=seed, attention_mask=attention_mask, sample_ids=ids,
        scheme=scheme, schedule=schedule, mask_token_id=mask_token_id, draw=draw,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip


def pair_elbos(
    model: nn.Module,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    chosen_attention_mask: Tensor | None = None,
    rejected_attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Mean ELBO estimates ``[B]`` of chosen and rejected completions under one model.

    Call it for the policy, and under ``torch.no_grad()`` for the reference, with the same ``seed`` and ``n_mc``.

    Args:
        chosen_ids, rejected_ids: ``[B, T]`` int64, prompt and completion; their T may differ.
        chosen_mask, rejected_mask: as the ids, True (or 1) for completion tokens.
        chosen_attention_mask, rejected_attention_mask: as the ids, 0 is padding.
        options: of :func:`sequence_elbos`, but ``draw`` and ``sample_ids``, which would serve one of the two only.
    """
    own = {"draw", "sample_ids"} & options.keys()
    if own:
        raise TypeError(f"{', '.join(sorted(own))} belong to one batch: call sequence_elbos for each of the two")
    if len(chosen_ids) != len(rejected_ids):
        raise ValueError(f"chosen_ids and rejected_ids must pair up, got {len(chosen_ids)} and {len(rejected_ids)}")
    chosen = sequence_elbos(model, chosen_ids, chosen_mask, attention_mask=chosen_attention_mask, **options)
    return chosen, sequence_elbos(model, rejected_ids, rejected_mask, attention_mask=rejected_attention_mask, **options)


def dpo_logit(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """``(chosen - ref_chosen) - (rejected - ref_rejected)`` ``[B]``; DPO's loss is ``-logsigmoid(beta * logit)``."""
    shape = tuple(check.tensor("chosen", chosen).shape)
    for name, value in (("rejected", rejected), ("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        check.shape(name, check.tensor(name, value), shape, " (as chosen)")
    return (chosen - ref_chosen) - (rejected - ref_rejected)
