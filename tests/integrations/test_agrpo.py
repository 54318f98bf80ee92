"""AGRPO: log-probabilities over the sampler's support, against its arithmetic on all logits."""

from __future__ import annotations

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
    logits_of,
    padded,
    positional,
    sequences,
    shifted_model,
    unshifted,
)
from models_zoo import MASK, V, assert_same_gradients, llada, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import agrpo

TRAINER = SimpleNamespace(temperature=0.7)


def step(seed: int = 3, per_step: int = 2) -> dict[str, Tensor]:
    """One decoding step of every sequence: what it saw, which tokens it decoded, from which support."""
    generator = torch.Generator().manual_seed(seed)
    ids, attended = sequences(), torch.ones(B, T, dtype=torch.int64)
    order = torch.rand(B, L, generator=generator).argsort(-1)  # place in the decoding order
    decoded = (order >= 2) & (order < 2 + per_step)
    completion = ids[:, P:]
    seen = torch.cat([ids[:, :P], torch.where(order >= 2, MASK, completion)], 1)
    support = torch.rand(B, L, V, generator=generator) < 0.1
    support.scatter_(-1, completion[..., None], True)
    return {
        "input_ids": seen, "attention_mask": attended, "sampling_masks": support, "unmask_positions": decoded,
        "completion_ids": completion,
    }  # fmt: skip


def plain(model: nn.Module, s: dict[str, Tensor], temperature: float = 0.7, shift: int = 0) -> Tensor:
    """Logits of everything, the completion's, -inf outside the support, log-softmax, gather. Padding by hand."""
    dtype = next(model.parameters()).dtype
    logits = torch.zeros(*s["input_ids"].shape, V, dtype=dtype)
    for b, real in enumerate(s["attention_mask"].bool()):
        logits[b, real] = logits_of(model, s["input_ids"][b : b + 1, real])[0].roll(shift, 0)
    chosen = logits[:, -L:][s["unmask_positions"]] / temperature
    chosen = chosen.masked_fill(~s["sampling_masks"][s["unmask_positions"]], -torch.inf)
    return chosen.log_softmax(-1).gather(-1, s["completion_ids"][s["unmask_positions"]][:, None])[:, 0]


def ours(model: nn.Module, s: dict[str, Tensor], **options: Any) -> Tensor:
    return agrpo.get_per_token_logps_and_entropies(TRAINER, model, *s.values(), **options)


def loss(logp: Tensor) -> Tensor:
    """A clipped ratio against other old values, each token with its own advantage."""
    ratio = (logp - logp.detach() + torch.linspace(-0.3, 0.3, len(logp))).exp()
    advantage = torch.linspace(-1.0, 1.5, len(logp))
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()


@unshifted
@pytest.mark.parametrize("left_padded", [False, True])
def test_values_and_gradients_are_those_of_agrpo(build, left_padded: bool) -> None:
    s = step()
    if left_padded:
        _, attended = padded(s["input_ids"])
        attended[:, P:] = 1
        s["attention_mask"] = attended
    values, gradients = gradients_of(lambda m: ours(m, s), build(torch.float64), loss)
    expected, expected_gradients = gradients_of(lambda m: plain(m, s), build(torch.float64), loss)
    assert values.shape == (int(s["unmask_positions"].sum()),)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, expected_gradients)


def test_a_shifted_model() -> None:
    s = step()
    (first, head), (second, _) = shifted_model(), shifted_model()
    values, gradients = gradients_of(lambda m: ours(m, s, head=head), first, loss)
    expected, expected_gradients = gradients_of(lambda m: plain(m, s, shift=1), second, loss)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, expected_gradients)


def test_in_fp32_as_good_as_torch() -> None:
    s = step()
    found = [
        ours(llada(), s).detach(),
        plain(llada(), s).detach(),
        plain(llada(torch.float64), s).detach(),
    ]
    assert found[0].dtype == torch.float32
    assert_as_good_as_torch(*found)


@pytest.mark.parametrize("kind", ["everything", "one token", "as ids"])
def test_every_kind_of_support(kind: str) -> None:
    s = step()
    model = llada(torch.float64)
    if kind == "everything":
        s["sampling_masks"] = torch.ones(B, L, V, dtype=torch.bool)
    if kind == "one token":
        s["sampling_masks"] = torch.zeros(B, L, V, dtype=torch.bool).scatter_(-1, s["completion_ids"][..., None], True)
    expected = plain(model, s)
    if kind == "as ids":
        s["sampling_masks"] = agrpo.support_ids(s["sampling_masks"])
    torch.testing.assert_close(ours(model, s), expected, rtol=1e-10, atol=1e-10)
    assert kind != "one token" or not bool(expected.any()), "the only token has probability 1"


def test_support_ids_hold_every_token_once() -> None:
    mask = torch.tensor([[[True, False, True, False], [False] * 4], [[True] * 4, [False, True, False, False]]])
    ids = agrpo.support_ids(mask)
    assert ids.tolist() == [[[0, 2, -1, -1], [-1] * 4], [[0, 1, 2, 3], [1, -1, -1, -1]]]
    assert agrpo.support_ids(mask[0, 0]).tolist() == [0, 2]


def test_what_is_decoded_may_be_the_mask_token() -> None:
    """Rows come from unmask_positions, never from a comparison with the mask token."""
    s = step()
    s["completion_ids"] = s["completion_ids"].masked_fill(s["unmask_positions"], MASK)
    s["sampling_masks"] = torch.ones(B, L, V, dtype=torch.bool)
    model = llada(torch.float64)
    torch.testing.assert_close(ours(model, s), plain(model, s), rtol=1e-10, atol=1e-10)


def test_no_logits_and_no_graphs() -> None:
    model = llada()
    ours(model, step(), head=untouchable(model.get_output_embeddings()))

    def call(count: int, tokens: int | None) -> Tensor:
        s = {k: v[:1].repeat(count, *[1] * (v.dim() - 1)) for k, v in step().items()}
        return ours(llada(), s, micro_batch_tokens=tokens)

    assert_flat(call, lambda count: count * L)


def test_random_state_stays() -> None:
    with LeavesRandomStateAlone():
        ours(llada(), step())


def test_the_signature_is_agrpos() -> None:
    assert positional(agrpo.get_per_token_logps_and_entropies) == [
        "self", "model", "input_ids", "attention_mask", "sampling_masks", "unmask_positions", "completion_ids",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(B, T)}, TypeError, "input_ids must be int64"),
        ({"completion_ids": torch.zeros(B, T + 1, dtype=torch.int64)}, ValueError, "must be the last L of the T"),
        ({"unmask_positions": torch.zeros(B, L)}, TypeError, "unmask_positions must be bool"),
        ({"sampling_masks": torch.zeros(B, L + 1, V, dtype=torch.bool)}, ValueError, r"sampling_masks must have shape"),
        ({"sampling_masks": torch.zeros(B, L, V)}, TypeError, "sampling_masks must be bool or int64"),
        ({"attention_mask": None}, TypeError, "attention_mask must be a torch.Tensor"),
        ({"sampling_masks": torch.zeros(B, L, V, dtype=torch.bool)}, ValueError, "not in their row's support"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ours(llada(), step() | change)


def test_errors_of_support_ids() -> None:
    with pytest.raises(TypeError, match="sampling_masks must be bool"):
        agrpo.support_ids(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="holds nothing"):
        agrpo.support_ids(torch.zeros(0, 3, dtype=torch.bool))
