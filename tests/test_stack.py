"""What people put around and under a model: PEFT, accelerate, loss scaling, checkpointing, torch.compile, EMA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models_zoo import (
    DRAWING,
    Call,
    assert_bitwise,
    assert_same_gradients,
    bert,
    by_bgpo,
    by_elbo,
    by_torch,
    every_call,
    gradients_of,
    llada,
    make_batch,
    take_gradients,
)
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.head import engine


def by_rows(model: nn.Module, batch: Any, **options: Any) -> None:
    from models_zoo import loss_of

    draw = bk.random_mask(batch.ids, batch.response, **DRAWING)
    logp = bk.row_logprob(model, draw.noisy_ids.flatten(0, 1), draw.rows, draw.targets, **options)
    with torch.autocast("cpu", enabled=False):
        loss_of(batch)(draw.reduce(logp)).backward()


by_rows.__name__ = "rows"
four_calls = pytest.mark.parametrize("call", [*every_call.args[1], by_rows], ids=["bgpo", "replay", "elbo", "rows"])


def same_as_torch(call: Call, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Our gradients, which must be those of plain torch on the very same stack."""
    batch = make_batch()
    expected = gradients_of(by_torch, model, batch)
    found = gradients_of(call, model, batch, **options)
    assert_same_gradients(found, expected)
    return found


def score(model: nn.Module) -> Tensor:
    batch = make_batch()
    with torch.no_grad():
        return bk.elbo_logprob(model, batch.ids, batch.response, **DRAWING)


# ---------------------------------------------------------------------------------------------------------- PEFT

ATTENTION = ["q_proj", "v_proj"]


