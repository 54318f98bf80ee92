"""``step_logprob``: the tokens that decoding steps decode, of any number of steps at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec
from ._completions import score_rows


def step_logprob(
    model: nn.Module,
    noisy_ids: Tensor,
    targets: Tensor,
    rows: Tensor,
    *,
    temperature: float = 1.0,
    attention_mask: Tensor | None = None,
    model_kwargs: dict[str, Any] | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities of the tokens that steps decode; zeros at all others. Differentiable.

    Args:
        noisy_ids: ``[..., T]`` int64, what the model sees: steps, sequences and samples in any leading dimensions.
        targets: ``[..., T]`` int64, read at ``rows``. rows: ``[..., T]`` bool, the tokens to score.
        attention_mask: ``[..., T]`` of 0 and 1; padding is cut away. None: every token is attended.
        Others: as :func:`bgpo_kernels.row_logprob`, with P the product of the leading dimensions.

    Returns:
        ``[..., T]`` fp32 (fp64 for a model in fp64).
    """
    check.dtype("noisy_ids", check.tensor("noisy_ids", noisy_ids), torch.int64)
    if noisy_ids.dim() < 2:
        raise ValueError(f"noisy_ids must have shape [..., T] with a leading dimension, got {list(noisy_ids.shape)}")
    for name, value, dtype in (("targets", targets, torch.int64), ("rows", rows, torch.bool)):
        check.dtype(name, check.tensor(name, value), dtype)
        check.shape(name, value, tuple(noisy_ids.shape), " (as noisy_ids)")
        check.same_device(name, value, "noisy_ids", noisy_ids)
    if attention_mask is not None:
        check.shape("attention_mask", attention_mask, tuple(noisy_ids.shape), " (as noisy_ids)")
        attention_mask = attention_mask.flatten(0, -2)
    (logp,) = score_rows(
        model, noisy_ids.flatten(0, -2), rows.flatten(0, -2), targets.flatten(0, -2), temperature=temperature,
        attention_mask=attention_mask, model_kwargs=model_kwargs, micro_batch_tokens=micro_batch_tokens, head=head,
        backend=backend,
    )  # fmt: skip
    return logp.view(noisy_ids.shape)
