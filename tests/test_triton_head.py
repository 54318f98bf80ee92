"""Row kernels in Triton: statistics and in-place gradients of a chunk of logits, at every option, dtype and edge."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from bgpo_kernels._triton_math import bits, narrow, number
from bgpo_kernels.head import reference, triton_kernels
from bgpo_kernels.head.options import LogitTransform

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, at infinities and NaN
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = LogitTransform()
TRANSFORMS = [
    PLAIN,
    LogitTransform(temperature=0.7),
    LogitTransform(scale=0.0625),
    LogitTransform(softcap=30.0),
    LogitTransform(scale=-1.5, softcap=5.0, temperature=1.3),
]
PAIRS = [  # logits, gradients
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]


@dataclass
class Chunk:
    """Inputs of the row kernels; ``logits`` may be a strided view."""

    logits: Tensor  # [C, V]
    targets: Tensor  # [C]
    bias: Tensor | None  # [V]
    grad_logprob: Tensor  # [C]
    grad_entropy: Tensor | None  # [C]

    @property
    def acc(self) -> torch.dtype:
        return self.grad_logprob.dtype

    def double(self) -> Chunk:
        tensors = (self.logits, self.bias, self.grad_logprob, self.grad_entropy)
        logits, bias, g, h = (None if x is None else x.double() for x in tensors)
        return Chunk(logits, self.targets, bias, g, h)

    def copy(self) -> Chunk:
        """The same inputs over storage of their own, with the same row stride."""
        rows, columns = self.logits.shape
        storage = torch.zeros(rows, self.logits.stride(0), dtype=self.logits.dtype, device=DEVICE)
        storage[:, :columns] = self.logits
        return Chunk(storage[:, :columns], self.targets, self.bias, self.grad_logprob, self.grad_entropy)


def make_chunk(
    vocab: int,
    dtype: torch.dtype = torch.float32,
    rows: int = 4,
    bias: bool = False,
    entropy: bool = False,
    padding: int = 0,
    spread: float = 3.0,
) -> Chunk:
    """Random logits; targets in the first, last and middle column, one twice; row 1 has no upstream gradient."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    logits = (spread * torch.randn(rows, vocab + padding, dtype=torch.float64)).to(dtype).to(DEVICE)[:, :vocab]
    targets = torch.tensor([0, vocab - 1, vocab // 2, vocab // 2] * rows)[:rows].to(DEVICE)
    g, h = torch.randn(2, rows, dtype=acc, device=DEVICE)
    g[1 % rows] = h[1 % rows] = 0.0
    return Chunk(
        logits, targets, torch.randn(vocab, dtype=acc, device=DEVICE) if bias else None, g, h if entropy else None
    )


def run(engine: object, chunk: Chunk, transform: LogitTransform, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Statistics [4, C] (row 3 untouched NaN without entropy) and gradients [C, V] of a fresh copy of the chunk."""
    chunk = chunk.copy()
    entropy = chunk.grad_entropy is not None
    stats = torch.full((4, len(chunk.targets)), torch.nan, dtype=chunk.acc, device=DEVICE)
    engine.row_statistics(chunk.logits, chunk.targets, chunk.bias, transform, stats, entropy)
    grad = engine.dlogits_(
        chunk.logits, chunk.targets, chunk.bias, transform, stats, chunk.grad_logprob, chunk.grad_entropy, out_dtype
    )
    assert grad.data_ptr() == chunk.logits.data_ptr() and grad.dtype == out_dtype
    assert grad.stride(0) * grad.element_size() == chunk.logits.stride(0) * chunk.logits.element_size()
    return stats, grad


def autograd(chunk: Chunk, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and gradient in fp64 from torch alone: independent of every row kernel's formulas."""
    wide = chunk.double()
    logits = wide.logits.detach().clone().requires_grad_()
    logp = torch.log_softmax(transform.apply(logits if wide.bias is None else logits + wide.bias), dim=-1)
    logprob = logp.gather(-1, wide.targets[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    loss = (logprob * wide.grad_logprob).sum()
    if wide.grad_entropy is not None:
        loss = loss + (entropy * wide.grad_entropy).sum()
    loss.backward()
    return logprob.detach(), entropy.detach(), logits.grad


def assert_good(chunk: Chunk, transform: LogitTransform, out_dtype: torch.dtype) -> None:
    """Gradients by the tier-3 rule against autograd in fp64; statistics of a few rows close to torch's in their dtype.

    Tier 3 needs many numbers, or torch's own largest error is a fluke: ``test_statistics_are_as_good_as_torch`` has
    them. fp64 has no wider reference, so there autograd's fp64 result counts, to a few hundred roundings.
    """
    stats, grad = run(triton_kernels, chunk, transform, out_dtype)
    plain_stats, plain_grad = run(reference, chunk, transform, out_dtype)
    logprob, entropy, exact_grad = autograd(chunk, transform)
    assert (stats[2] <= 0).all() and (stats[1] >= 1).all()
    if transform.softcap is None:
        assert torch.equal(stats[0], plain_stats[0])  # the maximum is exact
    if chunk.acc == torch.float64:
        if chunk.grad_entropy is None:
            entropy.fill_(math.nan)  # what run() left there
        torch.testing.assert_close(stats[2:], torch.stack([logprob, entropy]), rtol=1e-13, atol=1e-13, equal_nan=True)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-13, atol=1e-13)
    else:
        torch.testing.assert_close(stats[2:], plain_stats[2:], equal_nan=True)
        assert_as_good_as_torch(grad, plain_grad, exact_grad, f"dlogits {transform}")


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype, out_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias+entropy"])
def test_options_and_dtypes(
    transform: LogitTransform, dtype: torch.dtype, out_dtype: torch.dtype, extras: bool
) -> None:
    """V = 4500: a full block and a ragged one; rows strided."""
    assert_good(make_chunk(4500, dtype, bias=extras, entropy=extras, padding=12), transform, out_dtype)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_statistics_are_as_good_as_torch(transform: LogitTransform) -> None:
    chunk = make_chunk(4500, rows=48, bias=True, entropy=True)
    results = []
    for engine in (triton_kernels, reference):
        stats = torch.empty(4, 48, device=DEVICE)
        engine.row_statistics(chunk.logits, chunk.targets, chunk.bias, transform, stats, True)
        results.append(stats)
    logprob, entropy, _ = autograd(chunk, transform)
    (_, _, got_logprob, got_entropy), (_, _, plain_logprob, plain_entropy) = results
    assert_as_good_as_torch(got_logprob, plain_logprob, logprob, "logprob")
    assert_as_good_as_torch(got_entropy, plain_entropy, entropy, "entropy")


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 127, 4095, 4096, 4097, 8192])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_around_the_tiles(vocab: int, out_dtype: torch.dtype) -> None:
    assert_good(make_chunk(vocab, entropy=True, rows=2), PLAIN, out_dtype)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("padding", [0, 5])
def test_many_blocks_written_over_their_own_logits(
    monkeypatch: pytest.MonkeyPatch, out_dtype: torch.dtype, padding: int
) -> None:
    """Eleven blocks: narrow stores reach far into blocks that were read long before."""
    monkeypatch.setitem(triton_kernels.BLOCKS, 4, 64)
    assert_good(make_chunk(64 * 10 + 7, padding=padding), PLAIN, out_dtype)


def test_llada_vocabulary() -> None:
    assert_good(make_chunk(126464, rows=1), PLAIN, torch.bfloat16)


@pytest.mark.parametrize("shift", [1.0e4, -1.0e4, -3.0e38])
def test_far_from_zero(shift: float) -> None:
    """The running maximum starts below anything finite."""
    chunk = make_chunk(100)
    chunk.logits += shift
    assert_good(chunk, PLAIN, torch.float32)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_spread_of_1e4(transform: LogitTransform) -> None:
    chunk = make_chunk(500, bias=True, entropy=True)
    chunk.logits[:, ::7] = 1.0e4
    chunk.logits[:, 1::7] = -1.0e4
    chunk.logits[2, chunk.targets[2]] = 2.0e4
    assert_good(chunk, transform, torch.float32)


def test_certain_targets_never_exceed_probability_one() -> None:
    chunk = make_chunk(1000, spread=1.0)
    rows = torch.arange(4, device=DEVICE)
    for margin in (5.0, 17.0, 20.0, 100.0):
        chunk.logits[rows, chunk.targets] = margin
        assert_good(chunk, PLAIN, torch.float32)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_minus_infinite_bias_excludes_a_column(softcap: float | None) -> None:
    """p = 0 and no NaN anywhere, whether the excluded columns come first, last, or fill a whole block."""
    chunk = make_chunk(4500, bias=True, entropy=True)
    chunk.bias[:4200] = -math.inf
    chunk.bias[-5:] = -math.inf
    chunk.targets[:] = 4300
    transform = LogitTransform(softcap=softcap)
    stats, grad = run(triton_kernels, chunk, transform, torch.float32)
    plain_stats, plain_grad = run(reference, chunk, transform, torch.float32)
    torch.testing.assert_close(stats, plain_stats)
    torch.testing.assert_close(grad, plain_grad)
    assert stats.isfinite().all() and grad.isfinite().all()
    assert (grad[:, chunk.bias == -math.inf] == 0).all()


def test_excluded_target_has_log_probability_minus_infinity() -> None:
    chunk = make_chunk(50, bias=True)
    chunk.bias[chunk.targets[0]] = -math.inf
    stats, grad = run(triton_kernels, chunk, PLAIN, torch.float32)
    assert stats[2, 0] == -math.inf and not grad.isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("column", [0, 4099])
def test_bad_logits_stay_in_their_row_and_are_not_hidden(bad: float, out_dtype: torch.dtype, column: int) -> None:
    chunk = make_chunk(4100, entropy=True)
    clean = run(triton_kernels, chunk, PLAIN, out_dtype)
    chunk.logits[2, column] = bad
    stats, grad = run(triton_kernels, chunk, PLAIN, out_dtype)
    assert stats[1:, 2].isnan().all() and grad[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(stats[:, others], clean[0][:, others]) and torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("dtype, out_dtype", PAIRS, ids=str)
def test_rows_without_gradient_are_exact_zeros_even_over_nan(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    chunk = make_chunk(4500, dtype, entropy=True, padding=3)
    chunk.logits[1] = math.nan
    _, grad = run(triton_kernels, chunk, PLAIN, out_dtype)
    assert (grad[1] == 0).all() and not grad[1].signbit().any()
    assert grad[[0, 2, 3]].isfinite().all() and (grad[[0, 2, 3]] != 0).any(-1).all()


def test_entropy_alone_keeps_a_row_alive() -> None:
    chunk = make_chunk(64, entropy=True)
    chunk.grad_logprob[:] = 0
    assert_good(chunk, PLAIN, torch.float32)
    _, grad = run(triton_kernels, chunk, PLAIN, torch.float32)
    assert (grad[[0, 2, 3]] != 0).any() and (grad[1] == 0).all()


def test_gradient_rows_sum_to_zero() -> None:
    chunk = make_chunk(4500, torch.float64, entropy=True)
    _, grad = run(triton_kernels, chunk, LogitTransform(temperature=0.7), torch.float64)
    # Each entry is below ~10 and rounded a handful of times; 4500 of them add up to at most this.
    assert float(grad.sum(-1).abs().max()) < 4500 * 10 * 2**-50


def test_a_row_alone_has_the_bits_it_has_in_a_chunk() -> None:
    chunk = make_chunk(4500, rows=5, bias=True, entropy=True)
    order = [3, 0, 4, 1, 2]
    stats, grad = run(triton_kernels, chunk, PLAIN, torch.bfloat16)
    for rows in (order, [2]):
        part = Chunk(
            chunk.logits[rows], chunk.targets[rows], chunk.bias, chunk.grad_logprob[rows], chunk.grad_entropy[rows]
        )
        part_stats, part_grad = run(triton_kernels, part, PLAIN, torch.bfloat16)
        assert torch.equal(part_stats, stats[:, rows]) and torch.equal(part_grad, grad[rows])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_stay_inside(out_dtype: torch.dtype) -> None:
    """Everything lies amid NaN, which must neither leak in nor be overwritten; statistics are a slice."""
    chunk = make_chunk(4500, bias=True, entropy=True)
    want_stats, want_grad = run(triton_kernels, chunk, PLAIN, out_dtype)
    storage = torch.full((6, 4600), math.nan, device=DEVICE)
    logits = storage[1:5, 50:4550].copy_(chunk.logits)
    bias, g, h, stats = (torch.full(shape, math.nan, device=DEVICE) for shape in ((4600,), (100,), (100,), (6, 20)))
    bias[50:4550] = chunk.bias
    g[50:54], h[50:54] = chunk.grad_logprob, chunk.grad_entropy
    targets = torch.full((100,), 2**40, device=DEVICE)
    targets[50:54] = chunk.targets
    inner = stats[1:5, 10:14]
    triton_kernels.row_statistics(logits, targets[50:54], bias[50:4550], PLAIN, inner, True)
    grad = triton_kernels.dlogits_(logits, targets[50:54], bias[50:4550], PLAIN, inner, g[50:54], h[50:54], out_dtype)
    assert torch.equal(inner, want_stats) and torch.equal(grad, want_grad)
    logits.fill_(math.nan)
    inner.fill_(math.nan)
    assert storage.isnan().all() and stats.isnan().all()


def test_rows_beyond_2_to_31_elements() -> None:
    """The stride fits 32 bits, the third row's offset does not. On the CPU the pages between rows are never touched."""
    stride = 2**30 + 64
    elements = 2 * stride + 256
    if DEVICE == "cuda":
        storage = torch.zeros(elements, dtype=torch.bfloat16, device=DEVICE)
    else:
        storage = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.bfloat16)
    far = storage.as_strided((3, 256), (stride, 1))
    near = make_chunk(256, torch.bfloat16, rows=3)
    far.copy_(near.logits)
    want_stats, want_grad = run(triton_kernels, near, PLAIN, torch.bfloat16)
    stats = torch.empty(4, 3, device=DEVICE)
    triton_kernels.row_statistics(far, near.targets, None, PLAIN, stats, False)
    grad = triton_kernels.dlogits_(far, near.targets, None, PLAIN, stats, near.grad_logprob, None, torch.bfloat16)
    assert torch.equal(stats[:3], want_stats[:3]) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMS[-1]], ids=str)
def test_gradcheck_through_both_kernels(transform: LogitTransform) -> None:
    """Tier 2, with an arbitrary upstream gradient for log-probability and entropy together."""
    chunk = make_chunk(40, torch.float64, rows=3, bias=True)

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, logits: Tensor) -> tuple[Tensor, Tensor]:
            stats = torch.empty(4, 3, dtype=torch.float64, device=DEVICE)
            triton_kernels.row_statistics(logits, chunk.targets, chunk.bias, transform, stats, True)
            ctx.save_for_backward(logits, stats)
            return stats[2].clone(), stats[3].clone()

        @staticmethod
        def backward(ctx: object, g: Tensor, h: Tensor) -> Tensor:
            logits, stats = ctx.saved_tensors
            return triton_kernels.dlogits_(
                logits.clone(), chunk.targets, chunk.bias, transform, stats, g, h, torch.float64
            )

    logits = chunk.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(Rows.apply, logits, eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=0.0, fast_mode=True)


