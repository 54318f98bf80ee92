"""Trainers that score decoding steps: the model sees a half-decoded sequence, the tokens decoded next are scored.

``step_logprob`` is the general function: noisy ids, targets and rows of any number of steps at once,

    lp[s, i] = log p(targets[s, i] | noisy_ids[s])    where rows[s, i], else 0.

The others have the signatures of the trainers' own functions:

=============================  ====================================================================================
yjyddq/EOSER-ASS-RL            cj-grpo/cj_grpo_trainer_*.py, ``_get_per_token_logps``: ``cj_grpo_get_per_token_logps``;
                               one-step-grpo/one_step_grpo_trainer.py: ``one_step_get_per_token_logps``
kuleshov-group/d2              diffu-grpo/diffu_grpo_trainer.py, StepMerge: ``d2_get_per_token_logps`` and
                               ``d2_get_per_token_logps_oldandref``; diffu-grpo-ao/diffu_grpo_trainer_ao.py, any order:
                               ``d2_any_order_get_per_token_logps``
autonomousvision/mdpo          src/open_r1/mdpo/mdpo_trainer.py, ``_get_per_token_logps``: ``mdpo_get_per_token_logps``
LeapLabTHU/JustGRPO            grpo.py, ``logprob_loss``: ``justgrpo_logprob_loss``
maple-research-lab/LLaDOU      networks/lladou_v0.py (DCoLT), one step of ``logprob_loss``: ``dcolt_step_logprob``
=============================  ====================================================================================

Saved: the head runs on the tokens a step decodes, not on the whole sequence, and no logits are made. Where a trainer
scores several steps before it back-propagates (CJ-GRPO), their graphs are not kept: more than one micro-batch is run
again in the backward.

What differs from upstream: log-probabilities are fp32 whatever the model's dtype; tokens that a step does not decode
give 0, where upstream gives numbers that its loss then masks; padding known by an attention mask is cut away;
classifier-free guidance is refused; what else, each function says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec
from ._completions import completion_of, refuse_guidance, same_as_input
from ._d2 import d2_any_order_get_per_token_logps, d2_get_per_token_logps, d2_get_per_token_logps_oldandref
from ._dcolt import dcolt_step_logprob
from ._justgrpo import justgrpo_logprob_loss, left_to_right_logprob
from ._steps import step_logprob

__all__ = [
    "cj_grpo_get_per_token_logps",
    "d2_any_order_get_per_token_logps",
    "d2_get_per_token_logps",
    "d2_get_per_token_logps_oldandref",
    "dcolt_step_logprob",
    "justgrpo_logprob_loss",
    "left_to_right_logprob",
    "mdpo_get_per_token_logps",
    "one_step_get_per_token_logps",
    "step_logprob",
]


def cj_grpo_get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    reversed_traj: Sequence[Tensor],
    reversed_traj_unmask_positions: Sequence[Tensor],
    logits_to_keep: int,
    *,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """CJ-GRPO's ``_get_per_token_logps``: every step of a trajectory, the tokens it decodes.

    Args:
        self: the trainer; ``args.cfg_scale`` is read.
        input_ids: ``[B, T]``, of which only the shape counts.
        reversed_traj: K + 1 tensors ``[B, T]``: the sequence before each of K steps, and at the end.
        reversed_traj_unmask_positions: K tensors ``[B, L]`` bool, the completion tokens that a step decodes.
        logits_to_keep: L. Others: as :func:`step_logprob`.

    Returns:
        K tensors ``[B, L]``. Their graphs are one: back-propagate a loss of all of them, as the trainer does.
    """
    refuse_guidance(self.args.cfg_scale, "self.args.cfg_scale")
    completion = completion_of(input_ids, logits_to_keep)
    steps = len(reversed_traj_unmask_positions)
    if len(reversed_traj) != steps + 1:
        raise ValueError(
            f"reversed_traj must hold one state more than reversed_traj_unmask_positions holds steps ({steps}), "
            f"got {len(reversed_traj)}"
        )
    states = torch.stack(list(reversed_traj))
    check.shape("reversed_traj", states, (steps + 1, *input_ids.shape), " (steps + 1, and input_ids)")
    decoded = torch.stack([p.bool() for p in reversed_traj_unmask_positions])
    check.shape("reversed_traj_unmask_positions", decoded, (steps, input_ids.shape[0], logits_to_keep), " (K, B, L)")
    rows = completion.expand(steps, *input_ids.shape).clone()
    rows[..., -logits_to_keep:] = decoded
    logp = step_logprob(
        model, states[:-1], states[1:], rows, micro_batch_tokens=micro_batch_tokens, head=head, backend=backend
    )
    return list(logp[..., -logits_to_keep:].unbind())


def one_step_get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_to_keep: int,
    *,
    rows: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """One-step GRPO's ``_get_per_token_logps``: the completion fully masked, the prompt untouched; ``[B, L]``.

    ``rows [B, T]`` bool restricts what is scored (up to the end of sequence, say). Reads ``self.args.mask_id`` and
    ``self.args.cfg_scale``.
    """
    refuse_guidance(self.args.cfg_scale, "self.args.cfg_scale")
    completion = completion_of(input_ids, logits_to_keep).expand_as(input_ids)
    rows = completion if rows is None else same_as_input("rows", rows, input_ids, torch.bool)
    logp = step_logprob(
        model, input_ids.masked_fill(completion, self.args.mask_id), input_ids, rows,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    return logp[:, -logits_to_keep:]


def mdpo_get_per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    target_ids: Tensor,
    attention_mask: Tensor,
    *,
    rows: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """MDPO's ``_get_per_token_logps``: one trajectory step; ``[B, self.max_completion_length]``.

    Scored are the tokens its loss counts, those still masked in ``input_ids``; ``rows [B, T]`` bool gives others.
    Left padding is cut away. Logits are divided by ``self.temperature``, where upstream adds the dtype's epsilon to it
    (1/128 for bf16). Also read: ``self.processing_class.mask_token_id``.
    """
    length = self.max_completion_length
    completion = completion_of(input_ids, length)
    if rows is None:
        mask_token_id = self.processing_class.mask_token_id
        if mask_token_id is None:
            raise ValueError("self.processing_class.mask_token_id is None: pass rows, the tokens to score")
        rows = (input_ids == mask_token_id) & completion
    logp = step_logprob(
        model, input_ids, target_ids, rows, temperature=self.temperature, attention_mask=attention_mask,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    return logp[:, -length:]
