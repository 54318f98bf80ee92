"""Finding heads, and standing in for them: every refusal, every convention, nothing left behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bgpo_kernels import models
from bgpo_kernels.models import HeadSpec, capture_head, find_head, forward_kwargs, register, unwrap

V, H = 13, 6
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


class Toy(nn.Module):
    """Embedding, one mixing layer, head; `after` is what the model does to its logits."""

    def __init__(self, head: nn.Module | None = None, after: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.mix = nn.Linear(H, H)
        self.out = head if head is not None else nn.Linear(H, V)
        self.after = after

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.mix(x) + x.mean(dim=1, keepdim=True)

    def forward(self, input_ids: Tensor) -> Any:
        return self.after(self.out(self.hidden(input_ids)))


class Found(Toy):
    """A toy in the way of transformers: the head is asked for, options are on the config."""

    def __init__(self, head: nn.Module | None = None, **config: Any) -> None:
        super().__init__(head)
        self.config = SimpleNamespace(**config)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


@pytest.fixture(autouse=True)
def _adapters_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.heads, "_adapters", dict(models.heads._adapters))


# ---------------------------------------------------------------------------------------------------- finding


def test_explicit_head_then_adapter_then_output_embeddings() -> None:
    model = Found()
    other = nn.Linear(H, V)
    assert find_head(model) == HeadSpec(model.out)
    register("Toy", lambda m: HeadSpec(m.out, logit_scale=0.5, shift=1))
    assert find_head(model) == HeadSpec(model.out, logit_scale=0.5, shift=1), "adapters reach derived classes"
    register("Found", lambda m: HeadSpec(m.out, softcap=2.0))
    assert find_head(model) == HeadSpec(model.out, softcap=2.0), "the most derived class decides"
    assert find_head(model, other) == HeadSpec(other, softcap=2.0), "a module says where, the adapter says how"
    assert find_head(model, HeadSpec(other)) == HeadSpec(other)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({"logit_scale": 0.25}, 0.25, None),
        ({"logits_scaling": 8.0}, 0.125, None),
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"scale_logits": True, "d_model": 64}, 0.125, None),
        ({"scale_logits": False, "d_model": 64}, 1.0, None),
        ({"logit_scale": None, "final_logit_softcapping": None}, 1.0, None),
        ({"get_text_config": lambda: SimpleNamespace(final_logit_softcapping=5.0)}, 1.0, 5.0),
    ],
)
def test_conventions_are_read_from_the_config(config: dict[str, Any], scale: float, softcap: float | None) -> None:
    model = Found(**config)
    assert find_head(model) == HeadSpec(model.out, logit_scale=scale, softcap=softcap)
    assert find_head(model, model.out) == HeadSpec(model.out, logit_scale=scale, softcap=softcap)


def test_dream_predicts_the_next_token_and_llada_hides_its_head() -> None:
    class DreamModel(Found):
        pass

    class DiffuCoder(DreamModel):
        pass

    class LLaDAModelLM(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.transformer = nn.ModuleDict({"wte": nn.Embedding(V, H), "ff_out": head})

        def get_output_embeddings(self) -> None:
            return None

    dream, coder, llada = DreamModel(), DiffuCoder(), LLaDAModelLM(nn.Linear(H, V, bias=False))
    assert find_head(dream) == HeadSpec(dream.out, shift=1)
    assert find_head(coder) == HeadSpec(coder.out, shift=1)
    assert find_head(llada) == HeadSpec(llada.model.transformer["ff_out"])
    with pytest.raises(ValueError, match=r"Embedding, is not a plain torch\.nn\.Linear"):
        find_head(LLaDAModelLM(nn.Embedding(V, H)))  # what its tie_weights leaves behind


@pytest.mark.no_poison
def test_wrappers_are_seen_through() -> None:
    class PeftModel(nn.Module):  # the shape of peft's class of that name
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = inner

        def get_base_model(self) -> nn.Module:
            return self.base_model.model

    model = Found(logit_scale=0.5)
    compiled = torch.compile(nn.DataParallel(torch.compile(model, backend="eager")), backend="eager")
    assert unwrap(compiled) is model
    assert unwrap(model) is model
    for wrapped in (compiled, PeftModel(model), nn.DataParallel(PeftModel(compiled))):
        assert find_head(wrapped) == HeadSpec(model.out, logit_scale=0.5)
    assert find_head(model, torch.compile(model.out, backend="eager")).module is model.out


# ---------------------------------------------------------------------------------------------------- refusals


class LoraLinear(nn.Module):
    """The shape of an adapter layer: `weight` passes through to the frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(H, V)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class ModulesToSaveWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(V, H))


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class StillLinear(nn.Linear):
    pass


