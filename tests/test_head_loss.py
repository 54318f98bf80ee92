"""bgpo_head_loss: one pass over the head gives what bgpo_loss over masked_logprob gives, and behaves under autograd."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from head_cases import (
    BACKENDS,
    BACKENDS_WITH_OPTIONS,
    ENGINES,
    OPTIONS,
    assert_judged,
    assert_same_bits,
    device_of,
    interpreted,
    make_draw,
    plain_logprob,
)
from torch import Tensor

import bgpo_kernels as bk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
COUNTS = [[3, 0, 12], [5, 1, 7], [2, 2, 9], [12, 4, 0], [1, 8, 6], [0, 0, 3]]
FEW = [[3, 0, 2], [1, 1, 2], [2, 1, 1], [2, 1, 0], [1, 2, 0], [0, 0, 1]]  # for the interpreter
BOUNDS: dict[str, dict[str, object]] = {
    "on-policy": {},
    "on-policy-length": {"length": True, "clip_range": 0.2, "dual_clip": 3.0, "normalizer": 17},
    "off-policy": {"old": True},
    "off-policy-length": {"old": True, "length": True},
    "clip": {"old": True, "length": True, "clip_range": 0.1},
    "clip-pair": {"old": True, "length": True, "clip_range": (0.05, 0.3), "normalizer": 4.5},
    "dual-clip": {"old": True, "length": True, "clip_range": (0.3, 0.1), "dual_clip": 1.2},
}


@dataclass(frozen=True)
class Case:
    """Arguments of bgpo_head_loss; advantages of both signs, and 0."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    draw: bk.MaskDraw
    advantages: Tensor  # [B]
    old_logprob: Tensor | None = None  # [B, n]
    length: Tensor | None = None  # [B]
    clip_range: float | tuple[float, float] | None = None
    dual_clip: float | None = None
    normalizer: float | None = None
    options: dict[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> dict[str, object]:
        names = ("old_logprob", "length", "clip_range", "dual_clip", "normalizer")
        return {name: getattr(self, name) for name in names}

    def wide(self) -> Case:
        wide = {n: None if (x := getattr(self, n)) is None else x.double()
                for n in ("hidden", "weight", "bias", "old_logprob")}  # fmt: skip
        return replace(self, **wide)


def make_case(
    backend: str = "cpu", dtype: torch.dtype = torch.float32, bound: str = "off-policy-length", counts=None,
    h: int = 16, v: int = 67, bias: bool = True, **options: float,
) -> Case:  # fmt: skip
    device = device_of(backend)
    settings = dict(BOUNDS[bound])
    counts = counts or (FEW if interpreted(backend) else COUNTS)
    draw = make_draw(counts, vocab=v, device=device)
    batch, samples, tokens = draw.noisy_ids.shape
    advantages = torch.randn(batch, device=device)
    advantages[: min(3, batch)] = torch.tensor([1.3, -0.8, 0.0], device=device)[:batch]
    case = Case(
        torch.randn(batch * samples * tokens, h).to(device, dtype), (torch.randn(v, h) * h**-0.5).to(device, dtype),
        torch.randn(v).to(device, dtype) if bias else None, draw, advantages, options=options,
    )  # fmt: skip
    if settings.pop("length", False):
        settings["length"] = torch.randint(8, 20, (batch,), device=device).float()
    if settings.pop("old", False):  # log-ratios of a few tenths after length normalisation
        wide = case.wide()
        logp = plain_logprob(wide.hidden, wide.weight, draw.targets, rows=draw.rows, bias=wide.bias, **options)[0]
        spread = 0.2 * settings["length"][:, None] if "length" in settings else 0.5
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        settings["old_logprob"] = (draw.reduce(logp) + spread * torch.randn(batch, samples, device=device)).to(acc)
    return replace(case, **settings)


def plain_head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
    """Loss and sums [B, n] with all logits in memory, PPO's own min and max, and a loop over segments."""
    draw = case.draw
    logp = plain_logprob(hidden, weight, draw.targets, rows=draw.rows, bias=bias, **case.options)[0]
    acc = logp.dtype
    sums = torch.stack([logp[a:b].sum() for a, b in pairwise(draw.segment_offsets.tolist())])
    sums = sums.view_as(draw.segment_weight) * draw.segment_weight.to(acc)
    old = sums.detach() if case.old_logprob is None else case.old_logprob.to(acc)
    length = torch.ones_like(case.advantages) if case.length is None else case.length
    d = (sums - old) / length[:, None].to(acc)
    low, high = case.clip_range if isinstance(case.clip_range, tuple) else (case.clip_range, case.clip_range)
    a = case.advantages[:, None].to(acc)
    ratio = torch.where(a >= 0, 1 + d, torch.exp(d))
    term = ratio * a
    if low is not None:
        term = torch.minimum(term, ratio.clamp(1 - low, 1 + high) * a)
    if case.dual_clip is not None:
        term = torch.where(a < 0, torch.maximum(term, case.dual_clip * a), term)
    count = len(case.advantages) if case.normalizer is None else case.normalizer
    return -term.sum() / (count * term.shape[1]), sums.detach()


def composed(backend: str):
    """bgpo_loss over reduce over masked_logprob."""

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
        options = {"rows": case.draw.rows, "bias": bias, "backend": backend, **case.options}
        sums = case.draw.reduce(bk.masked_logprob(hidden, weight, case.draw.targets, **options))
        return bk.bgpo_loss(sums, case.advantages, **case.bound)[0], sums.detach()

    return call


def one_pass(backend: str):
    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
        return bk.bgpo_head_loss(
            hidden, weight, case.draw, case.advantages, bias=bias, backend=backend, **case.bound, **case.options
        )[:2]

    return call


def outcome(call, case: Case, need: str = "hwb", upstream: float = 1.0) -> dict[str, Tensor]:
    inputs = [x if x is None else x.detach().requires_grad_(c in need)
              for x, c in zip((case.hidden, case.weight, case.bias), "hwb", strict=True)]  # fmt: skip
    loss, sums = call(*inputs, case)
    if need:
        (loss * upstream).backward()
    grads = {f"d_{c}": x.grad for c, x in zip("hwb", inputs, strict=True) if x is not None and x.grad is not None}
    return {"loss": loss.detach(), "logprob": sums} | grads


def pooled(outcomes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([o[name].flatten() for o in outcomes]) for name in outcomes[0]}


def assert_matches_torch(backend: str, make) -> None:
    """Tier 3 against torch in the same dtype and fp64, pooled over draws (see head_cases)."""
    cases = [make() for _ in range(2 if interpreted(backend) else 8)]
    assert_judged(
        pooled([outcome(one_pass(backend), case) for case in cases]),
        pooled([outcome(plain_head_loss, case) for case in cases]),
        pooled([outcome(plain_head_loss, case.wide()) for case in cases]),
    )


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients(backend: str, bound: str) -> None:
    if interpreted(backend) and bound not in ("on-policy-length", "dual-clip"):
        pytest.skip("the interpreter takes the two that cover all code")
    assert_matches_torch(backend, lambda: make_case(backend, bound=bound, counts=COUNTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    assert_matches_torch(backend, lambda: make_case(backend, dtype, counts=COUNTS))


@pytest.mark.parametrize(("backend", "options"), BACKENDS_WITH_OPTIONS)
def test_transforms(backend: str, options: dict[str, float]) -> None:
    assert_matches_torch(backend, lambda: make_case(backend, counts=COUNTS, **options))
    if not interpreted(backend):
        assert_matches_torch(backend, lambda: make_case(backend, bias=False, **options))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_composition(backend: str, bound: str) -> None:
    """fp64: to the last digits. fp32: log-probabilities of the same bits, as both run one chunk of the same GEMM."""
    case = make_case(backend, torch.float64, bound, **OPTIONS["all"])
    got, expected = outcome(one_pass(backend), case), outcome(composed(backend), case)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-14)
    single = make_case(backend, torch.float32, bound, **OPTIONS["all"])
    got, expected = outcome(one_pass(backend), single), outcome(composed(backend), single)
    assert torch.equal(got["logprob"], expected["logprob"]) and torch.equal(got["loss"], expected["loss"])
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_ratio_is_exactly_one(backend: str) -> None:
    """old = the same log-probabilities: d is bitwise 0, hence the loss and every gradient are those of on-policy."""
    case = make_case(backend, bound="on-policy")
    first = outcome(one_pass(backend), case)
    again = replace(case, old_logprob=first["logprob"])
    assert_same_bits(outcome(one_pass(backend), again), first)
    stats = bk.bgpo_head_loss(case.hidden, case.weight, case.draw, case.advantages, bias=case.bias,
                              old_logprob=first["logprob"], backend=backend)[2]  # fmt: skip
    assert stats.max_abs_log_ratio == 0 and stats.mean_ratio == 1 and stats.gap == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sign_of_advantages_negates_gradients(backend: str) -> None:
    """On-policy both branches have slope 1: the same bits with the other sign."""
    case = make_case(backend, bound="on-policy")
    plus = outcome(one_pass(backend), case)
    minus = outcome(one_pass(backend), replace(case, advantages=-case.advantages))
    for name in ("loss", "d_h", "d_w", "d_b"):
        assert torch.equal(minus[name], -plus[name]), name


@pytest.mark.parametrize("bound", ["on-policy", "clip"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_those_of_bgpo_loss(backend: str, bound: str) -> None:
    case = make_case(backend, bound=bound)
    _, logprob, stats = bk.bgpo_head_loss(
        case.hidden, case.weight, case.draw, case.advantages, bias=case.bias, backend=backend, **case.bound
    )
    assert stats == bk.bgpo_loss(logprob, case.advantages, **case.bound)[1]
    assert not logprob.requires_grad and all(not s.requires_grad for s in stats)


@pytest.mark.parametrize("upstream", [2.0, 1 / 3, -1.0, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_loss(backend: str, upstream: float) -> None:
    case = make_case(backend)
    one, scaled = outcome(one_pass(backend), case), outcome(one_pass(backend), case, upstream=upstream)
    for name in ("d_h", "d_w", "d_b"):
        torch.testing.assert_close(scaled[name], one[name] * upstream, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("need", ["", "h", "w", "b", "hw", "hb", "wb"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_required_gradients(backend: str, need: str) -> None:
    case = make_case(backend)
    full, got = outcome(one_pass(backend), case), outcome(one_pass(backend), case, need)
    assert got.keys() == {"loss", "logprob", *(f"d_{c}" for c in need)}
    assert_same_bits(got, {name: full[name] for name in got})


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend: str) -> None:
    """A retained graph gives the gradient again, also after the first .grad was overwritten: nothing is shared."""
    case = make_case(backend)
    once = outcome(one_pass(backend), case)
    h, w, b = (x.detach().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    loss, _ = one_pass(backend)(h, w, b, case)
    loss.backward(retain_graph=True)
    for x in (h, w, b):
        x.grad.zero_()
    loss.backward(retain_graph=True)
    assert_same_bits({"d_h": h.grad, "d_w": w.grad, "d_b": b.grad}, {n: once[n] for n in ("d_h", "d_w", "d_b")})
    loss.backward()
    for name, x in (("d_h", h), ("d_w", w), ("d_b", b)):
        assert torch.equal(x.grad, 2 * once[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_over_calls(backend: str) -> None:
    """.grad of one call is not touched by the next but by addition."""
    first, second = make_case(backend), make_case(backend)
    second = replace(second, weight=first.weight, bias=first.bias)
    parts = [outcome(one_pass(backend), case, "w")["d_w"] for case in (first, second)]
    weight = first.weight.detach().requires_grad_()
    for case in (first, second):
        one_pass(backend)(case.hidden, weight, case.bias, case)[0].backward()
    assert torch.equal(weight.grad, parts[0] + parts[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_feeds_other_losses(backend: str) -> None:
    """Gradients of the hidden states add to those of other terms on the way to the layers below."""
    case = make_case(backend)
    alone = outcome(one_pass(backend), case, "h")["d_h"]
    below = case.hidden.detach().requires_grad_()
    hidden = below * 1.0
    loss = one_pass(backend)(hidden, case.weight, case.bias, case)[0]
    (loss + (hidden**2).sum() + loss).backward()
    torch.testing.assert_close(below.grad, 2 * alone + 2 * case.hidden)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad(backend: str) -> None:
    case = make_case(backend)
    h, w = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.no_grad():
        loss, logprob = one_pass(backend)(h, w, case.bias, case)
    assert not loss.requires_grad
    again, logprob_again = one_pass(backend)(h, w, case.bias, case)
    assert again.requires_grad and torch.equal(loss, again.detach()) and torch.equal(logprob, logprob_again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes(backend: str) -> None:
    """hidden [B, n, T, H], as a model gives it for the draw's noisy ids."""
    case = make_case(backend)
    flat = outcome(one_pass(backend), case)
    shaped = outcome(one_pass(backend), replace(case, hidden=case.hidden.view(6, 3, 12, -1)))
    assert shaped["d_h"].shape == (6, 3, 12, 16)
    assert_same_bits({n: x.reshape(flat[n].shape) for n, x in shaped.items()}, flat)


@pytest.mark.parametrize("bound", ["on-policy", "off-policy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, bound: str) -> None:
    """Nothing masked: the loss is -mean(A) with connected zero gradients."""
    case = make_case(backend, bound=bound, counts=[[0, 0], [0, 0]])
    if case.old_logprob is not None:
        case.old_logprob.zero_()
    got = outcome(one_pass(backend), case)
    assert float(got["loss"]) == pytest.approx(-float(case.advantages.mean()))
    assert all(bool((got[name] == 0).all()) for name in ("d_h", "d_w", "d_b", "logprob"))


@pytest.mark.parametrize("bound", ["on-policy", "off-policy"])
@pytest.mark.parametrize("backend", ENGINES)
def test_sequences_without_advantage(backend: str, bound: str) -> None:
    """A = 0 gives exact zeros for its rows, even where its hidden states are NaN, none in dW; the loss shows NaN."""
    case = make_case(backend, bound=bound)
    rows = case.draw.rows[case.draw.host_offsets[6] : case.draw.host_offsets[9]]  # sequence 2
    clean = outcome(one_pass(backend), case)
    assert bool((clean["d_h"][rows] == 0).all())
    broken = replace(case, hidden=case.hidden.index_fill(0, rows, torch.nan))
    got = outcome(one_pass(backend), broken)
    assert_same_bits({n: got[n] for n in ("d_h", "d_w", "d_b")}, {n: clean[n] for n in ("d_h", "d_w", "d_b")})
    assert bool(got["loss"].isnan()) and got["logprob"].isnan().sum() == 3


@pytest.mark.parametrize("bound", ["on-policy", "off-policy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_loss(backend: str, bound: str) -> None:
    case = make_case(backend, bound=bound)
    case.hidden[case.draw.rows[0]] = torch.nan
    got = outcome(one_pass(backend), case)
    assert bool(got["loss"].isnan()) and bool(got["d_w"].isnan().any())


@pytest.mark.parametrize("bound", ["on-policy", "clip"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_have_the_same_bits(backend: str, bound: str) -> None:
    case = make_case(backend, bound=bound)
    if not interpreted(backend):
        bk.set_workspace_bytes(1 << 16)
        case = make_case(backend, bound=bound, v=3001)
    first = outcome(one_pass(backend), case)
    for _ in range(3):
        assert_same_bits(first, outcome(one_pass(backend), case))


@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
def test_permuting_sequences(old: bool) -> None:
    """The loss does not depend on the order of the sequences; per-sequence results move with them (exact GEMMs)."""
    case = make_case("cpu", torch.float64, "off-policy" if old else "on-policy", **OPTIONS["all"])
    order = [3, 0, 5, 1, 4, 2]
    draw = case.draw
    tokens, samples, offsets = 12, 3, draw.host_offsets
    rows, targets = [], []
    for place, b in enumerate(order):
        begin, end = offsets[b * samples], offsets[(b + 1) * samples]
        rows.append(draw.rows[begin:end] + (place - b) * samples * tokens)
        targets.append(draw.targets[begin:end])
    counts = draw.count[order]
    moved = bk.MaskDraw(
        draw.noisy_ids[order], torch.cat(rows), torch.cat(targets),
        torch.tensor([0, *counts.flatten().tolist()]).cumsum(0), draw.segment_weight[order], counts,
    )  # fmt: skip
    shaped = case.hidden.view(6, samples * tokens, -1)
    other = replace(case, draw=moved, hidden=shaped[order].flatten(0, 1), advantages=case.advantages[order],
                    old_logprob=None if case.old_logprob is None else case.old_logprob[order])  # fmt: skip
    a, b = outcome(one_pass("cpu"), case), outcome(one_pass("cpu"), other)
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-13, atol=0)
    torch.testing.assert_close(a["logprob"][order], b["logprob"], rtol=1e-13, atol=0)
    torch.testing.assert_close(a["d_h"].view_as(shaped)[order].flatten(0, 1), b["d_h"], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(a["d_w"], b["d_w"], rtol=1e-11, atol=1e-14)
