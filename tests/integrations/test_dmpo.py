"""DMPO: the same ELBOs, losses and gradients as its trainer, given the same masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from completion_checks import (
    EOS,
    PAD,
    B,
    L,
    LeavesRandomStateAlone,
    P,
    T,
    assert_flat,
    gradients_of,
    logits_of,
    positional,
    sequences,
    shifted_model,
)
from models_zoo import MASK, assert_same_gradients, bert, llada, perturbed, take_gradients, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import dmpo

R = 4


class Adapted(nn.Module):
    """As a PEFT model: the policy, and under ``disable_adapter`` the reference."""

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        super().__init__()
        self.policy, self.reference, self.adapter = policy, [reference], True
        self.get_output_embeddings = policy.get_output_embeddings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.policy(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        own = {name: p.detach().clone() for name, p in self.policy.named_parameters()}
        with torch.no_grad():
            for name, p in self.reference[0].named_parameters():
                self.policy.get_parameter(name).copy_(p)
        yield
        with torch.no_grad():
            for name, p in own.items():
                self.policy.get_parameter(name).copy_(p)


def trainer(step: int = 7, **changes: Any) -> Any:
    """Defaults of DMPOConfig."""
    options = {
        "mask_id": MASK, "num_replicates": R, "loss_antithetic": True, "loss_mask_prob_clamp": True,
        "loss_mask_non_eos": False, "loss": "wdce", "advantage_centering": True, "advantage_centering_unbias": False,
        "advantage_centering_neg": True, "centering_strength": 1, "ddo_alpha": 1.0, "ddo_beta": 1.0,
        "ddo_indep_set": False, "log_rnd_omit_eos": False, "seed": 42,
    }  # fmt: skip
    return SimpleNamespace(
        args=SimpleNamespace(**options | changes),
        state=SimpleNamespace(global_step=step),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
    )


def batch(ids: Tensor | None = None) -> dict[str, Tensor]:
    ids = sequences() if ids is None else ids
    end = torch.tensor([L, 4, 6]).repeat(len(ids) // B)
    return {
        "prompt_ids": ids[:, :P],
        "completion_ids": ids[:, P:],
        "completion_mask": (torch.arange(L) <= end[:, None]).int(),
        "advantages": torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
        "negative_advantages": torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64),
        "log_prob_cur": torch.tensor([-30.0, -31.0, -32.5], dtype=torch.float64),
    }


def explicit(seed: int = 3) -> Tensor:
    """``[B, R, L]``; one masking is empty, one is everything."""
    masks = torch.rand(B, R, L, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks[0, 1], masks[2, 3] = False, True
    return masks


def everything(model: nn.Module, inputs: dict[str, Tensor], masks: Tensor, shift: int = 0) -> tuple[Tensor, Tensor]:
    """dmpo_trainer.py: cross-entropy of all tokens, zeros where not masked; ``[R*B, T]``, and m ``[R*B]``."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1).repeat(masks.shape[1], 1)
    full = F.pad(masks.transpose(0, 1).flatten(0, 1), (P, 0))
    logits = logits_of(model, torch.where(full, MASK, ids)).roll(shift, 1)
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.flatten(), reduction="none").view(ids.shape)
    return losses * full, full.sum(-1).clamp(min=1)


def plain_elbo(model: nn.Module, inputs: dict[str, Tensor], masks: Tensor, shift: int = 0) -> Tensor:
    """``[B, T]``."""
    losses, m = everything(model, inputs, masks, shift)
    count, repeats, _ = masks.shape
    logp = -losses.view(repeats, count, T).transpose(0, 1)
    weight = (L / m.to(losses.dtype)).view(repeats, count, 1).transpose(0, 1)
    return (weight * logp).mean(1)


