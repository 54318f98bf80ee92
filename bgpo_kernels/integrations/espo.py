"""ESPO (ML-GSAI/ESPO): replaces ``ESPOTrainer._get_elbo_mc`` and ``_get_elbo`` of ``espo/espo_trainer.py``.

Every MC sample draws l uniformly from 0..L and a uniform l-subset M of the L completion tokens, with its complement M':

    S = (L+1)/l sum_{k in M} log p_k,      S' = (L+1)/(L-l) sum_{k in M'} log p_k,      an empty side counts 0
    elbo = mean over the MC samples of (S + S') / 2,   or of S alone with ``reduce_var=False``

This is ``random_mask(scheme="coupled")``, whose pair is one MC sample here. Tokens after the end of sequence count, as
in the original; the prompt is never masked.

Saved: the head runs on masked tokens only; the 2 ``num_mc`` graphs of the original are not kept: one micro-batch of
them is alive at a time.

What differs from the original:

* masks come from a counter-based stream keyed (seed, sequence, mask, position): global random state is untouched, and
  masks do not depend on the batch around a sequence. The original spreads the l of one call evenly over its batch;
  here each l is uniform by itself, which is the same law for every single sequence;
* the result is fp32 whatever the model's dtype;
* ``attention_mask=`` cuts padding away. Without it left padding is attended, as in the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..estimators import elbo_logprob
from ..masks import MaskDraw, random_mask
from ..models import HeadSpec
from ._common import content_ids
from ._subsets import join


def get_elbo_mc(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    mask_seeds: Sequence[Sequence[int]] | Tensor,
    reduce_var: bool = True,
    num_mc: int = 1,
    *,
    draw: MaskDraw | Sequence[MaskDraw] | None = None,
    attention_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """ELBO estimates ``[B, I]`` fp32, as ``ESPOTrainer._get_elbo_mc``.

    Args:
        self: the trainer; read is ``processing_class.mask_token_id``.
        input_ids: ``[I, B, T]``. logits_to_keep: completion tokens L, at the end of T.
        mask_seeds: ``[I, num_mc]`` seeds, a tensor or nested lists.
        reduce_var: also score the complement of every mask.
        draw: explicit masks, one :class:`MaskDraw` per iteration (or one alone, for I = 1).
        attention_mask: ``[B, T]`` of 0 and 1; see above.
        sample_ids: ``[B]`` int64, whose masks are whose; default: from the tokens themselves.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.elbo_logprob`.

    Raises:
        ValueError, TypeError: shapes that disagree, and as :func:`bgpo_kernels.elbo_logprob`.
    """
    check.shape("input_ids", check.tensor("input_ids", input_ids), ("I", "B", "T"))
    iterations, _batch, tokens = input_ids.shape
    check.integer("logits_to_keep", logits_to_keep, 1, tokens)
    response = torch.zeros_like(input_ids[0], dtype=torch.bool)
    response[:, tokens - logits_to_keep :] = True
    draws = _given(draw, iterations)
    if draws is None:
        seeds = _seeds(mask_seeds, iterations, num_mc)
        ids = content_ids(input_ids[0], attention_mask) if sample_ids is None else sample_ids
        mask_id = self.processing_class.mask_token_id
        draws = [
            draw_masks(clean, response, row, mask_id, ids, reduce_var=reduce_var, backend=backend)
            for clean, row in zip(input_ids, seeds, strict=True)
        ]
    with _as_trained(input_ids):
        elbos = [
            elbo_logprob(
                model, clean, response, draw=masks, attention_mask=attention_mask,
                micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
            )
            for clean, masks in zip(input_ids, draws, strict=True)
        ]  # fmt: skip
    return torch.stack(elbos, dim=1)


def get_elbo(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    mask_seeds: Sequence[int] | Tensor,
    reduce_var: bool = True,
    **options: Any,
) -> Tensor:
    """``[B, I]`` of one MC sample, as ``ESPOTrainer._get_elbo``: :func:`get_elbo_mc` with ``mask_seeds [I]``."""
    seeds = mask_seeds.tolist() if isinstance(mask_seeds, Tensor) else list(mask_seeds)
    return get_elbo_mc(self, model, input_ids, logits_to_keep, [[s] for s in seeds], reduce_var, 1, **options)


def draw_masks(
    input_ids: Tensor,
    response_mask: Tensor,
    seeds: Sequence[int],
    mask_token_id: int,
    sample_ids: Tensor,
    *,
    reduce_var: bool = True,
    backend: str = "auto",
) -> MaskDraw:
    """The masks of one iteration: per seed a mask and, with ``reduce_var``, its complement.

    Args:
        input_ids: ``[B, T]`` clean; a token equal to ``mask_token_id`` is masked and scored like any other.
        response_mask: ``[B, T]`` bool. sample_ids: ``[B]`` int64.
    """
    other = 0 if mask_token_id else 1
    plain = torch.where(input_ids == mask_token_id, other, input_ids)
    draws = [
        random_mask(
            plain, response_mask, mask_token_id=mask_token_id, n_mc=2, mc_range=(0, 2 if reduce_var else 1), seed=seed,
            sample_ids=sample_ids, scheme="coupled", schedule="uniform", backend=backend,
        )
        for seed in seeds
    ]  # fmt: skip
    return join(draws, input_ids, mask_token_id)


def _seeds(mask_seeds: Any, iterations: int, num_mc: int) -> list[list[int]]:
    rows = mask_seeds.tolist() if isinstance(mask_seeds, Tensor) else [list(row) for row in mask_seeds]
    if len(rows) != iterations or any(not isinstance(row, list) or len(row) != num_mc for row in rows):
        got = list(mask_seeds.shape) if isinstance(mask_seeds, Tensor) else [len(row) for row in rows]
        raise ValueError(f"mask_seeds must be [I, num_mc] = [{iterations}, {num_mc}], got {got}")
    return [[int(seed) for seed in row] for row in rows]


def _given(draw: Any, iterations: int) -> list[MaskDraw] | None:
    if draw is None:
        return None
    draws = [draw] if isinstance(draw, MaskDraw) else list(draw)
    if len(draws) != iterations:
        raise ValueError(f"draw must hold one MaskDraw per iteration, {iterations}; got {len(draws)}")
    return draws


def _as_trained(input_ids: Tensor) -> AbstractContextManager[None]:
    """The original runs its forwards in bfloat16 on a GPU, and so do we."""
    return torch.autocast("cuda", torch.bfloat16) if input_ids.is_cuda else nullcontext()
