"""What the checks of a head cut over two ranks share: their registry, ways to cut a tensor, comparison with torch.

Both ranks make every tensor from the same seed, so each knows the whole answer: torch's, with the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from head_cases import Problem, assert_judged, outcome, plain_logprob
from test_head_loss import pooled
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import bgpo_kernels as bk

RANKS = 2
CHECKS: dict[str, Callable[[], None]] = {}


def checks(*cases: Any, **named: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check, once for every case (a positional argument) if there are any."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.replace("_", " ")
        if not cases:
            CHECKS[name] = function
        for case in cases:
            CHECKS[f"{name} [{str(case).removeprefix('torch.')}]"] = lambda case=case: function(case)
        return function

    return add


def mesh() -> Any:
    return init_device_mesh("cpu", (RANKS,))


def rank() -> int:
    return dist.get_rank()


def cut(x: Tensor | None) -> Tensor | None:
    """This rank's rows as a DTensor, cut as DTensor cuts; differentiable by the whole tensor."""
    if x is None:
        return None
    size = -(-x.shape[0] // RANKS)
    mine = x[rank() * size : (rank() + 1) * size]
    return DTensor.from_local(mine, mesh(), [Shard(0)], run_check=False, shape=x.shape, stride=x.stride())


def half(x: Tensor | None) -> Tensor | None:
    """This rank's rows as Megatron holds them."""
    return None if x is None else x.chunk(RANKS)[rank()]


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of weight and bias, of which every rank has its own rows and zeros."""
    for name in ("d_weight", "d_bias", "d_w", "d_b"):
        if name in found:
            wide = found[name].float() if found[name].dtype in (torch.bfloat16, torch.float16) else found[name]
            dist.all_reduce(wide := wide.clone())
            found[name] = wide.to(found[name].dtype)
    return found


def ours(backend: str = "cpu") -> Callable[..., tuple[Tensor, Tensor]]:
    def call(hidden, weight, targets, *, bias=None, support=None, **options):
        return bk.masked_logprob(
            hidden, cut(weight), targets, bias=cut(bias), return_entropy=True, backend=backend, **options
        )

    return call


def megatron(hidden, weight, targets, *, bias=None, support=None, **options):
    group = dist.group.WORLD
    return bk.masked_logprob(
        hidden, half(weight), targets, bias=half(bias), return_entropy=True, tp_group=group, **options
    )


def assert_matches_torch(make: Callable[[], Problem], call=None, need=("hidden", "weight", "bias"), draws=4) -> None:
    """As head_cases.assert_matches_torch, of a head in two halves."""
    problems = [make() for _ in range(draws)]
    got = [whole(outcome(call or ours(), p, need)) for p in problems]
    plain = [outcome(plain_logprob, p, need) for p in problems]
    exact = [outcome(plain_logprob, p.wide(), need) for p in problems]
    assert_judged(*(pooled(found) for found in (got, plain, exact)))


def everywhere(x: Tensor) -> list[Tensor]:
    """The tensor as every rank has it."""
    found = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(found, x.contiguous())
    return found


def assert_same_on_every_rank(x: Tensor) -> None:
    first, *rest = everywhere(x)
    assert all(torch.equal(first, other) for other in rest)


@contextmanager
def workspace(size: int) -> Iterator[None]:
    bk.set_workspace_bytes(size)
    try:
        yield
    finally:
        bk.set_workspace_bytes(None)
