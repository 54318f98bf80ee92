"""DARE (verl): the BGPO actors' micro-batches and the policy update, and the scoring of three of its other actors.

Serves yjyddq/DARE, verl/workers/actor. Replaced, by functions of the same signature:

* ``DLLMDataParallelPPOActor._forward_micro_batch`` of llada_dp_actor_bgpo.py, which dream_dp_actor_bgpo.py inherits:
  ``forward_micro_batch``;
* the loop over MC samples in ``update_policy`` of both: ``bgpo_update``;
* ``_compute_block_diffusion_token_losses`` of sdar_dp_actor_bgpo.py and llada2_dp_actor_bgpo.py:
  ``block_diffusion_token_losses``;
* ``_forward_micro_batch_mdpo`` of llada_dp_actor_mdpo.py, ``_forward_ar_position_chunk`` of llada_dp_actor_justgrpo.py.

With M_j the tokens that sample j masks, p_j their share, R the padded response length, and d_j = (ell_j - old_j) / R:

    ell_j = sum_{k in M_j} log p(y_k | noisy_j) / p_j          log_prob = mean_j ell_j,  loss_per_sample = ell_j / R
    loss  = - mean_j sum_b w_b g_bj,   g = A (1 + d) for A > 0, A exp(d) for A < 0, clipped as compute_policy_loss_bgpo
                                       w from ``loss_agg_mode``

Saved: upstream makes the logits of all packed tokens and, sequence by sequence, a [T, V] copy of them in fp32; here the
head runs on M_j alone. ``bgpo_update`` computes value and gradient in one pass over the head, and sequences with zero
advantage cost nothing. Masks need not be stored or sent (13 bytes a token and sample): pass ``seed`` for those of
``bgpo_masks``, in the old policy's pass and in the update alike.

What differs from upstream:

* 1 + d is used as it is, where upstream takes exp(log(1 + d)), which is NaN for d <= -1. ``actor/ppo_kl`` is the mean
  of -d (upstream: of -log(1 + d) where A > 0).
* The loss of a micro-batch of dynamic size is scaled by its number of sequences; upstream's LLaDA actor has rebound
  ``data`` to a dict by then and counts its keys.
* ``entropy`` is that of the model's predictions, an estimate of its sum over all tokens in proportion to 1/p_j, per
  token. Upstream returns -p log p of the whole response's likelihood p, which underflows to 0.
* Sequences run without padding, one length at a time, instead of packed by ``cu_seqlens``; Dream's first row borrows
  nothing from the sequence before it. Sequence parallelism (Ulysses) is refused.
* Masks are explicit, so a response may hold the mask token; upstream asserts that it does not.
* The temperature is not applied to the ELBO, as upstream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..estimators import bgpo_backward
from ..masks import random_mask
from ..models import HeadSpec
from ._common import content_ids
from ._completions import score_rows
from ._dare_actors import (
    autocast,
    block_diffusion_token_losses,
    forward_ar_position_chunk,
    forward_micro_batch_mdpo,
    refuse_sequence_parallelism,
)
from ._dare_bound import aggregation, metrics, per_sequence, weights
from ._subsets import explicit_draw

__all__ = [
    "bgpo_masks",
    "bgpo_update",
    "block_diffusion_token_losses",
    "forward_ar_position_chunk",
    "forward_micro_batch",
    "forward_micro_batch_mdpo",
]


def forward_micro_batch(
    self: Any,
    micro_batch: Any,
    temperature: float,
    n_l: int,
    mc_num: int,
    calculate_entropy: bool = False,
    call_fn_name: str = "",
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``_forward_micro_batch`` of the BGPO actors for LLaDA and Dream.

    Args:
        self: the actor; ``actor_module`` is read, and ``MASK_TOKEN_ID`` with ``seed``.
        micro_batch: dict or TensorDict: ``input_ids [B, T]``, ``responses [B, R]``, ``attention_mask [B, T]``, and
            without ``seed`` the masks ``perturbed_seq``, ``mask_indices``, ``p_mask``, ``[B, mc_num, T]`` each.
        temperature, n_l, call_fn_name: taken and not used, as upstream.
        mc_num: Monte Carlo samples.
        calculate_entropy: also return the entropy.
        seed: draw the masks of :func:`bgpo_masks` instead of reading them.
        sample_ids: ``[B]`` int64, what drawn masks depend on besides the seed. None: the tokens themselves.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        ``(entropy [B, R] or None, log_prob [B, R], loss_per_sample [B, mc_num, R])``, constant along R but for the
        entropy; differentiable.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; tensors of other shapes; sequence parallelism.
    """
    refuse_sequence_parallelism(self)
    ids, length, attended = _sequences(micro_batch)
    noisy, masked, share = _masks(self, micro_batch, mc_num, seed, sample_ids)
    with autocast(ids.device):
        found = score_rows(
            self.actor_module, noisy.flatten(0, 1), masked.flatten(0, 1), ids[:, None].expand_as(noisy).flatten(0, 1),
            return_entropy=calculate_entropy, attention_mask=attended[:, None].expand_as(noisy).flatten(0, 1),
            micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
        )  # fmt: skip
    share = torch.where(masked, share, 1.0)
    weighted = [value.view(noisy.shape) / share for value in found]  # 0 where nothing is masked
    samples = weighted[0].sum(-1)  # [B, n]
    log_prob = samples.mean(1)[:, None].expand(-1, length)
    per_sample = (samples / length)[..., None].expand(-1, -1, length).contiguous()
    entropy = weighted[1].mean(1)[:, -length:] if calculate_entropy else None
    return entropy, log_prob, per_sample


