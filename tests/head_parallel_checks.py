"""Checks of masked_logprob and bgpo_head_loss with a weight cut over two ranks; run by head_parallel_worker.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from head_cases import OPTIONS, assert_judged, gemm_flops, make_problem, outcome, plain_logprob
from head_parallel_common import (
    RANKS,
    assert_matches_torch,
    assert_same_on_every_rank,
    checks,
    cut,
    half,
    megatron,
    mesh,
    ours,
    rank,
    whole,
    workspace,
)
from test_head_loss import BOUNDS, Case, make_case, plain_head_loss, pooled
from test_head_loss import outcome as loss_outcome
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import bgpo_kernels as bk
from bgpo_kernels.head import parallel


@checks(*OPTIONS)
def values_and_gradients_in_fp64(label: str) -> None:
    for backend in ("cpu", "reference"):
        assert_matches_torch(lambda: make_problem("cpu", torch.float64, **OPTIONS[label]), ours(backend), draws=2)
    assert_matches_torch(lambda: make_problem("cpu", torch.float64, bias=False, rows=False, **OPTIONS[label]), draws=1)


@checks(torch.float32, torch.bfloat16, torch.float16)
def values_and_gradients_by_the_rule(dtype: torch.dtype) -> None:
    for backend in ("cpu", "reference"):
        assert_matches_torch(lambda: make_problem("cpu", dtype, **OPTIONS["all"]), ours(backend))
        assert_matches_torch(lambda: make_problem("cpu", dtype, bias=False, entropy=False), ours(backend))


@checks()
def triton_in_its_interpreter() -> None:
    assert_matches_torch(lambda: make_problem("triton", **OPTIONS["all"]), ours("triton"), draws=2)


@checks(64, 67, 3, 1)
def any_vocabulary(v: int) -> None:
    """Even, uneven, one row on the second rank, none on it."""
    for backend in ("cpu", "reference"):
        assert_matches_torch(lambda: make_problem("cpu", torch.float64, v=v), ours(backend), draws=1)


@checks()
def many_chunks() -> None:
    """Shards of different size, whose own capacities would differ: the exchange must not get out of step."""
    with workspace(1 << 16):
        make = lambda: make_problem("cpu", torch.float64, n=96, v=241)  # noqa: E731
        rows = (1 << 16) // (8 * 121)
        assert 96 / rows > 1 and rows != (1 << 16) // (8 * 120)
        assert_matches_torch(make, draws=1)


@checks()
def extreme_logits() -> None:
    """Thousands of nats apart, in fp32: finite, at most 0, and the target on either rank."""
    for spread in (30.0, 1000.0):
        problem = make_problem("cpu", spread=spread, bias=False)
        assert_matches_torch(lambda p=problem: p, draws=1)
        logp, entropy = ours()(problem.hidden, problem.weight, problem.targets, rows=problem.rows)
        assert float(logp.max()) <= 0 and float(entropy.min()) >= -1e-6
    assert float(logp.min()) < -1000
    far = make_problem("cpu", torch.float64, bias=True)  # all of one rank's logits out of reach of exp
    far.bias[34:] -= 2000.0  # type: ignore[index]
    far.targets[:] %= 34
    assert_matches_torch(lambda: far, draws=1)


@checks("cpu", "triton")
def a_shard_of_which_nothing_counts(backend: str) -> None:
    """Padding ids with a bias of -inf fill the second rank: it adds nothing, and NaN neither."""
    problem = make_problem(backend, n=24)
    problem.bias[34:] = -torch.inf  # type: ignore[index]
    problem.targets[:] %= 34
    got = whole(outcome(ours(backend), problem))
    exact = outcome(plain_logprob, replace(problem, weight=problem.weight[:34], bias=problem.bias[:34]))  # type: ignore
    for name in ("logp", "entropy", "d_hidden"):
        torch.testing.assert_close(got[name], exact[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(got["d_weight"][34:], torch.zeros(33, 24))


@checks()
def nan_in_one_shard_shows_on_every_rank() -> None:
    problem = make_problem("cpu")
    problem.weight[66] = torch.nan
    logp, entropy = ours()(problem.hidden, problem.weight, problem.targets, rows=problem.rows)
    assert bool(logp.isnan().all()) and bool(entropy.isnan().all())


@checks()
def rows_without_gradient_give_exact_zeros() -> None:
    problem = make_problem("cpu", rows=False, entropy=False)
    problem.hidden[3] = torch.nan
    problem.grad_logp[3] = 0.0  # type: ignore[index]
    got = whole(outcome(ours(), problem))
    assert torch.equal(got["d_hidden"][3], torch.zeros(24)) and bool(got["d_weight"].isfinite().all())


@checks(("hidden",), ("weight",), ("hidden", "bias"), ("hidden", "weight"), ())
def what_needs_no_gradient_gets_none(need: tuple[str, ...]) -> None:
    assert_matches_torch(lambda: make_problem("cpu", torch.float64), need=need, draws=1)


@checks()
def the_same_bits_on_every_rank_and_run() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem("cpu", dtype, n=96, v=4001)
        first, again = (whole(outcome(ours(), problem)) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], again[name]), name
        for name in ("logp", "entropy", "d_hidden"):
            assert_same_on_every_rank(first[name])


@checks()
def local_shards_with_a_group() -> None:
    assert_matches_torch(lambda: make_problem("cpu", torch.float64, v=68, **OPTIONS["all"]), megatron)


@checks()
def hidden_as_a_dtensor() -> None:
    """What ColwiseParallel hands to the head: replicated; its gradient is whole, and replicated too."""
    problem = make_problem("cpu", torch.float64, rows=False)
    hidden = nn.Parameter(distribute_tensor(problem.hidden, mesh(), [Replicate()]))
    logp = bk.masked_logprob(hidden, cut(problem.weight), problem.targets)  # type: ignore[arg-type]
    logp.sum().backward()  # type: ignore[union-attr]
    exact = outcome(plain_logprob, replace(problem, bias=None, grad_logp=None, grad_entropy=None), ("hidden",))
    assert hidden.grad.placements == (Replicate(),)
    torch.testing.assert_close(hidden.grad.to_local(), exact["d_hidden"], rtol=1e-11, atol=1e-13)


@checks()
def a_parameter_keeps_its_layout() -> None:
    problem = make_problem("cpu", torch.float64, rows=False, entropy=False)
    weight, bias = (nn.Parameter(distribute_tensor(x, mesh(), [Shard(0)])) for x in (problem.weight, problem.bias))
    (bk.masked_logprob(problem.hidden, weight, problem.targets, bias=bias) * problem.grad_logp).sum().backward()
    exact = outcome(plain_logprob, problem)
    for parameter, name in ((weight, "d_weight"), (bias, "d_bias")):
        assert parameter.grad.placements == (Shard(0),)
        torch.testing.assert_close(parameter.grad.full_tensor(), exact[name], rtol=1e-11, atol=1e-13)


def one_pass(backend: str = "cpu"):
    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
        return bk.bgpo_head_loss(
            hidden, cut(weight), case.draw, case.advantages, bias=cut(bias), backend=backend, **case.bound,
            **case.options,
        )[:2]  # fmt: skip

    return call


def assert_loss_matches(make: Callable[[], Case], backend: str = "cpu", draws: int = 1) -> None:
    cases = [make() for _ in range(draws)]
    assert_judged(
        pooled([whole(loss_outcome(one_pass(backend), case)) for case in cases]),
        pooled([loss_outcome(plain_head_loss, case) for case in cases]),
        pooled([loss_outcome(plain_head_loss, case.wide()) for case in cases]),
    )


@checks(*BOUNDS)
def loss_and_gradients(bound: str) -> None:
    for backend in ("cpu", "reference"):
        assert_loss_matches(lambda: make_case("cpu", torch.float64, bound, **OPTIONS["all"]), backend)


@checks(torch.float32, torch.bfloat16)
def loss_by_the_rule(dtype: torch.dtype) -> None:
    assert_loss_matches(lambda: make_case("cpu", dtype, "off-policy-length"), draws=8)


@checks()
def loss_in_tritons_interpreter() -> None:
    assert_loss_matches(lambda: make_case("triton", bound="dual-clip"), "triton", draws=2)


@checks("on-policy", "off-policy-length")
def loss_in_many_chunks(bound: str) -> None:
    """Segments of up to 12 rows; 8 fit: whole segments in a chunk, and one in pieces."""
    with workspace(1 << 16):
        assert_loss_matches(lambda: make_case("cpu", torch.float64, bound, v=2 * 1024 - 1))


@checks("on-policy", "off-policy-length")
def one_pass_is_one_pass(bound: str) -> None:
    """6NHV_r FLOPs, 4NHV_r with a frozen head."""
    case = make_case("cpu", torch.float64, bound, v=68, bias=False)
    product = 2 * case.draw.rows.shape[0] * 34 * 16
    for need, products in (("hw", 3), ("h", 2), ("", 1)):
        with gemm_flops() as counted:
            loss_outcome(one_pass(), case, need)
        assert counted[0] == products * product, need


@checks()
def what_travels_between_ranks() -> None:
    """One all-gather of 3 numbers a row, and dX once, in fp32 even for a bf16 model. (Besides 4 integers a call.)"""
    case = make_case("cpu", torch.bfloat16, "off-policy-length", v=68, bias=False)
    rows, sent = case.draw.rows.shape[0], []

    def recorded(plain, which: int):
        def call(*args, **kwargs):
            sent.append((args[which].dtype, args[which].numel()))
            return plain(*args, **kwargs)

        return call

    gather = recorded(parallel._all_gather(), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_all_gather", lambda: gather)
        patch.setattr(dist, "all_reduce", recorded(dist.all_reduce, 0))
        loss_outcome(one_pass(), case)
    assert sent == [(torch.int64, 4), (torch.float32, 3 * rows), (torch.float32, 16 * rows)]


@checks()
def main_grad_of_a_local_shard() -> None:
    """Megatron's fp32 buffer takes the sum over chunks unrounded, and the bf16 weight has no .grad."""
    case = make_case("cpu", torch.bfloat16, "off-policy-length", v=4096, bias=False)
    weight = nn.Parameter(half(case.weight).clone())  # type: ignore[union-attr]
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    with workspace(1 << 16):
        loss, _, _ = bk.bgpo_head_loss(
            case.hidden, weight, case.draw, case.advantages, tp_group=dist.group.WORLD, **case.bound
        )
    loss.backward()
    exact = half(loss_outcome(plain_head_loss, case.wide())["d_w"])
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad.double(), exact, rtol=0.05, atol=2e-2 * float(exact.abs().max()))
    assert bool((weight.main_grad.bfloat16().float() != weight.main_grad).any())


