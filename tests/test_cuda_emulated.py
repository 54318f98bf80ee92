"""The CUDA kernels' own source, run on a CPU by tests/cuda_emulator, against the references.

Covers what a GPU would not change: indices, ragged ends, unaligned rows, in-place overlap, selection, scans, reductions
and, by running the threads of a block in three different orders, races between barriers.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import cuda_emulator
import pytest
import torch
from fused_bound import CLIPPED, OPEN, assert_right, make_case
from mask_model import MASK_ID, draw_with, make_spec
from torch import Tensor

from bgpo_kernels.bound import reference as bound_reference
from bgpo_kernels.head import reference as head_reference
from bgpo_kernels.head.options import LogitTransform
from bgpo_kernels.masks import reference as mask_reference
from bgpo_kernels.masks.reference import Draw
from bgpo_kernels.masks.schedule import HARMONIC, CountSchedule, DrawSpec

ORDERS = ["forward", "backward", "shuffled"]
# Across a group of 4 or 8, a tile of 256 groups of four (4096 elements) and of 256 of fp64 (2048).
VOCABULARIES = [1, 3, 4, 8, 9, 1023, 1025, 2048, 4096, 4097, 9001]
PLAIN = LogitTransform()
TRANSFORMS = [PLAIN, LogitTransform(scale=0.7, temperature=1.3), LogitTransform(softcap=5.0, temperature=0.9)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def cuda(request: pytest.FixtureRequest) -> SimpleNamespace:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated kernels")
    return cuda_emulator.emulated(request.config.cache.mkdir("cuda_emulator"))


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)
    return request.param


# Masks


def make_batch(lengths: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    """Random ids, and responses of the given lengths scattered over the row."""
    response = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for b, length in enumerate(lengths):
        response[b, torch.randperm(tokens)[:length]] = True
    return torch.randint(0, MASK_ID, response.shape), response


def assert_same_draw(
    cuda: SimpleNamespace, ids: Tensor, response: Tensor, prompt: Tensor | None, sample_ids: Tensor, spec: DrawSpec
) -> None:
    want = draw_with(mask_reference, ids, response, prompt, sample_ids, spec)
    got = draw_with(cuda.masks, ids, response, prompt, sample_ids, spec)
    for name, w, g in zip(Draw._fields, want, got, strict=True):
        assert w.dtype == g.dtype and torch.equal(w, g), f"{name} of {spec}"


@pytest.mark.parametrize("schedule", ["uniform", "stratified", HARMONIC], ids=lambda s: getattr(s, "name", s))
@pytest.mark.parametrize("scheme", ["exact", "bernoulli", "coupled", "full"])
def test_every_law_matches_the_reference(
    cuda: SimpleNamespace, scheme: str, schedule: str | CountSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    if schedule is HARMONIC and scheme != "exact":
        pytest.skip("count tables belong to the exact scheme")
    lengths = [1, 2, 31, 300]
    ids, response = make_batch(lengths, 301)
    sample_ids = torch.tensor([0, 7, 2**31, 2**32 + 5])
    for (lo, hi), which in (((0, 4), "forward"), ((1, 3), "backward")):
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", which)
        spec = make_spec(scheme, schedule, 4, lengths, (lo, hi), 2**63 + 12345, 2**31)
        assert_same_draw(cuda, ids, response, ~response, sample_ids, spec)


def test_selection_in_every_thread_order(cuda: SimpleNamespace, order: str) -> None:
    ids, response = make_batch([1000, 1025], 1100)
    spec = make_spec("exact", "stratified", 4)
    assert_same_draw(cuda, ids, response, None, torch.tensor([4, 9]), spec)


def test_longest_response(cuda: SimpleNamespace) -> None:
    ids, response = make_batch([32768], 32768)
    assert_same_draw(cuda, ids, response, None, torch.tensor([1]), make_spec("exact", "stratified", 4, mc_range=(1, 2)))


def test_strided_inputs(cuda: SimpleNamespace) -> None:
    ids, response = make_batch([30, 50], 60)
    ids, response = ids.T.contiguous().T, response.T.contiguous().T
    spec = make_spec("exact", "uniform", 2, prompt_threshold=2**31)
    assert_same_draw(cuda, ids, response, ~response, torch.tensor([[4, 0], [9, 0]])[:, 0], spec)


def test_prompts_at_probability_one_and_zero(cuda: SimpleNamespace) -> None:
    ids, response = make_batch([5, 6], 40)
    for threshold in (0, 2**32):
        spec = make_spec("exact", "uniform", 2, prompt_threshold=threshold)
        assert_same_draw(cuda, ids, response, ~response, torch.tensor([4, 9]), spec)


def test_a_segment_adds_up_all_before_it(order: str, tmp_path: Path) -> None:
    """The scan's look-back by itself: predecessors that know their own count, or the sum up to themselves."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated kernels")
    check = cuda_emulator.program(Path(__file__).with_name("scan_check.cpp"), tmp_path)
    done = subprocess.run([check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("scheme", ["exact", "bernoulli", "coupled", "full"])
def test_segments_find_their_place_whatever_blocks_run_when(
    cuda: SimpleNamespace, order: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan over segments, with a few blocks at every stage of it at once."""
    lengths = [3, 1, 20, 7, 2, 40, 5, 9, 1, 33]
    ids, response = make_batch(lengths, 41)
    spec = make_spec(scheme, "stratified", 4, lengths, seed=3)
    for resident in ("2", "6"):
        monkeypatch.setenv("CUDA_EMULATOR_RESIDENT", resident)
        assert_same_draw(cuda, ids, response, None, torch.arange(10), spec)


# Rows


def make_chunk(
    rows: int, vocab: int, dtype: torch.dtype, stride: int | None = None, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in a buffer of NaN, with a row stride and a start of choice; the buffer; targets."""
    stride = stride or vocab
    buffer = torch.full((offset + rows * stride + 16,), torch.nan, dtype=dtype)
    logits = buffer.as_strided((rows, vocab), (stride, 1), offset)
    logits.copy_(torch.randn(rows, vocab, dtype=torch.float64) * 4)
    return logits, buffer, torch.randint(0, vocab, (rows,))


def outside(logits: Tensor, buffer: Tensor) -> Tensor:
    """What of the buffer does not belong to the logits."""
    kept = torch.ones(buffer.shape, dtype=torch.bool)
    kept.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(False)
    return buffer[kept]


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(
    backend, logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, entropy: bool = True
) -> Tensor:
    stats = torch.full((4, len(targets)), torch.nan, dtype=accumulate(logits.dtype))
    backend.row_statistics(logits, targets, bias, transform, stats, entropy)
    return stats


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """z, its maximum and the logarithm round once each, and |z| reaches 20, where an fp32 ulp is 1.9e-6; a narrow
    gradient rounds once more. Good for a few rows; accuracy against torch over many is measured on the real engines.
    """
    if dtype == torch.float64:
        return {"rtol": 1e-12, "atol": 1e-12}
    return {"rtol": max(4e-6, torch.finfo(dtype).eps), "atol": 4e-6}


def check_rows(
    cuda: SimpleNamespace, logits: Tensor, buffer: Tensor, targets: Tensor, transform: LogitTransform, with_bias: bool,
    entropy: bool,
) -> None:  # fmt: skip
    acc, vocab = accumulate(logits.dtype), logits.shape[1]
    bias = torch.randn(vocab, dtype=acc) if with_bias else None
    exact = statistics(head_reference, logits.double(), targets, bias, transform)
    stats = statistics(cuda.head, logits, targets, bias, transform, entropy)
    written = 4 if entropy else 3
    torch.testing.assert_close(stats[:written].double(), exact[:written], **tolerance(acc))
    assert entropy or stats[3].isnan().all()
    assert (stats[2] <= 0).all() and (stats[1] >= 1).all()

    grads = torch.randn(2, len(targets), dtype=acc)
    grad_entropy = grads[1] if entropy else None
    wide = None if grad_entropy is None else grad_entropy.double()
    rest = (targets, bias, transform)
    want = head_reference.dlogits_(logits.double(), *rest, exact, grads[0].double(), wide, torch.float64)
    got = cuda.head.dlogits_(logits, *rest, stats, grads[0], grad_entropy, logits.dtype)
    torch.testing.assert_close(got.double(), want, **tolerance(logits.dtype))
    assert outside(logits, buffer).isnan().all(), "wrote outside the chunk"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_rows_of_every_width(cuda: SimpleNamespace, dtype: torch.dtype, vocab: int) -> None:
    logits, buffer, targets = make_chunk(3, vocab, dtype, stride=vocab + 3, offset=1)
    check_rows(cuda, logits, buffer, targets, PLAIN, with_bias=False, entropy=True)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option(
    cuda: SimpleNamespace, dtype: torch.dtype, transform: LogitTransform, with_bias: bool, entropy: bool
) -> None:
    logits, buffer, targets = make_chunk(2, 4612, dtype)
    targets[0] = 0
    check_rows(cuda, logits, buffer, targets, transform, with_bias, entropy)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 8, 2047, 2056, 4096, 4104, 9001])
def test_narrow_gradient_over_wide_logits(cuda: SimpleNamespace, order: str, vocab: int, narrow: torch.dtype) -> None:
    """Bit for bit the rounded fp32 gradient in any order of threads: nothing is overwritten before it is read."""
    stride = vocab + (-vocab % 4 if vocab % 2 else 5)
    logits, buffer, targets = make_chunk(3, vocab, torch.float32, stride)
    targets[0], targets[1] = 0, vocab - 1
    stats = statistics(cuda.head, logits, targets, None, PLAIN)
    grads = torch.randn(2, 3)
    rest = (targets, None, PLAIN, stats, grads[0], grads[1])
    want = cuda.head.dlogits_(logits.clone(), *rest, torch.float32).to(narrow)
    got = cuda.head.dlogits_(logits, *rest, narrow)
    assert got.dtype == narrow and got.data_ptr() == logits.data_ptr()
    assert torch.equal(got, want)
    assert outside(logits, buffer).isnan().all()


def test_a_row_has_the_same_bits_wherever_it_lies(cuda: SimpleNamespace, order: str) -> None:
    row = torch.randn(1, 5003) * 4
    targets = torch.tensor([4321])
    results = []
    for offset in range(4):
        buffer = torch.empty(5003 + 4)
        logits = buffer.as_strided((1, 5003), (5003, 1), offset).copy_(row)
        stats = statistics(cuda.head, logits, targets, None, TRANSFORMS[1])
        grads = (torch.tensor([0.3]), torch.tensor([-0.2]))
        grad = cuda.head.dlogits_(logits, targets, None, TRANSFORMS[1], stats, *grads, torch.float32)
        results.append((stats, grad.clone()))
    for stats, grad in results[1:]:
        assert torch.equal(stats, results[0][0]) and torch.equal(grad, results[0][1])


def test_extreme_logits(cuda: SimpleNamespace) -> None:
    logits = torch.randn(6, 4500)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 4499] = 3.0
    logits[2] *= 1e4
    logits[3] -= 1e4
    logits[4, 17] = torch.nan  # dead below: exact zeros
    logits[5, 17] = torch.nan
    targets = torch.tensor([1, 4499, 5, 5, 5, 5])
    stats = statistics(cuda.head, logits, targets, None, PLAIN)
    want = statistics(head_reference, logits.double(), targets, None, PLAIN)
    torch.testing.assert_close(stats[:, :4], want[:, :4].float())
    assert stats[2, 1] == 0 and stats[2, 5].isnan()
    grad = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    got = cuda.head.dlogits_(logits, targets, None, PLAIN, stats, grad, torch.zeros(6), torch.bfloat16)
    assert got[:4].isfinite().all() and (got[4] == 0).all() and got[5].isnan().any()
    assert (got[0, ::2] == 0).all() and (got[1] == 0).all()


