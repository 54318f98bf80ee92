"""The head on a GPU: every backend against fp64 at the heads of LLaDA and Dream, and beyond 2^31 logits.

The rule is that of the CPU tests (tolerances.py): at most twice the error torch itself makes in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import test_head_loss as loss_tests
import torch
from head_cases import OPTIONS, Problem, assert_judged, assert_matches_torch, make_problem, ours, outcome, plain_logprob
from machine import BACKENDS, COUNTS, CUDA, DEVICE, HEADS, KERNELS, TOKENS, needs, new_draw, randn, size, weight_of
from test_head_loss import Case, plain_head_loss
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.workspace import chunk_capacity

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
Judged = dict[str, Tensor]


class Asked(NamedTuple):
    """A problem, what torch says in the same dtype, and in fp64."""

    problem: Problem
    plain: Judged
    exact: Judged


class AskedLoss(NamedTuple):
    case: Case
    plain: Judged
    exact: Judged


HEADS_AND_DTYPES = [
    pytest.param((head, dtype), id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, head in HEADS.items()
    for dtype in (torch.bfloat16, torch.float32)
]


def free() -> None:
    if CUDA:
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", params=HEADS_AND_DTYPES)
def asked(request: pytest.FixtureRequest) -> Iterator[Asked]:
    """masked_logprob at a real head, judged once for all backends."""
    (head, dtype), _ = request.param, torch.manual_seed(1)
    draw = new_draw(vocab=head[1])
    rows = draw.num_rows
    problem = Problem(
        randn(draw.noisy_ids.numel(), head[0], dtype=dtype), weight_of(head, dtype), draw.targets, draw.rows,
        grad_logp=randn(rows), grad_entropy=randn(rows),
    )  # fmt: skip
    problem.targets[:2] = torch.tensor([0, head[1] - 1])
    yield Asked(problem, outcome(plain_logprob, problem), outcome(plain_logprob, problem.wide()))
    free()


@needs(40)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logprob(asked: Asked, backend: str) -> None:
    assert_judged(outcome(ours(backend), asked.problem), asked.plain, asked.exact)


BOUNDS: dict[str, dict[str, object]] = {"on-policy": {}, "off-policy": {"clip_range": 0.2, "dual_clip": 3.0}}


@pytest.fixture(scope="module", params=[(p, b) for p in HEADS_AND_DTYPES for b in BOUNDS],
                ids=lambda pair: f"{pair[0].id}-{pair[1]}")  # fmt: skip
def asked_loss(request: pytest.FixtureRequest) -> Iterator[AskedLoss]:
    """bgpo_head_loss at a real head; off-policy some of the ratios are beyond each clip."""
    (parameter, name), _ = request.param, torch.manual_seed(2)
    head, dtype = parameter.values[0]
    draw = new_draw(vocab=head[1])
    length = torch.full((len(COUNTS),), float(TOKENS), device=DEVICE)
    case = Case(
        randn(draw.noisy_ids.numel(), head[0], dtype=dtype), weight_of(head, dtype), None, draw,
        torch.tensor([1.3, -0.8, 0.7], device=DEVICE), length=length, **BOUNDS[name],
    )  # fmt: skip
    if name == "off-policy":
        with torch.no_grad():
            sums = plain_head_loss(case.hidden, case.weight, None, case)[1]
        log_ratio = torch.tensor([[0.05, 0.5, -0.4], [-0.1, 1.5, -0.5], [-0.05, 0.4, 0.1]], device=DEVICE)
        case = replace(case, old_logprob=sums - log_ratio * length[:, None])
    yield AskedLoss(case, loss_tests.outcome(plain_head_loss, case), loss_tests.outcome(plain_head_loss, case.wide()))
    free()


@needs(40)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bgpo_head_loss(asked_loss: AskedLoss, backend: str) -> None:
    case = asked_loss.case
    got = loss_tests.outcome(loss_tests.one_pass(backend), case)
    gradients = ({k: v for k, v in found.items() if k.startswith("d_")} for found in (got, *asked_loss[1:]))
    assert_judged(*gradients)

    # The largest of nine errors is luck, so their rounding counts too; and one loss moves no further than they move it.
    plain, exact = (found["logprob"].double() for found in asked_loss[1:])
    eps = torch.finfo(torch.float32).eps
    budget = 2 * float((plain - exact).abs().max()) + eps * float(exact.abs().max())
    assert float((got["logprob"].double() - exact).abs().max()) <= budget
    slope = 3.0 * float(case.advantages.abs().mean()) / TOKENS  # at most, under the dual clip
    rounding = 8 * eps * float(case.advantages.abs().sum())
    assert abs(float(got["loss"]) - float(asked_loss.exact["loss"])) <= slope * budget + rounding


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_options(backend: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    """Temperature, softcap, scale and bias, in rows that repeat, over a vocabulary that no tile divides."""
    if not CUDA and backend == "triton" and (dtype != torch.float32 or len(options) < 3):
        pytest.skip("the interpreter takes the one that covers all code")
    n, r, h, v = size((500, 400, 256, 5003), (0, 30, 24, 67))
    assert_matches_torch(backend, lambda: make_problem(backend, dtype, n, r, h, v, **options))


BIG = size(40 * 512, 40)  # rows; whole panels of the engine's forward
BORDER = size(2**31 // HEADS["llada"][1], BIG // 2)  # the row in which element 2^31 lies
WIDTH = size(64, 8)


def one_chunk_of_all_rows() -> None:
    """More than 2^31 logits in the workspace at once: elements and bytes beyond what 32 bits can index."""
    vocab = HEADS["llada"][1]
    bk.set_workspace_bytes(max(1 << 16, (BIG + 1) * vocab * 4))
    assert BIG * vocab > size(2**31, 0) and chunk_capacity(vocab, torch.float32, DEVICE) >= BIG


def few_rows_of(problem: Problem, looked_at: Tensor) -> Problem:
    rows = looked_at if problem.rows is None else problem.rows[looked_at]
    upstream = None if problem.grad_logp is None else problem.grad_logp[looked_at]
    return replace(problem, rows=rows, targets=problem.targets[looked_at], grad_logp=upstream)


def assert_few_rows_right(got: Judged, few: Problem) -> None:
    """Only these rows have an upstream gradient: plain torch on them alone gives every gradient, 0 elsewhere."""
    plain, exact = outcome(plain_logprob, few), outcome(plain_logprob, few.wide())
    for name, value in got.items():
        assert_as_good_as_torch(value, plain[name], exact[name], name)
    others = torch.ones(len(got["d_hidden"]), dtype=torch.bool, device=DEVICE).index_fill_(0, few.rows, False)
    assert bool((got["d_hidden"][others] == 0).all())


@needs(30)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_logprob_of_more_than_two_to_the_31_logits(backend: str, dtype: torch.dtype) -> None:
    one_chunk_of_all_rows()
    vocab = HEADS["llada"][1]
    looked_at = torch.tensor([0, 1, BORDER - 1, BORDER, BORDER + 1, BIG - 2, BIG - 1], device=DEVICE)
    upstream = torch.zeros(BIG, device=DEVICE)
    upstream[looked_at] = randn(len(looked_at))
    problem = Problem(
        randn(BIG, WIDTH, dtype=dtype), weight_of((WIDTH, vocab), dtype), torch.randint(vocab, (BIG,), device=DEVICE),
        grad_logp=upstream,
    )  # fmt: skip
    got = outcome(ours(backend), problem)
    assert bool(torch.isfinite(got["logp"]).all()) and bool((got["logp"] <= 0).all())
    got |= {name: got[name][looked_at] for name in ("logp", "entropy")}
    assert_few_rows_right(got, few_rows_of(problem, looked_at))


@needs(30)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_loss_of_more_than_two_to_the_31_logits(backend: str, dtype: torch.dtype) -> None:
    """Off-policy, in one pass. Short sequences first, in the middle and last have an advantage, so few rows count."""
    one_chunk_of_all_rows()
    vocab = HEADS["llada"][1]
    draw = new_draw([[3], [BORDER - 5], [4], [BIG - BORDER - 5], [3]], BIG, vocab)
    advantages = torch.tensor([1.0, 0.0, -0.5, 0.0, -1.5], device=DEVICE)
    hidden, weight = randn(draw.noisy_ids.numel(), WIDTH, dtype=dtype), weight_of((WIDTH, vocab), dtype)
    problem = Problem(hidden, weight, draw.targets, draw.rows)

    log_ratio, length = 0.1, 1e4  # so long that the rounding of a sum does not move its ratio
    live = (advantages != 0).repeat_interleave(draw.count.flatten(), output_size=BIG).nonzero().flatten()
    logp = torch.zeros(BIG, dtype=torch.float64, device=DEVICE)
    logp[live] = outcome(plain_logprob, few_rows_of(problem, live).wide(), need=())["logp"]
    old = (draw.reduce(logp) - log_ratio * length).float()
    slope = torch.where(advantages >= 0, advantages, advantages.double() * math.exp(log_ratio))
    per_row = -slope / (5 * length) * draw.segment_weight.flatten()
    upstream = per_row.repeat_interleave(draw.count.flatten(), output_size=BIG).float()

    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    lengths = torch.full((5,), length, device=DEVICE)
    loss, logprob, _ = bk.bgpo_head_loss(*leaves, draw, advantages, old_logprob=old, length=lengths, backend=backend)
    loss.backward()
    torch.testing.assert_close(logprob[advantages != 0], draw.reduce(logp).float()[advantages != 0], rtol=1e-3, atol=0)
    few = few_rows_of(replace(problem, grad_logp=upstream), live)
    assert_few_rows_right({"d_hidden": leaves[0].grad, "d_weight": leaves[1].grad}, few)
