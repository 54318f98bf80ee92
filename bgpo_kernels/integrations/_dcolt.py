"""DCoLT (maple-research-lab/LLaDOU): new tokens and the last hidden states of a step. See ``steps.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..head.functional import masked_logprob
from ..models import HeadSpec, assert_bidirectional, capture_head, find_head, forward_kwargs
from ..models.patched import expand_rows
from ._completions import same_as_input


def dcolt_step_logprob(
    model: nn.Module,
    x: Tensor,
    x0: Tensor,
    update_flag: Tensor,
    prompt_len: Tensor,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of DCoLT's ``logprob_loss``: the summed log-probability of its new tokens, and the last hidden states.

    Both come from one forward that neither makes logits nor keeps the hidden states of every layer, as
    ``output_hidden_states=True`` does. The hidden states are those the unmasking policy ``pred_mask_prob=True`` takes.

    Args:
        x, x0: ``[B, T]`` int64, before and after the step; prompt, completion, padding on the right.
        update_flag: ``[B, G]`` bool, completion tokens the step decodes. prompt_len: ``[B]`` int64.
        attention_mask: ``[B, T]``, 0 on the right is padding. Sequences of different lengths run apart, without a
            mask: upstream's model turns causal under a mask that holds a 0.
        temperature: divides the logits; 0 means 1, as upstream.

    Returns:
        ``(logprob [B], hidden [B, G, H])``.
    """
    check.dtype("x", check.tensor("x", x), torch.int64)
    check.shape("x", x, ("B", "T"))
    same_as_input("x0", x0, x, torch.int64)
    check.dtype("update_flag", check.tensor("update_flag", update_flag), torch.bool)
    check.shape("update_flag", update_flag, (x.shape[0], "G"))
    span = update_flag.shape[1]
    token = prompt_len[:, None] + torch.arange(span, device=x.device)  # [B, G]
    lengths = [x.shape[1]] * x.shape[0] if attention_mask is None else _right_padded(attention_mask, x)
    if any(last > length for last, length in zip((token[:, -1] + 1).tolist(), lengths, strict=True)):
        raise ValueError(f"prompt_len {prompt_len.tolist()} + {span} exceed the sequences' lengths {lengths}")
    spec = find_head(model, head)
    assert_bidirectional(model, spec)
    logprob: list[Tensor | None] = [None] * x.shape[0]
    hidden: list[Tensor | None] = [None] * x.shape[0]
    for length in sorted(set(lengths)):
        members = [b for b, own in enumerate(lengths) if own == length]
        logp, states = _dcolt_forward(
            model,
            spec,
            x[members, :length],
            x0[members],
            update_flag[members],
            token[members],
            temperature or 1.0,
            backend,
        )
        for i, b in enumerate(members):
            logprob[b], hidden[b] = logp[i], states[i]
    return torch.stack(logprob), torch.stack(hidden)  # type: ignore[arg-type]


def _right_padded(attention_mask: Tensor, x: Tensor) -> list[int]:
    same_as_input("attention_mask", attention_mask, x, attention_mask.dtype)
    if bool((attention_mask.long().diff(dim=1) > 0).any()):
        raise ValueError("attention_mask must have its zeros on the right only, as LLaDOU pads")
    return attention_mask.long().sum(-1).tolist()


def _dcolt_forward(
    model: nn.Module,
    spec: HeadSpec,
    x: Tensor,
    x0: Tensor,
    update_flag: Tensor,
    token: Tensor,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    places = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1] + token  # [m, G] into m*T
    module: Any = spec.module

    def consume(states: Tensor) -> tuple[Tensor, Tensor]:
        logp = masked_logprob(
            states, module.weight, x0.gather(1, token)[update_flag], rows=places[update_flag] - spec.shift,
            bias=getattr(module, "bias", None), temperature=temperature, softcap=spec.softcap,
            logit_scale=spec.logit_scale, backend=backend,
        )  # fmt: skip
        assert isinstance(logp, Tensor)
        return expand_rows(logp, update_flag).sum(-1), states.flatten(0, 1)[places]

    with capture_head(model, spec, consume) as capture:
        model(input_ids=x, **forward_kwargs(model))
    return capture.value