def adapted(base: nn.Module | None = None, **options: Any) -> Any:
    """llada in fp64 with LoRA matrices that do something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ATTENTION} | options)
    model = peft.get_peft_model(llada(torch.float64) if base is None else base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape))
    return model


@four_calls
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_adapters_in_the_backbone_and_a_frozen_head(call: Call, options: dict[str, Any]) -> None:
    found = same_as_torch(call, adapted(**options))
    assert found and all("lora_" in name for name in found)


@four_calls
def test_modules_to_save_trains_the_copy(call: Call) -> None:
    model = adapted(modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    assert bk.models.find_head(model).module is wrapper.modules_to_save["default"]
    found = same_as_torch(call, model)
    assert [name for name in found if "lm_head" in name] == ["base_model.model.lm_head.modules_to_save.default.weight"]


def test_modules_to_save_of_the_active_adapter() -> None:
    """Two adapters with a head each, and the original one while adapters are disabled."""
    peft = pytest.importorskip("peft")
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["lm_head"]))
    wrapper = model.base_model.model.lm_head
    with torch.no_grad():
        wrapper.modules_to_save["other"].weight.mul_(2)
        wrapper.modules_to_save["default"].weight.mul_(3)
    scores = {"default": score(model)}
    model.set_adapter("other")
    assert bk.models.find_head(model).module is wrapper.modules_to_save["other"]
    scores["other"] = score(model)
    with model.disable_adapter():
        assert bk.models.find_head(model).module is wrapper.original_module
        scores["none"] = score(model)
    torch.testing.assert_close(scores["none"], score(llada(torch.float64)), rtol=1e-12, atol=0)
    assert len({float(s[0]) for s in scores.values()}) == 3


def test_disabled_adapters_are_the_reference_model() -> None:
    model = adapted()
    with model.disable_adapter():
        reference = score(model)
    assert torch.equal(reference, score(llada(torch.float64)))
    assert not torch.equal(reference, score(model))


def test_merged_adapters() -> None:
    model = adapted()
    separate = score(model)
    torch.testing.assert_close(score(model.merge_and_unload()), separate, rtol=1e-10, atol=0)


def test_lora_on_the_head_is_refused_with_the_way_out() -> None:
    model = adapted(target_modules=[*ATTENTION, "lm_head"])
    for call in (by_bgpo, by_elbo, by_rows):
        with pytest.raises(ValueError, match=r"wrapped by an adapter.*modules_to_save=\['lm_head'\]"):
            call(model, make_batch())
    assert take_gradients(model) == {}


def test_lora_on_the_head_while_it_is_disabled_or_merged() -> None:
    """Then the layer below is all of it."""
    model = adapted(target_modules=[*ATTENTION, "lm_head"])
    with model.disable_adapter():
        assert torch.equal(score(model), score(llada(torch.float64)))
    model.merge_adapter()
    batch = make_batch()
    draw = bk.random_mask(batch.ids, batch.response, **DRAWING)
    with torch.no_grad():
        from models_zoo import plain_scores

        expected = plain_scores(model, batch.ids, batch.response, draw).mean(-1)
    torch.testing.assert_close(score(model), expected, rtol=1e-10, atol=0)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        score(model)


# ------------------------------------------------------------------------------------------------- quantised bases


class Int4Linear(nn.Module):
    """A quantised layer in the way of bitsandbytes: packed codes and a scale, multiplied out in its forward."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        scale = plain.weight.abs().amax(1, keepdim=True) / 7
        codes = (plain.weight / scale).round().to(torch.int64) + 8
        self.weight = nn.Parameter((codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.weight // 16, self.weight % 16], -1).flatten(1).to(x.dtype) - 8
        return x @ (codes * self.scale).T


def quantised(head: bool) -> Any:
    model = llada(torch.float64)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and (head or name != "lm_head"):
                setattr(parent, name, Int4Linear(child))
    return model


@four_calls
def test_four_bit_base_with_its_head_left_out(call: Call) -> None:
    assert "lm_head.weight" in same_as_torch(call, quantised(head=False))


def test_quantised_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantised.*leave the head out of quantisation"):
        by_bgpo(quantised(head=True), make_batch())


@four_calls
def test_bitsandbytes_four_bit_base_with_lora(call: Call) -> None:
    """The real thing, where it is installed and has a CPU engine."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llada(hidden_size=64, intermediate_size=128)  # whole blocks of 64
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.load_state_dict({"weight": old.weight})
            # On a CPU of that kind the first forward in evaluation mode repacks the weight, which then cannot train.
            new.support_avx512bf16_for_cpu = False
            setattr(layer.mlp, name, new.to("cpu"))
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
    batch = make_batch()
    expected, found = gradients_of(by_torch, model, batch), gradients_of(call, model, batch)
    assert found.keys() == expected.keys() and any("lora_" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------- accelerate, loss scaling


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The package, with its settings, which are global, forgotten afterwards."""
    package = pytest.importorskip("accelerate")
    yield package
    package.state.AcceleratorState._reset_state(True)


@four_calls
def test_accelerate_in_bf16(call: Call, accelerate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare() runs forwards under autocast and turns what leaves the model into fp32; the head still sees bf16."""
    batch = make_batch()
    exact = gradients_of(by_torch, llada(torch.float64), batch)
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(llada())
    seen: list[torch.dtype] = []
    real = engine._Chunk.__init__
    monkeypatch.setattr(engine._Chunk, "__init__", lambda *a: (real(*a), seen.append(a[0].x.dtype))[0])
    call(model, batch)
    assert set(seen) == {torch.bfloat16}, "what the GEMMs of the head take"
    for name, gradient in take_gradients(model).items():
        assert gradient.dtype == torch.float32
        error = float((gradient.double() - exact[name]).norm() / exact[name].norm())
        assert error < 0.05, (name, error)


@every_call
def test_accelerate_accumulates(call: Call, accelerate: Any) -> None:
    """accumulate() is no_sync and a counter; what is summed over the calls is summed by the normaliser."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(llada())
    for _ in range(2):
        with accelerator.accumulate(model):
            call(model, make_batch())
    found = take_gradients(model)
    single = gradients_of(call, llada(), make_batch())
    assert_bitwise(found, {name: 2 * g for name, g in single.items()})
    assert accelerator.sync_gradients


def test_gradient_scaler() -> None:
    """The scale goes onto the advantages, of which the gradient is a multiple; an overflow is an exception, and then
    the caller lowers the scale."""
    batch = make_batch()
    model, plain = llada(), llada()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for step in range(2):
        handle = (
            model.model.norm.register_full_backward_hook(lambda _m, g, _o: (g[0] * torch.inf,)) if not step else None
        )
        try:
            by_bgpo(model, batch._replace(advantages=scaler.scale(batch.advantages)))
            scaler.step(optimizer)
            scaler.update()
        except FloatingPointError:
            scaler.update(scaler.get_scale() / 2)
        if handle is not None:
            handle.remove()
            assert take_gradients(model) == {}
    assert scaler.get_scale() == 2.0**13
    by_bgpo(plain, batch)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# --------------------------------------------------------------------------------- checkpointing, compile, averages


@four_calls
def test_gradient_checkpointing(call: Call) -> None:
    model = llada(torch.float64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same_as_torch(call, model)


def test_reentrant_checkpointing_does_not_pass_silently() -> None:
    """Of layers: bgpo and replay run it as torch does; what is differentiated by autograd.grad is refused by torch."""
    model = llada(torch.float64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    same_as_torch(by_bgpo, model)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        by_elbo(model, make_batch())


BACKENDS = ["eager", "aot_eager"]


@pytest.mark.no_poison
@pytest.mark.parametrize("call", [by_bgpo, by_elbo, by_rows], ids=["bgpo", "elbo", "rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layers(call: Call, backend: str) -> None:
    model = llada(torch.float64)
    expected = gradients_of(by_torch, model, make_batch())
    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert_same_gradients(gradients_of(call, model, make_batch()), expected)
    torch._dynamo.reset()


@pytest.mark.no_poison
@every_call
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_as_a_whole(call: Call, backend: str) -> None:
    plain = llada(torch.float64)
    expected = gradients_of(by_torch, plain, make_batch())
    model = torch.compile(plain, backend=backend)
    for _ in range(2):
        found = gradients_of(call, model, make_batch())
        assert_same_gradients({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)
    torch._dynamo.reset()


def test_averaged_model() -> None:
    """An EMA of the policy as the reference: seen through, and following the policy."""
    model = bert(torch.float64)  # llada's layers in fp64 are patched, and a copy's would be those of the original
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    start = score(model)
    assert torch.equal(score(ema), start)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    ema.update_parameters(model)
    moved, followed = score(model), score(ema)
    assert not torch.equal(followed, start) and not torch.equal(followed, moved)
    average = bert(torch.float64)
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(0.5 + 0.5 * 1.05)
    torch.testing.assert_close(followed, score(average), rtol=1e-10, atol=0)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: copy.deepcopy(m).requires_grad_(False)])
def test_copied_reference_model(make: Callable[[Any], Any]) -> None:
    """Made after a call, so that whatever a call leaves on a model is copied too."""
    model, batch = bert(torch.float64), make_batch()
    expected = gradients_of(by_bgpo, model, batch)
    reference = make(model)
    before = score(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert torch.equal(score(reference), before)
    assert not torch.equal(score(model), before)
    if next(reference.parameters()).requires_grad:
        assert_bitwise(gradients_of(by_bgpo, reference, batch), expected)


def test_weights_changed_between_score_and_backward_are_noticed() -> None:
    """An EMA update of the policy itself between a call and its backward."""
    model, batch = llada(), make_batch()
    scores = bk.elbo_logprob(model, batch.ids, batch.response, **DRAWING)
    with torch.no_grad():
        model.lm_head.weight.lerp_(torch.zeros_like(model.lm_head.weight), 0.1)
    with pytest.raises(RuntimeError, match="modified in place between elbo_logprob and the backward"):
        scores.sum().backward()
    assert take_gradients(model) == {}