class Wrapped(Tensor):
    """The shape of a torchao weight: it calls itself float32 and is something else."""


def _with_weight(weight: Tensor) -> nn.Linear:
    head = nn.Linear(H, V)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def _patched() -> nn.Linear:
    head = nn.Linear(H, V)
    head.forward = lambda input: input  # type: ignore[method-assign]
    return head


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (LoraLinear(), "LoraLinear, is wrapped by an adapter"),
        (ModulesToSaveWrapper(), "ModulesToSaveWrapper, is wrapped by an adapter"),
        (_with_weight(torch.zeros(V, H, dtype=torch.int8)), "quantised .* torch.int8"),
        (_with_weight(torch.zeros(V, H).to(torch.float8_e4m3fn)), "quantised .* torch.float8_e4m3fn"),
        (_with_weight(torch.zeros(V, H).as_subclass(Wrapped)), "quantised .* Wrapped of torch.float32"),
        (nn.Sequential(nn.Linear(H, V)), "has no weight tensor.* pass head=HeadSpec"),
    ],
)
def test_heads_whose_weight_is_not_the_whole_truth(head: nn.Module, message: str) -> None:
    for given in (None, head, HeadSpec(head)):
        with pytest.raises(ValueError, match=message):
            find_head(Found(head), given)


@pytest.mark.parametrize("head", [ScaledLinear(H, V), nn.Embedding(V, H), _patched()])
def test_heads_that_only_a_head_spec_can_vouch_for(head: nn.Module) -> None:
    model = Found(head)
    for given in (None, head):
        with pytest.raises(ValueError, match=r"is unknown: pass head=HeadSpec\(module, \.\.\.\) or register"):
            find_head(model, given)
    assert find_head(model, HeadSpec(head)).module is head
    register("Found", lambda m: HeadSpec(m.out))
    assert find_head(model).module is head


def test_plain_subclasses_and_odd_vocabularies_are_fine() -> None:
    head = StillLinear(H, V + 3, bias=False)
    assert find_head(Found(head)).module is head


def test_missing_head_and_wrong_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"Toy has no get_output_embeddings\(\).* register"):
        find_head(Toy())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        find_head(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"head must be a torch\.nn\.Module or a HeadSpec, got Tensor"):
        find_head(Toy(), torch.zeros(V, H))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_scale of Found is 'inv_sqrt_d_model', not a number"):
        find_head(Found(logit_scale="inv_sqrt_d_model"))
    register("Found", lambda m: m.out)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="adapter of Found must return a HeadSpec, got Linear"):
        find_head(Found())
    with pytest.raises(TypeError, match="model_class_name must be a str, got type"):
        register(Toy, HeadSpec)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter must be callable, got NoneType"):
        register("Toy", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale must be finite and not 0, got 0.0"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite"),
        ({"softcap": 0.0}, "softcap must be None or positive"),
        ({"shift": 2}, "shift must be 0 or 1, got 2"),
    ],
)
def test_head_spec_checks_its_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSpec(nn.Linear(H, V), **options)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        HeadSpec("lm_head")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- standing in


def _log_prob(head: nn.Module, hidden: Tensor) -> Tensor:
    """What a fused op computes: a scalar from hidden states and the head's own parameters."""
    assert isinstance(head, nn.Linear)
    return F.log_softmax(F.linear(hidden, head.weight, head.bias), dim=-1)[..., 3].sum()


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_and_gradients_are_those_of_the_dense_model(tied: bool) -> None:
    model = Toy(after=lambda logits: SimpleNamespace(logits=logits.float()[:, -2:] * 2))
    if tied:
        model.out.weight = model.embed.weight
    F.log_softmax(model.out(model.hidden(IDS)), dim=-1)[..., 3].sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seen = []

    def consume(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return _log_prob(model.out, hidden)

    with capture_head(model, HeadSpec(model.out), consume) as capture:
        output = model(IDS)
    assert output.logits.shape == (2, 2, 1), "the model's own code ran on a placeholder"
    assert capture.calls == 1 and torch.equal(seen[0], model.hidden(IDS))
    capture.value.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name])


