"""AGRPO's per-token log-probabilities over the sampler's own support.

Replaces ``AGRPOTrainer._get_per_token_logps_and_entropies`` of probablyabot/agrpo, agrpo_trainer.py, which its
``compute_loss`` calls once per sampled decoding step (24 of them, each back-propagated alone). With S_k the top-k or
top-p tokens that the sampler could draw at the position of token k,

    lp_k = z[y_k] / tau - log sum_{v in S_k} exp(z[v] / tau)             z the logits, tau = ``self.temperature``

Saved: the head runs on the tokens that the step decoded (a few of some hundred), and where the support is small on
their support alone, 2 K H multiply-adds per token instead of 2 V H; no logits are made. ``support_ids`` turns the
trainer's bool mask [B, L, V] into ids [B, L, K], which this function takes as well: store those after sampling and the
batch shrinks by V / 8K.

What differs from upstream:

* Padding is cut away. Upstream hands ``attention_mask`` to the model, and LLaDA's own code turns causal under a mask
  that holds a 0 (a batch of prompts of different lengths).
* A target outside its support is an error, where upstream returns minus infinity, whose gradient is NaN.
* Everything is computed in fp32 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..estimators import row_logprob
from ..models import HeadSpec


def get_per_token_logps_and_entropies(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling_masks: Tensor,
    unmask_positions: Tensor,
    completion_ids: Tensor,
    *,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``AGRPOTrainer._get_per_token_logps_and_entropies``: the tokens of one decoding step.

    Args:
        self: the trainer; ``temperature`` is read.
        model: the policy, wrapped or not.
        input_ids: ``[B, T]`` int64, prompt and the completion as the step found it (with mask tokens).
        attention_mask: ``[B, T]`` of 0 and 1; padding is cut away.
        sampling_masks: ``[B, L, V]`` bool, the sampler's support; or ``[B, L, K]`` int64 from :func:`support_ids`.
        unmask_positions: ``[B, L]`` bool, the tokens that the step decoded.
        completion_ids: ``[B, L]`` int64, the finished completion.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        ``[N]`` fp32 (fp64 for a model in fp64), one per True of ``unmask_positions``, row by row.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; shapes or dtypes that disagree.
    """
    _check(input_ids, attention_mask, sampling_masks, unmask_positions, completion_ids)
    length = completion_ids.shape[1]
    rows = torch.zeros_like(input_ids, dtype=torch.bool)
    rows[:, -length:] = unmask_positions
    logp = row_logprob(
        model, input_ids, rows, completion_ids[unmask_positions], temperature=self.temperature,
        support=_support(sampling_masks[unmask_positions]), attention_mask=attention_mask,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    assert isinstance(logp, Tensor)
    return logp


def support_ids(sampling_masks: Tensor) -> Tensor:
    """Ids ``[..., K]`` int64 of the True tokens of ``sampling_masks [..., V]`` bool, ascending; -1 fills up to K.

    K is the largest support. A few times K ids take less memory than V bools as long as K < V / 8.
    """
    check.dtype("sampling_masks", check.tensor("sampling_masks", sampling_masks), torch.bool)
    if sampling_masks.dim() < 1 or sampling_masks.numel() == 0:
        raise ValueError(f"sampling_masks [..., V] holds nothing: shape {list(sampling_masks.shape)}")
    flat = sampling_masks.flatten(0, -2) if sampling_masks.dim() > 1 else sampling_masks[None]
    count = flat.sum(-1)
    row, token = flat.nonzero(as_tuple=True)
    slot = torch.arange(row.shape[0], device=row.device) - (count.cumsum(0) - count)[row]
    ids = torch.full((flat.shape[0], max(1, int(count.max()))), -1, dtype=torch.int64, device=flat.device)
    ids[row, slot] = token
    return ids.view(*sampling_masks.shape[:-1], -1)


def _support(chosen: Tensor) -> Tensor | None:
    """Support ``[N, K]`` of the scored tokens, or None where it is the whole vocabulary."""
    if chosen.dtype == torch.int64:
        return chosen
    if chosen.shape[0] == 0 or bool(chosen.all()):
        return None
    return support_ids(chosen)


def _check(
    input_ids: Any, attention_mask: Any, sampling_masks: Any, unmask_positions: Any, completion_ids: Any
) -> None:
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("B", "T"))
    check.tensor("attention_mask", attention_mask)
    check.dtype("completion_ids", check.tensor("completion_ids", completion_ids), torch.int64)
    check.shape("completion_ids", completion_ids, (input_ids.shape[0], "L"), " (B as input_ids)")
    if not 0 < completion_ids.shape[1] <= input_ids.shape[1]:
        raise ValueError(
            f"completion_ids {list(completion_ids.shape)} must be the last L of the T tokens of input_ids "
            f"{list(input_ids.shape)}"
        )
    size = tuple(completion_ids.shape)
    check.dtype("unmask_positions", check.tensor("unmask_positions", unmask_positions), torch.bool)
    check.shape("unmask_positions", unmask_positions, size, " (as completion_ids)")
    check.dtype("sampling_masks", check.tensor("sampling_masks", sampling_masks), torch.bool, torch.int64)
    check.shape("sampling_masks", sampling_masks, (*size, "V" if sampling_masks.dtype == torch.bool else "K"))
    for name, value in (
        ("completion_ids", completion_ids),
        ("unmask_positions", unmask_positions),
        ("sampling_masks", sampling_masks),
    ):
        check.same_device(name, value, "input_ids", input_ids)
