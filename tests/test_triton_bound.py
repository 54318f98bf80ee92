"""Segment sums and the bound in Triton against the reference, at edges and amid poisoned memory."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

pytest.importorskip("triton")

from bgpo_kernels.bound import reference, triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64]
OFF = (math.inf, math.inf, math.inf)
CLIPS = [OFF, (0.2, 0.2, 3.0), (0.2, 0.3, math.inf), (math.inf, math.inf, 1.5)]


def make_samples(
    dtype: torch.dtype, batch: int = 9, samples: int = 31, spread: float = 20.0
) -> dict[str, Tensor | None]:
    """Log-probabilities of responses, old ones nearby, advantages of either sign with exact zeros."""
    logprob = -200 + 50 * torch.randn(batch, samples, dtype=torch.float64)
    old = logprob + spread * torch.randn(batch, samples, dtype=torch.float64)
    advantages = torch.randn(batch)
    advantages[0] = 0.0
    return {
        "logprob": logprob.to(dtype).to(DEVICE),
        "advantages": advantages.to(DEVICE),
        "old": old.to(dtype).to(DEVICE),
        "length": torch.randint(10, 60, (batch,)).float().to(DEVICE),
    }


def widened(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.double() for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
def test_bound(dtype: torch.dtype, clip: tuple[float, float, float], on_policy: bool, with_length: bool) -> None:
    inputs = make_samples(dtype, spread=20.0 if with_length else 1.0)
    if on_policy:
        inputs["old"] = None
    if not with_length:
        inputs["length"] = None
    got = triton_kernels.bound(*inputs.values(), *clip)
    plain = reference.bound(*inputs.values(), *clip)
    exact = reference.bound(*widened(inputs).values(), *clip)
    for name, g, p, e in zip(("term", "slope"), got, plain, exact, strict=True):
        assert g.dtype == dtype
        assert_as_good_as_torch(g, p, e, f"{name}, clip {clip}")
    assert torch.equal(got[1] == 0, plain[1] == 0)  # the same samples are clipped


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_policy_both_branches_are_exact(dtype: torch.dtype) -> None:
    inputs = make_samples(dtype)
    inputs["old"], inputs["length"] = None, None
    term, slope = triton_kernels.bound(*inputs.values(), 0.2, 0.2, 3.0)
    advantage = inputs["advantages"][:, None].to(dtype).expand_as(term)
    assert torch.equal(term, advantage) and torch.equal(slope, advantage)


def test_fp64_clips_are_not_rounded_to_fp32() -> None:
    """r lies between 1.2 in fp64 and 1.2 rounded to fp32 (1.2000000477): it is clipped."""
    inputs = (torch.tensor([[0.20000002]], dtype=torch.float64, device=DEVICE), torch.ones(1, device=DEVICE))
    old = torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    term, slope = triton_kernels.bound(*inputs, old, None, 0.2, 0.2, 3.0)
    assert float(term) == 1.0 + 0.2 and float(slope) == 0.0


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_bad_logprob_reaches_the_term(clip: tuple[float, float, float], advantage: float) -> None:
    logprob = torch.tensor([[math.nan, -1.0]], device=DEVICE)
    advantages = torch.tensor([advantage], device=DEVICE)
    for old in (None, torch.zeros(1, 2, device=DEVICE)):
        term, slope = triton_kernels.bound(logprob, advantages, old, None, *clip)
        assert term.isnan().tolist() == [[True, False]] and bool(slope[0, 1].isfinite())


def test_far_below_minus_one_the_linear_branch_stays_linear() -> None:
    logprob = torch.full((1, 1), -50.0, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    term, slope = triton_kernels.bound(logprob, one, torch.zeros_like(logprob), None, *OFF)
    assert float(term) == -49.0 and float(slope) == 1.0


def make_segments(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Values by segment, offsets and weights, around the kernel's block of 256 and with empty segments."""
    sizes = [0, 1, 255, 256, 257, 0, 700, 3, 0]
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)
    values = [-5 * torch.rand(size, dtype=dtype, device=DEVICE) for size in sizes]
    return values, offsets, (1 + torch.rand(len(sizes))).to(DEVICE)


def test_segment_sum_fp32_is_rounded_once() -> None:
    values, offsets, weight = make_segments(torch.float32)
    got = triton_kernels.segment_sum(torch.cat(values), offsets, weight)
    exact = [math.fsum(v.tolist()) * float(w) for v, w in zip(values, weight, strict=True)]
    assert torch.equal(got.cpu(), torch.tensor(exact, dtype=torch.float64).float())


def test_segment_sum_fp64() -> None:
    values, offsets, weight = make_segments(torch.float64)
    got = triton_kernels.segment_sum(torch.cat(values), offsets, weight)
    assert got.dtype == torch.float64
    for g, v, w in zip(got.tolist(), values, weight.tolist(), strict=True):
        # At most: one addition per pass over a lane, 8 in the tree over 256 lanes, one product.
        roundings = math.ceil(len(v) / 256) + 8 + 1
        assert abs(g - w * math.fsum(v.tolist())) <= roundings * 2**-53 * w * float(v.abs().sum())


def test_segment_sum_of_integers_is_bit_exact() -> None:
    values = torch.randint(-4, 5, (900,)).float().to(DEVICE)
    offsets = torch.tensor([0, 450, 900], device=DEVICE)
    weight = torch.tensor([1.0, 0.5], device=DEVICE)
    assert torch.equal(
        triton_kernels.segment_sum(values, offsets, weight), values.double().view(2, 450).sum(1).float() * weight
    )


def test_a_segment_ignores_its_neighbours() -> None:
    values = torch.randn(600, device=DEVICE)
    offsets = torch.tensor([0, 300, 600], device=DEVICE)
    weight = torch.ones(2, device=DEVICE)
    both = triton_kernels.segment_sum(values, offsets, weight)
    values[300:] = math.nan
    spoiled = triton_kernels.segment_sum(values, offsets, weight)
    assert torch.equal(both[0], spoiled[0]) and bool(spoiled[1].isnan())


def test_reads_and_writes_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs amid NaN and outputs amid sentinels."""
    inputs = make_samples(torch.float32, batch=3, samples=7)
    want = reference.bound(*inputs.values(), 0.2, 0.2, 3.0)
    storages = []

    def amid(poison: float, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        storage = torch.full((math.prod(shape) + 512,), poison, dtype=dtype, device=DEVICE)
        storages.append(storage)
        return storage[256:-256].view(shape)

    sheltered = [amid(math.nan, x.shape, x.dtype).copy_(x) for x in inputs.values()]
    values = amid(math.nan, (5,), torch.float32).fill_(1.0)
    storages.clear()
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: amid(77, torch.zeros(shape).shape, dtype))
    monkeypatch.setattr(torch, "empty_like", lambda x: amid(77, x.shape, x.dtype))
    got = triton_kernels.bound(*sheltered, 0.2, 0.2, 3.0)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    sums = triton_kernels.segment_sum(values, torch.tensor([0, 2, 5], device=DEVICE), torch.ones(2, device=DEVICE))
    assert sums.tolist() == [2.0, 3.0]
    assert len(storages) == 3
    for storage in storages:
        assert (storage[:256] == 77).all() and (storage[-256:] == 77).all()


def test_empty_inputs() -> None:
    none = torch.zeros(0, 4, device=DEVICE)
    term, slope = triton_kernels.bound(none, none[:, 0], None, None, *OFF)
    assert term.shape == slope.shape == (0, 4)
    offsets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert triton_kernels.segment_sum(none[:, 0], offsets, none[:, 0]).shape == (0,)