def test_strided_inputs() -> None:
    chunk = make_chunk(500, bias=True, entropy=True)
    stats, grad = run(triton_kernels, chunk, PLAIN, torch.float32)
    for name in ("targets", "bias", "grad_logprob", "grad_entropy"):
        setattr(chunk, name, getattr(chunk, name).repeat_interleave(2)[::2])
    strided_stats, strided_grad = run(triton_kernels, chunk, PLAIN, torch.float32)
    assert torch.equal(strided_stats, stats) and torch.equal(strided_grad, grad)


def test_no_rows() -> None:
    none = Chunk(
        *(torch.zeros(shape, device=DEVICE) for shape in ((0, 9), 0)), None, torch.zeros(0, device=DEVICE), None
    )
    stats, grad = run(triton_kernels, none, PLAIN, torch.float32)
    assert stats.shape == (4, 0) and grad.shape == (0, 9)


@triton.jit
def _narrow_kernel(wide, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, narrow(tl.load(wide + lane), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 2e-38, 65520.0, 6e-8])
    ties = torch.arange(1 << 10) * 2.0**-9 + 1.0  # halfway between bf16 neighbours, every other one of them
    wide = torch.cat([edges, ties, torch.randn(4096 - 10 - 1024) * 100]).to(DEVICE)
    out = torch.empty(4096, dtype=dtype, device=DEVICE)
    _narrow_kernel[(1,)](wide, out, BLOCK=4096)
    want = wide.to(dtype)
    assert torch.equal(out.isnan(), want.isnan())
    kept = ~want.isnan()
    assert torch.equal(out[kept], want[kept]) and torch.equal(out[kept].signbit(), want[kept].signbit())


