"""TRL's per-token log-probabilities, for a masked diffusion model inside ``GRPOTrainer``.

Replaces ``GRPOTrainer._get_per_token_logps_and_entropies`` of huggingface/trl, trl/trainer/grpo_trainer.py (0.20 and
later: a pair, from 1.7 on a triple; ``get_per_token_logps`` serves 0.15 to 0.19, where the method had that name).
TRL's own function scores token i with the logits of row i-1 of a clean sequence, which means nothing for a diffusion
model: it sees the tokens that it is asked for.

    scheme="full"       lp_k = log p(y_k | prompt, whole completion masked)          one pass (diffu-GRPO), the default
    any other scheme    lp_k = 1/n sum_j w_j [k masked in sample j] log p(y_k | noisy y in sample j, prompt)

so that the sum over k is the ELBO estimate of the sequence. Logits are divided by ``self.temperature``, as in TRL.

Saved: the head runs on masked completion tokens alone, and no [batch, L, V] logits are made. Several samples or chunks
under grad mode leave no graph behind.

Masks: TRL passes no seed, shuffles sequences between generation and update, and scores old, reference and current
policy in batches of different sizes. Masks are therefore a function of ``args.seed`` and the sequence's own tokens: all
of these calls, inner iterations included, see the same masks of a sequence, and a new completion gets new ones.

What differs from upstream: padding (left, and after EOS) is cut away, and its log-probabilities and entropies are 0;
the shift is the model's (Dream: row i-1), not always 1. Images and the load-balancing loss of experts are refused.
Generation is not replaced: TRL's ``generate`` is for causal models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..masks import CountSchedule, MaskDraw
from ..models import HeadSpec, unwrap
from ._common import content_ids
from ._completions import check_padded, chunk_tokens, draw_masks, inside, score_rows


def get_per_token_logps_and_entropies(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    num_images: list[int] | None = None,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    num_tiles: list[int] | None = None,
    image_sizes: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    image_position_ids: Tensor | None = None,
    *,
    pixel_position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, None]:
    """``GRPOTrainer._get_per_token_logps_and_entropies``.

    Args:
        self: the trainer; ``temperature``, ``args.seed``, ``processing_class.mask_token_id`` and, where it exists,
            ``_entropy_bonus_enabled`` are read. With an attribute ``aux_loss_enabled`` (TRL 1.7 and later) a triple is
            returned, else a pair.
        model: the policy or the reference, wrapped or not.
        input_ids: ``[N, T]`` int64, prompt and completion. attention_mask: ``[N, T]`` of 0 and 1.
        logits_to_keep: L, length of the completion.
        batch_size: sequences per chunk; None lets ``micro_batch_tokens`` decide.
        compute_entropy: return entropies too; they carry gradients where TRL's entropy bonus asks for them.
        compute_aux_loss: refused when True.
        token_type_ids: ``[N, T]``, given to the model. pixel_values and all others: refused unless None.
        options: keyword arguments of :func:`completion_logprob`.

    Returns:
        (logp ``[N, L]`` fp32, entropies ``[N, L]`` or None), and None once more for TRL 1.7 and later. Both are 0 where
        nothing is scored.

    Raises:
        TypeError, ValueError: as :func:`completion_logprob`; images; the auxiliary loss of experts.
    """
    _refuse_images(
        pixel_values=pixel_values, image_grid_thw=image_grid_thw, num_images=num_images,
        pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes, num_tiles=num_tiles,
        image_sizes=image_sizes, mm_token_type_ids=mm_token_type_ids, image_position_ids=image_position_ids,
        pixel_position_ids=pixel_position_ids,
    )  # fmt: skip
    if compute_aux_loss:
        raise ValueError("compute_aux_loss needs the router's logits: set router_aux_loss_coef to 0 in GRPOConfig")
    logp, entropy = completion_logprob(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, token_type_ids, **options
    )
    if entropy is not None and not getattr(self, "_entropy_bonus_enabled", False):
        entropy = entropy.detach()
    return (logp, entropy, None) if hasattr(self, "aux_loss_enabled") else (logp, entropy)


def get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    **options: Any,
) -> Tensor:
    """``GRPOTrainer._get_per_token_logps`` of TRL 0.16 to 0.19 (0.15 has no temperature): logp ``[N, L]`` alone."""
    return completion_logprob(self, model, input_ids, attention_mask, logits_to_keep, batch_size, **options)[0]


def completion_logprob(
    trainer: Any,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    token_type_ids: Tensor | None = None,
    *,
    scheme: str = "full",
    n_mc: int = 1,
    schedule: str | CountSchedule = "stratified",
    prompt_mask_prob: float = 0.0,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    mask_token_id: int | None = None,
    draw: MaskDraw | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Both of the above, and the options they take.

    Args:
        scheme, n_mc, schedule: as :func:`random_mask`; over the attended completion tokens.
        prompt_mask_prob: mask prompt tokens with this probability (d1: 0.3).
        seed: None: ``trainer.args.seed``.
        sample_ids: ``[N]`` int64, what masks depend on besides the seed. None: the tokens themselves.
        mask_token_id: None: the tokenizer's, else that of the model's config.
        draw: explicit masks over ``[N, n, T]``, used as they are; rows on the attended completion.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        logp ``[N, L]`` and, with ``compute_entropy``, entropies: of a token, the mean over the samples that mask it.
    """
    completion = check_padded(input_ids, attention_mask, logits_to_keep)
    scored = completion & (attention_mask != 0)
    if draw is None:
        sample_ids = content_ids(input_ids, attention_mask) if sample_ids is None else sample_ids
        masks = draw_masks(
            scored, seed=trainer.args.seed if seed is None else seed, sample_ids=sample_ids, n_mc=n_mc, scheme=scheme,
            schedule=schedule, context=~completion & (attention_mask != 0), context_prob=prompt_mask_prob,
            attention_mask=attention_mask, backend=backend,
        )  # fmt: skip
        noisy = input_ids[:, None].masked_fill(masks.masked, _mask_token_id(trainer, model, mask_token_id))
        rows, weight = masks.masked & scored[:, None], masks.weight
    else:
        noisy, rows, weight = _explicit(draw, input_ids, scored)
    found = _score(
        model, noisy, rows, input_ids, attention_mask, token_type_ids, temperature=trainer.temperature,
        return_entropy=compute_entropy, micro_batch_tokens=chunk_tokens(batch_size, input_ids, micro_batch_tokens),
        head=head, backend=backend,
    )  # fmt: skip
    logp = (found[0] * weight[..., None].to(found[0].dtype)).mean(1)[:, -logits_to_keep:]
    if not compute_entropy:
        return logp, None
    return logp, (found[1].sum(1) / rows.sum(1).clamp(min=1))[:, -logits_to_keep:]


