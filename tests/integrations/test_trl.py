"""TRL's GRPOTrainer with a masked diffusion model: values against plain torch, and what TRL's versions expect back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from completion_checks import (
    B,
    L,
    LeavesRandomStateAlone,
    P,
    T,
    assert_flat,
    gradients_of,
    grpo,
    logits_of,
    padded,
    positional,
    sequences,
    shifted_model,
    token_logp,
    unshifted,
)
from models_zoo import MASK, assert_same_gradients, llada, perturbed, take_gradients, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.integrations import trl
from bgpo_kernels.integrations._common import content_ids

TEMPERATURE = 0.7
ADVANTAGES = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)


def trainer(**attributes: Any) -> Any:
    """What GRPOTrainer has since 1.7; before, there is no aux_loss_enabled."""
    fields = {"temperature": TEMPERATURE, "args": SimpleNamespace(seed=11), "aux_loss_enabled": False}
    fields["processing_class"] = SimpleNamespace(mask_token_id=MASK)
    return SimpleNamespace(**fields | attributes)


def score(model: nn.Module, ids: Tensor, attended: Tensor, **options: Any) -> Tensor:
    return trl.get_per_token_logps_and_entropies(trainer(), model, ids, attended, L, **options)[0]


def drawn(ids: Tensor, attended: Tensor, seed: int = 11, **law: Any) -> bk.MaskDraw:
    """The masks our function should use, from the public call."""
    response = (torch.arange(T) >= P) & (attended != 0)
    return bk.random_mask(
        ids, response, mask_token_id=MASK, seed=seed, sample_ids=content_ids(ids, attended),
        **{"n_mc": 1, "scheme": "full"} | law,
    )  # fmt: skip


def plain(model: nn.Module, ids: Tensor, attended: Tensor, draw: bk.MaskDraw, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies ``[N, L]``, one sequence and one sample at a time, without its padding."""
    masked = torch.zeros(draw.noisy_ids.numel(), dtype=torch.bool).index_fill(0, draw.rows, True)
    masked = masked.view(draw.noisy_ids.shape)
    logp, entropy = [], []
    for b in range(len(ids)):
        keep = attended[b].bool().nonzero()[:, 0]
        scores, entropies = [], []
        for j in range(draw.n_mc):
            logits = logits_of(model, draw.noisy_ids[b : b + 1, j, keep])[0].roll(shift, 0) / TEMPERATURE
            log_softmax = logits.log_softmax(-1)
            rows, nothing = masked[b, j, keep], torch.zeros(T, dtype=logits.dtype)
            token = token_logp(logits, ids[b, keep]) * rows * draw.segment_weight[b, j].to(logits.dtype)
            scores.append(nothing.index_put((keep,), token))
            entropies.append(nothing.index_put((keep,), -(log_softmax.exp() * log_softmax).sum(-1) * rows))
        logp.append(torch.stack(scores).mean(0))
        entropy.append(torch.stack(entropies).sum(0) / masked[b].sum(0).clamp(min=1))
    return torch.stack(logp)[:, -L:], torch.stack(entropy)[:, -L:]


LAWS = [
    {"scheme": "full", "n_mc": 1},
    {"scheme": "exact", "n_mc": 3},
    {"scheme": "coupled", "n_mc": 4},
    {"scheme": "bernoulli", "n_mc": 2},
]
every_law = pytest.mark.parametrize("law", LAWS, ids=[law["scheme"] for law in LAWS])


