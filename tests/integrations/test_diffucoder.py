"""DiffuCoder's coupled-GRPO: the same numbers and gradients as its function, given the same masks."""

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
    positional,
    sequences,
    shifted_model,
    token_logp,
)
from models_zoo import MASK, Plain, assert_same_gradients, llada, perturbed, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import diffucoder
from bgpo_kernels.models import HeadSpec

SEEDS = [42, 1000]
ADVANTAGES = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)
TRAINER = SimpleNamespace(processing_class=SimpleNamespace(mask_token_id=MASK))


def twice(ids: Tensor) -> Tensor:
    return ids.expand(len(SEEDS), -1, -1)


def our_masks(ids: Tensor) -> Tensor:
    return torch.stack([diffucoder.coupled_masks(ids, L, s, diffucoder.mask_ratio(s)) for s in SEEDS])


def plain(model: nn.Module, ids: Tensor, masks: Tensor, ratios: list[float], shift: int) -> Tensor:
    """coupled_grpo.py, one iteration and one sequence at a time, all logits of three versions. ``[B, I, L]``."""
    result = torch.empty(ids.shape[1], ids.shape[0], L, dtype=torch.float64)
    completion = torch.arange(T) >= P
    for i, t in enumerate(ratios):
        for b in range(ids.shape[1]):
            clean, mask = ids[i, b], masks[i, b]
            versions = torch.stack([torch.where(m, MASK, clean) for m in (completion, mask, completion & ~mask)])
            logits = logits_of(model, versions)
            logits = logits[:, P - 1 : T - 1] if shift else logits[:, P:]
            full, first, second = token_logp(logits, clean[P:].expand(3, -1))
            result[b, i] = (full + torch.where(mask[P:], first / t, second / (1 - t))) / 2
    return result


def shifted(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, HeadSpec | None]:
    return shifted_model(dtype)


def unshifted(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, HeadSpec | None]:
    return llada(dtype), None


@pytest.mark.parametrize(("make", "shift"), [(shifted, 1), (unshifted, 0)], ids=["dream", "llada"])
def test_values_and_gradients_are_those_of_diffucoder(make, shift: int) -> None:
    ids = sequences()
    masks, ratios = our_masks(ids), [diffucoder.mask_ratio(s) for s in SEEDS]
    old = plain(perturbed(make()[0]), twice(ids), masks, ratios, shift).detach()

    def loss(logp: Tensor) -> Tensor:
        return grpo(logp.transpose(0, 1), old.transpose(0, 1), ADVANTAGES, torch.ones(B, L))

    model, head = make()
    ours, our_gradients = gradients_of(
        lambda m: diffucoder.get_per_token_logps(TRAINER, m, twice(ids), L, SEEDS, head=head), model, loss
    )
    theirs, their_gradients = gradients_of(lambda m: plain(m, twice(ids), masks, ratios, shift), make()[0], loss)
    assert ours.shape == (B, 2, L)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert_same_gradients(our_gradients, their_gradients)


def test_single_precision_is_as_good_as_torch() -> None:
    ids = twice(sequences(20 * B))  # the largest of few errors is luck
    masks, ratios = our_masks(ids[0]), [diffucoder.mask_ratio(s) for s in SEEDS]
    model, head = shifted(torch.float32)
    with torch.no_grad():
        ours = diffucoder.get_per_token_logps(TRAINER, model, ids, L, SEEDS, head=head)
        theirs = plain(model, ids, masks, ratios, 1).float()
        truth = plain(shifted()[0], ids, masks, ratios, 1)
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours, theirs, truth, "logp")


def test_masks_follow_the_law() -> None:
    for seed in SEEDS:
        t = diffucoder.mask_ratio(seed)
        assert 0.2 <= t <= 0.8
        masks = diffucoder.coupled_masks(sequences(1000), L, seed, t)
        assert not masks[:, :P].any()
        share = masks[:, P:].double().mean(0)
        assert ((share - t).abs() < 5 * (t * (1 - t) / 1000) ** 0.5).all(), (share, t)
        counts = masks.sum(-1).double()  # independent tokens: a binomial count
        assert abs(counts.var() / (L * t * (1 - t)) - 1) < 5 * (2 / 1000) ** 0.5
    drawn = torch.tensor([diffucoder.mask_ratio(seed) for seed in range(2000)])
    assert abs(drawn.mean() - 0.5) < 5 * (0.6**2 / 12 / 2000) ** 0.5
    assert 0.2 <= drawn.min() < 0.21
    assert 0.79 < drawn.max() <= 0.8


def test_masks_depend_on_seed_and_sequence_only() -> None:
    ids, order = sequences(8), torch.tensor([5, 0, 7])
    with LeavesRandomStateAlone():
        whole = our_masks(ids)
    assert torch.equal(our_masks(ids[order]), whole[:, order])
    assert not torch.equal(whole[0], whole[1])
    wider = F.pad(ids, (3, 0), value=PAD)
    attended = F.pad(torch.ones_like(ids), (3, 0))
    again = diffucoder.coupled_masks(wider, L, SEEDS[0], diffucoder.mask_ratio(SEEDS[0]), attention_mask=attended)
    assert torch.equal(again[:, 3:], whole[0])


