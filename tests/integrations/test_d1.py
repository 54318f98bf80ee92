"""d1, wd1, unturtle: the same numbers and gradients as their function, given the same masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from completion_checks import (
    PAD,
    B,
    L,
    LeavesRandomStateAlone,
    P,
    T,
    assert_flat,
    gradients_of,
    grpo,
    logits_of,
    older,
    positional,
    sequences,
    unshifted,
)
from models_zoo import MASK, assert_same_gradients, llada, take_gradients, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import d1
from bgpo_kernels.integrations._completions import one_step_ids

SEEDS = [17, 4001]
ADVANTAGES = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)


def trainer(**args: Any) -> Any:
    return SimpleNamespace(args=SimpleNamespace(**{"mask_id": MASK, "p_mask_prompt": 0.3, "cfg_scale": 0.0} | args))


def twice(ids: Tensor) -> Tensor:
    return ids.expand(len(SEEDS), -1, -1)


def masked_by_us(ids: Tensor, seeds: list[int] = SEEDS, probability: float = 0.3) -> Tensor:
    """``[I, B, T]``: what our function shows the model."""
    completion = (torch.arange(T) >= P).expand_as(ids)
    return torch.stack([
        one_step_ids(ids, completion, s, MASK, probability, attention_mask=None, sample_ids=None, backend="auto")
        for s in seeds
    ])  # fmt: skip


def plain(model: nn.Module, noisy: Tensor, ids: Tensor) -> Tensor:
    """d1's arithmetic: logits of everything, the completion's part, cross-entropy. ``[I, B, L]``."""
    iterations, batch, _ = ids.shape
    logits = logits_of(model, noisy.flatten(0, 1))[:, -L:]
    targets = ids.flatten(0, 1)[:, -L:]
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return -loss.view(iterations, batch, L)


@unshifted
def test_values_and_gradients_are_those_of_d1(build) -> None:
    ids = sequences()
    noisy = masked_by_us(ids)
    old = plain(older(build), noisy, twice(ids)).detach()
    weight = (torch.arange(L) < torch.tensor([7, 4, 6])[:, None]).double()

    def loss(logp: Tensor) -> Tensor:
        return grpo(logp, old, ADVANTAGES, weight)

    ours, our_gradients = gradients_of(
        lambda m: d1.get_per_token_logps(trainer(), m, twice(ids), L, SEEDS), build(torch.float64), loss
    )
    theirs, their_gradients = gradients_of(lambda m: plain(m, noisy, twice(ids)), build(torch.float64), loss)
    assert ours.shape == (2, B, L)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert_same_gradients(our_gradients, their_gradients)


def test_single_precision_is_as_good_as_torch() -> None:
    ids = twice(sequences(20 * B))  # the largest of few errors is luck
    noisy = masked_by_us(ids[0])
    with torch.no_grad():
        ours = d1.get_per_token_logps(trainer(), llada(), ids, L, SEEDS)
        theirs, truth = plain(llada(), noisy, ids), plain(llada(torch.float64), noisy, ids)
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours, theirs, truth, "logp")


def test_masks_follow_the_law() -> None:
    ids = sequences(400)
    masked = masked_by_us(ids, [3])[0] == MASK
    assert masked[:, P:].all()
    share = masked[:, :P].double().mean(0)  # of 400 draws each
    assert ((share - 0.3).abs() < 5 * (0.3 * 0.7 / 400) ** 0.5).all(), share
    assert not (masked_by_us(ids, [3], 0.0)[0, :, :P] == MASK).any()
    assert (masked_by_us(ids, [3], 1.0) == MASK).all()


def test_masks_depend_on_seed_and_sequence_only() -> None:
    ids = sequences(8)
    with LeavesRandomStateAlone():
        whole = masked_by_us(ids)
    order = torch.tensor([5, 0, 7])
    assert torch.equal(masked_by_us(ids[order]), whole[:, order])
    assert torch.equal(masked_by_us(ids, [17])[0], whole[0])
    assert not torch.equal(whole[0], whole[1])
    assert (whole == masked_by_us(ids, SEEDS)).all()


def test_an_iteration_alone_is_its_part_of_all_of_them() -> None:
    """As the trainer does it: old policy on all iterations at once, current policy on one."""
    ids, model = sequences(), llada(torch.float64)
    with torch.no_grad():
        old = d1.get_per_token_logps(trainer(), model, twice(ids), L, torch.tensor(SEEDS))
        for i in range(2):
            new = d1.get_per_token_logps(trainer(), model, ids[None], L, [torch.tensor(SEEDS[i])])
            torch.testing.assert_close(new[0], old[i], rtol=1e-12, atol=1e-12)
        part = d1.get_per_token_logps(trainer(), model, ids[None, 1:], L, SEEDS[:1])
    torch.testing.assert_close(part[0], old[0, 1:], rtol=1e-12, atol=1e-12)
    assert not torch.equal(old[0], old[1])


def test_the_function_takes_its_masks_from_the_arguments_that_say_so() -> None:
    ids, model = sequences(), llada(torch.float64)
    noisy = torch.where(torch.rand(2, B, T) < 0.5, MASK, twice(ids))
    rows = torch.zeros(2, B, T, dtype=torch.bool)
    rows[:, :, P : P + 3] = True
    with torch.no_grad():
        ours = d1.get_per_token_logps(trainer(), model, twice(ids), L, SEEDS, noisy_ids=noisy, rows=rows)
        theirs = plain(model, noisy, twice(ids))
        other_ids = d1.get_per_token_logps(trainer(), model, twice(ids), L, SEEDS, sample_ids=torch.arange(B))
        same = d1.get_per_token_logps(trainer(), model, twice(ids), L, SEEDS)
    torch.testing.assert_close(ours, theirs * rows[..., P:], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(other_ids, same)


def test_no_rows_give_zeros_and_zero_gradients() -> None:
    """Every parameter has one: other ranks of a data-parallel run wait for it."""
    ids, model = sequences()[None], llada(torch.float64)
    rows = torch.zeros_like(ids, dtype=torch.bool)
    logp = d1.get_per_token_logps(trainer(), model, ids, L, [3], rows=rows)
    assert torch.equal(logp, torch.zeros(1, B, L, dtype=torch.float64))
    logp.exp().sum().backward()
    gradients = take_gradients(model)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for g in gradients.values())


def test_a_completion_may_hold_the_mask_token_and_padding() -> None:
    ids, model = sequences(), llada(torch.float64)
    ids[0, P + 1], ids[1, P + 2 :], ids[2, 1] = MASK, PAD, MASK
    with torch.no_grad():
        ours = d1.get_per_token_logps(trainer(), model, ids[None], L, [3])
        theirs = plain(model, masked_by_us(ids, [3]), ids[None])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours[0] < 0).all()


def test_left_padding_is_attended_unless_its_id_is_given() -> None:
    short, model = sequences(1)[:, 2:], llada(torch.float64)
    ids = F.pad(short, (2, 0), value=PAD)[None]
    with torch.no_grad():
        cut = d1.get_per_token_logps(trainer(), model, ids, L, [3], pad_token_id=PAD)
        alone = d1.get_per_token_logps(trainer(), model, short[None], L, [3])
        attended = d1.get_per_token_logps(trainer(), model, ids, L, [3])
    torch.testing.assert_close(cut, alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(attended, alone)


def test_no_logits_and_a_graph_that_does_not_grow() -> None:
    model = llada()
    head = untouchable(model.get_output_embeddings())

    def call(count: int, tokens: int | None) -> Tensor:
        ids = sequences(count)[None]
        return d1.get_per_token_logps(trainer(), model, ids, L, [3], head=head, micro_batch_tokens=tokens)

    assert_flat(call, lambda count: count * L)


@unshifted
def test_replayed_micro_batches_give_the_same_gradients(build) -> None:
    ids = sequences()
    old = plain(older(build), masked_by_us(ids), twice(ids)).detach()

    def score(tokens: int | None) -> Any:
        return gradients_of(
            lambda m: d1.get_per_token_logps(trainer(), m, twice(ids), L, SEEDS, micro_batch_tokens=tokens),
            build(torch.float64),
            lambda logp: grpo(logp, old, ADVANTAGES, torch.ones(B, L)),
        )

    (values, gradients), (again, replayed) = score(None), score(2 * T)
    torch.testing.assert_close(values, again, rtol=1e-12, atol=1e-12)
    assert_same_gradients(replayed, gradients)


def test_wd1_and_unturtle_are_the_same_function() -> None:
    assert d1.wd1_get_per_token_logps is d1.unturtle_get_per_token_logps is d1.get_per_token_logps
    assert positional(d1.get_per_token_logps) == ["self", "model", "input_ids", "logits_to_keep", "mask_seeds"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_seeds": [1]}, r"mask_seeds must hold one seed per iteration, 2; got 1"),
        ({"mask_seeds": [1, -1]}, "mask_seeds must be"),
        ({"mask_seeds": [1, 0.5]}, "mask_seeds must be an int"),
        ({"logits_to_keep": 0}, "logits_to_keep must be"),
        ({"logits_to_keep": T + 1}, "logits_to_keep must be"),
        ({"input_ids": sequences()}, r"input_ids must have shape \[I, B, T\]"),
        ({"input_ids": twice(sequences()).float()}, "input_ids must be int64"),
        ({"noisy_ids": sequences()}, r"noisy_ids must have shape \[2, 3, 12\] \(as input_ids\)"),
        ({"noisy_ids": twice(sequences()).int()}, "noisy_ids must be int64"),
        (
            {"rows": torch.ones(2, B, T, dtype=torch.bool)},
            "rows marks tokens outside the attended completion",
        ),
        ({"rows": torch.ones(2, B, T)}, "rows must be bool"),
        ({"pad_token_id": -1}, "pad_token_id must be"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"input_ids": twice(sequences()), "logits_to_keep": L, "mask_seeds": SEEDS} | change
    with pytest.raises((TypeError, ValueError), match=message):
        d1.get_per_token_logps(trainer(), llada(), **arguments)


def test_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"self\.args\.cfg_scale is 1\.5: guidance"):
        d1.get_per_token_logps(trainer(cfg_scale=1.5), llada(), twice(sequences()), L, SEEDS)
    d1.get_per_token_logps(trainer(cfg_scale=None), llada(), twice(sequences()), L, SEEDS)
