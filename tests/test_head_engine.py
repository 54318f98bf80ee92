"""Chunks of logits: what is computed where, how often, in how much memory, and that none of it changes a result."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from head_cases import (
    ENGINES,
    OPTIONS,
    Problem,
    assert_judged,
    assert_same_bits,
    device_of,
    gemm_flops,
    interpreted,
    make_draw,
    make_problem,
    ours,
    outcome,
    plain_logprob,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import bgpo_kernels as bk
from bgpo_kernels.head.chunks import cut, plan
from bgpo_kernels.workspace import MIN_BYTES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12))
def test_plan(lengths: list[int], capacity: int) -> None:
    """All rows and segments once, in order; no piece above capacity, no segment cut that fits, no needless chunk."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    groups = plan(offsets, capacity)
    assert [s for g in groups for s in range(g.first, g.last)] == list(range(len(lengths)))
    pieces = [piece for g in groups for piece in g.pieces]
    assert [row for begin, end in pieces for row in range(begin, end)] == list(range(offsets[-1]))
    assert all(0 < end - begin <= capacity for begin, end in pieces)
    for group in groups:
        assert (group.begin, group.end) == (offsets[group.first], offsets[group.last])
        if len(group.pieces) > 1:
            assert group.last == group.first + 1 and lengths[group.first] > capacity
    for a, b in pairwise(groups):  # greedy: the next segment would not have fitted
        assert offsets[b.first + 1] - a.begin > capacity


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))
def test_cut(begin: int, size: int, capacity: int) -> None:
    pieces = cut(begin, begin + size, capacity)
    assert [row for lo, hi in pieces for row in range(lo, hi)] == list(range(begin, begin + size))
    assert all(hi - lo == capacity for lo, hi in pieces[:-1]) and all(0 < hi - lo <= capacity for lo, hi in pieces)


def many_chunks(backend: str, dtype: torch.dtype = torch.float32, **options: float) -> Problem:
    """Chunks of 3 rows (6 for 16-bit logits) under the smallest workspace."""
    vocab = MIN_BYTES // 12
    return make_problem(backend, dtype, n=30 if interpreted(backend) else 200, v=vocab, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ENGINES)
def test_many_chunks_are_as_good_as_one(backend: str, dtype: torch.dtype) -> None:
    """dW over dozens of chunks adds up in fp32 (Liger #1391: in the weight's dtype the error grows with the chunks)."""
    if interpreted(backend) and dtype != torch.bfloat16:
        pytest.skip("one dtype is enough in the interpreter")
    bk.set_workspace_bytes(MIN_BYTES)
    problem = many_chunks(backend, dtype)
    got, plain, exact = (outcome(ours(backend), problem), outcome(plain_logprob, problem),
                         outcome(plain_logprob, problem.wide()))  # fmt: skip
    # A chunk's dX is one GEMM, and vendor GEMMs over so few rows are several times less exact; so must be torch's.
    chunks = [outcome(plain_logprob, _rows(problem, lo, hi)) for lo, hi in cut(0, len(problem.targets), 3)]
    plain["d_hidden"] = torch.stack([chunk["d_hidden"] for chunk in chunks]).sum(0)
    assert_judged(got, plain, exact)


def _rows(problem: Problem, begin: int, end: int) -> Problem:
    names = ("targets", "rows", "grad_logp", "grad_entropy")
    return replace(problem, **{name: getattr(problem, name)[begin:end] for name in names})


@pytest.mark.parametrize("backend", ENGINES)
def test_chunk_size_leaves_rows_alone(backend: str) -> None:
    """With exact GEMMs (small integers) a row's outputs and gradient have the same bits in chunks of any size."""
    problem = many_chunks(backend, **OPTIONS["all"])
    problem = replace(problem, hidden=whole(problem.hidden), weight=whole(problem.weight))
    one = outcome(ours(backend), problem)
    for size in (MIN_BYTES, 2 * MIN_BYTES + 1000):
        bk.set_workspace_bytes(size)
        several = outcome(ours(backend), problem)
        assert_same_bits({n: one[n] for n in ("logp", "entropy")}, {n: several[n] for n in ("logp", "entropy")})
        for name in ("d_hidden", "d_weight", "d_bias"):
            torch.testing.assert_close(several[name], one[name])


@pytest.mark.parametrize("backend", ENGINES)
def test_order_of_rows_does_not_matter(backend: str) -> None:
    """Permuting the rows permutes their outputs, bit for bit, and a row alone is the row in a batch."""
    problem = make_problem(backend, n=24)
    problem = replace(problem, hidden=whole(problem.hidden), weight=whole(problem.weight))
    order = torch.randperm(24, device=problem.hidden.device)

    def pick(index: Tensor) -> dict[str, Tensor]:
        picked = replace(problem, targets=problem.targets[index], rows=problem.rows[index])
        return outcome(ours(backend), picked, need=())

    everything = outcome(ours(backend), problem, need=())
    assert_same_bits(pick(order), {name: value[order] for name, value in everything.items()})
    assert_same_bits(pick(order[:1]), {name: value[order[:1]] for name, value in everything.items()})


