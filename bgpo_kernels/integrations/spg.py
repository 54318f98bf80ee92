"""SPG (facebookresearch/SPG): replaces ``SPGTrainer._get_per_seq_logps`` of ``spg/spg_trainer.py``.

With completion length len, n = ``num_t`` masks per sequence, M_j the masked completion tokens of mask j, s_j = |M_j|:

    E = mean_j (1/s_j) sum_{k in M_j} log p_k                                              every sequence with A > 0
    U = (1/b) mean_k log mean_j( 1[k in M_j] p_k^b / (s_j/len) ),  over k masked once or more
    A <= 0:  "elbo" E,  "eubo" U,  "mix" (1 - w) E + w U,  "zero" 0        b = ``eubo_beta``, w = ``mix_weight``

Masks follow ``SPGTrainer.forward_process``: of the completion (up to its end of sequence) "all" masks every token,
"random" a uniform subset of a uniform size between ``min_t`` and ``max_t`` of len, "block_all" every token from a
random block on, "block_random" a random subset of a random block and every token of later blocks. Tokens after the end
are always masked and never scored. With ``use_mask_prompt`` clean tokens are masked with probability
``p_mask_prompt``: those of the prompt, and for the block modes also the completion's before the block, which then
count in M_j.

Saved: the head runs on the M_j alone, once instead of twice (a cross-entropy and a softmax of all logits), and the
graphs of the n maskings are not kept: one micro-batch of them is alive at a time.

What differs from the original:

* masks come from a counter-based stream keyed (seed, sequence, mask, position): global random state is untouched, and
  masks do not depend on the batch around a sequence;
* left padding of the prompt is cut away (``prompt_mask``), where the original leaves it to the model, which may attend
  to it or turn causal;
* U is computed from log-probabilities, so a token with p^b below the smallest fp32 number counts (the original drops
  it) and logits of 16 bits cost no accuracy;
* block modes build a mask of the tokens up to the end of the drawn block and never apply it, so the original scores
  later blocks as well. That is kept, since published runs were trained so; ``later_blocks=False`` applies it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec
from ._common import content_ids
from ._completions import check_iterations, refuse_guidance, score_rows
from ._subsets import count_words, in_range, rank_of, scattered, subsets

MODES = ("all", "random", "block_all", "block_random")
ESTIMATES = ("elbo", "eubo", "mix", "zero")
_NEVER = -1e30  # stands for log 0 where a token is not masked: minus infinity would make gradients NaN


class Masks(NamedTuple):
    """Masks of one iteration: what the model sees, and which tokens count."""

    noisy_ids: Tensor  # [B, n, T] int64
    rows: Tensor  # [B, n, T] bool


def get_per_seq_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    mask_seeds: Sequence[int] | Tensor,
    prompt_mask: Tensor | None = None,
    completion_mask: Tensor | None = None,
    reward_mask: Tensor | None = None,
    *,
    noisy_ids: Tensor | None = None,
    rows: Tensor | None = None,
    sample_ids: Tensor | None = None,
    later_blocks: bool = True,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sequence-level estimates ``[I, B]`` fp32, as ``SPGTrainer._get_per_seq_logps``; see the module's docstring.

    Args:
        self: the trainer; read are ``args.forward_type, num_t, min_t, max_t, block_length, use_mask_prompt,
            p_mask_prompt, mask_id, cfg_scale, logp_estimation, eubo_beta, mix_weight``.
        input_ids: ``[I, B, T]`` prompt and completion, the same B sequences in every iteration.
        logits_to_keep: completion tokens, at the end of T. mask_seeds: I seeds.
        prompt_mask: ``[B, T - L]`` of 0 and 1, 0 is padding. completion_mask: ``[B, L]``, 1 up to the end of sequence.
        reward_mask: ``[B]`` bool, True where the advantage is positive.
        noisy_ids, rows: explicit masks ``[I, B, n, T]``: what the model sees, and which completion tokens count.
        sample_ids: ``[B]`` int64, whose masks are whose; default: from the tokens themselves.
        later_blocks: see above. micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Raises:
        ValueError, TypeError: shapes that disagree, a mode that is not known, ``cfg_scale`` above 0 (the original fails
            there too), and as :func:`bgpo_kernels.row_logprob`.
    """
    args = self.args
    _, seeds = check_iterations(input_ids, logits_to_keep, mask_seeds)
    completion_mask, reward_mask = _check(args, input_ids, logits_to_keep, completion_mask, reward_mask)
    iterations, batch, tokens = input_ids.shape
    attended = _attended(prompt_mask, completion_mask, input_ids)
    if noisy_ids is None:
        ids = content_ids(input_ids[0], attended) if sample_ids is None else sample_ids
        drawn = [
            draw_masks(args, clean, seed, completion_mask, attended, sample_ids=ids, later_blocks=later_blocks)
            for clean, seed in zip(input_ids, seeds, strict=True)
        ]
        noisy_ids, rows = torch.stack([m.noisy_ids for m in drawn]), torch.stack([m.rows for m in drawn])
    else:
        check.shape("noisy_ids", noisy_ids, (iterations, batch, "n", tokens), " (I, B, n, T)")
        _check_rows(rows, noisy_ids, completion_mask)
    assert rows is not None
    samples = noisy_ids.shape[2]
    clean = input_ids[:, :, None].expand_as(noisy_ids).reshape(-1, tokens)
    padding = None if attended is None else attended[None, :, None].expand_as(noisy_ids).reshape(-1, tokens)
    (logp,) = score_rows(
        model, noisy_ids.reshape(-1, tokens), rows.reshape(-1, tokens), clean, attention_mask=padding,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    logp, scored = logp.view(rows.shape)[..., -logits_to_keep:], rows[..., -logits_to_keep:]
    length = completion_mask.sum(-1).clamp(min=1).view(1, batch, 1).expand(iterations, batch, samples)
    return estimates(logp, scored, length, reward_mask.bool(), args.logp_estimation, args.eubo_beta, args.mix_weight)


def estimates(
    logp: Tensor,  # [I, B, n, L], 0 where not scored
    scored: Tensor,  # [I, B, n, L] bool
    length: Tensor,  # [I, B, n]
    positive: Tensor,  # [B] bool
    estimation: str,
    beta: float,
    mix_weight: float,
) -> Tensor:
    """SPG's estimates ``[I, B]`` from log-probabilities of masked tokens."""
    count = scored.sum(-1)
    elbo = (logp.sum(-1) / count.clamp(min=1)).mean(-1)
    if estimation == "elbo":
        return elbo
    if estimation == "zero":
        return torch.where(positive, elbo, torch.zeros_like(elbo))
    share = (count.clamp(min=1).to(logp.dtype) / length).log()[..., None]  # log(s/len)
    power = torch.where(scored, beta * logp - share, torch.full_like(logp, _NEVER))
    ever = scored.any(2)
    log_mean = (power.logsumexp(2) - math.log(logp.shape[2])).masked_fill(~ever, 0.0)
    eubo = log_mean.sum(-1) / ever.sum(-1).clamp(min=1) / beta
    weight = 1.0 if estimation == "eubo" else mix_weight
    return torch.where(positive, elbo, weight * eubo + (1 - weight) * elbo)


def draw_masks(
    args: Any,
    input_ids: Tensor,
    seed: int,
    completion_mask: Tensor,
    attended: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    later_blocks: bool = True,
) -> Masks:
    """The masks of one iteration.

    Args:
        args: the trainer's. input_ids: ``[B, T]``, the completion its last L tokens. seed: of this iteration.
        completion_mask: ``[B, L]``. attended: ``[B, T]`` bool without padding. Others: as :func:`get_per_seq_logps`.
    """
    ids = content_ids(input_ids, attended) if sample_ids is None else sample_ids
    completion = nn.functional.pad(completion_mask.bool(), (input_ids.shape[1] - completion_mask.shape[1], 0))
    prompt = torch.zeros_like(completion)
    prompt[:, : -completion_mask.shape[1]] = True
    real = torch.ones_like(prompt) if attended is None else attended
    if args.forward_type.startswith("block"):
        masked, clean, upto = _blocks(args, completion, completion_mask.shape[1], ids, seed)
    else:
        masked, clean = _whole(args, completion, ids, seed), prompt[:, None]
        upto = torch.ones_like(masked)
    if args.use_mask_prompt:
        noise = scattered(rank_of(real), masked.shape[1], args.p_mask_prompt, ids, seed)
        masked = masked | (clean & noise & real[:, None])
    rows = masked & completion[:, None]
    if not later_blocks:
        rows = rows & upto
    after_end = ~completion & ~prompt
    return Masks(torch.where(masked | after_end[:, None], args.mask_id, input_ids[:, None]), rows)


def _whole(args: Any, completion: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Masked completion tokens ``[B, n, T]`` of the modes without blocks."""
    length = completion.sum(-1)
    if args.forward_type == "all":
        return completion[:, None].expand(-1, args.num_t, -1)
    word = count_words(torch.arange(args.num_t, device=length.device), ids, seed)
    count = in_range(word, *_count_range(args, length[:, None]))
    allowed = completion[:, None].expand(-1, args.num_t, -1)
    return subsets(rank_of(completion), allowed, count, ids, seed)


def _blocks(args: Any, completion: Tensor, kept: int, ids: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masked completion tokens, clean tokens before the drawn block, and tokens up to its end; ``[B, n, T]`` each."""
    size, tokens = args.block_length, completion.shape[1]
    place = torch.arange(tokens, device=ids.device) - (tokens - kept)
    block = place.div(size, rounding_mode="floor")[None, None]
    own = ((completion.sum(-1) - 1).clamp(min=0) // size + 1)[:, None]  # blocks of the completion
    first = torch.zeros(1, dtype=torch.int64, device=ids.device)
    words = torch.stack([count_words(first, ids, seed, 1 + k)[:, 0] for k in range(kept // size)], -1)
    drawn = (words.argsort(dim=-1, stable=True)[:, : args.num_t] % own)[..., None]
    masked = (block >= drawn) & completion[:, None]
    if args.forward_type == "block_random":
        inside = (block == drawn) & completion[:, None]
        word = count_words(torch.arange(args.num_t, device=ids.device), ids, seed)
        count = in_range(word, *_count_range(args, inside.sum(-1)))
        masked = masked & ~inside | subsets(rank_of(completion), inside, count, ids, seed)
    return masked, (block < drawn).expand_as(masked), (block <= drawn).expand_as(masked)


def _count_range(args: Any, length: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of masked tokens."""
    low, high = ((length.double() * t).floor().long() for t in (args.min_t, args.max_t))
    low = torch.minimum(low.clamp(min=1), length)
    return low, torch.maximum(torch.minimum(high, length), low)


def _attended(prompt_mask: Tensor | None, completion_mask: Tensor, input_ids: Tensor) -> Tensor | None:
    """Bool ``[B, T]`` without the prompt's padding; every completion token is attended."""
    if prompt_mask is None:
        return None
    size = (input_ids.shape[1], input_ids.shape[2] - completion_mask.shape[1])
    check.shape("prompt_mask", check.tensor("prompt_mask", prompt_mask), size, " (B, T - logits_to_keep)")
    return torch.cat((prompt_mask.bool(), torch.ones_like(completion_mask, dtype=torch.bool)), -1)


def _check_rows(rows: Any, noisy_ids: Tensor, completion_mask: Tensor) -> None:
    check.dtype("rows", check.tensor("rows", rows), torch.bool)
    check.shape("rows", rows, tuple(noisy_ids.shape), " (as noisy_ids)")
    kept = completion_mask.shape[1]
    stray = bool(rows[..., :-kept].any()) or bool((rows[..., -kept:] & ~completion_mask.bool()[None, :, None]).any())
    if stray:
        raise ValueError("rows marks tokens outside the completion (completion_mask 0, or the prompt)")


def _check(args: Any, input_ids: Tensor, kept: int, completion_mask: Any, reward_mask: Any) -> tuple[Tensor, Tensor]:
    """The masks, checked, and the trainer's arguments."""
    batch = input_ids.shape[1]
    check.shape("completion_mask", check.tensor("completion_mask", completion_mask), (batch, kept), " (B, L)")
    check.shape("reward_mask", check.tensor("reward_mask", reward_mask), (batch,), " (True where A > 0)")
    refuse_guidance(args.cfg_scale, "args.cfg_scale")
    if args.logp_estimation not in ESTIMATES:
        raise ValueError(f"args.logp_estimation must be one of {', '.join(ESTIMATES)}; got {args.logp_estimation!r}")
    if args.forward_type not in MODES:
        raise ValueError(f"args.forward_type must be one of {', '.join(MODES)}; got {args.forward_type!r}")
    if args.forward_type == "all" and args.num_t != 1:
        raise ValueError(f"args.forward_type='all' masks everything, so args.num_t must be 1; got {args.num_t}")
    if args.forward_type.startswith("block"):
        check.integer("args.block_length", args.block_length, 1, kept)
        blocks, rest = divmod(kept, args.block_length)
        if rest or args.num_t > blocks:
            raise ValueError(
                f"args.block_length={args.block_length} must divide logits_to_keep={kept} into at least "
                f"args.num_t={args.num_t} blocks"
            )
    if args.forward_type.endswith("random") and not 0 <= args.min_t <= args.max_t <= 1:
        raise ValueError(f"0 <= args.min_t <= args.max_t <= 1 must hold, got {args.min_t} and {args.max_t}")
    return completion_mask, reward_mask
