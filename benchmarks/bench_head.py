"""The head against its bare GEMMs and against what trainers do today: `pytest benchmarks/bench_head.py [--record]`.

Three comparisons, each proved equal before it is timed, timed interleaved, and at N = 512, H = 1024, V = 32768:

    loss and gradients   bgpo_head_loss against the three GEMMs it cannot avoid (logits, d hidden, d weight), 6NHV
    forward              masked_logprob without gradients against its one GEMM, 2NHV
    trainers             a response of 512 tokens, half masked, behind a prompt of 512: bgpo_head_loss on the 256 masked
                         rows against head on all 1024 positions, fp32 log-softmax, gather

The bare GEMMs write into buffers made beforehand. Memory is what one call adds beyond its inputs and the gradients it
returns, in a fresh process. Equality: error against fp64 at most twice that of plain torch in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _measure import MIB, interleave, peak_in_fresh_process
from torch import Tensor

import bgpo_kernels as bk

H, V = 1024, 32768
ROUNDS = 7
DTYPES = ("float32", "bfloat16")
# The C allocator's own rounding, the coefficients and statistics per row, and pages of code met for the first time.
SLACK = 8 * MIB


@dataclass
class Problem:
    """Sequences of `prompt` + `response` tokens with one masked copy each, as the head sees them."""

    hidden: Tensor  # [B*T, H]
    weight: Tensor  # [V, H]
    draw: bk.MaskDraw
    advantages: Tensor  # [B]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients for hidden and weight."""
        return self.hidden.nbytes + self.weight.nbytes


def make_problem(dtype: str, sequences: int, prompt: int, response: int, masked: int, vocabulary: int = V) -> Problem:
    """Random inputs with `masked` of the `response` tokens masked in every sequence; unit-variance logits."""
    generator = torch.Generator().manual_seed(0)
    tokens = prompt + response
    hidden = torch.randn(sequences * tokens, H, generator=generator)
    weight = torch.randn(vocabulary, H, generator=generator) * H**-0.5
    chosen = torch.rand(sequences, response, generator=generator).argsort(1)[:, :masked].sort(1).values + prompt
    rows = (chosen + torch.arange(sequences)[:, None] * tokens).flatten()
    draw = bk.MaskDraw(
        noisy_ids=torch.zeros(sequences, 1, tokens, dtype=torch.int64),
        rows=rows,
        targets=torch.randint(0, vocabulary, rows.shape, generator=generator),
        segment_offsets=torch.arange(sequences + 1) * masked,
        segment_weight=torch.full((sequences, 1), response / masked),
        count=torch.full((sequences, 1), masked, dtype=torch.int32),
    )
    advantages = torch.where(torch.arange(sequences) % 2 == 0, 1.0, -1.0)
    kind = getattr(torch, dtype)
    return Problem(hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_(), draw, advantages)


def fused(problem: Problem) -> tuple[Tensor, ...]:
    """Loss and gradients in one pass over the head."""
    loss, _, _ = bk.bgpo_head_loss(problem.hidden, problem.weight, problem.draw, problem.advantages)
    return loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight))


def _loss(logprob: Tensor, problem: Problem) -> Tensor:
    """The on-policy loss of per-row log-probs in plain torch."""
    ell = problem.draw.segment_weight[:, 0] * logprob.view(len(problem.advantages), -1).sum(dim=1)
    d = ell - ell.detach()
    return -(problem.advantages * torch.where(problem.advantages >= 0, 1 + d, torch.exp(d))).mean()


def trainers_way(problem: Problem) -> tuple[Tensor, ...]:
    """Logits of all positions, log-softmax in fp32 over all of them, gather, then the masked ones."""
    logits = torch.nn.functional.linear(problem.hidden, problem.weight)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    labels[problem.draw.rows] = problem.draw.targets
    logprob = torch.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, None])[:, 0]
    del logits
    loss = _loss(logprob[problem.draw.rows], problem)
    return loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight))


def in_double(problem: Problem) -> tuple[Tensor, ...]:
    """Loss and gradients in fp64, from the masked rows alone."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight))
    rows = torch.log_softmax(hidden[problem.draw.rows] @ weight.T, dim=-1)
    loss = _loss(rows.gather(-1, problem.draw.targets[:, None])[:, 0], problem)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def assert_no_worse(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Every result within twice torch's own error against fp64 (and a rounding of the largest value)."""
    for our, their, true in zip(ours, theirs, exact, strict=True):
        error, allowed = ((result.double() - true).abs().max().item() for result in (our, their))
        rounding = torch.finfo(our.dtype).eps * true.abs().max().item()
        assert error <= 2 * allowed + rounding, f"error {error:.3g}, torch's own {allowed:.3g}"


def bare_gemms(problem: Problem) -> Callable[[], None]:
    """The three products, into buffers that exist already."""
    hidden, weight = (t.detach() for t in (problem.hidden, problem.weight))
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return run


