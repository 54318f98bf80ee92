"""BGPO's bound: the identities that make it BGPO, its clips against PPO's own min and max, its statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from head_cases import CUDA, device_of
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.backends import engine, why_not
from bgpo_kernels.bound.ops import spread

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
INF = math.inf
CLIPS = {
    "off": {},
    "clip": {"clip_range": 0.2},
    "pair": {"clip_range": (0.1, 0.35)},
    "dual": {"dual_clip": 1.5},
    "both": {"clip_range": 0.2, "dual_clip": 3.0},
}


def _kernels() -> Iterator[object]:
    for name in ("reference", "cpu", "triton", *(["cuda"] if CUDA else [])):
        reason = why_not(name, device_of(name))
        yield pytest.param(name, marks=[pytest.mark.skipif(reason is not None, reason=str(reason))])


backends = pytest.mark.parametrize("backend", list(_kernels()))


def limits(clip_range=None, dual_clip: float | None = None) -> tuple[float, float, float]:
    """Clip limits as the kernels take them."""
    low, high = (INF, INF) if clip_range is None else clip_range if isinstance(clip_range, tuple) else (clip_range,) * 2
    return low, high, INF if dual_clip is None else dual_clip


def samples(batch: int = 40, n: int = 25, spread: float = 0.5, dtype=torch.float64, seed: int = 3) -> dict[str, Tensor]:
    """Log-probabilities around -100, old ones nearby; advantages of both signs, one exactly 0."""
    g = torch.Generator().manual_seed(seed)
    logprob = -100 + 30 * torch.randn(batch, n, dtype=torch.float64, generator=g)
    old = logprob + spread * torch.randn(batch, n, dtype=torch.float64, generator=g)
    advantages = torch.randn(batch, generator=g)
    advantages[0] = 0.0
    return {"logprob": logprob.to(dtype), "advantages": advantages, "old_logprob": old.to(dtype)}


def ppo_term(d: Tensor, a: Tensor, clip_range=None, dual_clip: float | None = None) -> Tensor:
    """PPO's clipped surrogate, min(r A, clip(r) A), and dual clip, max(that, c A) where A < 0, on BGPO's ratio."""
    ratio = torch.where(a >= 0, 1 + d, torch.exp(d))
    term = ratio * a
    if clip_range is not None:
        low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
        term = torch.minimum(term, ratio.clamp(1 - low, 1 + high) * a)
    if dual_clip is not None:
        term = torch.where(a < 0, torch.maximum(term, dual_clip * a), term)
    return term


def loss_and_gradient(inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor, bk.BoundStats]:
    logprob = inputs["logprob"].detach().requires_grad_()
    loss, stats = bk.bgpo_loss(logprob, **{k: v for k, v in inputs.items() if k != "logprob"}, **options)
    loss.backward()
    return loss.detach(), logprob.grad, stats


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
@pytest.mark.parametrize("with_length", [False, True], ids=["plain", "length"])
def test_loss_is_ppo_on_the_bounds_ratio(clip: dict[str, object], with_length: bool) -> None:
    """Value and gradient against autograd through PPO's min and max, in fp64."""
    inputs = samples(spread=5.0 if with_length else 0.5)
    if with_length:
        inputs["length"] = torch.randint(5, 30, (40,))
    loss, gradient, _ = loss_and_gradient(inputs, **clip)
    logprob = inputs["logprob"].detach().requires_grad_()
    length = inputs["length"][:, None].double() if with_length else 1.0
    a = inputs["advantages"][:, None].double()
    expected = -ppo_term((logprob - inputs["old_logprob"]) / length, a, **clip).mean(1).sum() / 40
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, logprob.grad, rtol=1e-12, atol=1e-16)
    clipped = gradient[1:] == 0
    assert bool(clipped.any()) == bool(clip) and not bool(clipped.all())


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@backends
def test_kernels(backend: str, dtype: torch.dtype, clip: dict[str, object]) -> None:
    """Terms and slopes of every backend against PPO's form and its autograd."""
    device = device_of(backend)
    inputs = {name: x.to(device) for name, x in samples(batch=12, dtype=dtype).items()}
    length = torch.randint(1, 4, (12,), device=device).float()
    kernel = engine("bound", backend).bound
    got = kernel(inputs["logprob"], inputs["advantages"], inputs["old_logprob"], length, *limits(**clip))

    def plain(acc: torch.dtype) -> tuple[Tensor, Tensor]:
        logprob = inputs["logprob"].to(acc).requires_grad_()
        d = (logprob - inputs["old_logprob"].to(acc)) / length[:, None].to(acc)
        term = ppo_term(d, inputs["advantages"][:, None].to(acc), **clip)
        return term.detach(), torch.autograd.grad(term.sum(), logprob)[0]

    for name, value, torchs, exact in zip(("term", "slope"), got, plain(dtype), plain(torch.float64), strict=True):
        assert value.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact, rtol=1e-13, atol=1e-15)
        else:
            assert_as_good_as_torch(value, torchs, exact, name)


