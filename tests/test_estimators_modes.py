"""The estimators under checkpointing, autocast, 16-bit weights and dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models_zoo import (
    DRAWING,
    Call,
    N,
    Plain,
    as_one,
    assert_same_gradients,
    bert,
    by_bgpo,
    by_elbo,
    by_replay,
    by_torch,
    every_architecture,
    every_call,
    gradients_of,
    llada,
    loss_of,
    make_batch,
    modern_bert,
    plain_scores,
    take_gradients,
    two_passes,
    untouchable,
)
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bgpo_kernels as bk

# --------------------------------------------------------------------------------------------------- checkpointing

UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@every_call
@pytest.mark.parametrize("build", [partial(bert, **UNDROPPED), modern_bert, llada], ids=["bert", "modernbert", "llada"])
def test_checkpointed_layers(build: Callable[..., Any], call: Call) -> None:
    model, batch = build(torch.float64), make_batch()
    expected = gradients_of(by_torch, model, batch)
    recomputed = checkpoint_layers(model, reentrant=False)
    assert_same_gradients(gradients_of(call, model, batch), expected)
    assert any(recomputed), "no layer was recomputed in a backward pass, so nothing was tested"


@every_call
def test_reentrant_checkpointing_of_layers(call: Call) -> None:
    """The older kind works where the call itself runs backward; torch refuses it inside autograd.grad."""
    model, batch = llada(torch.float64), make_batch()
    expected = gradients_of(by_torch, model, batch)
    recomputed = checkpoint_layers(model, reentrant=True)
    if call is by_elbo:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            call(model, batch)
        return
    assert_same_gradients(gradients_of(call, model, batch), expected)
    assert any(recomputed)


def checkpoint_layers(model: Any, reentrant: bool) -> list[bool]:
    """Switches checkpointing on; the list is filled with whether each run of the attention is part of a backward."""
    model.train()  # transformers checkpoint in training mode only
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[bool] = []
    for module in model.modules():
        if type(module).__name__ in ("BertAttention", "ModernBertAttention", "LlamaAttention"):
            module.register_forward_pre_hook(lambda *_: runs.append(torch._C._current_graph_task_id() != -1))
    return runs


class Checkpointed(nn.Module):
    """Head and all under one checkpoint."""

    def __init__(self, inner: Plain, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, input_ids: Tensor) -> Tensor:
        # The second argument makes the reentrant kind differentiable at all, as enable_input_require_grads does.
        run = lambda ids, _: self.inner(ids)  # noqa: E731
        return checkpoint(run, input_ids, self.inner.mix.weight, use_reentrant=self.reentrant)


@every_call
def test_checkpointed_model_never_makes_logits(call: Call) -> None:
    inner, batch = Plain(torch.float64), make_batch()
    expected = gradients_of(by_torch, inner, batch)
    head = untouchable(inner.out)
    found = gradients_of(call, Checkpointed(inner, reentrant=False), batch, head=head)
    assert_same_gradients({name.removeprefix("inner."): g for name, g in found.items()}, expected)


@every_call
def test_reentrant_checkpoint_around_the_head_is_refused_not_silent(call: Call) -> None:
    """Inside it autograd is off, so the layers below the head would be left untrained."""
    inner, batch = Plain(), make_batch()
    model = Checkpointed(inner, reentrant=True)
    with pytest.raises(RuntimeError, match="without autograd"):
        call(model, batch, head=inner.out)
    assert take_gradients(model) == {}


@pytest.mark.parametrize("call", [by_bgpo, by_replay], ids=["bgpo", "replay"])
def test_inference_mode_is_refused_not_silent(call: Call) -> None:
    model, batch = llada(), make_batch()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        call(model, batch)
    assert take_gradients(model) == {}


@pytest.mark.parametrize("call", [by_bgpo, by_replay], ids=["bgpo", "replay"])
def test_no_grad_around_a_call_that_is_all_backward(call: Call) -> None:
    model, batch = llada(torch.float64), make_batch()
    expected = gradients_of(call, model, batch)
    with torch.no_grad():
        assert_same_gradients(gradients_of(call, model, batch), expected)


# ----------------------------------------------------------------------------------------- autocast, 16-bit weights


@every_call
@every_architecture
def test_autocast_is_as_good_as_torch(build: Callable[..., nn.Module], call: Call) -> None:
    """fp32 weights, bf16 arithmetic; the backward of elbo_logprob runs outside the context and must restore it."""
    batch = make_batch()
    reference = gradients_of(by_torch, build(torch.float64), batch)
    model = build()
    found = {}
    for name, run in (("ours", call), ("torch", by_torch)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[name] = gradients_of(run, model, batch)
    assert {g.dtype for g in found["ours"].values()} == {torch.float32}
    assert_as_good_as_torch(as_one(found["ours"]), as_one(found["torch"]), as_one(reference))
    error = (as_one(found["ours"]) - as_one(reference)).norm() / as_one(reference).norm()
    assert error > 1e-4, "the context had no effect, so nothing was tested"


def test_backward_ignores_an_autocast_that_the_forward_did_not_have() -> None:
    model, batch = llada(torch.float64), make_batch()
    expected = gradients_of(by_torch, model, batch)
    model.float()
    scores = bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **DRAWING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(batch)(scores).backward()
    assert_same_gradients({n: g.double() for n, g in take_gradients(model).items()}, expected, rtol=1e-4)


@every_call
@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(build: Callable[..., nn.Module], dtype: torch.dtype, call: Call) -> None:
    batch = make_batch()
    reference = as_one(gradients_of(by_torch, build(dtype).double(), batch)).double()
    model = build(dtype)
    found = as_one(gradients_of(call, model, batch))
    assert found.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(found.double(), reference, dim=0)
    assert cosine > 0.999
    assert float(found.double().norm() / reference.norm()) == pytest.approx(1.0, rel=0.01)


# --------------------------------------------------------------------------------------------------------- dropout

DROPPING = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}


@two_passes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_second_pass_repeats_the_dropout_of_the_first(call: Call, checkpointing: bool) -> None:
    """The gradient along itself equals the difference quotient of the value, at equal seeds of everything."""
    model, batch = bert(torch.float64, **DROPPING).train(), make_batch()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def objective(scores: Tensor) -> Tensor:
        return (scores * torch.arange(N)).square().sum()

    def value() -> float:
        torch.manual_seed(5)
        with torch.no_grad():
            return float(objective(bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **DRAWING)))

    torch.manual_seed(5)
    if call is by_replay:
        bk.replay_backward(model, batch.ids, batch.response, objective, **DRAWING)
    else:
        estimates = bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **DRAWING)
        torch.rand(3)  # whatever happens to the global generator in between
        objective(estimates).backward()
    gradients = take_gradients(model)
    slope, step = float(as_one(gradients).norm()), 1e-5
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(gradients[name], alpha=sign * step / slope)
        values.append(value())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_one_pass_draws_dropout_like_any_forward() -> None:
    model, batch = bert(torch.float64, **DROPPING).train(), make_batch()
    torch.manual_seed(6)
    found = gradients_of(by_bgpo, model, batch)
    torch.manual_seed(6)
    draw = bk.random_mask(batch.ids, batch.response, **DRAWING)
    scores = [
        plain_scores(model, batch.ids[b : b + 1], batch.response[b : b + 1], draw.sequence(b, 0, N, torch.arange(10)))
        for b in range(3)
    ]
    loss_of(batch)(torch.cat(scores)).backward()
    assert_same_gradients(found, take_gradients(model))


@every_call
@pytest.mark.parametrize("training", [False, True])
def test_global_random_state(call: Call, training: bool) -> None:
    """Evaluation leaves it alone; a two-pass call in training takes exactly one number from it."""
    model, batch = bert(**DROPPING).train(training), make_batch()
    begin = expected = torch.get_rng_state()
    if training:
        torch.randint(2**31, ())
        expected = torch.get_rng_state()
        torch.set_rng_state(begin)
    call(model, batch)
    # bgpo_backward, one pass, draws its dropout from the global generator like any forward
    assert torch.equal(torch.get_rng_state(), expected) == (call is not by_bgpo or not training)


@pytest.mark.parametrize("training", [False, True])
def test_replay_runs_in_the_mode_of_its_forward(training: bool) -> None:
    """model.train() between a forward and its backward changes nothing, as for any other graph."""
    model, batch = bert(torch.float64, **DROPPING).train(training), make_batch()
    begin = torch.get_rng_state()
    expected = gradients_of(by_elbo, model, batch)
    torch.set_rng_state(begin)
    scores = bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **DRAWING)
    model.train(not training)
    loss_of(batch)(scores).backward()
    assert_same_gradients(take_gradients(model), expected)
    assert all(module.training is not training for module in model.modules())