def fused_in_fresh_process(dtype: str, *shape: int) -> Callable[[], Any]:
    """For `peak_in_fresh_process`: the fused loss and gradients of one problem."""
    return _warm(fused, dtype, *shape)


def trainers_way_in_fresh_process(dtype: str, *shape: int) -> Callable[[], Any]:
    """For `peak_in_fresh_process`: the trainers' loss and gradients of one problem."""
    return _warm(trainers_way, dtype, *shape)


def logprob_in_fresh_process(dtype: str, *shape: int) -> Callable[[], Any]:
    """For `peak_in_fresh_process`: the forward alone."""
    return _warm(logprob, dtype, *shape)


def _warm(call: Callable[[Problem], Any], dtype: str, *shape: int) -> Callable[[], Any]:
    call(make_problem(dtype, 2, 8, 8, 4, vocabulary=64))
    problem = make_problem(dtype, *shape)
    return lambda: call(problem)


@torch.no_grad()
def logprob(problem: Problem) -> Tensor:
    """Log-probs of the masked rows, forward only."""
    result = bk.masked_logprob(problem.hidden, problem.weight, problem.draw.targets, rows=problem.draw.rows)
    assert isinstance(result, Tensor)
    return result


EIGHT_FULL = (8, 0, 64, 64)  # sequences, prompt, response, masked: 512 rows, all of them scored
HALF_MASKED = (1, 512, 512, 256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_against_three_gemms(dtype: str, judge: Any, benchmark: Any) -> None:
    """bgpo_head_loss costs at most 1.15 times its three GEMMs, and no memory beyond the workspace."""
    problem = make_problem(dtype, *EIGHT_FULL)
    assert_no_worse(fused(problem), trainers_way(problem), in_double(problem))
    seconds = interleave({"fused": lambda: fused(problem), "GEMMs": bare_gemms(problem)}, ROUNDS)
    judge.ratio(f"head loss and gradients / three GEMMs, {dtype}", seconds, ("fused", "GEMMs"), "<=", 1.15)
    extra = peak_in_fresh_process("bench_head", "fused_in_fresh_process", dtype, *EIGHT_FULL) - problem.gradient_bytes
    allowed = (bk.workspace_bytes("cpu") + SLACK) / MIB
    judge.figure(f"head loss and gradients, extra MiB, {dtype}", extra / MIB, "<=", allowed, {"extra_bytes": extra})
    benchmark.pedantic(fused, (problem,), rounds=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_against_its_gemm(dtype: str, judge: Any, benchmark: Any) -> None:
    """masked_logprob without gradients costs at most 1.15 times its GEMM."""
    problem = make_problem(dtype, *EIGHT_FULL)
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(-1, problem.draw.targets[:, None])[:, 0]
    plain = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, problem.draw.targets[:, None])[:, 0]
    assert_no_worse((logprob(problem),), (plain,), (exact,))
    logits = hidden.new_empty(len(hidden), V)
    variants = {"fused": lambda: logprob(problem), "GEMM": lambda: torch.mm(hidden, weight.T, out=logits)}
    judge.ratio(f"masked_logprob / one GEMM, {dtype}", interleave(variants, 2 * ROUNDS), ("fused", "GEMM"), "<=", 1.15)
    extra = peak_in_fresh_process("bench_head", "logprob_in_fresh_process", dtype, *EIGHT_FULL)
    allowed = (bk.workspace_bytes("cpu") + SLACK) / MIB
    judge.figure(f"masked_logprob, extra MiB, {dtype}", extra / MIB, "<=", allowed, {"extra_bytes": extra})
    benchmark.pedantic(logprob, (problem,), rounds=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_what_trainers_do(dtype: str, judge: Any, benchmark: Any) -> None:
    """At least 2.5 times faster than the trainers' way, with at most a fifth of its memory."""
    problem = make_problem(dtype, *HALF_MASKED)
    assert_no_worse(fused(problem), trainers_way(problem), in_double(problem))
    variants = {"fused": lambda: fused(problem), "trainers": lambda: trainers_way(problem)}
    seconds = interleave(variants, ROUNDS)
    judge.ratio(f"trainers' way / fused, time, {dtype}", seconds, ("trainers", "fused"), ">=", 2.5)
    peaks = {
        name: peak_in_fresh_process("bench_head", function, dtype, *HALF_MASKED) - problem.gradient_bytes
        for name, function in (("fused", "fused_in_fresh_process"), ("trainers", "trainers_way_in_fresh_process"))
    }
    ratio = peaks["trainers"] / peaks["fused"]
    judge.figure(f"trainers' way / fused, extra memory, {dtype}", ratio, ">=", 5.0, {"extra_bytes": peaks})
    benchmark.pedantic(fused, (problem,), rounds=3)
