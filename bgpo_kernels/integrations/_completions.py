"""What the trainers that score completions share: where to mask, row log-probabilities in place, checks.

Shapes: P sequences for the model, T tokens of prompt and completion, L of the completion, n maskings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import validation as check
from ..estimators import row_logprob
from ..masks import CountSchedule, random_mask
from ..models.patched import expand_rows
from ._common import content_ids


class Masks(NamedTuple):
    """n maskings of B sequences."""

    masked: Tensor  #: ``[B, n, T]`` bool, scored or context
    weight: Tensor  #: ``[B, n]`` fp32, of each scored token


def draw_masks(
    scored: Tensor,
    *,
    seed: int,
    sample_ids: Tensor,
    n_mc: int = 1,
    scheme: str = "full",
    schedule: str | CountSchedule = "stratified",
    context: Tensor | None = None,
    context_prob: float = 0.0,
    attention_mask: Tensor | None = None,
    backend: str = "auto",
) -> Masks:
    """:func:`random_mask` for trainers that know where tokens are, not what they are.

    ``scored [B, T]`` bool is masked by the scheme, ``context [B, T]`` bool with probability ``context_prob``. Which ids
    stand there plays no part: a completion may hold the mask token (a sampler can produce it) or padding ids, and a
    sequence may have nothing to score. Positions count attended tokens only, so padding changes nothing.
    """
    order = None
    if attention_mask is not None:  # attended tokens first
        order = (attention_mask == 0).int().argsort(dim=-1, stable=True)
        scored = scored.gather(-1, order)
        context = None if context is None else context.gather(-1, order)
    nothing = ~scored.any(-1, keepdim=True)  # a sequence needs a token to score, so these get one that is then cut off
    response = torch.cat([scored, nothing], -1)
    prompt = None if context is None else torch.cat([context, torch.zeros_like(nothing)], -1)
    draw = random_mask(
        torch.zeros_like(response, dtype=torch.int64), response, mask_token_id=1, n_mc=n_mc, seed=seed,
        sample_ids=sample_ids, scheme=scheme, schedule=schedule, prompt_mask=prompt, prompt_mask_prob=context_prob,
        backend=backend,
    )  # fmt: skip
    masked = draw.noisy_ids[..., :-1] == 1
    if order is not None:
        masked = torch.zeros_like(masked).scatter_(-1, order[:, None].expand_as(masked), masked)
    return Masks(masked, draw.segment_weight)


def one_step_ids(
    input_ids: Tensor,
    completion: Tensor,
    seed: int,
    mask_token_id: int,
    prompt_mask_prob: float,
    *,
    attention_mask: Tensor | None,
    sample_ids: Tensor | None,
    backend: str,
) -> Tensor:
    """``[B, T]``: the completion masked, prompt tokens masked with a probability (diffu-GRPO's one-step estimate)."""
    if sample_ids is None:
        sample_ids = content_ids(input_ids, attention_mask)
    attended = torch.ones_like(completion) if attention_mask is None else attention_mask != 0
    masks = draw_masks(
        completion & attended, seed=seed, sample_ids=sample_ids, context=~completion & attended,
        context_prob=prompt_mask_prob, attention_mask=attention_mask, backend=backend,
    )  # fmt: skip
    return input_ids.masked_fill(masks.masked[:, 0], mask_token_id)


def score_rows(
    model: nn.Module, noisy_ids: Tensor, rows: Tensor, clean_ids: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """(logp,) or (logp, entropy) ``[P, T]``, 0 outside ``rows [P, T]``: :func:`row_logprob`, rows or none.

    Without any, one token is scored and multiplied by 0, so that every rank of a data-parallel run has the gradients
    that the others wait for.
    """
    empty = not bool(rows.any())
    if empty:
        attention_mask = options.get("attention_mask")
        attended = torch.ones_like(rows) if attention_mask is None else attention_mask != 0
        rows = torch.zeros_like(rows)
        rows.view(-1)[attended.flatten().nonzero()[-1:, 0]] = True
    found = row_logprob(model, noisy_ids, rows, clean_ids, **options)
    values = found if isinstance(found, tuple) else (found,)
    return tuple(expand_rows(0.0 * value if empty else value, rows) for value in values)


def check_iterations(input_ids: Any, logits_to_keep: Any, mask_seeds: Any) -> tuple[Tensor, list[int]]:
    """The completion as ``[T]`` bool, and the seeds, of arguments ``[I, B, T]``, L and I seeds."""
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("I", "B", "T"))
    seeds = mask_seeds.tolist() if isinstance(mask_seeds, Tensor) else list(mask_seeds)
    seeds = [seed.item() if isinstance(seed, Tensor) else seed for seed in seeds]
    if len(seeds) != input_ids.shape[0]:
        raise ValueError(f"mask_seeds must hold one seed per iteration, {input_ids.shape[0]}; got {len(seeds)}")
    seeds = [check.integer("mask_seeds", seed, 0, check.MAX_SEED) for seed in seeds]
    return completion_of(input_ids, logits_to_keep), seeds


def check_padded(input_ids: Any, attention_mask: Any, logits_to_keep: Any) -> Tensor:
    """The completion as ``[T]`` bool, of arguments ``[N, T]``, ``[N, T]`` and L."""
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("N", "T"))
    check.shape(
        "attention_mask", check.tensor("attention_mask", attention_mask), tuple(input_ids.shape), " (as input_ids)"
    )
    check.same_device("attention_mask", attention_mask, "input_ids", input_ids)
    return completion_of(input_ids, logits_to_keep)


def chunk_tokens(batch_size: int | None, input_ids: Tensor, micro_batch_tokens: int | None) -> int | None:
    """What a trainer's chunk of sequences is in tokens, unless ``micro_batch_tokens`` says otherwise."""
    if batch_size is None or micro_batch_tokens is not None:
        return micro_batch_tokens
    return check.integer("batch_size", batch_size, 1) * input_ids.shape[1]


def completion_of(input_ids: Tensor, logits_to_keep: Any) -> Tensor:
    """``[T]`` bool, the last L tokens."""
    tokens = input_ids.shape[-1]
    length = check.integer("logits_to_keep", logits_to_keep, 1, tokens)
    return torch.arange(tokens, device=input_ids.device) >= tokens - length


def refuse_guidance(scale: float | None, name: str) -> None:
    """ValueError under classifier-free guidance."""
    if scale:
        raise ValueError(
            f"{name} is {scale}: guidance mixes the logits of two forward passes, which needs all of them; score with "
            "0 (generation may keep its own scale)"
        )


def without_left_padding(input_ids: Tensor, completion: Tensor, pad_token_id: int | None) -> Tensor | None:
    """Attention mask ``[..., T]`` that leaves out the leading run of padding of the prompt."""
    if pad_token_id is None:
        return None
    real = (input_ids != check.integer("pad_token_id", pad_token_id, 0)) | completion
    return (real.cumsum(-1) > 0).long()


def same_as_input(name: str, value: Any, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """An explicit mask or list of the shape of ``input_ids``."""
    check.dtype(name, check.tensor(name, value), dtype)
    check.shape(name, value, tuple(input_ids.shape), " (as input_ids)")
    check.same_device(name, value, "input_ids", input_ids)
    return value


def inside(name: str, rows: Tensor, allowed: Tensor, otherwise: str = "tokens outside the attended completion") -> None:
    """ValueError for rows that the result has no place for."""
    stray = rows & ~allowed
    if bool(stray.any()):
        raise ValueError(f"{name} marks {otherwise}, at {stray.nonzero()[:4].tolist()}")
