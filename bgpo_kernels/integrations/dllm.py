"""dllm's per-token log-probabilities (diffu-GRPO on TRL).

Replaces ``DiffuGRPOTrainer._get_per_token_logps`` of ZHZisZZ/dllm, dllm/pipelines/rl/grpo/trainer.py.

    lp_k = log p(y_k | prompt with tokens masked at p_mask_prompt, whole completion masked),   0 after EOS

Saved: the head runs on the completion tokens up to EOS, instead of all N*T; padding on either side never reaches the
model; no logits are made, where upstream has [batch_size, T, V] of them and their copy. Chunks of ``batch_size``
sequences under grad mode leave no graph behind, where upstream's graphs of all chunks stay.

What differs from upstream:

* Prompt masks are drawn by counter from (seed, sequence, position). Upstream starts every chunk from the same seed, so
  chunks repeat each other's masks, and they depend on ``batch_size`` and on the order of sequences (upstream turns
  TRL's shuffling off for that). Here a sequence has its masks anywhere; shuffling may be on.
* Padding is cut away instead of masked, so nothing depends on how a model treats its attention mask.
* Without a seed (argument or ``_current_mask_seed``) ``args.seed`` serves. Upstream then uses whatever state the global
  generator is in, which nothing can replay.
* A sequence without completion tokens (``mask_truncated_completions``) gives zeros and costs nothing.
* Global random state is left alone; log-probabilities are computed in fp32; guidance (``cfg_scale > 0``) is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import HeadSpec
from ._completions import check_padded, chunk_tokens, inside, one_step_ids, refuse_guidance, same_as_input, score_rows


def get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    seed: int | None = None,
    *,
    noisy_ids: Tensor | None = None,
    rows: Tensor | None = None,
    sample_ids: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``DiffuGRPOTrainer._get_per_token_logps`` of dllm.

    Args:
        self: the trainer; ``processing_class.mask_token_id``, ``args.p_mask_prompt``, ``sampler_config.cfg_scale`` and
            for the seed ``_current_mask_seed`` and ``args.seed`` are read.
        model: the policy or the reference, wrapped or not.
        input_ids: ``[N, T]`` int64, prompt and completion. attention_mask: ``[N, T]``, 0 for padding and after EOS.
        logits_to_keep: L, length of the completion.
        batch_size: sequences per chunk; None lets ``micro_batch_tokens`` decide.
        seed: of the masks.
        noisy_ids: ``[N, T]`` int64, what the model sees, instead of masks drawn here.
        rows: ``[N, T]`` bool, attended completion tokens to score; the others give 0. None: all of them.
        sample_ids: ``[N]`` int64, what masks depend on besides the seed. None: the tokens themselves.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        ``[N, L]`` fp32 (fp64 for a model in fp64), 0 where ``attention_mask`` is 0.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; shapes that disagree, guidance, a tokenizer without
            mask token.
    """
    completion = check_padded(input_ids, attention_mask, logits_to_keep)
    refuse_guidance(self.sampler_config.cfg_scale, "self.sampler_config.cfg_scale")
    if noisy_ids is None:
        mask_token_id = self.processing_class.mask_token_id
        if mask_token_id is None:
            raise ValueError("self.processing_class.mask_token_id is None: the tokenizer has no mask token")
        noisy = one_step_ids(
            input_ids, completion.expand_as(input_ids), _seed(self, seed), mask_token_id, self.args.p_mask_prompt,
            attention_mask=attention_mask, sample_ids=sample_ids, backend=backend,
        )  # fmt: skip
    else:
        noisy = same_as_input("noisy_ids", noisy_ids, input_ids, torch.int64)
    scored = completion & (attention_mask != 0)
    if rows is not None:
        inside("rows", same_as_input("rows", rows, input_ids, torch.bool), scored)
        scored = rows
    (logp,) = score_rows(
        model, noisy, scored, input_ids, attention_mask=attention_mask,
        micro_batch_tokens=chunk_tokens(batch_size, input_ids, micro_batch_tokens), head=head, backend=backend,
    )  # fmt: skip
    return logp[:, -logits_to_keep:]


def _seed(trainer: Any, seed: int | None) -> int:
    if seed is None:
        seed = getattr(trainer, "_current_mask_seed", None)
    return trainer.args.seed if seed is None else seed
