"""What the tests of trainers that score completions share: sequences, models, and what a call leaves for its backward.

No part of a restatement is here: those stand in the test files, one each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_zoo import ARCHITECTURES, MASK, Plain, perturbed, take_gradients
from torch import Tensor, nn

from bgpo_kernels.models import HeadSpec

PAD, EOS = 1, 2
B, P, L = 3, 5, 7  # sequences, tokens of the prompt and of the completion
T = P + L

# No shift: rotary and absolute positions.
unshifted = pytest.mark.parametrize("build", [ARCHITECTURES["llada"], ARCHITECTURES["bert"]], ids=["llada", "bert"])


def sequences(count: int = B, seed: int = 6) -> Tensor:
    """``[count, T]`` int64, no special tokens among them."""
    return torch.randint(5, MASK, (count, T), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences with prompts padded on the left and completions after EOS, and their attention mask."""
    left = torch.arange(len(ids)) % 3
    end = T - 2 * (torch.arange(len(ids)) % 2)
    place = torch.arange(T)
    attended = (place >= left[:, None]) & (place < end[:, None])
    return torch.where(attended, ids, PAD), attended.long()


def shifted_model(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, HeadSpec]:
    """A model whose row i-1 predicts token i, as Dream's does, and the head that says so."""
    model = Plain(dtype)
    return model, HeadSpec(model.out, shift=1)


def logits_of(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """All of them."""
    output = model(input_ids=ids, **kwargs)
    return getattr(output, "logits", output)


def token_logp(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-softmax at ``ids``, for logits of the same rows."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def grpo(logp: Tensor, old: Tensor, advantages: Tensor, weight: Tensor, beta: float = 0.04) -> Tensor:
    """Clipped ratios and the k3 penalty per token, ``[..., B, L]``: a loss whose gradient differs in every token."""
    ratio = (logp - old).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    k3 = (old - logp).exp() - (old - logp) - 1
    return -((gain - beta * k3) * weight).sum() / weight.sum()


def gradients_of(score: Callable[[nn.Module], Tensor], model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Any:
    """(values, gradients by name) of a way to score, on a model without gradients."""
    values = score(model)
    loss(values).backward()
    return values.detach(), take_gradients(model)


def older(build: Callable[..., nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same architecture a small step away: the old policy."""
    return perturbed(build(dtype))


def numbers_kept(call: Callable[[], Any]) -> int:
    """Numbers that a call's graph saves for its backward."""
    kept = 0

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        call()
    return kept


def assert_flat(call: Callable[[int, int | None], Any], rows: Callable[[int], int]) -> None:
    """``call(sequences, micro_batch_tokens)`` keeps activations of one pass, and of none when replayed.

    Rows of the result may be kept (a few numbers each); a forward's activations may not.
    """
    ordinary = numbers_kept(lambda: call(2, None))
    for count in (2, 6):
        kept = numbers_kept(lambda count=count: call(count, T))  # type: ignore[misc]
        assert kept < 30 * rows(count) + 100, f"{kept} numbers kept for {count} sequences"
        assert kept < ordinary / 4


def positional(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments a trainer's own call may give by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds]


class LeavesRandomStateAlone:
    """Within the context, the global generator must not move."""

    def __enter__(self) -> None:
        self.before = torch.random.get_rng_state()

    def __exit__(self, *_: object) -> None:
        assert torch.equal(self.before, torch.random.get_rng_state())