def test_no_rows(cuda: SimpleNamespace) -> None:
    logits, targets = torch.empty(0, 100), torch.empty(0, dtype=torch.int64)
    stats = statistics(cuda.head, logits, targets, None, PLAIN)
    got = cuda.head.dlogits_(logits, targets, None, PLAIN, stats, torch.empty(0), None, torch.float32)
    assert got.shape == (0, 100)


# Segments and the bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_segment_sums(cuda: SimpleNamespace, dtype: torch.dtype) -> None:
    sizes = torch.tensor([0, 1, 31, 32, 33, 0, 1000, 5, 2])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    values = torch.randn(int(offsets[-1]), dtype=dtype)
    weight = torch.rand(len(sizes))
    got = cuda.bound.segment_sum(values, offsets, weight)
    want = bound_reference.segment_sum(values, offsets, weight)
    assert got.dtype == dtype
    order_error = 1e-15 * float(values.abs().sum()) if dtype == torch.float64 else 0.0
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=order_error)
    integers = torch.randint(-4, 5, values.shape).to(dtype)
    ones = torch.ones_like(weight)
    assert torch.equal(
        cuda.bound.segment_sum(integers, offsets, ones), bound_reference.segment_sum(integers, offsets, ones)
    )


@pytest.mark.parametrize("clips", [(torch.inf, torch.inf, torch.inf), (0.2, 0.2, 3.0)], ids=["open", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bound(cuda: SimpleNamespace, dtype: torch.dtype, clips: tuple[float, float, float]) -> None:
    logprob = torch.randn(300, 3, dtype=dtype) * 2
    old = logprob + torch.randn(300, 3, dtype=dtype)
    advantages, length = torch.randn(300), torch.randint(1, 5, (300,)).float()
    advantages[0] = 0.0
    for arguments in ((None, None), (old, None), (old, length)):
        want = bound_reference.bound(logprob, advantages, *arguments, *clips)
        got = cuda.bound.bound(logprob, advantages, *arguments, *clips)
        for w, g in zip(want, got, strict=True):
            torch.testing.assert_close(g, w, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("clip", [OPEN, CLIPPED], ids=["open", "clipped"])
@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize(
    ("logits", "out", "vocab"),
    [
        (torch.float32, torch.float32, 41),
        (torch.float32, torch.bfloat16, 4105),
        (torch.float64, torch.float64, 41),
        (torch.bfloat16, torch.bfloat16, 41),
    ],
    ids=str,
)
def test_bound_in_the_kernel_that_makes_dlogits(
    cuda: SimpleNamespace, order: str, logits: torch.dtype, out: torch.dtype, vocab: int, old: bool,
    clip: tuple[float, float, float],
) -> None:  # fmt: skip
    case = make_case(vocab, old, clip, TRANSFORMS[2 if vocab < 100 else 0])
    got = case.run(cuda.head, "cuda", logits, out, "cpu")
    if logits == torch.bfloat16:  # the reference's logits must be the rounded ones, too
        case = case._replace(logits=case.logits.bfloat16().double())
    assert_right(got, case)
