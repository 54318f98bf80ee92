"""The gradients of the three model-level calls against a plain restatement that keeps all graphs and all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_zoo import (
    ARCHITECTURES,
    MASK,
    Batch,
    Plain,
    as_one,
    assert_same_gradients,
    every_architecture,
    make_batch,
    perturbed,
    plain_bgpo,
    plain_scores,
    take_gradients,
)
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.models import HeadSpec

N, SEED = 4, 11
Objective = Callable[[Tensor], Tensor]


def draw_of(batch: Batch, **options: Any) -> bk.MaskDraw:
    return bk.random_mask(batch.ids, batch.response, **{"mask_token_id": MASK, "n_mc": N, "seed": SEED} | options)


def by_replay(model: nn.Module, batch: Batch, objective: Objective, **options: Any) -> float:
    step = bk.replay_backward(model, batch.ids, batch.response, objective, **{"n_mc": N, "seed": SEED} | options)
    return float(step.loss)


def by_elbo(model: nn.Module, batch: Batch, objective: Objective, **options: Any) -> float:
    scores = bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **{"n_mc": N, "seed": SEED} | options)
    loss = objective(scores)
    loss.backward()
    return loss.item()


two_passes = pytest.mark.parametrize("call", [by_replay, by_elbo], ids=["replay", "elbo"])


def plainly(model: nn.Module, batch: Batch, objective: Objective, draw: bk.MaskDraw, **options: Any) -> float:
    loss = objective(plain_scores(model, batch.ids, batch.response, draw, **options))
    loss.backward()
    return loss.item()


def old_scores(model: nn.Module, batch: Batch, draw: bk.MaskDraw, **options: Any) -> Tensor:
    """Scores of the model, which then is moved away from them."""
    with torch.no_grad():
        old = plain_scores(model, batch.ids, batch.response, draw, **options)
    perturbed(model)
    return old


# ------------------------------------------------------------------------------------- BGPO's bound, its options

BOUNDS: dict[str, dict[str, Any]] = {
    "on-policy": {},
    "on-policy paper": {"length_norm": False},
    "off-policy": {"off_policy": True},
    "off-policy paper": {"off_policy": True, "length_norm": False},
    "clip": {"off_policy": True, "clip_range": 0.02},
    "two-sided clip": {"off_policy": True, "clip_range": (0.01, 0.03), "length_norm": False},
    "dual clip": {"off_policy": True, "dual_clip": 1.02, "length_norm": False},
    "normalizer": {"off_policy": True, "normalizer": 40},
    "temperature": {"off_policy": True, "temperature": 0.6},
}


@every_architecture
@pytest.mark.parametrize("case", BOUNDS.values(), ids=list(BOUNDS))
def test_bgpo_backward_is_the_gradient_of_the_bound(build: Callable[..., nn.Module], case: dict[str, Any]) -> None:
    options = dict(case)
    temperature = options.get("temperature", 1.0)
    model, batch = build(torch.float64), make_batch(5)
    draw = draw_of(batch)
    old = old_scores(model, batch, draw, temperature=temperature) if options.pop("off_policy", False) else None
    clip = options.get("clip_range", (1.0, torch.inf))

    def objective(scores: Tensor) -> Tensor:
        return plain_bgpo(
            scores, batch.advantages, old=old, length=batch.length if options.get("length_norm", True) else None,
            clip=clip if isinstance(clip, tuple) else (clip, clip), dual=options.get("dual_clip", torch.inf),
            normalizer=options.get("normalizer"),
        )  # fmt: skip

    loss = plainly(model, batch, objective, draw, temperature=temperature)
    expected = take_gradients(model)
    step = bk.bgpo_backward(
        model, batch.ids, batch.response, batch.advantages, old_logprob=old, n_mc=N, seed=SEED, **options
    )
    assert_same_gradients(take_gradients(model), expected)
    assert float(step.loss) == pytest.approx(loss, rel=1e-6)  # the loss is reported in fp32
    if "clip" in "".join(options):
        assert 0 < float(step.stats.clipped) < 1, "the case must clip some samples and spare others"


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@every_architecture
def test_bgpo_backward_in_fp32_is_as_good_as_torch(build: Callable[..., nn.Module], off_policy: bool) -> None:
    """Against the same model in fp64: at most twice the error of plain fp32 torch."""
    batch = make_batch(5)
    draw = draw_of(batch)
    old = old_scores(build(), batch, draw) if off_policy else None

    def objective(scores: Tensor) -> Tensor:
        return plain_bgpo(scores, batch.advantages, old=old, length=batch.length)

    found = {}
    for dtype in (torch.float64, torch.float32):
        model = perturbed(build(torch.float32)).to(dtype)
        plainly(model, batch, objective, draw)
        found[dtype] = take_gradients(model)
    bk.bgpo_backward(model, batch.ids, batch.response, batch.advantages, old_logprob=old, n_mc=N, seed=SEED)
    assert_as_good_as_torch(*map(as_one, (take_gradients(model), found[torch.float32], found[torch.float64])))


# --------------------------------------------------------------------------------- any objective of the estimates


def vrpo(batch: Batch, old: Tensor) -> Objective:
    """The exact objective: a sequence ratio of mean estimates, unclipped."""
    return lambda scores: -(batch.advantages * torch.exp((scores - old).mean(-1) / batch.length)).mean()


def clipped_sequence_ratio(batch: Batch, old: Tensor) -> Objective:
    """PPO on the sequence ratio, with a clip between the ratios of the batch: it acts on half of them."""

    def objective(scores: Tensor) -> Tensor:
        ratio = torch.exp((scores - old).mean(-1))
        distance = (ratio.detach() - 1).abs().sort().values
        width = float(distance[len(distance) // 2 - 1 :][:2].mean())
        clipped = ratio.clamp(1 - width, 1 + width)
        assert int((ratio != clipped).sum()) == len(distance) // 2
        return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()

    return objective


def dpo(batch: Batch, old: Tensor) -> Objective:
    """Pairs of neighbours; both sides of a pair share a sigmoid."""

    def objective(scores: Tensor) -> Tensor:
        margin = (scores - old).mean(-1)
        return -F.logsigmoid(0.3 * (margin[0::2] - margin[1::2])).mean()

    return objective


def second_moment(batch: Batch, old: Tensor) -> Objective:
    """Every sample's slope is another number."""
    return lambda scores: (scores - old).square().sum() + scores[0, 0] * scores[1, 2]