@checks()
def layouts_that_are_refused() -> None:
    problem = make_problem("cpu", rows=False)
    h, t = problem.hidden, problem.targets
    for placement in (Shard(1), Replicate()):
        weight = distribute_tensor(problem.weight, mesh(), [placement])
        with pytest.raises(ValueError, match=r"weight is a DTensor with .*over its rows, the vocabulary"):
            bk.masked_logprob(h, weight, t)
    square = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="mesh of 2 dimensions"):
        bk.masked_logprob(h, distribute_tensor(problem.weight, square, [Replicate(), Shard(0)]), t)
    weight = cut(problem.weight)
    lopsided = DTensor.from_local(problem.weight[: 40 if rank() == 0 else 27], mesh(), [Shard(0)], run_check=False,
                                  shape=problem.weight.shape, stride=problem.weight.stride())  # fmt: skip
    with pytest.raises(ValueError, match=r"weight \[67, 24\] has (40|27) rows on rank . of 2, where DTensor cuts"):
        bk.masked_logprob(h, lopsided, t)
    with pytest.raises(ValueError, match=r"hidden is a DTensor with .*every rank of the head needs all rows"):
        bk.masked_logprob(distribute_tensor(h, mesh(), [Shard(0)]), weight, t)
    with pytest.raises(ValueError, match=r"bias is a DTensor with .*cut it alike"):
        bk.masked_logprob(h, weight, t, bias=distribute_tensor(problem.bias, mesh(), [Replicate()]))
    with pytest.raises(ValueError, match=r"bias must have shape \[(34|33)\]"):
        bk.masked_logprob(h, weight, t, bias=problem.bias)
    with pytest.raises(ValueError, match="support is not served"):
        bk.masked_logprob(h, weight, t, support=t[:, None])
    with pytest.raises(ValueError, match="tp_group is not the group of weight's mesh"):
        bk.masked_logprob(h, weight, t, tp_group=dist.new_group())