def plain_loss(args: Any, model: nn.Module, inputs: dict[str, Tensor], masks: Tensor, total: bool = False) -> Tensor:
    losses, m = everything(model, inputs, masks)
    repeats = masks.shape[1]
    weight = (L / m.to(losses.dtype)).view(repeats, B, 1)
    elbo = (weight * -losses.view(repeats, B, T)).sum(-1)  # [R, B]
    advantages = inputs["advantages"].repeat(repeats)
    if args.loss == "wdce":
        if args.advantage_centering and args.advantage_centering_unbias:
            centre = (elbo.detach().mean(0) - inputs["log_prob_cur"]).softmax(-1).repeat(repeats)
        elif args.advantage_centering and args.advantage_centering_neg:
            centre = inputs["negative_advantages"].repeat(repeats)
        else:
            centre = advantages.mean() * args.advantage_centering
        return (losses.sum(-1) / m * (advantages - args.centering_strength * centre)).sum() / repeats
    real = fake = elbo.sum(0) if total else elbo.mean(0)
    if args.ddo_indep_set:
        real, fake = elbo[: repeats // 2].mean(0), elbo[repeats // 2 :].mean(0)
    real, fake = real - inputs["log_prob_cur"], fake - inputs["log_prob_cur"]
    first = -(inputs["advantages"] * torch.sigmoid(args.ddo_beta * real).log()).mean()
    return first - args.ddo_alpha * torch.sigmoid(-args.ddo_beta * fake).log().mean()


LOSSES = {
    "wdce": {},
    "uncentred": {"advantage_centering": False},
    "mean": {"advantage_centering_neg": False, "centering_strength": 0.5},
    "unbiased": {"advantage_centering_unbias": True},
    "ddo": {"loss": "ddo", "ddo_beta": 0.1, "ddo_alpha": 0.7},
    "ddo halves": {"loss": "ddo", "ddo_beta": 0.1, "ddo_indep_set": True},
}


@pytest.mark.parametrize("build", [llada, bert], ids=["llada", "bert"])
@pytest.mark.parametrize("options", LOSSES.values(), ids=list(LOSSES))
def test_losses_and_gradients_are_those_of_dmpo(build, options: dict[str, Any]) -> None:
    inputs, masks, own = batch(), explicit(), trainer(**options)
    before = {name: value.clone() for name, value in inputs.items()}
    ours, our_gradients = gradients_of(
        lambda m: dmpo.compute_loss(own, m, inputs, masks=masks), build(torch.float64), lambda loss: loss
    )
    theirs, their_gradients = gradients_of(
        lambda m: plain_loss(own.args, m, inputs, masks), build(torch.float64), lambda loss: loss
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert_same_gradients(our_gradients, their_gradients)
    assert all(torch.equal(before[name], inputs[name]) for name in before)


def test_the_sum_over_maskings_that_upstream_takes_in_ddo() -> None:
    inputs, masks, own = batch(), explicit(), trainer(loss="ddo", ddo_beta=0.05)
    model = llada(torch.float64)
    with torch.no_grad():
        ours = dmpo.compute_loss(own, model, inputs, masks=masks, ddo_sum=True)
        torch.testing.assert_close(ours, plain_loss(own.args, model, inputs, masks, total=True))
        assert not torch.allclose(ours, dmpo.compute_loss(own, model, inputs, masks=masks))


def test_the_elbo_of_both_policies() -> None:
    inputs, masks = batch(), explicit()
    policy, reference = perturbed(llada(torch.float64), 0.1), llada(torch.float64)
    model = Adapted(policy, reference)
    arguments = [inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"], R]
    ref, cur = dmpo.compute_log_prob_elbo(trainer(), model, *arguments, masks=masks)
    assert ref.shape == cur.shape == (B, T)
    assert not cur.requires_grad
    torch.testing.assert_close(cur, plain_elbo(policy, inputs, masks).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ref, plain_elbo(reference, inputs, masks).detach(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ref, cur)
    short = dmpo.compute_log_prob_elbo(trainer(log_rnd_omit_eos=True), model, *arguments, masks=masks)
    for whole, part in zip((ref, cur), short, strict=True):
        torch.testing.assert_close(part * inputs["completion_mask"], whole[:, P:] * inputs["completion_mask"])
    again = dmpo.compute_log_prob_elbo(trainer(), model, *arguments)
    same = Adapted(policy, policy)
    one, two = dmpo.compute_log_prob_elbo(trainer(), same, *arguments)
    assert torch.equal(one, two)  # both policies see the same masks
    assert torch.equal(two, again[1])


def test_a_model_with_shift() -> None:
    inputs, masks = batch(), explicit()
    model, head = shifted_model()
    own = trainer(loss="ddo", ddo_beta=0.05)
    with torch.no_grad():
        ours = dmpo.compute_loss(trainer(advantage_centering=False), model, inputs, masks=masks, head=head)
        losses, m = everything(model, inputs, masks, shift=1)
        theirs = (losses.sum(-1) / m * inputs["advantages"].repeat(R)).sum() / R
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert torch.isfinite(dmpo.compute_loss(own, model, inputs, head=head))


def test_single_precision_is_as_good_as_torch() -> None:
    many = 20 * B  # the largest of few errors is luck
    inputs, masks = batch(sequences(many)), torch.rand(many, R, L) < 0.5
    own = Adapted(llada(), llada())
    arguments = [inputs["prompt_ids"], inputs["completion_ids"], None, R]
    _, ours = dmpo.compute_log_prob_elbo(trainer(), own, *arguments, masks=masks)
    with torch.no_grad():
        theirs, truth = (plain_elbo(llada(dtype), inputs, masks) for dtype in (torch.float32, torch.float64))
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours, theirs, truth, "elbo")


def draw(args: Any, scored: Tensor, repeats: int = R, seed: int = 1) -> Tensor:
    return dmpo.draw_maskings(args, scored, repeats, seed, torch.arange(len(scored)))


@pytest.mark.parametrize("clamp", [True, False])
def test_counts_follow_the_law(clamp: bool) -> None:
    """Against the law itself, by quadrature: p uniform, then every token with probability p."""
    length, many = 9, 20_000
    masks = draw(trainer(loss_mask_prob_clamp=clamp, loss_antithetic=False).args, torch.ones(many, length).bool(), 1)
    found = torch.bincount(masks.sum(-1).flatten(), minlength=length + 1).double() / many
    points = 20_001
    p = torch.linspace(0.1 if clamp else 0.0, 1, points, dtype=torch.float64)
    binomial = torch.distributions.Binomial(length, p[:, None])
    pmf = binomial.log_prob(torch.arange(length + 1, dtype=torch.float64)).exp().T
    law = torch.trapezoid(pmf, p) / (p[-1] - p[0])
    law = law[1:] / law[1:].sum()  # given one token or more
    assert found[0] == 0
    error = (found[1:] - law).abs()
    assert (error < 5 * (law * (1 - law) / many).sqrt()).all(), (found, law)
    share = masks.double().mean((0, 1))
    assert ((share - share.mean()).abs() < 5 * (0.25 / many) ** 0.5).all()  # no place is preferred


def test_the_law_serves_long_completions() -> None:
    for length in (1, 2, 256, 8192):
        q = dmpo.CLAMPED.probabilities(length)
        assert q.shape == (length,)
        assert (q > 0).all()


@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 5])
def test_antithetic_maskings_are_complements(repeats: int) -> None:
    scored = torch.rand(6, L) < 0.8
    scored[:, 0] = True
    masks = draw(trainer().args, scored, repeats)
    half = (repeats + 1) // 2
    assert masks.shape == (6, repeats, L)
    assert not (masks & ~scored[:, None]).any()
    assert torch.equal(masks[:, half:], (scored[:, None] & ~masks[:, :half])[:, : repeats - half])
    independent = draw(trainer(loss_antithetic=False).args, scored, repeats)
    assert independent.any(-1).all()


def test_masks_depend_on_seed_step_and_sequence_only() -> None:
    ids, model = sequences(), llada(torch.float64)
    inputs, order = batch(ids), torch.tensor([2, 0])
    part = {name: value[order] for name, value in inputs.items()}
    own = {"advantage_centering": False}

    def loss(inputs: dict[str, Tensor], step: int = 7, **options: Any) -> Tensor:
        with torch.no_grad():
            return dmpo.compute_loss(trainer(step, **own | options), model, inputs)

    with LeavesRandomStateAlone():
        whole = loss(inputs)
    assert torch.equal(whole, loss(inputs))
    middle = {name: value[1:2] for name, value in inputs.items()}
    torch.testing.assert_close(loss(part) + loss(middle), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(loss(inputs, step=8), whole)  # new masks in every inner iteration
    assert not torch.allclose(loss(inputs, seed=43), whole)
    with torch.no_grad():
        one, two = (dmpo.compute_loss(trainer(step), model, inputs, seed=5) for step in (1, 2))
    assert torch.equal(one, two)


def test_tokens_after_eos_stay_unmasked_when_asked() -> None:
    """With an integer mask, as the trainer makes it."""
    inputs = batch()
    inputs["completion_ids"] = torch.where(inputs["completion_mask"] == 0, EOS, inputs["completion_ids"])
    seen: list[Tensor] = []
    model, head = shifted_model()
    model.embed.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        dmpo.compute_loss(trainer(loss_mask_non_eos=True), model, inputs, head=head)
    shown = torch.cat([x for x in seen if x.shape[1] == T])
    inside = inputs["completion_mask"] != 0
    for prompt, real in zip(inputs["prompt_ids"], inside, strict=True):
        masked = shown[(shown[:, :P] == prompt).all(-1)][:, P:] == MASK
        assert not (masked & ~real).any()
        assert (masked.sum(0) == R // 2 * real).all()  # in one of each pair
    with pytest.raises(ValueError, match="masks marks tokens after EOS, which loss_mask_non_eos leaves unmasked"):
        dmpo.compute_loss(trainer(loss_mask_non_eos=True), model, inputs, masks=explicit() | True, head=head)


def test_a_completion_may_hold_the_mask_token_and_padding() -> None:
    ids, masks = sequences(), explicit()
    ids[0, P + 1], ids[1, P + 2 :] = MASK, PAD
    inputs, model = batch(ids), llada(torch.float64)
    with torch.no_grad():
        ours = dmpo.compute_loss(trainer(), model, inputs, masks=masks)
        torch.testing.assert_close(ours, plain_loss(trainer().args, model, inputs, masks), rtol=1e-10, atol=1e-10)


def test_left_padding_is_attended_unless_its_id_is_given() -> None:
    inputs, masks, model = batch(), explicit(), llada(torch.float64)
    wider = inputs | {"prompt_ids": F.pad(inputs["prompt_ids"], (2, 0), value=PAD)}

    def loss(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        with torch.no_grad():
            return dmpo.compute_loss(trainer(), model, inputs, **options)

    for options in ({"masks": masks}, {"seed": 3}):  # with our own masks, too: they are the same ones
        alone = loss(inputs, **options)
        torch.testing.assert_close(loss(wider, pad_token_id=PAD, **options), alone, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(loss(wider, **options), alone)


def test_replayed_micro_batches_give_the_same_gradients() -> None:
    def score(tokens: int | None) -> Any:
        return gradients_of(
            lambda m: dmpo.compute_loss(trainer(), m, batch(), micro_batch_tokens=tokens),
            llada(torch.float64), lambda loss: loss,
        )  # fmt: skip

    (value, gradients), (again, replayed) = score(None), score(2 * T)
    torch.testing.assert_close(value, again, rtol=1e-12, atol=1e-12)
    assert_same_gradients(replayed, gradients)


def test_maskings_without_a_token_give_zero_and_zero_gradients() -> None:
    model = llada(torch.float64)
    loss = dmpo.compute_loss(trainer(), model, batch(), masks=torch.zeros(B, R, L, dtype=torch.bool))
    assert loss == 0
    loss.backward()
    gradients = take_gradients(model)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for g in gradients.values())


def test_no_logits_and_a_graph_that_does_not_grow() -> None:
    model = llada()
    head = untouchable(model.get_output_embeddings())

    def call(replicates: int, tokens: int | None) -> Tensor:
        own = trainer(num_replicates=replicates)
        return dmpo.compute_loss(own, model, batch(), head=head, micro_batch_tokens=tokens)

    assert_flat(call, lambda replicates: B * replicates * L)


def test_signatures() -> None:
    assert positional(dmpo.compute_log_prob_elbo) == [
        "self", "model", "prompt_ids", "completion_ids", "completion_mask", "repeated_size"
    ]  # fmt: skip
    assert positional(dmpo.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"return_outputs": True}, ValueError, "does not support returning outputs"),
        ({"loss": "ce"}, {}, NotImplementedError, "args.loss must be 'wdce' or 'ddo', got 'ce'"),
        ({"num_replicates": 0}, {}, ValueError, "args.num_replicates must be"),
        ({}, {"masks": torch.ones(B, R, T).bool()}, ValueError, r"masks must have shape \[3, 4, 7\] \(B, R, L\)"),
        ({}, {"masks": torch.ones(B, R, L)}, TypeError, "masks must be bool"),
        ({}, {"seed": -1}, ValueError, "seed must be"),
        ({}, {"pad_token_id": -1}, ValueError, "pad_token_id must be"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        dmpo.compute_loss(trainer(**change), llada(), batch(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": sequences()[0]}, r"prompt_ids must have shape \[B, P\]"),
        ({"completion_ids": sequences(2)}, r"completion_ids must have shape \[3, L\] \(B of prompt_ids\)"),
        ({"completion_ids": sequences().float()}, "completion_ids must be int64"),
        ({"repeated_size": 0}, "repeated_size must be"),
    ],
)
def test_mistakes_in_the_elbo_are_named(change: dict[str, Any], message: str) -> None:
    inputs = batch()
    arguments = {name: inputs[name] for name in ("prompt_ids", "completion_ids", "completion_mask")}
    model = Adapted(llada(), llada())
    with pytest.raises((TypeError, ValueError), match=message):
        dmpo.compute_log_prob_elbo(trainer(), model, **{**arguments, "repeated_size": R} | change)
