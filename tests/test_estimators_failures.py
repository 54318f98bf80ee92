"""All or nothing: errors, interrupts, NaN and out-of-memory in the middle of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models_zoo import (
    DRAWING,
    Call,
    N,
    assert_bitwise,
    bert,
    by_bgpo,
    by_elbo,
    every_call,
    llada,
    make_batch,
    take_gradients,
    two_passes,
)
from torch import Tensor, nn

import bgpo_kernels as bk

TOKENS = 10


@pytest.fixture(params=[False, True], ids=["no .grad", "earlier .grad"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """A model whose gradients and head must be, at the end of the test, what they are now."""
    made = llada()
    bk.models.assume_bidirectional(made)  # so that forwards can be counted
    if request.param:
        for p in made.parameters():
            p.grad = torch.randn_like(p)
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in made.parameters()]
    yield made
    for p, (tensor, values) in zip(made.parameters(), before, strict=True):
        assert p.grad is tensor, ".grad must be the same tensor, or None, as before"
        assert tensor is None or torch.equal(tensor, values), ".grad must hold the same numbers as before"
    assert "forward" not in vars(made.lm_head) and not made.lm_head._forward_hooks, "the head must be itself again"


class Break:
    """Raises at the k-th time it is called."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.left = error, at

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


ERRORS = [ValueError("a bug in the model"), KeyboardInterrupt()]
every_error = pytest.mark.parametrize("error", ERRORS, ids=["error", "interrupt"])


# ------------------------------------------------------------------------------------------------- accumulation


@every_call
def test_gradients_add_to_those_that_exist(call: Call) -> None:
    model, batch = llada(), make_batch()
    call(model, batch)
    new = take_gradients(model)
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    tensors = {name: g.clone() for name, g in before.items()}
    for name, p in model.named_parameters():
        p.grad = tensors[name]
    call(model, batch)
    assert all(p.grad is tensors[name] for name, p in model.named_parameters())
    assert_bitwise(take_gradients(model), {name: before[name] + new[name] for name in new})


# ---------------------------------------------------------------------------------------------- errors on the way


@every_call
@every_error
@pytest.mark.parametrize("k", [1, 2, 3])
def test_error_in_a_forward(model: nn.Module, call: Call, error: BaseException, k: int) -> None:
    model.model.layers[1].register_forward_pre_hook(Break(error, k))
    with pytest.raises(type(error)):
        call(model, make_batch())


@two_passes
@every_error
@pytest.mark.parametrize("k", [4, 6])
def test_error_in_the_second_pass(model: nn.Module, call: Call, error: BaseException, k: int) -> None:
    model.model.layers[1].register_forward_pre_hook(Break(error, k))
    with pytest.raises(type(error)):
        call(model, make_batch())


@every_call
@every_error
@pytest.mark.parametrize("k", [1, 3])
def test_error_in_a_backward(model: nn.Module, call: Call, error: BaseException, k: int) -> None:
    breaking = Break(error, k)
    model.model.layers[0].mlp.register_full_backward_hook(lambda *_: breaking())
    with pytest.raises(type(error)):
        call(model, make_batch())