@checks()
def ids_are_those_of_the_whole_vocabulary() -> None:
    problem = make_problem("cpu", rows=False)
    for bad in (67, -1):
        with pytest.raises(ValueError, match=r"targets must be in \[0, 67\)"):
            bk.masked_logprob(problem.hidden, cut(problem.weight), torch.full_like(problem.targets, bad))
    case = make_case("cpu")
    with pytest.raises(ValueError, match=r"draw.targets holds id \d+, but weight \[30, 16\] has fewer rows"):
        bk.bgpo_head_loss(case.hidden, cut(case.weight[:30]), case.draw, case.advantages)


@checks("number of rows", "targets", "rows", "workspace")
def ranks_that_disagree(what: str) -> None:
    problem = make_problem("cpu")
    rows, targets = problem.rows.clone(), problem.targets.clone()
    if rank() == 1:
        if what == "number of rows":
            rows, targets = rows[:-1], targets[:-1]
        elif what == "targets":
            targets[5] = (targets[5] + 1) % 67
        elif what == "rows":
            rows[5] = (rows[5] + 1) % 30
    with (
        workspace(1 << (16 + rank() * (what == "workspace"))),
        pytest.raises(ValueError, match="the ranks of the tensor-parallel group must make the same call"),
    ):
        bk.masked_logprob(problem.hidden, cut(problem.weight), targets, rows=rows)
