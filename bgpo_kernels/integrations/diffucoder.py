"""DiffuCoder's coupled-GRPO per-token log-probabilities.

Replaces ``DiffuGRPOTrainer._get_per_token_logps`` of apple/ml-diffucoder, src/open_r1/coupled_grpo.py. A completion is
scored in three versions, with t in [0.2, 0.8] drawn once per seed:

    version 0: all masked;   1: a set M, each token with probability t;   2: the rest of the completion
    lp_k = (lp_k[0] + lp_k[1] / t) / 2   for k in M,      (lp_k[0] + lp_k[2] / (1 - t)) / 2   for the others

Saved: the head runs on 2L rows of a sequence, the L of version 0 and one more for every token where it is masked.
Upstream runs it on 3T rows, keeps [3*I*B, T, V] logits, and takes the log-softmax of a copy of them.

What differs from upstream:

* Version 2 masks what version 1 leaves. Upstream compares with ``<`` and ``>``, so a token whose random number equals
  t is in neither, and is then scored where the model sees it.
* Masks are drawn by counter from (seed, sequence, position). Upstream draws by place in the batch, and has to repeat
  its random numbers over the accumulation steps for the old policy to get the masks of the current one; here a sequence
  has its masks wherever it is. t is upstream's: the same function of the seed.
* The shift (row i-1 predicts token i) is read from the model: Dream and DiffuCoder have it, LLaDA has not. Upstream
  always shifts.
* Global random state is left alone; log-probabilities are computed in fp32; ``pad_token_id`` cuts left padding away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec
from ._common import content_ids
from ._completions import check_iterations, draw_masks, inside, same_as_input, score_rows, without_left_padding


def get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    mask_seeds: Any,
    *,
    masks: Tensor | None = None,
    mask_ratios: Sequence[float] | None = None,
    sample_ids: Tensor | None = None,
    pad_token_id: int | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``DiffuGRPOTrainer._get_per_token_logps`` of coupled-GRPO.

    Args:
        self: the trainer; ``processing_class.mask_token_id`` is read.
        model: the policy or the reference, wrapped or not.
        input_ids: ``[I, B, T]`` int64, prompt and completion, once per inner iteration.
        logits_to_keep: L, length of the completion (more than T means T, as upstream).
        mask_seeds: I seeds, a list or a tensor.
        masks: ``[I, B, T]`` bool, completion tokens masked in version 1, instead of masks drawn here.
        mask_ratios: t of every iteration, in (0, 1). None: drawn from the seeds.
        sample_ids: ``[B]`` int64, what masks depend on besides the seed. None: the tokens themselves.
        pad_token_id: cut the leading run of this id off every prompt. None: padding is attended, as upstream does.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        ``[B, I, L]`` fp32 (fp64 for a model in fp64), a view like upstream's.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; shapes that disagree, not one seed per iteration, a
            ratio outside (0, 1), a tokenizer without mask token.
    """
    if isinstance(input_ids, Tensor) and input_ids.dim() == 3 and isinstance(logits_to_keep, int):
        logits_to_keep = min(logits_to_keep, input_ids.shape[-1])
    completion, seeds = check_iterations(input_ids, logits_to_keep, mask_seeds)
    ratios = _ratios(mask_ratios, seeds)
    mask_token_id = _mask_token_id(self)
    attended = without_left_padding(input_ids, completion, pad_token_id)
    if masks is None:
        parts = [None] * len(seeds) if attended is None else list(attended)
        each = zip(input_ids, seeds, ratios, parts, strict=True)
        masks = torch.stack([coupled_masks(ids, logits_to_keep, s, t, sample_ids, a, backend) for ids, s, t, a in each])
    else:
        same_as_input("masks", masks, input_ids, torch.bool)
        inside("masks", masks, completion)
    everything = completion.expand_as(masks)
    rows = torch.stack([everything, masks, everything & ~masks])  # [3, I, B, T]
    noisy = torch.where(rows, mask_token_id, input_ids)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=input_ids.is_cuda):  # as upstream, on CUDA only
        (flat,) = score_rows(
            model, noisy.flatten(0, 2), rows.flatten(0, 2), input_ids.expand_as(rows).flatten(0, 2),
            attention_mask=None if attended is None else attended.expand(rows.shape).flatten(0, 2),
            micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
        )  # fmt: skip
    logp = flat.view(rows.shape)
    t = torch.tensor(ratios, dtype=logp.dtype, device=logp.device)[:, None, None]
    # A version is 0 where it masks nothing, and versions 1 and 2 never mask the same token.
    mixed = (logp[0] + logp[1] / t + logp[2] / (1 - t)) / 2
    return mixed[..., -logits_to_keep:].permute(1, 0, 2)


def coupled_masks(
    input_ids: Tensor,
    length: int,
    seed: int,
    ratio: float,
    sample_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``[B, T]`` bool: version 1 of these sequences, each of the last ``length`` tokens with probability ``ratio``."""
    if sample_ids is None:
        sample_ids = content_ids(input_ids, attention_mask)
    completion = torch.ones_like(input_ids[:, -length:], dtype=torch.bool)
    drawn = draw_masks(
        torch.zeros_like(completion), seed=seed, sample_ids=sample_ids, context=completion, context_prob=ratio,
        backend=backend,
    )  # fmt: skip
    prompt = torch.zeros_like(input_ids[:, :-length], dtype=torch.bool)
    return torch.cat([prompt, drawn.masked[:, 0]], -1)


def mask_ratio(seed: int) -> float:
    """t of a seed, uniform in [0.2, 0.8]: what upstream draws right after seeding Python's generator."""
    return random.Random(seed).uniform(0.2, 0.8)


def _ratios(given: Sequence[float] | None, seeds: list[int]) -> list[float]:
    if given is None:
        return [mask_ratio(seed) for seed in seeds]
    if len(given) != len(seeds):
        raise ValueError(f"mask_ratios must hold one ratio per iteration, {len(seeds)}; got {len(given)}")
    ratios = [check.number("mask_ratios", ratio, 0.0, exclusive=True, high=1.0) for ratio in given]
    if 1.0 in ratios:
        raise ValueError(f"mask_ratios must be below 1, since 1 / (1 - t) weighs the other version; got {ratios}")
    return ratios


def _mask_token_id(trainer: Any) -> int:
    found = trainer.processing_class.mask_token_id
    if found is None:
        raise ValueError("self.processing_class.mask_token_id is None: the tokenizer has no mask token")
    return check.integer("self.processing_class.mask_token_id", found, 0)