@triton.jit(do_not_specialize=("x",))
def _number_kernel(x: tl.int64, out):
    tl.store(out, number(x, out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, 0.7, -1.5, 1 / 3, 1e-40, 1e300, math.inf, -math.inf, math.nan])
def test_numbers_reach_a_kernel_rounded_once(x: float, dtype: torch.dtype) -> None:
    out = torch.zeros(1, dtype=dtype, device=DEVICE)
    _number_kernel[(1,)](bits(x), out)
    want = torch.tensor([x], dtype=torch.float64, device=DEVICE).to(dtype)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert math.isnan(x) or torch.equal(out.signbit(), want.signbit())


@triton.jit
def _tanh_kernel(u, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, triton_kernels._tanh(tl.load(u + lane)))


def test_tanh_is_good_to_2_ulp_at_every_magnitude() -> None:
    u = torch.cat([torch.logspace(-30, 1.5, 4000), torch.tensor([0.625, 0.0, 100.0, math.inf])])
    u = torch.cat([u, -u, torch.zeros(8192 - 2 * len(u))]).to(DEVICE)
    out = torch.empty_like(u)
    _tanh_kernel[(1,)](u, out, BLOCK=8192)
    exact = u.double().tanh()
    ulp = torch.nextafter(exact.float().abs(), torch.full_like(u, 2.0)).double() - exact.float().abs().double()
    assert float(((out.double() - exact).abs() / ulp).max()) <= 2
    assert (out.abs() <= 1).all()