every_objective = pytest.mark.parametrize("make", [vrpo, clipped_sequence_ratio, dpo, second_moment])


@every_architecture
@every_objective
@two_passes
def test_any_objective_gets_its_exact_gradient(
    build: Callable[..., nn.Module], make: Callable[[Batch, Tensor], Objective], call: Callable[..., float]
) -> None:
    model, batch = build(torch.float64), make_batch(4)
    draw = draw_of(batch)
    objective = make(batch, old_scores(model, batch, draw))
    loss = plainly(model, batch, objective, draw)
    expected = take_gradients(model)
    assert call(model, batch, objective) == pytest.approx(loss, rel=1e-10)
    assert_same_gradients(take_gradients(model), expected)


@two_passes
def test_any_objective_in_fp32_is_as_good_as_torch(call: Callable[..., float]) -> None:
    for build in ARCHITECTURES.values():
        batch = make_batch(4)
        draw = draw_of(batch)
        objective = vrpo(batch, old_scores(build(), batch, draw))
        found = {}
        for dtype in (torch.float64, torch.float32):
            model = perturbed(build(torch.float32)).to(dtype)
            plainly(model, batch, objective, draw)
            found[dtype] = take_gradients(model)
        call(model, batch, objective)
        assert_as_good_as_torch(*map(as_one, (take_gradients(model), found[torch.float32], found[torch.float64])))


@two_passes
def test_bounds_of_bgpo_and_of_replay_agree(call: Callable[..., float]) -> None:
    """BGPO's own loss, written by the user on the estimates, has the gradient that bgpo_backward makes in one pass."""
    model, batch = ARCHITECTURES["llada"](torch.float64), make_batch()
    old = old_scores(model, batch, draw_of(batch))
    bk.bgpo_backward(
        model, batch.ids, batch.response, batch.advantages, old_logprob=old, clip_range=0.02, n_mc=N, seed=SEED
    )
    expected = take_gradients(model)
    call(
        model, batch,
        lambda s: bk.bgpo_loss(s, batch.advantages, old_logprob=old, length=batch.length, clip_range=0.02)[0],
    )  # fmt: skip
    assert_same_gradients(take_gradients(model), expected)


def test_estimates_by_sequence_are_the_mean_of_those_by_sample() -> None:
    model, batch = ARCHITECTURES["bert"](torch.float64), make_batch()
    plain = plain_scores(model, batch.ids, batch.response, draw_of(batch))
    coefficients = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    (plain.mean(-1) @ coefficients).backward()
    expected = take_gradients(model)
    estimates = bk.elbo_logprob(model, batch.ids, batch.response, n_mc=N, seed=SEED)
    torch.testing.assert_close(estimates, plain.mean(-1), rtol=1e-12, atol=0)
    (estimates @ coefficients).backward()
    assert_same_gradients(take_gradients(model), expected)


