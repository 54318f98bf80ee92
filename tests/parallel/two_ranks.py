"""What the checks share: sequences dealt out to the ranks, and the gradient that one process makes of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models_zoo import DRAWING, Batch, assert_same_gradients, llada, make_batch, plain_bgpo, take_gradients
from torch import Tensor, nn

import bgpo_kernels as bk

B = 4


def rank() -> int:
    return dist.get_rank()


def everything() -> Batch:
    """Four sequences; those of rank 1 (the last two) have shorter responses."""
    return make_batch(B)


def mine(batch: Batch) -> tuple[Batch, Tensor]:
    """This rank's half, and its sample ids."""
    part = slice(2 * rank(), 2 * rank() + 2)
    return Batch(batch.ids[part], batch.response[part], batch.advantages[part]), torch.arange(B)[part]


def loss_of(batch: Batch) -> Callable[[Tensor], Tensor]:
    return lambda scores: plain_bgpo(scores, batch.advantages.to(scores.dtype), length=batch.length)


# The four calls on some sequences, each with the loss's mean over them.


def bgpo(model: nn.Module, batch: Batch, ids: Tensor, **options: Any) -> None:
    bk.bgpo_backward(model, batch.ids, batch.response, batch.advantages, sample_ids=ids, **DRAWING | options)


def replay(model: nn.Module, batch: Batch, ids: Tensor, **options: Any) -> None:
    bk.replay_backward(model, batch.ids, batch.response, loss_of(batch), sample_ids=ids, **DRAWING | options)


def elbo(model: nn.Module, batch: Batch, ids: Tensor, **options: Any) -> None:
    options = {"sample_ids": ids, "per_sample": True} | DRAWING | options
    loss_of(batch)(bk.elbo_logprob(model, batch.ids, batch.response, **options)).backward()


def rows(model: nn.Module, batch: Batch, ids: Tensor, **options: Any) -> None:
    """The same through row_logprob, its segment sums taken here."""
    tokens = options.pop("micro_batch_tokens", None)
    draw = bk.random_mask(batch.ids, batch.response, sample_ids=ids, **DRAWING)
    noisy = draw.noisy_ids.flatten(0, 1)
    logp = bk.row_logprob(model, noisy, draw.rows, draw.targets, micro_batch_tokens=tokens, **options)
    loss_of(batch)(draw.reduce(logp)).backward()


CALLS = [bgpo, replay, elbo, rows]
Call = Callable[..., None]


def expected(call: Call = bgpo, model: nn.Module | None = None, batch: Batch | None = None) -> dict[str, Tensor]:
    """Gradients by one process that has all sequences."""
    model = llada(torch.float64) if model is None else model
    call(model, everything() if batch is None else batch, torch.arange(B), micro_batch_tokens=40)
    return take_gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Taken off a wrapped or sharded model, whole, by the names of the module inside."""
    found = {name.removeprefix("module."): g for name, g in take_gradients(model).items()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def assert_expected(model: nn.Module, want: dict[str, Tensor]) -> None:
    """The gradient of one process on every rank, and the same bits on both."""
    found = gradients(model)
    assert_same_gradients(found, want)
    for name, g in found.items():
        both = [torch.empty_like(g) for _ in range(2)]
        dist.all_gather(both, g.contiguous())
        assert torch.equal(*both), name


def raises(kind: type[Exception], call: Call, model: nn.Module, *arguments: Any, **options: Any) -> str:
    try:
        call(model, *arguments, **options)
    except Exception as error:
        assert type(error) is kind, error
        return str(error)
    raise AssertionError("nothing was raised")