@unshifted
@every_law
def test_values_and_gradients(build, law) -> None:
    ids, attended = padded(sequences())
    draw = drawn(ids, attended, **law)
    old = plain(perturbed(build(torch.float64)), ids, attended, draw)[0].detach()

    def loss(logp: Tensor) -> Tensor:
        return grpo(logp, old, ADVANTAGES, attended[:, -L:].double())

    ours, our_gradients = gradients_of(lambda m: score(m, ids, attended, **law), build(torch.float64), loss)
    theirs, their_gradients = gradients_of(lambda m: plain(m, ids, attended, draw)[0], build(torch.float64), loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert_same_gradients(our_gradients, their_gradients)
    assert torch.equal(ours == 0, plain(build(torch.float64), ids, attended, draw)[0] == 0)


def test_the_sum_over_tokens_is_the_elbo() -> None:
    ids, attended = padded(sequences())
    model, response = llada(torch.float64), (torch.arange(T) >= P) & (attended != 0)
    with torch.no_grad():
        elbo = bk.elbo_logprob(
            model, ids, response, n_mc=4, seed=11, attention_mask=attended, sample_ids=content_ids(ids, attended),
            mask_token_id=MASK, temperature=TEMPERATURE,
        )  # fmt: skip
        ours = score(model, ids, attended, scheme="exact", n_mc=4).sum(-1)
    torch.testing.assert_close(ours, elbo, rtol=1e-10, atol=1e-10)


@every_law
def test_a_model_with_shift(law) -> None:
    ids, attended = padded(sequences())
    model, head = shifted_model()
    with torch.no_grad():
        ours = score(model, ids, attended, head=head, **law)
        theirs, _ = plain(model, ids, attended, drawn(ids, attended, **law), shift=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_law
def test_single_precision_is_as_good_as_torch(law) -> None:
    ids, attended = padded(sequences(20 * B))  # the largest of few errors is luck
    draw = drawn(ids, attended, **law)
    with torch.no_grad():
        ours = trl.get_per_token_logps_and_entropies(trainer(), llada(), ids, attended, L, compute_entropy=True, **law)
        theirs, truth = (plain(llada(dtype), ids, attended, draw) for dtype in (torch.float32, torch.float64))
    for i, name in enumerate(("logp", "entropy")):
        assert ours[i].dtype == torch.float32
        assert_as_good_as_torch(ours[i], theirs[i], truth[i], name)


@every_law
def test_entropies(law) -> None:
    """Detached as TRL's are for its logs, differentiable for its entropy bonus."""
    ids, attended = padded(sequences())
    truth_model = llada(torch.float64)
    _, truth = plain(truth_model, ids, attended, drawn(ids, attended, **law))

    def call(model: nn.Module, **attributes: Any) -> tuple[Tensor, ...]:
        return trl.get_per_token_logps_and_entropies(
            trainer(**attributes), model, ids, attended, L, compute_entropy=True, **law
        )

    logp, entropy, aux = call(llada(torch.float64))
    assert logp.requires_grad
    assert not entropy.requires_grad
    assert aux is None
    torch.testing.assert_close(entropy, truth.detach(), rtol=1e-9, atol=1e-9)
    model = llada(torch.float64)
    (call(model, _entropy_bonus_enabled=True)[1] ** 2).sum().backward()
    (truth**2).sum().backward()
    assert_same_gradients(take_gradients(model), take_gradients(truth_model))


@pytest.mark.parametrize("entropy", [False, True])
def test_what_each_version_of_trl_gets_back(entropy: bool) -> None:
    ids, attended = padded(sequences())
    model, call = llada(), trl.get_per_token_logps_and_entropies
    new = call(trainer(), model, ids, attended, L, compute_entropy=entropy)
    older = trainer()
    del older.aux_loss_enabled
    pair = call(older, model, ids, attended, L, compute_entropy=entropy)
    one = trl.get_per_token_logps(older, model, ids, attended, L, 2)
    assert (len(new), len(pair), one.shape) == (3, 2, (B, L))
    assert (new[1] is None) == (pair[1] is None) == (not entropy)
    torch.testing.assert_close(new[0], pair[0], rtol=0, atol=0)
    torch.testing.assert_close(one, pair[0])


def test_signatures() -> None:
    """By name where TRL calls by name; the first six also by position."""
    names = positional(trl.get_per_token_logps_and_entropies)
    assert names[:7] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"
    ]  # fmt: skip
    assert positional(trl.get_per_token_logps) == names[:6]


def test_masks_survive_trl_shuffling_and_splitting() -> None:
    """Old policy on the generation batch, current policy on shuffled slices of it, other padding."""
    ids, attended = padded(sequences(6))
    model, law = llada(torch.float64), {"scheme": "exact", "n_mc": 2, "prompt_mask_prob": 0.3}
    order = torch.tensor([4, 1, 5, 0])
    with torch.no_grad(), LeavesRandomStateAlone():
        old = score(model, ids, attended, batch_size=3, **law)
        new = score(model, ids[order], attended[order], **law)
        wide = [torch.nn.functional.pad(x, (3, 0)) for x in (ids, attended)]
        wider = score(model, *wide, **law)
        other = score(model, ids, attended, seed=12, **law)
    torch.testing.assert_close(new, old[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wider, old, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other, old)


def test_prompt_masks_follow_the_law() -> None:
    ids = sequences(400)
    seen: list[Tensor] = []
    model, head = shifted_model()
    model.embed.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        score(model, ids, torch.ones_like(ids), prompt_mask_prob=0.3, head=head)
    masked = torch.cat([x for x in seen if x.shape[1] == T])[-400:] == MASK  # after what the probe for causality shows
    assert masked[:, P:].all()
    share = masked[:, :P].double().mean(0)
    assert ((share - 0.3).abs() < 5 * (0.3 * 0.7 / 400) ** 0.5).all(), share


def test_an_explicit_draw() -> None:
    ids, attended = padded(sequences())
    draw = drawn(ids, attended, seed=99, scheme="exact", n_mc=2)
    model = llada(torch.float64)
    with torch.no_grad():
        ours = score(model, ids, attended, draw=draw)
        theirs, _ = plain(model, ids, attended, draw)
        own = score(model, ids, attended, scheme="exact", n_mc=2)
        by_id = score(model, ids, attended, scheme="exact", n_mc=2, sample_ids=torch.arange(B))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(own, ours)
    assert not torch.allclose(own, by_id)


def test_a_completion_may_hold_the_mask_token() -> None:
    ids, attended = padded(sequences())
    ids[0, P + 1] = MASK
    with torch.no_grad():
        ours = score(llada(torch.float64), ids, attended)
    assert torch.equal(ours < 0, attended[:, -L:] != 0)


def test_a_batch_without_completion_gives_zeros_and_zero_gradients() -> None:
    ids, attended = padded(sequences())
    attended[:, P:] = 0
    model = llada(torch.float64)
    logp, entropy, _ = trl.get_per_token_logps_and_entropies(
        trainer(), model, ids, attended, L, compute_entropy=True, scheme="exact", n_mc=2
    )
    assert (logp == 0).all()
    assert (entropy == 0).all()
    logp.exp().sum().backward()
    gradients = take_gradients(model)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for g in gradients.values())


def test_where_the_mask_token_comes_from() -> None:
    ids, attended = padded(sequences())
    model = llada()
    nameless = trainer(processing_class=SimpleNamespace())

    def call(model: nn.Module, **options: Any) -> Tensor:
        with torch.no_grad():
            return trl.get_per_token_logps_and_entropies(nameless, model, ids, attended, L, **options)[0]

    torch.testing.assert_close(call(model), score(model, ids, attended).detach())  # the config's
    torch.testing.assert_close(call(model, mask_token_id=MASK), call(model))
    assert not torch.allclose(call(model, mask_token_id=3), call(model))
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id is missing: neither"):
        call(model)


def test_token_types_reach_the_model() -> None:
    from models_zoo import bert

    ids, attended = padded(sequences())
    types = (torch.arange(T) >= P).long().expand(B, -1)
    with torch.no_grad():
        one = score(bert(), ids, attended, token_type_ids=types, scheme="exact", n_mc=2)
        none = score(bert(), ids, attended, token_type_ids=torch.zeros_like(types), scheme="exact", n_mc=2)
        absent = score(bert(), ids, attended, scheme="exact", n_mc=2)
    torch.testing.assert_close(none, absent)
    assert not torch.allclose(one, none)


@pytest.mark.parametrize(("law", "times"), [(LAWS[0], 1), (LAWS[1], 3)], ids=["full", "exact"])
def test_no_logits_and_a_graph_that_does_not_grow(law: dict[str, Any], times: int) -> None:
    model = llada()
    head = untouchable(model.get_output_embeddings())

    def call(count: int, tokens: int | None) -> Tensor:
        ids = sequences(count)
        return score(model, ids, torch.ones_like(ids), head=head, micro_batch_tokens=tokens, **law)

    assert_flat(call, lambda count: times * count * L)


def mistakes() -> list[Any]:
    ids, attended = padded(sequences())
    draw = drawn(ids, attended)
    outside = bk.random_mask(ids, torch.ones_like(ids, dtype=torch.bool), mask_token_id=MASK, n_mc=1, seed=0)
    few = drawn(ids[:2], attended[:2])
    return [
        ({"input_ids": ids[0]}, r"input_ids must have shape \[N, T\]"),
        ({"attention_mask": attended[:, 1:]}, r"attention_mask must have shape \[3, 12\] \(as input_ids\)"),
        ({"logits_to_keep": 0}, "logits_to_keep must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"scheme": "coupled"}, "n_mc must be even"),
        ({"n_mc": 0}, "n_mc must be"),
        ({"seed": -1}, "seed must be"),
        ({"compute_aux_loss": True}, "set router_aux_loss_coef to 0 in GRPOConfig"),
        ({"pixel_values": torch.ones(1), "num_images": [1]}, "pixel_values, num_images: models with images are not"),
        ({"draw": draw.noisy_ids}, "draw must be a MaskDraw, got Tensor"),
        ({"draw": few}, r"draw.noisy_ids must have shape \[3, n, 12\]"),
        ({"draw": outside}, "draw.rows marks tokens outside the attended completion"),
        ({"mask_token_id": -1}, "mask_token_id must be"),
    ]


@pytest.mark.parametrize("which", range(len(mistakes())))
def test_mistakes_are_named(which: int) -> None:
    change, message = mistakes()[which]
    ids, attended = padded(sequences())
    arguments = {"input_ids": ids, "attention_mask": attended, "logits_to_keep": L} | change
    call: Callable[..., Any] = trl.get_per_token_logps_and_entropies
    with pytest.raises((TypeError, ValueError), match=message):
        call(trainer(), llada(), **arguments)
