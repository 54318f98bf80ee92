"""Parameters with an fp32 ``main_grad``: the head's gradient goes there unrounded, all of it or none."""

from __future__ import annotations

import pytest
import torch
from head_cases import make_draw
from models_zoo import Plain, by_bgpo, by_replay, make_batch
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.estimators import head_pass
from bgpo_kernels.head.engine import Gradients

both_calls = pytest.mark.parametrize("call", [by_bgpo, by_replay], ids=["bgpo", "replay"])


def with_main_grad(weight: nn.Parameter, value: float = 0.0) -> Tensor:
    weight.main_grad = torch.full(weight.shape, value)  # type: ignore[attr-defined]
    return weight.main_grad  # type: ignore[attr-defined]


@both_calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [0.0, 2.0], ids=["zeros", "holds something"])
def test_a_call_adds_to_it(call, dtype: torch.dtype, before: float) -> None:
    """What an fp32 .grad would get of the same bf16 products; every other parameter is as ever."""
    batch, plain, model = make_batch(), Plain(dtype), Plain(dtype)
    call(plain, batch, head=plain.out, micro_batch_tokens=20)
    main = with_main_grad(model.out.weight, before)
    call(model, batch, head=model.out, micro_batch_tokens=20)
    assert model.out.weight.grad is None and model.out.weight.main_grad is main
    narrow = (main - before).to(dtype)
    if before == 0.0:
        assert torch.equal(narrow, plain.out.weight.grad)
    else:
        torch.testing.assert_close(main - before, plain.out.weight.grad.float(), rtol=2**-7, atol=1e-5)
    for name in ("embed.weight", "mix.weight", "out.bias"):
        assert torch.equal(model.get_parameter(name).grad, plain.get_parameter(name).grad), name


@both_calls
def test_bf16_micro_batches_add_up_in_fp32(call) -> None:
    """More digits than a bf16 gradient has, and those of the fp64 model."""
    batch, exact = make_batch(), Plain(torch.float64)
    model = Plain(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    call(exact, batch, head=exact.out, micro_batch_tokens=1)
    main = with_main_grad(model.out.weight)
    call(model, batch, head=model.out, micro_batch_tokens=1)
    assert not torch.equal(main, main.bfloat16().float())
    torch.testing.assert_close(main.double(), exact.out.weight.grad, rtol=0.05, atol=0.02)


@both_calls
@pytest.mark.parametrize("before", [0.0, 2.0], ids=["zeros", "holds something"])
def test_a_failure_leaves_it_as_it_was(call, before: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = make_batch(), Plain()
    main = with_main_grad(model.out.weight, before)
    real, calls = head_pass.one_pass, []

    def breaking(*arguments: object) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(head_pass, "one_pass", breaking)
    with pytest.raises(KeyboardInterrupt):
        call(model, batch, head=model.out, micro_batch_tokens=20)
    assert (main == before).all() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("before", [0.0, 2.0], ids=["zeros", "holds something"])
def test_a_non_finite_gradient_never_reaches_it(before: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities finite, dW not: the hidden states of one row overflow its product alone."""
    batch, model = make_batch(), Plain()
    main = with_main_grad(model.out.weight, before)
    real = Gradients.add_weight

    def poisoned(self: Gradients, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        self.weight[0, 0] = torch.inf

    monkeypatch.setattr(Gradients, "add_weight", poisoned)
    with pytest.raises(FloatingPointError, match="non-finite gradient"):
        by_bgpo(model, batch, head=model.out)
    assert (main == before).all() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("upstream", [1.0, -0.5])
def test_bgpo_head_loss_adds_to_it_in_backward(upstream: float, backend: str) -> None:
    draw = make_draw([[3, 1, 2], [2, 3, 0]], vocab=50)
    hidden, weight = torch.randn(72, 8).bfloat16().requires_grad_(), nn.Parameter(torch.randn(50, 8).bfloat16())
    plain = nn.Parameter(weight.detach().clone())
    advantages = torch.tensor([1.0, -2.0])
    if backend == "triton":
        pytest.importorskip("triton")
    (upstream * bk.bgpo_head_loss(hidden.detach(), plain, draw, advantages, backend=backend)[0]).backward()
    main = with_main_grad(weight)
    (upstream * bk.bgpo_head_loss(hidden, weight, draw, advantages, backend=backend)[0]).backward()
    assert weight.grad is None and hidden.grad is not None
    assert torch.equal(main.bfloat16(), plain.grad)
    once = main.clone()
    (upstream * bk.bgpo_head_loss(hidden, weight, draw, advantages, backend=backend)[0]).backward()
    torch.testing.assert_close(main, 2 * once)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(50, 8, dtype=torch.bfloat16), "a string", None], ids=str)
def test_something_else_of_that_name_is_left_alone(wrong: object) -> None:
    draw = make_draw([[3, 1]], vocab=50)
    weight = nn.Parameter(torch.randn(50, 8))
    weight.main_grad = wrong  # type: ignore[attr-defined]
    bk.bgpo_head_loss(torch.randn(24, 8), weight, draw, torch.ones(1))[0].backward()
    assert weight.grad is not None and weight.main_grad is wrong
