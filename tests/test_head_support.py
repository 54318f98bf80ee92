"""masked_logprob over a restricted support: softmax over K given ids per row, touching only their weight rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from head_cases import (
    DTYPES,
    OPTIONS,
    Problem,
    assert_judged,
    assert_same_bits,
    make_problem,
    ours,
    outcome,
    plain_logprob,
)

import bgpo_kernels as bk

CALL = ours("auto")


def restricted(dtype: torch.dtype = torch.float32, k: int = 9, **kwargs) -> Problem:
    """K distinct ids per row in any order, the target among them, some slots unused."""
    problem = make_problem("cpu", dtype, **kwargs)
    vocab = problem.weight.shape[0]
    support = torch.stack([torch.randperm(vocab)[:k] for _ in problem.targets])
    place = torch.randint(0, k, (len(support),))
    support[support == problem.targets[:, None]] = -1
    support[torch.rand(support.shape) < 0.2] = -1
    support[torch.arange(len(support)), place] = problem.targets
    return replace(problem, support=support)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, options: dict[str, float]) -> None:
    problems = [restricted(dtype, spread=2.0, **options) for _ in range(4)]
    found = [[outcome(call, p) for p in ps] for call, ps in (
        (CALL, problems), (plain_logprob, problems), (plain_logprob, [p.wide() for p in problems]))]  # fmt: skip
    assert_judged(*({n: torch.cat([o[n].flatten() for o in os]) for n in os[0]} for os in found))
    assert bool((found[0][0]["logp"] <= 0).all())


def test_whole_vocabulary_is_no_restriction() -> None:
    problem = make_problem("cpu", torch.float64, **OPTIONS["all"])
    every = torch.stack([torch.randperm(67) for _ in problem.targets])
    got, expected = outcome(CALL, replace(problem, support=every)), outcome(CALL, problem)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-14)


def test_one_id_is_certain() -> None:
    """Support of the target alone, with and without unused slots: probability 1, no gradient."""
    problem = make_problem("cpu", temperature=0.3)
    for slots in (problem.targets[:, None], torch.stack([torch.full_like(problem.targets, -1), problem.targets], 1)):
        for name, value in outcome(CALL, replace(problem, support=slots)).items():
            assert bool((value == 0).all()), name


def test_untouched_ids_get_no_gradient() -> None:
    problem = restricted(k=3, n=6)
    got = outcome(CALL, problem)
    touched = torch.zeros(67, dtype=torch.bool).index_fill_(0, problem.support[problem.support >= 0], True)
    assert bool((got["d_weight"][~touched] == 0).all()) and bool((got["d_bias"][~touched] == 0).all())
    assert bool((got["d_bias"][touched] != 0).any())


def test_unused_slots_do_not_read_id_zero() -> None:
    """A slot of -1 contributes nothing, even where weight row 0 is huge and its bias -inf."""
    problem = restricted(n=12)
    problem.targets.clamp_(min=1)
    support = problem.support.masked_fill(problem.support == 0, -1)
    support[:, 0] = torch.where((support == problem.targets[:, None]).any(1), support[:, 0], problem.targets)
    problem = replace(problem, support=support)
    expected = outcome(CALL, problem, ("hidden", "bias"))
    problem.weight[0], problem.bias[0] = 1e30, -torch.inf
    assert_same_bits(outcome(CALL, problem, ("hidden", "bias")), expected)


def test_masked_id_in_the_support() -> None:
    """A bias of -inf on a used slot: probability 0, finite entropy and gradients."""
    problem = restricted(temperature=1.2)
    problem.bias[3::5] = -torch.inf
    problem.bias[problem.targets] = 0.1
    got, exact = outcome(CALL, problem), outcome(plain_logprob, problem.wide())
    for name, value in got.items():
        assert bool(torch.isfinite(value).all()), name
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids=str)
def test_only_required_gradients(need: tuple[str, ...]) -> None:
    problem = restricted()
    full, got = outcome(CALL, problem), outcome(CALL, problem, need)
    assert got.keys() == {"logp", "entropy", *(f"d_{name}" for name in need)}
    assert_same_bits(got, {name: full[name] for name in got})


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_have_the_same_bits(threads: int) -> None:
    """Ids and rows that repeat hundreds of times: torch's own indexed sums are atomic, so unordered, on two threads."""
    problem = restricted(n=1500, r=4, h=64, v=12, k=10)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = outcome(CALL, problem)
        for _ in range(4):
            assert_same_bits(first, outcome(CALL, problem))
    finally:
        torch.set_num_threads(before)


def test_pieces_change_nothing() -> None:
    """Gathered weights are formed piece by piece within the workspace; rows do not notice."""
    problem = restricted(n=200, h=32, k=30)
    one = outcome(CALL, problem)
    bk.set_workspace_bytes(1 << 16)  # 17 rows
    several = outcome(CALL, problem)
    for name in one:
        torch.testing.assert_close(several[name], one[name], rtol=1e-6, atol=1e-6)


def test_autocast_keeps_products_in_fp32() -> None:
    """Only the inputs are rounded to 16 bits."""
    problem = restricted(k=20)
    with torch.autocast("cpu", torch.bfloat16):
        got = CALL(problem.hidden, problem.weight, problem.targets, rows=problem.rows, support=problem.support)
    rounded = problem.hidden.bfloat16().double()
    exact = plain_logprob(rounded, problem.weight.double(), problem.targets, rows=problem.rows, support=problem.support)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=5e-6)


def test_no_rows() -> None:
    problem = restricted(n=4)
    empty = torch.zeros(0, dtype=torch.int64)
    none = replace(problem, targets=empty, rows=empty, support=problem.support[:0], grad_logp=None, grad_entropy=None)
    got = outcome(CALL, none)
    assert got["logp"].shape == (0,)
    assert all(bool((got[f"d_{name}"] == 0).all()) for name in ("hidden", "weight", "bias"))
