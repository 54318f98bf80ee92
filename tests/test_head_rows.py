"""Row kernels of the compiled CPU engine on every instruction set: accuracy, independence of rows and threads."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

from bgpo_kernels.head import reference
from bgpo_kernels.head.options import LogitTransform

_cpu = pytest.importorskip("bgpo_kernels._cpu")
from bgpo_kernels.head import cpu  # noqa: E402

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(temperature=0.7),
    LogitTransform(scale=-1.5, temperature=1.3),
    LogitTransform(softcap=5.0),
    LogitTransform(scale=1.7, softcap=30.0, temperature=0.9),
]
LOGITS = [torch.float32, torch.bfloat16, torch.float64]


def _available() -> list[str]:
    best = _cpu.isa()
    found = []
    for name in ("kernels_baseline", "kernels_avx2", "kernels_avx512"):
        try:
            _cpu.use_kernels(name)
        except ValueError:
            continue
        found.append(name)
    _cpu.use_kernels(best)
    return found


@pytest.fixture(params=_available())
def isa(request) -> Iterator[str]:
    """Runs the test with the kernels of one instruction set."""
    best = _cpu.isa()
    _cpu.use_kernels(request.param)
    assert _cpu.isa() == request.param
    yield request.param
    _cpu.use_kernels(best)


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Chunk:
    """Arguments of the row kernels."""

    logits: Tensor  # [C, V]
    targets: Tensor  # [C]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    grad_logprob: Tensor  # [C]
    grad_entropy: Tensor | None  # [C]

    def run(self, kernels=cpu) -> tuple[Tensor, Tensor]:
        """Statistics and dlogits; the logits stay as they are."""
        entropy = self.grad_entropy is not None
        stats = torch.empty(4, len(self.targets), dtype=self.grad_logprob.dtype)
        kernels.row_statistics(self.logits, self.targets, self.bias, self.transform, stats, entropy)
        return stats if entropy else stats[:3], self.gradient_in_place(self.logits.clone(), stats, kernels)

    def gradient_in_place(self, logits: Tensor, stats: Tensor, kernels=cpu) -> Tensor:
        """dlogits over ``logits``, which hold the chunk's."""
        gradients = (self.grad_logprob, self.grad_entropy)
        return kernels.dlogits_(logits, self.targets, self.bias, self.transform, stats, *gradients, logits.dtype)

    def wide(self) -> Chunk:
        logits, bias, g, h = (
            None if x is None else x.double() for x in (self.logits, self.bias, self.grad_logprob, self.grad_entropy)
        )
        return Chunk(logits, self.targets, bias, self.transform, g, h)

    def rows(self, index: Tensor) -> Chunk:
        h = None if self.grad_entropy is None else self.grad_entropy[index]
        return Chunk(self.logits[index], self.targets[index], self.bias, self.transform, self.grad_logprob[index], h)


def make_chunk(
    vocab: int, dtype: torch.dtype = torch.float32, rows: int = 23, bias: bool = True, entropy: bool = True,
    transform: LogitTransform = TRANSFORMS[-1],
) -> Chunk:  # fmt: skip
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return Chunk(
        (4 * torch.randn(rows, vocab, dtype=torch.float64)).to(dtype),
        torch.randint(0, vocab, (rows,)),
        torch.randn(vocab, dtype=acc) if bias else None,
        transform,
        torch.randn(rows, dtype=acc),
        torch.randn(rows, dtype=acc) if entropy else None,
    )


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", LOGITS, ids=str)
def test_against_the_reference(isa: str, dtype: torch.dtype, transform: LogitTransform) -> None:
    for vocab, bias, entropy in ((1500, True, True), (1024, False, False), (37, True, False), (2049, False, True)):
        chunk = make_chunk(vocab, dtype, 31, bias, entropy, transform)
        exact, plain = chunk.wide().run(reference), chunk.run(reference)
        for name, got, torchs, true in zip(("stats", "dlogits"), chunk.run(), plain, exact, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-13)
            else:
                assert_as_good_as_torch(got, torchs, true, f"{name}, V={vocab}")


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.softcap is None], ids=str)
@pytest.mark.parametrize("dtype", LOGITS, ids=str)
def test_gradient_rows_sum_to_zero(isa: str, dtype: torch.dtype, transform: LogitTransform) -> None:
    """Softmax gradients do, however large the logits: the maximum must be recomputed to the bit (no contraction)."""
    for scale in (1.0, 100.0):
        chunk = make_chunk(1100, dtype, transform=transform)
        chunk.logits.mul_(scale)
        sums = [c.run(k)[1].double().sum(-1) for c, k in ((chunk, cpu), (chunk, reference), (chunk.wide(), reference))]
        if dtype == torch.float64:
            assert float(sums[0].abs().max()) < 1e-12
        else:
            error, plain = (float(s.abs().max()) for s in sums[:2])
            assert error <= 2 * plain + 2e-7, f"{error:.2e}, torch {plain:.2e}"