def bgpo_update(
    self: Any,
    data: Any,
    response_mask: Tensor | None = None,
    *,
    seed: int | None = None,
    mc_num: int | None = None,
    sample_ids: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> dict[str, float]:
    """The loop over MC samples of ``update_policy``: adds a micro-batch's gradient to .grad, returns its metrics.

    Args:
        self: the actor; read are ``actor_module``, ``config`` (``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``,
            ``clip_ratio_c``, ``loss_agg_mode``, ``use_dynamic_bsz``, ``ppo_mini_batch_size``, ``entropy_coeff``,
            ``use_kl_loss``) and ``gradient_accumulation``.
        data: dict or TensorDict: as :func:`forward_micro_batch`, ``advantages [B, R]``, one value per sequence, and
            ``old_loss_per_sample [B, mc_num, R]``; without the latter the update is on-policy.
        response_mask: ``[B, R]`` of 0 and 1, tokens that ``loss_agg_mode`` counts. None: the attended ones.
        seed, sample_ids: as :func:`forward_micro_batch`, the same as for the old policy.
        mc_num: with ``seed``, the number of samples. None: that of ``self.mc_num``.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.bgpo_backward`.

    Returns:
        ``actor/pg_loss``, ``actor/pg_clipfrac``, ``actor/ppo_kl``, ``actor/pg_clipfrac_lower``, means over samples;
        sequences with zero advantage count as d = 0.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.bgpo_backward`; an entropy bonus or a KL term (keep the loop over
            :func:`forward_micro_batch` for these), advantages or shares that vary within a sequence.
        On every exception ``.grad`` is as it was.
    """
    refuse_sequence_parallelism(self)
    config = self.config
    if config.entropy_coeff != 0 or config.use_kl_loss:
        raise ValueError(
            f"bgpo_update serves the bound alone, not entropy_coeff={config.entropy_coeff} and "
            f"use_kl_loss={config.use_kl_loss}: keep the loop of update_policy, over forward_micro_batch"
        )
    ids, length, attended = _sequences(data)
    counted = (attended[:, -length:] if response_mask is None else response_mask).float()
    check.shape("response_mask", counted, (ids.shape[0], length), " (as responses)")
    advantages = per_sequence(data["advantages"], counted.bool())
    if seed is None:
        mc_num = data["perturbed_seq"].shape[1]
    noisy, masked, share = _masks(self, data, self.mc_num if mc_num is None else mc_num, seed, sample_ids)
    response = attended.bool().clone()
    response[:, :-length] = False
    draw = explicit_draw(ids, noisy, masked, weights(masked, share) / length)
    old = data["old_loss_per_sample"][..., 0].float() if "old_loss_per_sample" in set(data.keys()) else None
    aggregate = aggregation(counted, config.loss_agg_mode)
    parts = self.gradient_accumulation if not config.use_dynamic_bsz else config.ppo_mini_batch_size / ids.shape[0]
    low, high = (config.clip_ratio if c is None else c for c in (config.clip_ratio_low, config.clip_ratio_high))
    dual = config.get("clip_ratio_c", 3.0)
    with autocast(ids.device):
        step = bgpo_backward(
            self.actor_module, ids, response, advantages * aggregate, old_logprob=old, length_norm=False,
            clip_range=(low, high), dual_clip=dual, normalizer=parts, attention_mask=attended, draw=draw,
            micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
        )  # fmt: skip
    d = torch.zeros_like(step.logprob) if old is None else step.logprob - old
    d = torch.where(advantages[:, None] == 0, 0.0, d)  # sequences that were not scored
    return metrics(step.loss * parts, d, advantages, counted, (low, high, dual))


def bgpo_masks(
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    *,
    mc_num: int,
    seed: int,
    mask_token_id: int,
    sample_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``(perturbed_seq, mask_indices, p_mask)``, ``[B, mc_num, T]`` each, by the law of ``_forward_process_bgpo``.

    Stratified counts l in 1..L of the L attended response tokens, a uniform l-subset of them, p = l / L. By counter
    from (seed, sample id, sample, position): the same for a sequence in any batch, and no random state is touched.
    """
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("B", "T"))
    check.shape(
        "attention_mask", check.tensor("attention_mask", attention_mask), tuple(input_ids.shape), " (as input_ids)"
    )
    length = check.integer("response_length", response_length, 1, input_ids.shape[1])
    response = attention_mask.bool().clone()
    response[:, :-length] = False
    if sample_ids is None:
        sample_ids = content_ids(input_ids, attention_mask)
    draw = random_mask(
        input_ids, response, mask_token_id=mask_token_id, n_mc=mc_num, seed=seed, sample_ids=sample_ids, backend=backend
    )
    masked = torch.zeros(draw.noisy_ids.shape, dtype=torch.bool, device=input_ids.device)
    masked.view(-1)[draw.rows] = True
    share = draw.count / response.sum(-1, keepdim=True)
    return draw.noisy_ids, masked, share[..., None].expand(draw.noisy_ids.shape)


def _sequences(micro_batch: Any) -> tuple[Tensor, int, Tensor]:
    """Clean ids ``[B, T]``, response length, attention mask ``[B, T]``."""
    ids, length = micro_batch["input_ids"], micro_batch["responses"].shape[-1]
    check.dtype("input_ids", check.tensor("input_ids", ids), torch.int64)
    check.shape("input_ids", ids, ("B", "T"))
    attended = micro_batch["attention_mask"]
    check.shape("attention_mask", attended, tuple(ids.shape), " (as input_ids)")
    return ids, check.integer("the length of responses", length, 1, ids.shape[1]), attended


def _masks(
    actor: Any, micro_batch: Any, mc_num: Any, seed: int | None, sample_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model sees, the tokens to score, and their share: ``[B, mc_num, T]`` each."""
    ids = micro_batch["input_ids"]
    mc_num = check.integer("mc_num", mc_num, 1)
    if seed is not None:
        return bgpo_masks(
            ids, micro_batch["attention_mask"], micro_batch["responses"].shape[-1], mc_num=mc_num, seed=seed,
            mask_token_id=actor.MASK_TOKEN_ID, sample_ids=sample_ids,
        )  # fmt: skip
    batch, tokens = ids.shape
    found = []
    for name in ("perturbed_seq", "mask_indices", "p_mask"):
        value = check.tensor(name, micro_batch[name])
        if value.dim() != 3 or value.shape[0] != batch or value.shape[1] < mc_num or value.shape[2] != tokens:
            raise ValueError(
                f"{name} must have shape {[batch, mc_num, tokens]} (B, mc_num, T), got {list(value.shape)}"
            )
        found.append(value[:, :mc_num])
    noisy, masked, share = found
    masked = masked.bool()
    wrong = masked & ~(share > 0)
    if bool(wrong.any()):
        raise ValueError(f"p_mask must be positive where mask_indices are set, got {share[wrong][:4].tolist()}")
    return noisy, masked, share