@backends
def test_kernels_at_the_clip(backend: str) -> None:
    """At exactly the limit the gradient still flows (torch's clamp says so too); one step beyond, it does not."""
    device = device_of(backend)
    d = torch.tensor([[0.25, 0.25 + 2**-20, -0.5, -3.0]], device=device)
    zero, one = torch.zeros_like(d), torch.ones(1, device=device)
    term, slope = engine("bound", backend).bound(d, one, zero, None, 0.25, 0.25, INF)
    assert slope.tolist() == [[1.0, 0.0, 1.0, 1.0]] and term.tolist() == [[1.25, 1.25, 0.5, -2.0]]
    at_one = engine("bound", backend).bound(zero, -one, zero, None, 0.0, 0.0, INF)
    assert at_one[1].tolist() == [[-1.0] * 4]


@backends
def test_on_policy_is_exact(backend: str) -> None:
    """d is bitwise 0 with and without an explicit old policy; both branches have slope 1; the sign only negates."""
    device = device_of(backend)
    bound = engine("bound", backend).bound
    for dtype in (torch.float32, torch.float64):
        inputs = {name: x.to(device) for name, x in samples(batch=9, n=7, dtype=dtype).items()}
        logprob, a = inputs["logprob"], inputs["advantages"]
        term, slope = bound(logprob, a, None, None, 0.2, 0.2, 3.0)
        assert torch.equal(term, a[:, None].expand_as(term).to(dtype)) and torch.equal(slope, term)
        same = bound(logprob, a, logprob.clone(), None, 0.2, 0.2, 3.0)
        assert torch.equal(same[0], term) and torch.equal(same[1], slope)
        minus = bound(logprob, -a, None, None, 0.2, 0.2, 3.0)
        assert torch.equal(minus[1], -slope)


def test_on_policy_gradient_is_the_exact_ratios() -> None:
    """grad of A exp(mean d) at d = 0, whatever the sign of A; flipping the sign negates it to the bit."""
    inputs = samples()
    inputs["old_logprob"] = inputs["logprob"]
    _, gradient, stats = loss_and_gradient(inputs)
    logprob = inputs["logprob"].detach().requires_grad_()
    exact = -(inputs["advantages"].double() * (logprob - inputs["logprob"]).mean(1).exp()).sum() / 40
    exact.backward()
    torch.testing.assert_close(gradient, logprob.grad, rtol=1e-14, atol=0)
    flipped = loss_and_gradient(inputs | {"advantages": -inputs["advantages"]})[1]
    assert torch.equal(flipped, -gradient)
    assert float(stats.max_abs_log_ratio) == 0.0 and float(stats.gap) == 0.0


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_bound_never_exceeds_the_objective(n: int) -> None:
    """100,000 random (d, A), including d < -1 where the exp(log(1 + d)) of public code is NaN; slack 4 ulp of fp64."""
    batch = 100_000 // 4
    g = torch.Generator().manual_seed(n)
    d = (
        torch.randn(batch, n, dtype=torch.float64, generator=g)
        * torch.tensor([0.01, 0.3, 2.0, 8.0])[torch.randint(0, 4, (batch, 1), generator=g)]
    )
    assert bool((d < -1).any())
    a = torch.randn(batch, generator=g)
    term, _ = engine("bound", "cpu").bound(d, a, torch.zeros_like(d), None, INF, INF, INF)
    lower = term.sum(1) / n
    exact = a.double() * torch.exp(d.sum(1) / n)
    scale = (a.double()[:, None] * torch.where(a[:, None] >= 0, 1 + d.abs(), d.exp())).abs().amax(1)
    assert bool((lower <= exact + 4 * torch.finfo(torch.float64).eps * scale.maximum(exact.abs())).all())
    gaps = ((exact - lower) > 1e-9 * scale).double().mean()
    assert float(gaps) > (0.4 if n == 1 else 0.7)  # the test sees real gaps, not equalities everywhere


