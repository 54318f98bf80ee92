"""d2 (kuleshov-group/d2): trajectories merged into segments, and the any-order model. See ``steps.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec
from ._completions import check_iterations, completion_of, one_step_ids, refuse_guidance, same_as_input
from ._steps import step_logprob


def d2_get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    mask_seeds: Any,
    trajectory: Tensor,
    *,
    trajectory_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """d2-StepMerge's ``_get_per_token_logps``: one segment of the trajectory; ``[I, B, L]``.

    Prompt tokens are masked with probability ``self.args.p_mask_prompt``, by counter from the seed and the sequence:
    the global random state that upstream seeds here is left alone, and old, reference and current policy agree.

    Args:
        self: the trainer; ``args.mask_id``, ``args.p_mask_prompt`` and ``args.cfg_scale`` are read.
        input_ids: ``[I, B, T]``. logits_to_keep: L. mask_seeds: I seeds.
        trajectory: ``[I, B, T]``, the sequence as the segment found it.
        trajectory_mask: ``[I or 1, B, L]``, 1 at the tokens the segment decoded: only these are scored. None: the
            whole completion, as upstream does before its loss masks the rest.
        sample_ids: ``[B]`` int64, what prompt masks depend on besides the seed. None: the tokens themselves.
        Others: as :func:`step_logprob`.
    """
    completion, seeds = check_iterations(input_ids, logits_to_keep, mask_seeds)
    refuse_guidance(self.args.cfg_scale, "self.args.cfg_scale")
    states = trajectory.reshape(input_ids.shape) if trajectory.numel() == input_ids.numel() else trajectory
    states = same_as_input("trajectory", states, input_ids, torch.int64)
    prompts = torch.stack([
        one_step_ids(
            ids, completion.expand_as(ids), seed, self.args.mask_id, self.args.p_mask_prompt, attention_mask=None,
            sample_ids=sample_ids, backend=backend,
        )
        for ids, seed in zip(input_ids, seeds, strict=True)
    ])  # fmt: skip
    rows = completion.expand_as(input_ids).clone()
    if trajectory_mask is not None:
        kept = (*input_ids.shape[:2], logits_to_keep)
        if (
            trajectory_mask.dim() != 3
            or trajectory_mask.shape[0] not in (1, kept[0])
            or trajectory_mask.shape[1:] != kept[1:]
        ):
            raise ValueError(
                f"trajectory_mask must have shape {list(kept)} or 1 first, got {list(trajectory_mask.shape)}"
            )
        rows[..., -logits_to_keep:] = trajectory_mask.bool()
    logp = step_logprob(
        model, torch.where(completion, states, prompts), input_ids, rows, micro_batch_tokens=micro_batch_tokens,
        head=head, backend=backend,
    )  # fmt: skip
    return logp[..., -logits_to_keep:]


def d2_get_per_token_logps_oldandref(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    mask_seeds: Any,
    trajectory: Sequence[Tensor],
    trajectory_mask: Sequence[Tensor],
    *,
    sample_ids: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """d2-StepMerge's ``_get_per_token_logps_oldandref``: all N segments, each token from the one that decoded it.

    As :func:`d2_get_per_token_logps` with N entries in ``trajectory`` and ``trajectory_mask``; ``[I, B, L]``.
    """
    if len(trajectory) != len(trajectory_mask):
        raise ValueError(f"trajectory holds {len(trajectory)} segments but trajectory_mask {len(trajectory_mask)}")
    parts = [
        d2_get_per_token_logps(
            self, model, input_ids, logits_to_keep, mask_seeds, state, trajectory_mask=mask, sample_ids=sample_ids,
            micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
        )
        for state, mask in zip(trajectory, trajectory_mask, strict=True)
    ]  # fmt: skip
    return torch.stack(parts).sum(0)


def d2_any_order_get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    position_id: Tensor,
    logits_to_keep: int,
    *,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """d2-AnyOrder's ``_get_per_token_logps``: all completion tokens in one pass; ``[I, B, L]``.

    The model (d2's LLaDA fork, which takes ``attention_bias`` and ``position_ids``) sees the sequence in decoding order
    and, after it, one mask token per completion token at the same position. Mask token k sees the prompt, itself, and
    the completion tokens of earlier pairs, as tokens are decoded two at a time. Scored are the mask tokens. The bias,
    one for the whole batch, is broadcast.
    """
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("I", "B", "T"))
    completion_of(input_ids, logits_to_keep)
    same_as_input("position_id", position_id, input_ids, torch.int64)
    ids, places = input_ids.flatten(0, 1), position_id.flatten(0, 1)
    masks = torch.full_like(ids[:, -logits_to_keep:], self.args.mask_id)
    seen = torch.cat([ids, masks], 1)
    targets = torch.cat([ids, ids[:, -logits_to_keep:]], 1)
    rows = completion_of(seen, logits_to_keep).expand_as(seen)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    bias = _any_order_bias(ids.shape[1] - logits_to_keep, logits_to_keep, dtype, ids.device)
    logp = step_logprob(
        model, seen, targets, rows, micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
        model_kwargs={
            "attention_bias": bias.expand(seen.shape[0], -1, -1, -1),
            "position_ids": torch.cat([places, places[:, -logits_to_keep:]], 1),
        },
    )  # fmt: skip
    return logp[:, -logits_to_keep:].view(*input_ids.shape[:2], logits_to_keep)


def _any_order_bias(prompt: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[1, 1, T', T']``, 0 where a token is seen and the lowest number where not; T' = prompt + 2 length."""
    seen = torch.zeros(prompt + 2 * length, prompt + 2 * length, dtype=torch.bool, device=device)
    seen[:, :prompt] = True
    clean, masks = slice(prompt, prompt + length), slice(prompt + length, None)
    token = torch.arange(length, device=device)
    seen[clean, clean] = token[:, None] >= token
    seen[masks, clean] = token[:, None] // 2 > token // 2
    seen[masks, masks] = token[:, None] == token
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]
