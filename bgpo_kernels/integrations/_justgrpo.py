"""JustGRPO (LeapLabTHU/JustGRPO): left to right, one target token per pass. See ``steps.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec
from ._steps import step_logprob


def left_to_right_logprob(
    model: nn.Module,
    input_ids: Tensor,
    prompt_len: int,
    *,
    positions: tuple[int, int] | None = None,
    mask_token_id: int = 126336,
    temperature: float = 1.0,
    attention_mask: Tensor | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``log p(y_t | x, y_<t)`` by one pass per completion token, itself and all later tokens masked.

    Args:
        input_ids: ``[B, T]``, prompt and completion. prompt_len: tokens of the prompt.
        positions: (lo, hi), completion tokens to score; None: all. Each is one forward of B sequences, one row each.
        attention_mask: ``[B, T]``; padding is cut away, and padded completion tokens give 0.
        Others: as :func:`step_logprob`.

    Returns:
        ``[B, hi - lo]``.
    """
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("B", "T"))
    prompt_len = check.integer("prompt_len", prompt_len, 0, input_ids.shape[1] - 1)
    lo, hi = (0, input_ids.shape[1] - prompt_len) if positions is None else positions
    if not 0 <= lo < hi <= input_ids.shape[1] - prompt_len:
        raise ValueError(f"positions must be within 0..{input_ids.shape[1] - prompt_len} and ascend, got {positions}")
    tokens = torch.arange(input_ids.shape[1], device=input_ids.device)
    place = torch.arange(prompt_len + lo, prompt_len + hi, device=input_ids.device)
    later = (tokens >= place[:, None])[:, None]  # [k, 1, T]
    noisy = torch.where(later, mask_token_id, input_ids)
    rows = (tokens == place[:, None])[:, None].expand_as(noisy)
    if attention_mask is not None:
        check.shape("attention_mask", attention_mask, tuple(input_ids.shape), " (as input_ids)")
        rows, attention_mask = rows & (attention_mask != 0), attention_mask.expand_as(noisy)
    logp = step_logprob(
        model, noisy, input_ids.expand_as(noisy), rows, temperature=temperature, attention_mask=attention_mask,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    return logp.sum(-1).transpose(0, 1)


def justgrpo_logprob_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    valid_samples: Tensor,
    eps: float = 0.2,
    gain: float = 1.0,
    temperature: float = 1.0,
    accelerator: Any = None,
    gen_length: int = 256,
    mask_id: int = 126336,
    *,
    old_logprob: Tensor | None = None,
    positions_per_pass: int = 1,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> dict[str, float]:
    """JustGRPO's ``logprob_loss``: the whole policy update's gradient, one target token per pass, one row of the head.

    Args:
        inputs: ``advantages [B]``, ``generated_ids [B, prompt_len + gen_length]``, ``prompt_len``, ``rewards``.
        valid_samples: ``[B]``, gathered over ranks for the scale ``gain / gen_length / mean``.
        accelerator: None back-propagates without one.
        old_logprob: ``[B, gen_length]`` of the policy that sampled (:func:`left_to_right_logprob`). None: on-policy,
            where the ratio is 1 and no clip ever acts, as upstream always has it.
        positions_per_pass: completion tokens per backward.
        Others: as upstream and :func:`step_logprob`.
    """
    advantages, ids, prompt_len = inputs["advantages"], inputs["generated_ids"], inputs["prompt_len"]
    if ids.shape[1] != prompt_len + gen_length:
        raise ValueError(
            f"generated_ids {list(ids.shape)} must hold prompt_len + gen_length = {prompt_len + gen_length}"
        )
    if old_logprob is not None:
        check.shape("old_logprob", old_logprob, (ids.shape[0], gen_length), " (B, gen_length)")
    step = check.integer("positions_per_pass", positions_per_pass, 1)

    def gather(value: Tensor) -> Tensor:
        return value if accelerator is None else accelerator.gather(value)

    valid = gather(valid_samples).float().mean().item()
    scale = gain / gen_length / (valid + 1e-5)
    for lo in range(0, gen_length, step):
        hi = min(lo + step, gen_length)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type != "cpu"):
            logp = left_to_right_logprob(
                model, ids, prompt_len, positions=(lo, hi), mask_token_id=mask_id, temperature=temperature,
                micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
            )  # fmt: skip
        old = logp.detach() if old_logprob is None else old_logprob[:, lo:hi]
        ratio = (logp - old).exp()
        gain_of = advantages[:, None]
        loss = -torch.min(ratio * gain_of, ratio.clamp(1 - eps, 1 + eps) * gain_of).mul(scale).sum()
        loss.backward() if accelerator is None else accelerator.backward(loss)
    return {"reward": gather(inputs["rewards"].detach()).mean().item(), "valid_samples": valid}