def test_in_place_code_after_the_head_leaves_the_hidden_states_alone() -> None:
    model = Toy(after=lambda logits: logits.mul_(0.0))
    with capture_head(model, HeadSpec(model.out), lambda hidden: hidden) as capture:
        model(IDS)
    assert torch.equal(capture.value, model.hidden(IDS))


def test_nothing_of_a_micro_batch_waits_for_the_garbage_collector() -> None:
    model = Toy()
    gc.collect()
    gc.disable()
    try:
        with capture_head(model, HeadSpec(model.out), lambda hidden: hidden) as capture:
            model(IDS)
        hidden = weakref.ref(capture.value)
        assert hidden() is not None
        del capture
        assert hidden() is None
    finally:
        gc.enable()


def _is_untouched(head: nn.Module) -> bool:
    return "forward" not in vars(head) and not head._forward_hooks


@pytest.mark.parametrize("where", ["consume", "model", "body"])
def test_exceptions_restore_the_head(where: str) -> None:
    def fail(_: Any) -> Any:
        raise KeyError(where)

    model = Toy(after=fail if where == "model" else lambda logits: logits)
    with (
        pytest.raises(KeyError, match=where),
        capture_head(model, HeadSpec(model.out), fail if where == "consume" else lambda h: None),
    ):
        model(IDS)
        fail(None)
    assert _is_untouched(model.out)


def test_consume_may_use_the_real_head_and_contexts_nest() -> None:
    model = Toy()
    spec = HeadSpec(model.out)
    dense = model(IDS)

    def outer(hidden: Tensor) -> tuple[Tensor, Tensor]:
        with capture_head(model, spec, lambda h: h + 1) as inner:
            model(IDS)
        return inner.value, spec.module(hidden)

    with capture_head(model, spec, outer) as capture:
        assert model(IDS).shape == (2, 4, 1)
    inner_value, logits = capture.value
    assert torch.equal(inner_value, model.hidden(IDS) + 1)
    assert torch.equal(logits, dense)
    assert capture.calls == 1 and _is_untouched(model.out) and torch.equal(model(IDS), dense)


def test_a_head_not_called_or_called_twice_is_an_error() -> None:
    class Functional(Toy):
        def forward(self, input_ids: Tensor) -> Tensor:
            return F.linear(self.hidden(input_ids), self.out.weight)

    for model, times, message in [
        (Functional(), 1, "Functional did not call the head that was found, a Linear: a tied weight"),
        (Toy(), 0, "Toy did not call the head"),
        (Toy(), 2, "Toy called its head twice"),
    ]:
        with (
            pytest.raises(RuntimeError, match=message),
            capture_head(model, HeadSpec(model.out), lambda hidden: None),
        ):
            for _ in range(times):
                model(IDS)
        assert _is_untouched(model.out)