def head_loss(draw: bk.MaskDraw, weight: Tensor, hidden: Tensor, backend: str, old: bool, need: str = "hw"):
    """Loss and gradients in one pass; advantages of both signs and 0, and ratios that differ from 1."""
    hidden, weight = (x.detach().requires_grad_(c in need) for x, c in ((hidden, "h"), (weight, "w")))
    generator = torch.Generator().manual_seed(5)
    shape = draw.segment_weight.shape
    advantages = torch.randn(shape[0], generator=generator).to(hidden.device)
    advantages[-1] = 0.0
    old_logprob = None
    if old:
        with torch.no_grad():
            old_logprob = draw.reduce(bk.masked_logprob(hidden, weight, draw.targets, rows=draw.rows))
        old_logprob += 0.3 * torch.randn(shape, generator=generator).to(hidden.device)
    loss, logprob, _ = bk.bgpo_head_loss(hidden, weight, draw, advantages, old_logprob=old_logprob, backend=backend)
    if need:
        loss.backward()
    return {"loss": loss.detach(), "logprob": logprob} | {
        name: x.grad for name, x in (("d_hidden", hidden), ("d_weight", weight)) if x.grad is not None
    }


#: empty segments first, last and between; segments of the capacity, one above it, several times it
COUNTS = [[0, 3, 2], [4, 0, 1], [0, 0, 0], [11, 1, 3], [7, 2, 0]]


@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("backend", ENGINES)
def test_segments_larger_than_the_workspace(backend: str, old: bool) -> None:
    """Piecewise equals in one piece: to the bit in what rows say (exact GEMMs), to rounding in sums over chunks."""
    vocab = MIN_BYTES // 12
    device = device_of(backend)
    draw = make_draw(COUNTS, vocab=vocab, device=device)
    hidden = whole(torch.empty(5 * 3 * 12, 8, device=device))
    weight = whole(torch.empty(vocab, 8, device=device)) / 4
    one = head_loss(draw, weight, hidden, backend, old)
    bk.set_workspace_bytes(MIN_BYTES)  # 3 rows
    several = head_loss(draw, weight, hidden, backend, old)
    for name in ("loss", "logprob", "d_hidden"):
        torch.testing.assert_close(several[name], one[name], rtol=2e-6, atol=1e-7)
    assert torch.equal(several["logprob"], one["logprob"])
    torch.testing.assert_close(several["d_weight"], one["d_weight"])


@pytest.mark.parametrize(
    ("old", "need", "gemms"),
    [(old, need, 1 + len(need)) for old in (False, True) for need in ("hw", "h", "w", "")],
    ids=str,
)
@pytest.mark.parametrize("backend", ENGINES)
def test_one_pass_flops(backend: str, old: bool, need: str, gemms: int) -> None:
    """6NHV, 4NHV with a frozen head, 2NHV without gradients, on- and off-policy; chunked or not."""
    vocab = MIN_BYTES // 12
    device = device_of(backend)
    draw = make_draw([[3, 1, 2], [2, 3, 0]], vocab=vocab, device=device)
    hidden, weight = torch.randn(6 * 12, 8, device=device), torch.randn(vocab, 8, device=device)
    expected = gemms * 2 * draw.num_rows * weight.numel()
    scored = 2 * draw.num_rows * weight.numel() if old else 0  # the old policy's pass inside head_loss
    for size in (None, MIN_BYTES):
        bk.set_workspace_bytes(size)
        with gemm_flops() as counted:
            head_loss(draw, weight, hidden, backend, old, need)
        assert counted[0] - scored == expected


@pytest.mark.parametrize(("old", "need", "gemms"), [(False, "hw", 3), (True, "hw", 4), (True, "", 1)], ids=str)
def test_piecewise_flops(old: bool, need: str, gemms: int) -> None:
    """A segment above the capacity is looked at twice only off-policy, and only when a gradient is wanted."""
    vocab = MIN_BYTES // 12
    draw = make_draw([[7], [10]], vocab=vocab)
    hidden, weight = torch.randn(24, 8), torch.randn(vocab, 8)
    bk.set_workspace_bytes(MIN_BYTES)
    one = 2 * draw.num_rows * weight.numel()
    with gemm_flops() as counted:
        head_loss(draw, weight, hidden, "cpu", old, need)
    assert counted[0] == (gemms + old) * one


def _memory(call) -> tuple[int, int]:
    """Largest single allocation and largest sum of live allocations while ``call`` runs, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return largest, peak


@pytest.mark.parametrize("kind", ["logprob", "on-policy", "off-policy"])
def test_memory_is_one_workspace(kind: str) -> None:
    """Every allocation is counted: gradients, the workspace and O(N + chunk) numbers; nothing near N x V."""
    vocab, width, counts = 4096, 16, [[40, 25], [60, 33], [10, 64], [50, 22]]
    draw = make_draw(counts, tokens=64, vocab=vocab)
    hidden, weight = torch.randn(8 * 64, width), torch.randn(vocab, width)
    logits = draw.num_rows * vocab * 4
    bk.set_workspace_bytes(2 * MIN_BYTES)  # 8 rows

    def run() -> None:
        if kind == "logprob":
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            bk.masked_logprob(h, w, draw.targets, rows=draw.rows).sum().backward()
        else:
            head_loss(draw, weight, hidden, "cpu", kind == "off-policy")

    run()  # warm: thread-local buffers, lazy imports
    bk.set_workspace_bytes(2 * MIN_BYTES)
    largest, peak = _memory(run)
    gradients = 4 * (weight.numel() + 2 * hidden.numel())
    assert largest == 4 * weight.numel()
    assert peak <= gradients + 2 * MIN_BYTES + 4 * draw.num_rows * (8 + width) + 64 * 1024
    assert peak < logits / 4


def test_nothing_of_size_nv_is_saved() -> None:
    """What autograd keeps between forward and backward: inputs, and O(N) statistics."""
    problem = make_problem("cpu", n=50, v=3000)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        outcome(ours("cpu"), problem)
    assert max(kept) == max(problem.weight.numel(), problem.hidden.numel())
    small = sorted(kept)[:-2]
    assert all(size <= 4 * 50 + 3000 for size in small)
