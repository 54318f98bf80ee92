"""Whole calls on a GPU: gradients against plain torch, failures, autocast, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine import CUDA, DEVICE, KERNELS, new_draw, randn, size
from models_zoo import (
    MASK,
    Batch,
    Plain,
    assert_bitwise,
    assert_same_gradients,
    bert,
    llada,
    make_batch,
    perturbed,
    plain_bgpo,
    plain_scores,
    take_gradients,
)
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.head import ops as head_ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
DRAWING: dict[str, Any] = {"n_mc": 6, "seed": 41, "mask_token_id": MASK}


def on_device(sequences: int = 3) -> Batch:
    return Batch(*(t.to(DEVICE) for t in make_batch(sequences)))


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("build", [bert, llada], ids=["bert", "llada"])
@pytest.mark.parametrize("backend", KERNELS)
def test_bgpo_backward_against_plain_torch(build: Callable[..., nn.Module], backend: str, off_policy: bool) -> None:
    """fp64: the gradients are those of the paper's loss with every graph kept."""
    model, batch = build(torch.float64), on_device()
    older = perturbed(copy.deepcopy(model)).to(DEVICE)  # on the CPU, whose generator `perturbed` uses
    model = model.to(DEVICE)
    drawn = bk.random_mask(*batch[:2], **DRAWING)
    with torch.no_grad():
        old = plain_scores(older, batch.ids, batch.response, drawn) if off_policy else None
    options = {"clip_range": 0.2, "dual_clip": 3.0} if off_policy else {}
    bk.bgpo_backward(model, *batch, old_logprob=old, backend=backend, **options, **DRAWING)
    ours = take_gradients(model)
    clip = {"clip": (0.2, 0.2), "dual": 3.0} if off_policy else {}
    scores = plain_scores(model, batch.ids, batch.response, drawn)
    plain_bgpo(scores, batch.advantages.double(), old=old, length=batch.length, **clip).backward()
    assert_same_gradients(ours, take_gradients(model))


@pytest.mark.parametrize("where", ["out", "embed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("backend", KERNELS)
def test_non_finite_weights_leave_gradients_alone(backend: str, value: float, where: str) -> None:
    model, batch = Plain().to(DEVICE), on_device()
    bk.models.assume_bidirectional(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        getattr(model, where).weight[int(batch.ids[0, 0]), 0] = value
    calls: dict[str, Callable[[], object]] = {
        "bgpo": lambda: bk.bgpo_backward(model, *batch, head=model.out, backend=backend, **DRAWING),
        "replay": lambda: bk.replay_backward(
            model, *batch[:2], Tensor.sum, head=model.out, backend=backend, **DRAWING
        ),
    }  # fmt: skip
    for call in calls.values():
        with pytest.raises(FloatingPointError, match=r"nothing was added to \.grad"):
            call()
        assert_bitwise({name: p.grad for name, p in model.named_parameters()}, before)


# ------------------------------------------------------------------------------------------------ autocast, compile

VOCAB, WIDTH = size((5003, 256), (67, 16))


def gradients(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = call(*leaves)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def losses(backend: str) -> dict[str, Callable[..., Tensor]]:
    drawn = new_draw(vocab=VOCAB)
    advantages = torch.tensor([1.0, -0.5, 0.3], device=DEVICE)
    old = torch.full(drawn.count.shape, -20.0, device=DEVICE)
    length = torch.full((3,), 40.0, device=DEVICE)
    return {
        "masked_logprob": lambda h, w: bk.masked_logprob(h, w, drawn.targets, rows=drawn.rows, backend=backend).mean(),
        "bgpo_head_loss": lambda h, w: bk.bgpo_head_loss(
            h, w, drawn, advantages, old_logprob=old, length=length, backend=backend
        )[0],
    }


def head_inputs() -> tuple[Tensor, Tensor]:
    return randn(new_draw().noisy_ids.numel(), WIDTH), randn(VOCAB, WIDTH, scale=WIDTH**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", ["masked_logprob", "bgpo_head_loss"])
@pytest.mark.parametrize("backend", KERNELS)
def test_autocast(backend: str, function: str, dtype: torch.dtype) -> None:
    """fp32 parameters: GEMMs take 16-bit inputs; results and the gradients of parameters are fp32."""
    loss, inputs = losses(backend)[function], head_inputs()

    def under_autocast(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype):
            return loss(h, w)

    got = gradients(under_autocast, *inputs)
    exact = gradients(loss, *(x.to(dtype).double() for x in inputs))
    for name, g, e in zip(("loss", "hidden", "weight"), got, exact, strict=True):
        assert g.dtype == torch.float32
        error = float((g.double() - e).abs().max())
        assert error <= 4 * torch.finfo(dtype).eps * max(float(e.abs().max()), 1e-3), name


@pytest.mark.no_poison
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", ["head_statistics", "masked_logprob", "bgpo_head_loss"])
@pytest.mark.parametrize("backend", KERNELS)
def test_compile(backend: str, function: str, compiler: str) -> None:
    """The registered op in one graph; around the public calls, whose checks of the arguments may break it."""
    if compiler == "inductor" and not CUDA:
        pytest.skip("only on a GPU: a C++ compiler would run for half a minute")
    inputs, drawn = head_inputs(), new_draw(vocab=VOCAB)

    def statistics(h: Tensor, w: Tensor) -> Tensor:
        stats = head_ops.head_statistics(h, w, None, drawn.rows, drawn.targets, 1.0, 0.0, 0.8, True, backend)
        return stats[2].mean() + 0.1 * stats[3].mean()

    loss = statistics if function == "head_statistics" else losses(backend)[function]

    def wrapped(h: Tensor, w: Tensor) -> Tensor:
        return 2 * loss(h * 1.5, w)

    torch._dynamo.reset()
    got = gradients(torch.compile(wrapped, backend=compiler, fullgraph=function == "head_statistics"), *inputs)
    for g, e in zip(got, gradients(wrapped, *inputs), strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7)