def test_wrong_width_is_named() -> None:
    model = Toy(head=nn.Linear(H, V))
    model.out.weight = nn.Parameter(torch.zeros(V, H + 1))
    with (
        pytest.raises(ValueError, match=r"weight is \[13, 7\] but the hidden states are \[2, 4, 6\]"),
        capture_head(model, HeadSpec(model.out), lambda hidden: None),
    ):
        model(IDS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_around_the_model(reentrant: bool) -> None:
    """The recomputation calls the head again, during the backward pass: served, and the gradients are right."""
    model = Toy()
    hidden = model.hidden(IDS)
    want = torch.autograd.grad(_log_prob(model.out, hidden), [model.embed.weight, model.out.weight])
    entry = torch.ones((), requires_grad=True)  # reentrant checkpoints need an input with a gradient

    def step(scale: Tensor) -> Tensor:
        model(IDS)
        return capture.value * scale

    with capture_head(model, HeadSpec(model.out), lambda h: _log_prob(model.out, h)) as capture:
        checkpoint(step, entry, use_reentrant=reentrant).backward()
    assert capture.calls == 2 and _is_untouched(model.out)
    torch.testing.assert_close(model.embed.weight.grad, want[0])
    torch.testing.assert_close(model.out.weight.grad, want[1])


def test_offloaded_head_keeps_the_forward_that_brings_its_weight() -> None:
    """accelerate's hook: an instance forward that fetches the weight, then calls `_old_forward`."""
    model = Toy(after=lambda logits: logits)
    head, events = model.out, []
    head._hf_hook, head._old_forward = object(), head.forward
    offloaded = head.forward = lambda *args: (events.append("fetch"), head._old_forward(*args))[1]
    assert find_head(model, head) == HeadSpec(head)
    before = head._old_forward
    with capture_head(model, HeadSpec(head), lambda hidden: events.append("op")):
        model(IDS)
    assert events == ["fetch", "op"]
    assert head.forward is offloaded and head._old_forward is before


@pytest.mark.no_poison
def test_compiled_model_is_captured_again_and_again() -> None:
    torch._dynamo.reset()
    model = Toy()
    compiled = torch.compile(model, backend="eager")
    dense = compiled(IDS)
    for i in range(3):
        with capture_head(compiled, HeadSpec(model.out), lambda hidden, i=i: hidden + i) as capture:
            assert compiled(IDS).shape == (2, 4, 1)
        torch.testing.assert_close(capture.value, model.hidden(IDS) + i)
    torch.testing.assert_close(compiled(IDS), dense)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- sharding


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on CPUs")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # about views of layers before the head
@pytest.mark.parametrize("units", ["root alone", "head apart", "root resharded"])
def test_fsdp2_gathers_the_weight_for_forward_and_backward(mesh: Any, units: str) -> None:
    """In each layout the weight is gone after the forward, or its gradient is reduced only by the unit's own hooks."""
    from torch.distributed.fsdp import fully_shard

    model = Found()
    _log_prob(model.out, model.hidden(IDS)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if units == "head apart":
        fully_shard(model.out, mesh=mesh, reshard_after_forward=True)
    if units == "root resharded":
        fully_shard(model.mix, mesh=mesh)
    fully_shard(model, mesh=mesh, **({"reshard_after_forward": True} if units == "root resharded" else {}))
    spec = find_head(model)
    with capture_head(model, spec, lambda hidden: _log_prob(spec.module, hidden)) as capture:
        assert model(IDS).shape == (2, 4, 1)
    capture.value.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), want[name])


def test_a_dtensor_that_is_not_cut_over_the_vocabulary_is_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Found()
    model.out.weight = nn.Parameter(distribute_tensor(model.out.weight.data, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"the weight of the head of Found, .* is a DTensor with .*over its rows"):
        find_head(model)
    with (
        pytest.raises(ValueError, match=r"weight is a DTensor with .*over its rows"),
        capture_head(model, HeadSpec(model.out), lambda hidden: None),
    ):
        model(IDS)


# ---------------------------------------------------------------------------------------------------- forward_kwargs


def test_forward_kwargs_names_use_cache_only_where_it_is_taken() -> None:
    class Named(Found):
        def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Tensor:
            return super().forward(input_ids)

    class PassedOn(Found):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(input_ids)

    off = {"use_cache": False}
    assert forward_kwargs(Named()) == forward_kwargs(nn.DataParallel(Named())) == off
    assert forward_kwargs(Toy()) == forward_kwargs(PassedOn()) == forward_kwargs(PassedOn(use_cache=False)) == {}
    assert forward_kwargs(PassedOn(use_cache=True)) == off


def test_import_needs_neither_transformers_nor_peft() -> None:
    code = "import sys, bgpo_kernels.models; print([m for m in ('transformers', 'peft') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_registration_in_the_package_docstring_runs() -> None:
    lines = [line[4:] for line in models.__doc__.splitlines() if line.startswith("    ")]
    code = "\n".join(lines).replace("import bgpo_kernels as bk", "import bgpo_kernels; from bgpo_kernels import models")
    assert 10 <= len([line for line in lines if line]) <= 13
    names: dict[str, Any] = {}
    exec(code.replace("bk.models", "models"), names)
    model = names["MyDiffusionLM"]()
    model.decoder = nn.Module()
    model.decoder.out = nn.Linear(H, V)
    assert find_head(model) == HeadSpec(model.decoder.out, logit_scale=0.5)
