"""dllm's trainer on TRL: the same numbers and gradients as its function, given the same masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
)
from models_zoo import MASK, assert_same_gradients, llada, perturbed, take_gradients, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import dllm
from bgpo_kernels.integrations._completions import one_step_ids

SEED = 123456789
ADVANTAGES = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)


def trainer(scale: float = 0.0, **attributes: Any) -> Any:
    return SimpleNamespace(
        args=SimpleNamespace(p_mask_prompt=0.3, seed=5), processing_class=SimpleNamespace(mask_token_id=MASK),
        sampler_config=SimpleNamespace(cfg_scale=scale), **attributes,
    )  # fmt: skip


def masked_by_us(ids: Tensor, attended: Tensor, seed: int = SEED) -> Tensor:
    completion = (torch.arange(T) >= P).expand_as(ids)
    return one_step_ids(ids, completion, seed, MASK, 0.3, attention_mask=attended, sample_ids=None, backend="auto")


def plain(model: nn.Module, noisy: Tensor, ids: Tensor, attended: Tensor, chunk: int = 2) -> Tensor:
    """dllm's arithmetic: chunks, attention mask to the model, all logits, zeros after EOS. ``[N, L]``.

    Positions are counted from the first token: rotary embeddings depend on differences only, but transformers rounds
    their angles to fp32, in a model in fp64 too.
    """
    parts = []
    places = (attended.cumsum(-1) - 1).clamp(min=0)
    for i in range(0, len(ids), chunk):
        part = slice(i, i + chunk)
        logits = logits_of(model, noisy[part], attention_mask=attended[part], position_ids=places[part])[:, -L:]
        targets = ids[i : i + chunk, -L:]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
        parts.append(-loss.view(targets.shape))
    return torch.cat(parts) * attended[:, -L:]


def test_values_and_gradients_are_those_of_dllm() -> None:
    """Left padding and EOS tails of different lengths; the model of the restatement sees them behind its mask."""
    ids, attended = padded(sequences())
    noisy = masked_by_us(ids, attended)
    old = plain(perturbed(llada(torch.float64)), noisy, ids, attended).detach()

    def loss(logp: Tensor) -> Tensor:
        return grpo(logp, old, ADVANTAGES, attended[:, -L:].double())

    ours, our_gradients = gradients_of(
        lambda m: dllm.get_per_token_logps(trainer(), m, ids, attended, L, 2, seed=SEED), llada(torch.float64), loss
    )
    theirs, their_gradients = gradients_of(lambda m: plain(m, noisy, ids, attended), llada(torch.float64), loss)
    assert ours.shape == (B, L)
    assert torch.equal(ours == 0, attended[:, -L:] == 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert_same_gradients(our_gradients, their_gradients)


def test_a_model_with_shift() -> None:
    """No attention mask is needed for the restatement when every sequence goes alone, without its padding."""
    ids, attended = padded(sequences())
    noisy = masked_by_us(ids, attended)
    model, head = shifted_model()
    with torch.no_grad():
        ours = dllm.get_per_token_logps(trainer(), model, ids, attended, L, seed=SEED, head=head)
        for b in range(B):
            keep = attended[b].bool()
            logp = token_logp(logits_of(model, noisy[b : b + 1, keep])[:, :-1], ids[b : b + 1, keep][:, 1:])[0]
            length = int(keep[P:].sum())
            torch.testing.assert_close(ours[b, :length], logp[-length:], rtol=1e-10, atol=1e-10)


def test_single_precision_is_as_good_as_torch() -> None:
    ids, attended = padded(sequences(20 * B))  # the largest of few errors is luck
    noisy = masked_by_us(ids, attended)
    with torch.no_grad():
        ours = dllm.get_per_token_logps(trainer(), llada(), ids, attended, L, seed=SEED)
        theirs, truth = (plain(llada(dtype), noisy, ids, attended) for dtype in (torch.float32, torch.float64))
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours, theirs, truth, "logp")


def test_masks_depend_on_seed_and_sequence_only() -> None:
    ids, attended = padded(sequences(8))
    with LeavesRandomStateAlone():
        whole = masked_by_us(ids, attended)
    order = torch.tensor([5, 0, 7])
    assert torch.equal(masked_by_us(ids[order], attended[order]), whole[order])
    assert not torch.equal(masked_by_us(ids, attended, SEED + 1), whole)
    more = masked_by_us(ids, attended)[:, :P] == MASK
    assert more.any()
    alone = ids[2:3, attended[2].bool()]  # the same sequence without its padding
    completion = torch.arange(alone.shape[1]) >= P - 2
    again = one_step_ids(alone, completion[None], SEED, MASK, 0.3, attention_mask=None, sample_ids=None, backend="auto")
    assert torch.equal(again[0], whole[2, attended[2].bool()])


def test_neither_chunks_nor_order_change_a_result() -> None:
    ids, attended = padded(sequences(6))
    model, order = llada(torch.float64), torch.tensor([4, 1, 5, 0])
    with torch.no_grad():
        whole = dllm.get_per_token_logps(trainer(), model, ids, attended, L, seed=SEED)
        for chunk in (1, 2, 4):
            part = dllm.get_per_token_logps(trainer(), model, ids[order], attended[order], L, chunk, SEED)
            torch.testing.assert_close(part, whole[order], rtol=1e-12, atol=1e-12)


def test_where_the_seed_comes_from() -> None:
    ids, attended = padded(sequences())
    model = llada(torch.float64)

    def score(trainer: Any, seed: int | None = None) -> Tensor:
        with torch.no_grad():
            return dllm.get_per_token_logps(trainer, model, ids, attended, L, seed=seed)

    given = score(trainer(), SEED)
    assert torch.equal(score(trainer(_current_mask_seed=SEED)), given)
    assert torch.equal(score(trainer(_current_mask_seed=SEED), 9), score(trainer(), 9))
    assert torch.equal(score(trainer()), score(trainer(), 5))
    assert torch.equal(score(trainer(_current_mask_seed=None)), score(trainer(), 5))
    assert not torch.allclose(score(trainer()), given)


def test_sequences_without_completion_give_zeros() -> None:
    """What mask_truncated_completions leaves: some sequences, or a whole batch."""
    ids, attended = padded(sequences())
    attended[1, P:] = 0
    whole = dllm.get_per_token_logps(trainer(), llada(torch.float64), ids, attended, L, seed=SEED)
    noisy = masked_by_us(ids, attended)
    with torch.no_grad():
        torch.testing.assert_close(whole[[0, 2]], plain(llada(torch.float64), noisy, ids, attended)[[0, 2]])
    assert (whole[1] == 0).all()
    attended[:, P:] = 0
    model = llada(torch.float64)
    nothing = dllm.get_per_token_logps(trainer(), model, ids, attended, L, seed=SEED)
    assert torch.equal(nothing, torch.zeros(B, L, dtype=torch.float64))
    (nothing.exp() * ADVANTAGES[:, None]).sum().backward()  # as on a rank whose whole batch was cut off
    gradients = take_gradients(model)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for g in gradients.values())


def test_explicit_masks_and_rows() -> None:
    ids, attended = padded(sequences())
    noisy = torch.where(torch.rand(B, T) < 0.5, MASK, ids)
    rows = (torch.rand(B, T) < 0.5) & (torch.arange(T) >= P) & (attended != 0)
    model = llada(torch.float64)
    with torch.no_grad():
        ours = dllm.get_per_token_logps(trainer(), model, ids, attended, L, noisy_ids=noisy, rows=rows)
        theirs = plain(model, noisy, ids, attended) * rows[:, P:]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_no_logits_and_a_graph_that_does_not_grow() -> None:
    model = llada()
    head = untouchable(model.get_output_embeddings())

    def call(count: int, tokens: int | None) -> Tensor:
        ids = sequences(count)
        attended = torch.ones_like(ids)
        batch_size = None if tokens is None else tokens // T
        return dllm.get_per_token_logps(trainer(), model, ids, attended, L, batch_size, SEED, head=head)

    assert_flat(call, lambda count: count * L)


def test_signature() -> None:
    names = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "seed"]
    assert positional(dllm.get_per_token_logps) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": sequences()[0]}, r"input_ids must have shape \[N, T\]"),
        ({"attention_mask": torch.ones(B, T - 1)}, r"attention_mask must have shape \[3, 12\] \(as input_ids\)"),
        ({"attention_mask": torch.full((B, T), 0.5)}, "attention_mask must hold 0 and 1"),
        ({"logits_to_keep": T + 1}, "logits_to_keep must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"noisy_ids": sequences(2)}, "noisy_ids must have shape"),
        ({"rows": torch.ones(B, T, dtype=torch.bool)}, "rows marks tokens outside the attended completion"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    ids, attended = padded(sequences())
    arguments = {"input_ids": ids, "attention_mask": attended, "logits_to_keep": L} | change
    with pytest.raises((TypeError, ValueError), match=message):
        dllm.get_per_token_logps(trainer(), llada(), **arguments)


def test_guidance_and_a_tokenizer_without_mask_token_are_refused() -> None:
    ids, attended = padded(sequences())
    with pytest.raises(ValueError, match=r"self\.sampler_config\.cfg_scale is 2\.0: guidance"):
        dllm.get_per_token_logps(trainer(2.0), llada(), ids, attended, L)
    nobody = trainer()
    nobody.processing_class.mask_token_id = None
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        dllm.get_per_token_logps(nobody, llada(), ids, attended, L)