def test_same_bits_for_any_threads(isa: str) -> None:
    """Each row belongs to one thread, and its sums have an order of their own."""
    for dtype in LOGITS:
        chunk = make_chunk(1300, dtype, rows=37)
        results = []
        before = torch.get_num_threads()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(chunk.run())
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_ignore_their_companions(isa: str, threads: int) -> None:
    """Permuted, alone, or in a strided chunk: the same bits per row (batch invariance)."""
    chunk = make_chunk(1300)
    stats, dlogits = chunk.run()
    order = torch.randperm(len(chunk.targets))
    permuted = chunk.rows(order).run()
    assert torch.equal(permuted[0], stats[:, order]) and torch.equal(permuted[1], dlogits[order])
    alone = chunk.rows(torch.tensor([7])).run()
    assert torch.equal(alone[0][:, 0], stats[:, 7]) and torch.equal(alone[1][0], dlogits[7])
    wide = torch.full((23, 1317), torch.nan)
    wide[:, 11:1311] = chunk.logits
    view = wide[:, 11:1311]
    out = torch.empty(4, 23)
    cpu.row_statistics(view, chunk.targets, chunk.bias, chunk.transform, out, True)
    assert torch.equal(out, stats)
    assert torch.equal(chunk.gradient_in_place(view, out), dlogits)
    assert bool(wide[:, :11].isnan().all()) and bool(wide[:, 1311:].isnan().all())  # nothing written beyond the row


def test_dead_rows_are_zeroed_unread(isa: str) -> None:
    """No upstream gradient: exact zeros whatever logits and statistics hold."""
    for dtype in LOGITS:
        chunk = make_chunk(140, dtype, rows=5)
        chunk.logits[1], chunk.logits[3] = torch.nan, torch.inf
        chunk.grad_logprob[[1, 3]] = 0.0
        chunk.grad_entropy[[1, 3]] = 0.0
        dlogits = chunk.run()[1]
        assert bool((dlogits[[1, 3]] == 0).all()) and bool(torch.isfinite(dlogits).all())


def test_nan_and_infinity(isa: str) -> None:
    for where in (0, 1023, 1024, 1299):  # either side of a block's end
        chunk = make_chunk(1300, rows=2, transform=TRANSFORMS[1], entropy=True)
        chunk.logits[0, where] = torch.nan
        stats, dlogits = chunk.run()
        assert bool(stats[1:, 0].isnan().all()) and bool(dlogits[0].isnan().all())
        assert bool(torch.isfinite(stats[:, 1]).all()) and bool(torch.isfinite(dlogits[1]).all())
    blocked = make_chunk(2100, rows=2, transform=TRANSFORMS[1])
    blocked.logits[:, :1024] = -torch.inf  # a first block with no finite logit
    blocked.targets[:] = torch.tensor([3, 2000])
    stats, dlogits = blocked.run()
    assert stats[2, 0] == -torch.inf and bool(torch.isfinite(stats[2:, 1]).all())
    assert bool(torch.isfinite(dlogits).all()) and bool((dlogits[1, :1024] == 0).all())


def test_exponential_and_tanh(isa: str) -> None:
    """The engine's own exp and tanh, seen through statistics, over their whole range."""
    x = torch.cat([torch.linspace(-104, 0, 4001), -torch.logspace(-8, 1, 500)])
    two = torch.stack([torch.zeros_like(x), x], 1)  # max 0: sum = 1 + exp(x)
    stats = torch.empty(4, len(x))
    cpu.row_statistics(two, torch.ones(len(x), dtype=torch.int64), None, LogitTransform(), stats, False)
    assert float((stats[1].double() - (1 + x.double().exp())).abs().max()) <= 1.3e-7
    one = torch.ones(len(x))
    chunk = Chunk(two, torch.zeros(len(x), dtype=torch.int64), None, LogitTransform(), one, None)
    p_found = -chunk.run()[1][:, 1]  # a relative measure of exp, down to where it is flushed
    p = torch.sigmoid(x.double())
    kept = x > -86.9
    assert float(((p_found.double() - p) / p)[kept].abs().max()) < 4e-7
    assert bool(((p_found >= 0) & (p_found < 2e-38))[~kept].all())

    a = torch.cat([-torch.logspace(-7, 1.5, 2000), torch.logspace(-7, 1.5, 2000), torch.linspace(-1, 1, 999)])
    logits = torch.stack([a, torch.full_like(a, -1e4)], 1)  # maximum: tanh(a), against tanh(-1e4) = -1
    out = torch.empty(4, len(a))
    cpu.row_statistics(logits, torch.zeros(len(a), dtype=torch.int64), None, LogitTransform(softcap=1.0), out, False)
    true = torch.tanh(a.double())
    assert float(((out[0].double() - true) / true)[a > -9].abs().max()) < 4e-7


@pytest.mark.no_poison
def test_offsets_beyond_two_to_the_31(isa: str) -> None:
    """Rows 2^31 elements apart: 64-bit offsets. The address space is reserved; only the touched pages become memory."""
    vocab, stride, rows = 300, 2**31 + 5, 2
    size = 2 * ((rows - 1) * stride + vocab)
    try:
        reserved = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0))
    except (OSError, ValueError):
        pytest.skip("no 4 GiB of address space")
    far = torch.frombuffer(reserved, dtype=torch.bfloat16).as_strided((rows, vocab), (stride, 1))
    chunk = make_chunk(vocab, torch.bfloat16, rows)
    far.copy_(chunk.logits)
    stats = torch.empty(4, rows)
    cpu.row_statistics(far, chunk.targets, chunk.bias, chunk.transform, stats, True)
    expected_stats, expected = chunk.run()
    assert torch.equal(stats, expected_stats)
    assert torch.equal(chunk.gradient_in_place(far, stats), expected)
    del far


def test_no_such_instruction_set() -> None:
    with pytest.raises(ValueError, match="kernels_z80"):
        _cpu.use_kernels("kernels_z80")
    assert math.isfinite(float(make_chunk(5).run()[0][0, 0]))
