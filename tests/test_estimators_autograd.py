"""The estimators among the rest of autograd: what is trained, hooks, checkpointing, autocast, 16 bit, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_zoo import (
    DRAWING,
    Batch,
    Call,
    N,
    Plain,
    assert_same_gradients,
    bert,
    by_elbo,
    by_torch,
    every_call,
    llada,
    make_batch,
    perturbed,
    plain_scores,
    take_gradients,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bgpo_kernels as bk


def check(call: Call, model: nn.Module, batch: Batch, **options: Any) -> dict[str, Tensor]:
    by_torch(model, batch)
    expected = take_gradients(model)
    call(model, batch, **options)
    found = take_gradients(model)
    assert_same_gradients(found, expected)
    return found


# ------------------------------------------------------------------------------------------------ what is trained


class Adapted(nn.Module):
    """A frozen linear layer and a trained correction of rank 2, as LoRA adds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@every_call
def test_frozen_head(call: Call) -> None:
    model = llada(torch.float64)
    model.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in check(call, model, make_batch())


@every_call
def test_head_alone(call: Call) -> None:
    model = llada(torch.float64).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert list(check(call, model, make_batch())) == ["lm_head.weight"]


@every_call
def test_head_bias_alone(call: Call) -> None:
    model = Plain(torch.float64).requires_grad_(False)
    model.out.bias.requires_grad_(True)
    assert list(check(call, model, make_batch(), head=model.out)) == ["out.bias"]


@every_call
def test_adapter_in_the_backbone(call: Call) -> None:
    model = llada(torch.float64).requires_grad_(False)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Adapted(mlp.up_proj)
    assert len(check(call, model, make_batch())) == 2


@every_call
def test_adapter_under_a_trained_head_bias(call: Call) -> None:
    model = bert(torch.float64).requires_grad_(False)
    model.cls.predictions.bias.requires_grad_(True)
    layer = model.bert.encoder.layer[1].intermediate
    layer.dense = Adapted(layer.dense)
    assert len(check(call, model, make_batch())) == 3


@every_call
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_separate_embeddings(call: Call, tied: bool) -> None:
    model = bert(torch.float64, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    check(call, model, make_batch())


@every_call
def test_parametrized_head_weight(call: Call) -> None:
    model = llada(torch.float64)
    parametrizations.weight_norm(model.lm_head)
    found = check(call, model, make_batch())
    assert {name for name in found if "parametrizations" in name} == {
        "lm_head.parametrizations.weight.original0", "lm_head.parametrizations.weight.original1",
    }  # fmt: skip


@every_call
def test_parameters_that_share_or_expand_their_gradient(call: Call) -> None:
    """Autograd hands one tensor to both addends, and a view that repeats one number to a sum: sums must copy first."""

    class Offsets(Plain):
        def __init__(self) -> None:
            super().__init__(torch.float64)
            shape = (1, 10, 8)
            self.first, self.second, self.third = (nn.Parameter(torch.zeros(shape).double()) for _ in range(3))
            self.embed.register_forward_hook(lambda _m, _a, x: x + self.first + self.second + self.third.sum())

    model = Offsets()
    bk.models.assume_bidirectional(model)  # the probe's sequences are shorter than the offsets
    found = check(call, model, make_batch(), head=model.out, micro_batch_tokens=1)
    assert torch.equal(found["first"], found["second"])


def test_nothing_to_train() -> None:
    model, batch = llada().requires_grad_(False), make_batch()
    step = bk.bgpo_backward(model, batch.ids, batch.response, batch.advantages, n_mc=N)
    assert torch.isfinite(step.loss) and take_gradients(model) == {}
    assert not bk.elbo_logprob(model, batch.ids, batch.response, n_mc=N).requires_grad


# ----------------------------------------------------------------------------------------------------------- hooks


@every_call
@pytest.mark.parametrize("kind", ["tensor hook", "post-accumulate hook"])
@pytest.mark.parametrize("micro_batch_tokens", [None, 10])
def test_hooks_on_the_head_weight(call: Call, kind: str, micro_batch_tokens: int | None) -> None:
    """A watched weight gets its gradient from autograd: once per micro-batch where the call itself runs backward, and
    once in all where the caller does."""
    model, batch = llada(torch.float64), make_batch()
    by_torch(model, batch)
    expected = take_gradients(model)
    seen: list[Tensor] = []
    weight = model.lm_head.weight
    if kind == "tensor hook":
        weight.register_hook(lambda g: seen.append(g.clone()) or 2.0 * g)
        expected["lm_head.weight"] *= 2.0
    else:
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    call(model, batch, micro_batch_tokens=micro_batch_tokens)
    micro_batches = len(batch.ids) * (1 if micro_batch_tokens is None else N)
    assert len(seen) == (1 if call is by_elbo else micro_batches)
    total = 2.0 * sum(seen) if kind == "tensor hook" else seen[-1]
    found = take_gradients(model)
    assert_same_gradients(found, expected)
    torch.testing.assert_close(found["lm_head.weight"], total, rtol=1e-12, atol=1e-14)


def test_tensor_hooks_anywhere_act_once_on_the_estimates() -> None:
    model, batch = llada(torch.float64), make_batch()
    by_torch(model, batch)
    expected = {name: 3.0 * g for name, g in take_gradients(model).items()}
    calls: list[str] = []
    for name, p in model.named_parameters():
        p.register_hook(lambda g, n=name: calls.append(n) or 3.0 * g)
    by_elbo(model, batch, micro_batch_tokens=10)
    assert_same_gradients(take_gradients(model), expected)
    assert sorted(calls) == sorted(expected)


# ------------------------------------------------------------------------------------- elbo_logprob as a function


def test_no_grad_gives_the_same_numbers_without_graph() -> None:
    model, batch = llada(), make_batch()
    with_graph = bk.elbo_logprob(model, batch.ids, batch.response, **DRAWING)
    assert with_graph.requires_grad and with_graph.dtype == torch.float32
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            plain = bk.elbo_logprob(model, batch.ids, batch.response, **DRAWING)
        assert not plain.requires_grad and torch.equal(plain, with_graph)


def test_two_calls_before_one_backward() -> None:
    """As a preference loss does: chosen and rejected, scored separately, joined in one loss."""
    model, batch, other = llada(torch.float64), make_batch(4), make_batch(4, tokens=12)
    draws = [bk.random_mask(b.ids, b.response, **DRAWING) for b in (batch, other)]

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -nn.functional.logsigmoid(0.2 * (chosen - rejected)).mean()

    scores = (plain_scores(model, b.ids, b.response, d) for b, d in zip((batch, other), draws, strict=True))
    loss(*(s.mean(-1) for s in scores)).backward()
    expected = take_gradients(model)
    loss(*(bk.elbo_logprob(model, b.ids, b.response, **DRAWING) for b in (batch, other))).backward()
    assert_same_gradients(take_gradients(model), expected)


def test_changed_weights_are_noticed() -> None:
    model, batch = llada(), make_batch()
    estimates = bk.elbo_logprob(model, batch.ids, batch.response, **DRAWING)
    perturbed(model)
    with pytest.raises(RuntimeError, match="modified in place between elbo_logprob and the backward"):
        estimates.sum().backward()
    assert take_gradients(model) == {}


def test_second_derivatives_are_refused_not_wrong() -> None:
    model, batch = llada(), make_batch()
    estimates = bk.elbo_logprob(model, batch.ids, batch.response, **DRAWING)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(estimates.sum(), [model.lm_head.weight], create_graph=True)