@every_call
@every_error
def test_error_in_the_head(model: nn.Module, call: Call, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernels themselves, with the head's sum half done."""
    from bgpo_kernels.head import engine

    real, breaking = engine._Chunk._feed, Break(error, 3)
    monkeypatch.setattr(engine._Chunk, "_feed", lambda self, *a, **k: (real(self, *a, **k), breaking())[0])
    with pytest.raises(type(error)):
        call(model, make_batch())


@every_error
def test_error_in_the_objective(model: nn.Module, error: BaseException) -> None:
    with pytest.raises(type(error)):
        bk.replay_backward(model, *make_batch()[:2], Break(error, 1), **DRAWING)


# ---------------------------------------------------------------------------------------------------- not finite


def spoil(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[..., 0] = torch.nan
    return gradient


@every_call
def test_nan_weights(model: nn.Module, call: Call) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="non-finite"):
        call(model, make_batch())


@every_call
def test_overflow_in_the_forward(model: nn.Module, call: Call) -> None:
    model.model.norm.register_forward_hook(lambda _m, _a, x: torch.full_like(x, torch.inf))
    with pytest.raises(FloatingPointError, match="non-finite"):
        call(model, make_batch())


@every_call
@pytest.mark.parametrize("last_only", [False, True])
def test_nan_in_the_backward(model: nn.Module, call: Call, last_only: bool) -> None:
    """Log-probabilities are fine, the gradient is not; once in the very last micro-batch."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            seen.append(output)
            if not last_only or len(seen) == 3:
                output.register_hook(spoil)

    model.model.layers[0].mlp.register_forward_hook(hook)
    with pytest.raises(FloatingPointError, match="non-finite gradient"):
        call(model, make_batch())
    assert len(seen) == 3


def test_messages_name_the_sequence(model: nn.Module) -> None:
    batch = make_batch()
    with torch.no_grad():
        model.get_input_embeddings().weight[batch.ids[1, 0]] = torch.nan
    assert not bool((batch.ids[[0, 2]] == batch.ids[1, 0]).any())
    with pytest.raises(FloatingPointError, match=r"\(sample id, MC sample\) \[\(71, 0\)"):
        by_bgpo(model, batch, sample_ids=torch.tensor([70, 71, 72]))


def test_ratio_that_overflows(model: nn.Module) -> None:
    """exp(d) without clip for a negative advantage; the dual clip is the remedy."""
    batch = make_batch()
    old = torch.full((3, N), -1e4)
    with pytest.raises(FloatingPointError, match="non-finite gradient"):
        by_bgpo(model, batch, old_logprob=old, length_norm=False)
    clipped = bk.bgpo_backward(
        llada(), batch.ids, batch.response, batch.advantages, old_logprob=old, length_norm=False, dual_clip=3.0,
        **DRAWING,
    )  # fmt: skip
    assert clipped.loss.isfinite()


@pytest.mark.parametrize(
    "objective",
    [lambda s: s.sum() * torch.nan, lambda s: s.sum() + torch.nan, lambda s: torch.sqrt(s[0, 0] - s[0, 0].detach())],
    ids=["NaN slope", "NaN value", "infinite slope"],
)
def test_objectives_that_are_not_finite(model: nn.Module, objective: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(FloatingPointError, match="objective"):
        bk.replay_backward(model, *make_batch()[:2], objective, **DRAWING)


# ------------------------------------------------------------------------------------------------- out of memory


class Limit:
    """Out of memory for more than so many samples at once, in forward or in backward."""

    def __init__(self, model: Any, samples: int, where: str) -> None:
        self.samples, self.tried = samples, list[int]()
        bk.models.assume_bidirectional(model)  # the probe runs four sequences
        mlp = model.model.layers[0].mlp
        if where == "forward":
            mlp.register_forward_pre_hook(lambda _m, args: self.check(len(args[0])))
        else:
            mlp.register_full_backward_hook(lambda _m, _in, out: self.check(len(out[0])))

    def check(self, samples: int) -> None:
        self.tried.append(samples)
        if samples > self.samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")


in_both_directions = pytest.mark.parametrize("where", ["forward", "backward"])


@every_call
@in_both_directions
@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("training", [False, True])
def test_out_of_memory_halves_and_changes_nothing(call: Call, where: str, samples: int, training: bool) -> None:
    """Equal, to the bit, to a run with that size from the start; .grad from before is kept. In training too, as long
    as no dropout is drawn."""
    batch, found = make_batch(), []
    for limited in (True, False):
        model = llada().train(training)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.01 * i)
        limit = Limit(model, samples, where) if limited else None
        call(model, batch, micro_batch_tokens=None if limited else samples * TOKENS)
        found.append(take_gradients(model))
        if limit is not None:
            big = [size for size in limit.tried if size > samples]
            assert big == [size for size in (8, 4, 2) if size > samples], "halved, and no size tried twice"
    if call is by_bgpo or where == "forward":
        assert_bitwise(*found)
    else:  # the first pass fitted and ran at the larger size, hence differs by rounding
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)


def test_what_an_out_of_memory_taught_is_kept_for_this_model() -> None:
    batch, model = make_batch(), llada()
    limit = Limit(model, 2, "backward")
    by_bgpo(model, batch)
    limit.tried.clear()
    by_bgpo(model, batch)
    by_elbo(model, batch)
    assert set(limit.tried) == {2}
    other = llada()
    unlimited = Limit(other, N, "backward")
    by_bgpo(other, batch)
    assert set(unlimited.tried) == {N}


@every_call
@in_both_directions
def test_explicit_size_is_kept_and_advice_given(model: nn.Module, call: Call, where: str) -> None:
    limit = Limit(model, 2, where)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate(.|\n)*micro_batch_tokens=40 do not fit"):
        call(model, make_batch(), micro_batch_tokens=4 * TOKENS)
    assert set(limit.tried) == {4}


@every_call
@in_both_directions
def test_one_sample_that_does_not_fit(model: nn.Module, call: Call, where: str) -> None:
    limit = Limit(model, 0, where)
    with pytest.raises(torch.OutOfMemoryError, match=r"one sample of 10 tokens does not fit; use gradient checkp"):
        call(model, make_batch())
    assert limit.tried == [8, 4, 2, 1]


@two_passes
def test_dropout_pins_the_micro_batches_of_the_second_pass(call: Call) -> None:
    """Smaller ones would draw other dropout than the numbers that were differentiated."""
    model, batch = bert(hidden_dropout_prob=0.2).train(), make_batch()

    def limit(_module: nn.Module, _in: Any, out: tuple[Tensor, ...]) -> None:
        if len(out[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.bert.encoder.layer[0].output.register_full_backward_hook(limit)
    with pytest.raises(torch.OutOfMemoryError, match="the next call begins with them"):
        call(model, batch)
    assert take_gradients(model) == {}
    call(model, batch)
    assert take_gradients(model)