def test_every_completion_token_is_in_exactly_one_version() -> None:
    """What the model is shown: no token is left out of both, as a tie leaves it upstream."""
    seen: list[Tensor] = []
    model = Plain(torch.float64)
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    ids = sequences()
    with torch.no_grad():
        diffucoder.get_per_token_logps(TRAINER, model, ids[None], L, [7], head=HeadSpec(model.out, shift=1))
    full, first, second = (seen[-1] == MASK).view(3, B, T)
    assert full[:, P:].all()
    assert torch.equal(first ^ second, full)
    assert not full[:, :P].any()


def test_the_order_of_iterations_and_batches_changes_nothing() -> None:
    ids = sequences()
    model, head = shifted()
    with torch.no_grad():
        old = diffucoder.get_per_token_logps(TRAINER, model, twice(ids), L, torch.tensor(SEEDS), head=head)
        one = diffucoder.get_per_token_logps(TRAINER, model, ids[None, 1:], L, [SEEDS[1]], head=head)
    torch.testing.assert_close(one[:, 0], old[1:, 1], rtol=1e-12, atol=1e-12)


def test_explicit_masks_and_ratios() -> None:
    ids = twice(sequences())
    ids = ids.clone()
    ids[:, 0, P + 2], ids[:, 1, P:] = MASK, PAD  # rows are known by the mask, not by what stands there
    masks = (torch.rand(2, B, T) < 0.4) & (torch.arange(T) >= P)
    masks[0, 0] = False  # an empty version
    model, head = shifted()
    with torch.no_grad():
        ours = diffucoder.get_per_token_logps(
            TRAINER, model, ids, L, SEEDS, masks=masks, mask_ratios=[0.25, 0.5], head=head
        )
        theirs = plain(model, ids, masks, [0.25, 0.5], 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_left_padding_is_attended_unless_its_id_is_given() -> None:
    short = sequences(1)[:, 2:]
    ids = F.pad(short, (2, 0), value=PAD)[None]
    model, head = shifted()

    def score(ids: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            return diffucoder.get_per_token_logps(TRAINER, model, ids, L, [3], head=head, **options)

    alone = score(short[None])
    torch.testing.assert_close(score(ids, pad_token_id=PAD), alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(score(ids), alone)


def test_no_logits_and_a_graph_that_does_not_grow() -> None:
    model = llada()
    head = untouchable(model.get_output_embeddings())

    def call(count: int, tokens: int | None) -> Tensor:
        ids = sequences(count)[None]
        return diffucoder.get_per_token_logps(TRAINER, model, ids, L, [3], head=head, micro_batch_tokens=tokens)

    assert_flat(call, lambda count: 2 * count * L)


def test_replayed_micro_batches_give_the_same_gradients() -> None:
    ids = sequences()

    def score(tokens: int | None) -> Any:
        model, head = shifted()
        return gradients_of(
            lambda m: diffucoder.get_per_token_logps(
                TRAINER, m, twice(ids), L, SEEDS, head=head, micro_batch_tokens=tokens
            ),
            model,
            lambda logp: grpo(logp.transpose(0, 1), logp.detach().transpose(0, 1) + 0.1, ADVANTAGES, torch.ones(B, L)),
        )

    (values, gradients), (again, replayed) = score(None), score(T)
    torch.testing.assert_close(values, again, rtol=1e-12, atol=1e-12)
    assert_same_gradients(replayed, gradients)


def test_signature() -> None:
    names = ["self", "model", "input_ids", "logits_to_keep", "mask_seeds"]
    assert positional(diffucoder.get_per_token_logps) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_seeds": [1]}, "mask_seeds must hold one seed per iteration, 2; got 1"),
        ({"input_ids": sequences()}, r"input_ids must have shape \[I, B, T\]"),
        ({"masks": torch.ones(2, B, T, dtype=torch.bool)}, "masks marks tokens outside the attended completion"),
        ({"masks": torch.ones(2, B, T)}, "masks must be bool"),
        ({"mask_ratios": [0.5]}, "mask_ratios must hold one ratio per iteration, 2; got 1"),
        ({"mask_ratios": [0.5, 0.0]}, "mask_ratios must be"),
        ({"mask_ratios": [0.5, 1.0]}, r"mask_ratios must be below 1"),
        ({"logits_to_keep": T}, "the first token of a sequence cannot be scored"),
        ({"logits_to_keep": 0}, "logits_to_keep must be"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    model, head = shifted()
    arguments = {"input_ids": twice(sequences()), "logits_to_keep": L, "mask_seeds": SEEDS} | change
    with pytest.raises((TypeError, ValueError), match=message):
        diffucoder.get_per_token_logps(TRAINER, model, head=head, **arguments)


def test_a_tokenizer_without_mask_token_is_named() -> None:
    nobody = SimpleNamespace(processing_class=SimpleNamespace(mask_token_id=None))
    with pytest.raises(ValueError, match="mask_token_id is None: the tokenizer has no mask token"):
        diffucoder.get_per_token_logps(nobody, llada(), twice(sequences()), L, SEEDS)


def test_more_logits_than_tokens_means_all_of_them() -> None:
    model = llada(torch.float64)
    with torch.no_grad():
        everything = diffucoder.get_per_token_logps(TRAINER, model, sequences()[None], T + 5, [3])
    assert everything.shape == (B, 1, T)
    assert (everything < 0).all()
