"""d1's per-token log-probabilities (diffu-GRPO); wd1 and unturtle call the same function.

Replaces ``DiffuGRPOTrainer._get_per_token_logps`` of dllm-reasoning/d1, diffu-grpo/diffu_grpo_trainer.py. The methods
of that name in xiaohangt/wd1, wd1/trainers/rev_grpo_trainer.py (and its PSR and reference-policy variants), and in
nishide-dev/unturtle, unturtle/diffusion/grpo_trainer.py, have the same signature and law: the same replacement serves.

    lp_k = log p(y_k | prompt with tokens masked at p_mask_prompt, whole completion masked)        one pass, weight 1

Saved: the head runs on the I*B*L completion tokens instead of I*B*T, and no logits are made, where d1 makes
[I*B, T, V] of them, slices, and computes the cross-entropy of a copy. Several micro-batches leave no graph behind.

What differs from upstream:

* Prompt masks are drawn by counter from (seed, sequence, position). A sequence has the same masks in any batch, order
  or micro-batch, so old, reference and current policy always see the same ones. The bits are not upstream's.
* The global random state is left alone. Upstream calls ``set_seed`` with one of 4096 seeds here, which also rewinds
  dropout and the draw of the next mask seeds.
* A log-probability is computed in fp32 whatever the model's dtype, where upstream takes the cross-entropy of the
  logits as the model gave them and casts the result.
* ``pad_token_id`` cuts left padding away. Without it, padding is attended, as upstream does.
* ``cfg_scale > 0`` is refused: guidance mixes the logits of two forward passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import HeadSpec
from ._completions import (
    check_iterations,
    inside,
    one_step_ids,
    refuse_guidance,
    same_as_input,
    score_rows,
    without_left_padding,
)


def get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    mask_seeds: Any,
    *,
    noisy_ids: Tensor | None = None,
    rows: Tensor | None = None,
    sample_ids: Tensor | None = None,
    pad_token_id: int | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``DiffuGRPOTrainer._get_per_token_logps``: log-probabilities of every completion token, all of them masked.

    Args:
        self: the trainer; ``args.mask_id``, ``args.p_mask_prompt`` and ``args.cfg_scale`` are read.
        model: the policy, wrapped or not.
        input_ids: ``[I, B, T]`` int64, prompt and completion, once per inner iteration.
        logits_to_keep: L, length of the completion.
        mask_seeds: I seeds, a list or a tensor.
        noisy_ids: ``[I, B, T]`` int64, what the model sees, instead of masks drawn here.
        rows: ``[I, B, T]`` bool, completion tokens to score; the others give 0. None: all of them.
        sample_ids: ``[B]`` int64, what masks depend on besides the seed. None: the tokens themselves.
        pad_token_id: cut the leading run of this id off every prompt. None: padding is attended, as upstream does.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        ``[I, B, L]`` fp32 (fp64 for a model in fp64).

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; shapes that disagree, not one seed per iteration,
            guidance.
    """
    completion, seeds = check_iterations(input_ids, logits_to_keep, mask_seeds)
    refuse_guidance(self.args.cfg_scale, "self.args.cfg_scale")
    attended = without_left_padding(input_ids, completion, pad_token_id)
    if noisy_ids is None:
        parts = (None,) * len(seeds) if attended is None else attended
        noisy = torch.stack([
            one_step_ids(
                ids, completion.expand_as(ids), seed, self.args.mask_id, self.args.p_mask_prompt,
                attention_mask=part, sample_ids=sample_ids, backend=backend,
            )
            for ids, seed, part in zip(input_ids, seeds, parts, strict=True)
        ])  # fmt: skip
    else:
        noisy = same_as_input("noisy_ids", noisy_ids, input_ids, torch.int64)
    scored = completion.expand_as(input_ids)
    if rows is not None:
        scored = same_as_input("rows", rows, input_ids, torch.bool)
        inside("rows", scored, completion)
    (logp,) = score_rows(
        model, noisy.flatten(0, 1), scored.flatten(0, 1), input_ids.flatten(0, 1),
        attention_mask=None if attended is None else attended.flatten(0, 1), micro_batch_tokens=micro_batch_tokens,
        head=head, backend=backend,
    )  # fmt: skip
    return logp[:, -logits_to_keep:].view(*input_ids.shape[:2], logits_to_keep)


# wd1 and unturtle: their methods have this signature and compute this.
wd1_get_per_token_logps = get_per_token_logps
unturtle_get_per_token_logps = get_per_token_logps