# ------------------------------------------------------------------------------------------------- masks, heads

DRAWS: dict[str, dict[str, Any]] = {
    "exact uniform": {"schedule": "uniform"},
    "exact stratified": {"schedule": "stratified"},
    "exact harmonic": {"schedule": "harmonic"},
    "exact custom": {"schedule": bk.CountSchedule(lambda length: [1 / length] * length, name="flat")},
    "bernoulli uniform": {"scheme": "bernoulli", "schedule": "uniform"},
    "bernoulli stratified": {"scheme": "bernoulli"},
    "coupled uniform": {"scheme": "coupled", "schedule": "uniform"},
    "coupled stratified": {"scheme": "coupled"},
    "full": {"scheme": "full"},
    "sample ids": {"sample_ids": torch.tensor([7, 2**40 + 1, 0])},
    "seed": {"seed": 2**64 - 1},
}


def check_all_calls(model: nn.Module, batch: Batch, masks: bk.MaskDraw, plain: dict[str, Any], **options: Any) -> None:
    """Off-policy BGPO, and the same objective by replay and by estimates, against the restatement."""
    old = old_scores(model, batch, masks, **plain)

    def objective(scores: Tensor) -> Tensor:
        return plain_bgpo(scores, batch.advantages, old=old, length=batch.length)

    plainly(model, batch, objective, masks, **plain)
    expected = take_gradients(model)
    bk.bgpo_backward(
        model, batch.ids, batch.response, batch.advantages, old_logprob=old, **{"n_mc": N, "seed": SEED} | options
    )
    assert_same_gradients(take_gradients(model), expected)
    for call in (by_replay, by_elbo):
        call(model, batch, objective, **options)
        assert_same_gradients(take_gradients(model), expected)


@pytest.mark.parametrize("options", DRAWS.values(), ids=list(DRAWS))
def test_every_scheme_and_schedule(options: dict[str, Any]) -> None:
    batch = make_batch()
    check_all_calls(ARCHITECTURES["llada"](torch.float64), batch, draw_of(batch, **options), {}, **options)


@pytest.mark.parametrize("micro_batch_tokens", [None, 1, 25])
def test_a_segment_without_masked_tokens(micro_batch_tokens: int | None) -> None:
    """Coupled pairs of short responses often leave one side empty: no row, weight 0, nothing undefined."""
    batch = make_batch(tokens=6)
    draw = draw_of(batch, scheme="coupled", n_mc=12)
    assert 0 in draw.count and 0 in draw.segment_weight
    options = {"scheme": "coupled", "n_mc": 12, "micro_batch_tokens": micro_batch_tokens}
    check_all_calls(ARCHITECTURES["bert"](torch.float64), batch, draw, {}, **options)


def test_an_explicit_draw_replaces_seed_and_scheme() -> None:
    batch = make_batch()
    draw = draw_of(batch, scheme="bernoulli", n_mc=3, seed=99)
    by_hand = bk.MaskDraw(
        draw.noisy_ids, draw.rows, draw.targets, draw.segment_offsets, 0.5 * draw.segment_weight, draw.count
    )
    for explicit in (draw, by_hand):
        check_all_calls(ARCHITECTURES["modernbert"](torch.float64), batch, explicit, {}, draw=explicit)


HEADS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "a module": (lambda z: z, {}),
    "scale": (lambda z: 0.25 * z, {"logit_scale": 0.25}),
    "softcap": (lambda z: 1.5 * torch.tanh(z / 1.5), {"softcap": 1.5}),
    "scale, then softcap": (lambda z: 1.5 * torch.tanh(3.0 * z / 1.5), {"logit_scale": 3.0, "softcap": 1.5}),
}


@pytest.mark.parametrize(("after", "conventions"), HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("shift", [0, 1])
def test_heads_given_by_hand(after: Callable[[Tensor], Tensor], conventions: dict[str, Any], shift: int) -> None:
    model, batch = Plain(torch.float64, after), make_batch()
    given: Any = HeadSpec(model.out, shift=shift, **conventions) if conventions or shift else model.out
    check_all_calls(
        model, batch, draw_of(batch), {"temperature": 0.8, "shift": shift},
        head=given, mask_token_id=MASK, temperature=0.8,
    )  # fmt: skip