def _score(
    model: nn.Module, noisy: Tensor, rows: Tensor, input_ids: Tensor, attention_mask: Tensor,
    token_type_ids: Tensor | None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Log-probabilities, and entropies when asked for, ``[N, n, T]`` each; 0 where not in ``rows [N, n, T]``."""

    def each_sample(values: Tensor) -> Tensor:
        return values.repeat_interleave(noisy.shape[1], 0)

    found = score_rows(
        model, noisy.flatten(0, 1), rows.flatten(0, 1), each_sample(input_ids),
        attention_mask=each_sample(attention_mask),
        model_kwargs=None if token_type_ids is None else {"token_type_ids": each_sample(token_type_ids)}, **options,
    )  # fmt: skip
    return [values.view(rows.shape) for values in found]


def _explicit(draw: Any, input_ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the model sees ``[N, n, T]``, what is scored of it, and the weights ``[N, n]``."""
    if not isinstance(draw, MaskDraw):
        raise TypeError(f"draw must be a MaskDraw, got {type(draw).__name__}")
    count, tokens = input_ids.shape
    check.shape("draw.noisy_ids", draw.noisy_ids, (count, "n", tokens), " (N and T of input_ids)")
    check.same_device("draw", draw.noisy_ids, "input_ids", input_ids)
    rows = torch.zeros_like(draw.noisy_ids, dtype=torch.bool)
    rows.view(-1)[draw.rows] = True
    inside("draw.rows", rows, scored[:, None])
    return draw.noisy_ids, rows, draw.segment_weight


def _mask_token_id(trainer: Any, model: nn.Module, given: int | None) -> int:
    found = given
    if found is None:
        found = getattr(trainer.processing_class, "mask_token_id", None)
    if found is None:
        found = getattr(getattr(unwrap(model), "config", None), "mask_token_id", None)
    if found is None:
        raise ValueError(
            "mask_token_id is missing: neither the trainer's processing_class nor the model's config has one; pass it"
        )
    return check.integer("mask_token_id", found, 0)


def _refuse_images(**arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: models with images are not served")