def test_bound_meets_the_objective() -> None:
    """Equality at d = 0, and for A < 0 wherever all samples agree."""
    d = torch.linspace(-5, 3, 33, dtype=torch.float64)[:, None].expand(33, 6).contiguous()
    negative = torch.full((33,), -1.7)
    bound = engine("bound", "cpu").bound
    term, _ = bound(d, negative, torch.zeros_like(d), None, INF, INF, INF)
    torch.testing.assert_close(term.mean(1), negative.double() * d[:, 0].exp(), rtol=1e-15, atol=0)
    for a in (2.3, -2.3):
        term, _ = bound(torch.zeros(1, 6), torch.tensor([a]), torch.zeros(1, 6), None, INF, INF, INF)
        assert term.tolist() == [[pytest.approx(a)] * 6]


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_each_sample_backpropagates_alone(clip: dict[str, object]) -> None:
    """Linearity over MC samples: gradients of the n samples one by one are those of their sum, to the bit."""
    inputs = samples(batch=6, n=8)
    _, whole, _ = loss_and_gradient(inputs, **clip)
    for j in range(8):
        part = {name: x[:, j : j + 1] if x.dim() == 2 else x for name, x in inputs.items()}
        _, gradient, _ = loss_and_gradient(part, **clip, normalizer=6 * 8)
        torch.testing.assert_close(gradient, whole[:, j : j + 1], rtol=1e-12, atol=0)


def test_length_and_normalizer() -> None:
    """A length divides both log-probabilities; the normalizer replaces B."""
    inputs = samples()
    length = torch.randint(1, 50, (40,)).float()
    divided = {name: x / length[:, None] if x.dim() == 2 else x for name, x in inputs.items()}
    loss, gradient, _ = loss_and_gradient(inputs | {"length": length})
    expected, plain, _ = loss_and_gradient(divided)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, plain / length[:, None], rtol=1e-12, atol=0)
    halved, half_gradient, _ = loss_and_gradient(inputs | {"length": length}, normalizer=80)
    assert torch.equal(halved, loss / 2) and torch.equal(half_gradient, gradient / 2)
    whole_numbers = loss_and_gradient(inputs | {"length": length.long()})
    assert torch.equal(whole_numbers[0], loss) and torch.equal(whole_numbers[1], gradient)


@pytest.mark.parametrize("clip", [{}, CLIPS["both"]], ids=["off", "both"])
def test_statistics(clip: dict[str, object]) -> None:
    """Every number from its definition."""
    inputs = samples() | {"length": torch.full((40,), 2.0)}
    loss, gradient, stats = loss_and_gradient(inputs, normalizer=50, **clip)
    a = inputs["advantages"].double()
    d = (inputs["logprob"] - inputs["old_logprob"]) / 2
    r = d.exp()
    bound = (torch.where(a[:, None] >= 0, 1 + d, r) * a[:, None]).mean(1).sum() / 50
    exact = (a * d.mean(1).exp()).sum() / 50
    expected = {
        "mean_ratio": r.mean(),
        "clipped": (gradient == 0)[a != 0].double().mean(),
        "max_abs_log_ratio": d.abs().max(),
        "bound": bound,
        "exact": exact,
        "gap": exact - bound,
        "effective_sample_size": (r.sum(1) ** 2 / (r**2).sum(1)).mean(),
    }
    assert stats._fields == tuple(expected)
    for name, value in expected.items():
        got = getattr(stats, name)
        assert got.dtype == torch.float32 and got.shape == () and not got.requires_grad
        assert float(got) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
    assert float(stats.gap) > 0
    if not clip:
        assert float(stats.clipped) == 0.0 and float(loss) == pytest.approx(-float(bound), rel=1e-12)


def test_statistics_far_off_policy() -> None:
    """Log-ratios of hundreds neither overflow the sample size nor make NaN of a sequence without advantage."""
    old = torch.zeros(2, 3, dtype=torch.float64)
    for shift in (900.0, -900.0):
        logprob = torch.tensor([[0.0, 0.0, math.log(2.0)], [1.0, 1.0, 1.0]]).double() + shift
        stats = bk.bgpo_loss(logprob, torch.tensor([0.0, 0.0]), old_logprob=old)[1]
        assert float(stats.effective_sample_size) == pytest.approx((16 / 6 + 3) / 2)
        assert float(stats.exact) == 0.0 and float(stats.bound) == 0.0


def test_zero_advantages_count_nowhere() -> None:
    """All advantages 0: no loss, no gradient, nothing counted as clipped."""
    inputs = samples() | {"advantages": torch.zeros(40)}
    loss, gradient, stats = loss_and_gradient(inputs, **CLIPS["both"])
    assert float(loss) == 0.0 and bool((gradient == 0).all()) and float(stats.clipped) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_permuting_sequences(dtype: torch.dtype) -> None:
    inputs = samples(dtype=dtype)
    order = torch.randperm(40)
    loss, gradient, _ = loss_and_gradient(inputs)
    moved = loss_and_gradient({name: x[order] for name, x in inputs.items()})
    torch.testing.assert_close(moved[0], loss, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
    assert torch.equal(moved[1], gradient[order])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@backends
def test_nan_reaches_the_loss(backend: str, sign: float, old: bool) -> None:
    """On-policy too, where d would be 0 whatever the log-probability."""
    device = device_of(backend)
    for bad in (math.nan, -math.inf):
        logprob = torch.tensor([[bad, -3.0]], device=device)
        before = torch.tensor([[math.nan if bad != bad else -2.0, -3.0]], device=device) if old else None
        a = torch.full((1,), sign, device=device)
        term, slope = engine("bound", backend).bound(logprob, a, before, None, 0.2, 0.2, 3.0)
        if not old or bad != bad:
            assert term.isnan().tolist() == [[True, False]]
        assert bool(torch.isfinite(slope[0, 1]))


@backends
def test_layouts(backend: str) -> None:
    """Transposed and strided inputs."""
    device = device_of(backend)
    inputs = {name: x.to(device) for name, x in samples(batch=6, n=5, dtype=torch.float32).items()}
    logprob, a, old = inputs["logprob"], inputs["advantages"], inputs["old_logprob"]
    kernel = engine("bound", backend).bound
    plain = kernel(logprob, a, old, None, 0.2, 0.2, INF)
    wide = torch.zeros(12, device=device)
    wide[::2] = a
    odd = kernel(logprob.T.contiguous().T, wide[::2], old.T.contiguous().T, None, 0.2, 0.2, INF)
    assert torch.equal(odd[0], plain[0]) and torch.equal(odd[1], plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@backends
def test_segment_sums(backend: str, dtype: torch.dtype) -> None:
    """Exact on integers; one rounding otherwise; an empty segment is 0."""
    device = device_of(backend)
    counts = [0, 3, 0, 300, 1, 0, 17, 0]
    offsets = torch.tensor([0, *counts], device=device).cumsum(0)
    sums = engine("bound", backend).segment_sum
    whole = torch.randint(-50, 50, (321,), device=device).to(dtype)
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0, 7.0, 0.25, 1.0], device=device)
    expected = torch.stack([whole[a:b].sum() for a, b in pairwise(offsets)]) * weight
    assert torch.equal(sums(whole, offsets, weight), expected)
    values = -10 * torch.rand(321, dtype=torch.float64, device=device).to(dtype)
    parts = [values[a:b].double().sum() for a, b in pairwise(offsets)]
    exact = torch.stack(parts) * (weight / 3).double()
    torch.testing.assert_close(sums(values, offsets, weight / 3), exact.to(dtype), rtol=3e-16 if dtype == torch.float64
                               else 6e-8, atol=0)  # fmt: skip


def test_spread_is_the_adjoint_of_the_sum() -> None:
    """<spread(x), y> = <x, sum(y)>, through the public reduce too."""
    offsets = torch.tensor([0, 0, 4, 4, 9])
    x, y = torch.randn(4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    wide = spread(x, offsets, 9)
    sums = engine("bound", "cpu").segment_sum(y, offsets, torch.ones(4))
    torch.testing.assert_close(wide @ y, x @ sums)
    assert wide.tolist() == [x[1].item()] * 4 + [x[3].item()] * 5
