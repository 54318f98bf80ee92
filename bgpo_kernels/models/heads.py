"""The vocabulary head of a model: finding it, and standing in for it.

A fused op needs the hidden states the head receives and the head's weight; the logits [.., V] must never exist.
`find_head` says which module makes the logits and what the model does to them afterwards; `capture_head` replaces that
module's forward for one call of the model, so that the model's own forward (embedding, masks, dtype casts, sharding,
offloading hooks) stays the one way hidden states are made.

The op runs *inside* the head's own forward because FSDP and ZeRO-3 gather the weight only there. What the op returns
leaves through the forward hooks of the head and of every FSDP2 module around it, which is where these arrange to
gather the weight again for the backward pass and to reduce its gradient after it. The cost beyond the op is one
[.., 1] placeholder.

A model compiled as a whole (`torch.compile(model)`) works: the graph breaks at the head, and only there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from numbers import Real
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..head.parallel import is_dtensor, local_parts, shard_of
from .known_models import ModelSpec, config_integer, lookup, remember

_PASS_A_SPEC = "pass head=HeadSpec(module, ...) or register an adapter with bgpo_kernels.models.register"


@dataclass(frozen=True)
class HeadSpec:
    """The head and its conventions: logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    Raises TypeError unless `module` is a Module with a `weight`, ValueError for options outside their range.
    """

    module: nn.Module  # .weight [V, H], perhaps .bias [V]; its forward(hidden [.., H]) would make the logits [.., V]
    logit_scale: float = 1.0  # multiplies the logits, after the bias
    softcap: float | None = None  # c: logits become c * tanh(logits / c), after the scale
    shift: int = 0  # 1: row i-1 predicts token i (Dream); 0: row i predicts token i
    tp_group: Any = None  # a ProcessGroup over whose ranks weight and bias are cut alike (Megatron); not for DTensors

    @property
    def vocab_size(self) -> int:
        """V, over all ranks."""
        weight: Any = self.module.weight
        shard = local_parts(None, weight, None, self.tp_group)[3] if self.tp_group is not None else None
        if shard is not None:
            return shard.total
        whole = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 and FSDP1 leave the weight no shape of its own
        return int(whole[0] if len(whole) == 2 else getattr(self.module, "out_features", 0))

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"HeadSpec.module must be a torch.nn.Module, got {type(self.module).__name__}")
        if not math.isfinite(self.logit_scale) or self.logit_scale == 0:
            raise ValueError(f"HeadSpec.logit_scale must be finite and not 0, got {self.logit_scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"HeadSpec.softcap must be None or positive and finite, got {self.softcap}")
        if self.shift not in (0, 1):
            raise ValueError(f"HeadSpec.shift must be 0 or 1, got {self.shift}")


Adapter = Callable[[nn.Module], HeadSpec]
_adapters: dict[str, Adapter] = {}


def register(model_class_name: str, adapter: Adapter, model_spec: ModelSpec | None = None) -> None:
    """Make a kind of model known: `adapter(model)` returns the HeadSpec of models of this class or derived from it.

    The name is matched against the names of the classes in `type(model).__mro__`, most derived first; no import of the
    model's code is needed. Registering a name again replaces its adapter, and with `model_spec` what else is known of
    it: mask id, attention, block length. Raises TypeError for wrong types.
    """
    if not isinstance(model_class_name, str):
        raise TypeError(f"model_class_name must be a str, got {type(model_class_name).__name__}")
    if not callable(adapter):
        raise TypeError(f"adapter must be callable, got {type(adapter).__name__}")
    if model_spec is not None and not isinstance(model_spec, ModelSpec):
        raise TypeError(f"model_spec must be a ModelSpec, got {type(model_spec).__name__}")
    _adapters[model_class_name] = adapter
    if model_spec is not None:
        remember(model_class_name, model_spec)


# Wrappers by class name, so that none of the libraries is imported. The first four only forward the call; the others
# take part in it (gathering weights, injected adapters), so a model is *called* through them and *inspected* below.
_CALL_WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "DistributedDataParallel": attrgetter("module"),
    "DataParallel": attrgetter("module"),
    "OptimizedModule": attrgetter("_orig_mod"),  # torch.compile
    "AveragedModel": attrgetter("module"),  # torch.optim.swa_utils: averages of weights, EMA
}
_ALL_WRAPPERS = _CALL_WRAPPERS | {
    "FullyShardedDataParallel": attrgetter("module"),
    "DeepSpeedEngine": attrgetter("module"),
    "PeftModel": methodcaller("get_base_model"),
    "PeftMixedModel": methodcaller("get_base_model"),
}


def _class_names(value: object) -> list[str]:
    return [cls.__name__ for cls in type(value).__mro__]


def _peel(module: nn.Module, wrappers: dict[str, Callable[[Any], nn.Module]]) -> nn.Module:
    while (name := next((name for name in _class_names(module) if name in wrappers), None)) is not None:
        module = wrappers[name](module)
    return module


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, AveragedModel and torch.compile, in any nesting."""
    return _peel(model, _CALL_WRAPPERS)


def model_spec(model: nn.Module) -> ModelSpec:
    """What the table of known models says of `model`, wrapped or not; defaults for an unknown one."""
    return lookup(_peel(model, _ALL_WRAPPERS))


def default_mask_token_id(model: nn.Module) -> int | None:
    """The mask id that the model's config names, or else the table of known models, or else None."""
    named = config_integer(_peel(model, _ALL_WRAPPERS), "mask_token_id")
    return model_spec(model).mask_token_id if named is None else named


def default_block_length(model: nn.Module) -> int | None:
    """The block length that the model's config names, or else the table of known models, or else None."""
    named = config_integer(_peel(model, _ALL_WRAPPERS), "block_size", "block_length")
    return model_spec(model).block_length if named is None else named


def forward_kwargs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments every forward call should get: `use_cache=False` where the model would build a KV cache.

    A forward that names `use_cache` takes it; one with `**kwargs` takes it when the config asks for a cache (Granite
    MoE), since it must then reach the layers that way.
    """
    core = _peel(model, _ALL_WRAPPERS)
    parameters = inspect.signature(core.forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wants_cache = getattr(getattr(core, "config", None), "use_cache", False) is True
    return {"use_cache": False} if "use_cache" in parameters or (passes_on and wants_cache) else {}


def find_head(model: nn.Module, head: nn.Module | HeadSpec | None = None) -> HeadSpec:
    """The head of `model` and its conventions.

    A HeadSpec given as `head` is taken as it is; a module given as `head` replaces only where the head is. Otherwise
    a registered adapter decides, and otherwise `get_output_embeddings()` with the scale and cap from `model.config`:
    `final_logit_softcapping` (Gemma), `logit_scale` (Cohere), `logits_scaling` (Granite, divides), `scale_logits`
    (LLaDA, 1 / sqrt(d_model)). Nothing else is guessed; `assert_bidirectional` compares with what the model does.

    Raises TypeError for things that are not modules, and ValueError for: no head; a head that is not a plain
    `torch.nn.Linear` (unless a HeadSpec vouches for it); a head wrapped by an adapter (LoRA; not modules_to_save) or
    quantised, whose `weight` is not what its forward uses; a DTensor weight that is cut otherwise than over its rows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if head is not None and not isinstance(head, nn.Module | HeadSpec):
        raise TypeError(f"head must be a torch.nn.Module or a HeadSpec, got {type(head).__name__}")
    core = _peel(model, _ALL_WRAPPERS)
    adapter = next((_adapters[name] for name in _class_names(core) if name in _adapters), None)
    if isinstance(head, HeadSpec):
        spec = head
    elif adapter is not None:
        spec = adapter(core)
        if not isinstance(spec, HeadSpec):
            raise TypeError(f"the adapter of {type(core).__name__} must return a HeadSpec, got {type(spec).__name__}")
    else:
        spec = _spec_from_config(core, _output_embeddings(core) if head is None else head)
    if isinstance(head, nn.Module):
        spec = replace(spec, module=head)
    spec = replace(spec, module=_used_now(_peel(spec.module, _ALL_WRAPPERS)))
    vouched_for = isinstance(head, HeadSpec) or (adapter is not None and head is None)
    _refuse_unusable(core, spec.module, any_class=vouched_for)
    return spec


def _output_embeddings(core: nn.Module) -> nn.Module:
    getter = getattr(core, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    if not isinstance(found, nn.Linear):  # LLaDA's remote code keeps its head here, and ties it by F.linear otherwise
        transformer = getattr(getattr(core, "model", None), "transformer", None)
        if transformer is not None and getattr(getattr(core, "config", None), "weight_tying", None) is True:
            raise ValueError(
                f"{type(core).__name__} ties its head to the embedding (config.weight_tying) and makes its logits with "
                "F.linear, so there is no module to run our head in: untie the weights (set config.weight_tying=False "
                "and give model.transformer.ff_out its own copy) or use bgpo_kernels.models.load_native"
            )
        found = getattr(transformer, "ff_out", None) or found
    if found is None:
        raise ValueError(f"{type(core).__name__} has no get_output_embeddings() that returns a head: {_PASS_A_SPEC}")
    return found


def _spec_from_config(core: nn.Module, module: nn.Module) -> HeadSpec:
    config: Any = getattr(core, "config", None)
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()  # multimodal configs keep the language model's options one level down

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"config.{name} of {type(core).__name__} is {value!r}, not a number: {_PASS_A_SPEC}")
        return None if value is None else float(value)

    scale = 1.0 if (multiplier := number("logit_scale")) is None else multiplier
    scale /= 1.0 if (divisor := number("logits_scaling")) is None else divisor
    if getattr(config, "scale_logits", None) is True and (width := number("d_model")) is not None:
        scale /= math.sqrt(width)
    return HeadSpec(module, logit_scale=scale, softcap=number("final_logit_softcapping"))


def _dream(core: nn.Module) -> HeadSpec:
    return replace(_spec_from_config(core, _output_embeddings(core)), shift=1)


register("DreamModel", _dream)  # the remote code of Dream, Dream-Coder and DiffuCoder alike


_PEFT_WRAPPERS = {"BaseTunerLayer", "ModulesToSaveWrapper", "AuxiliaryTrainingWrapper"}


def _used_now(module: Any) -> nn.Module:
    """Of a head wrapped by PEFT, the plain module that its forward calls now, if that is all it does.

    With modules_to_save that is the active adapter's copy, or the original one while adapters are disabled; with LoRA
    the layer below while adapters are disabled or merged into it.
    """
    names = _class_names(module)
    if "ModulesToSaveWrapper" in names and hasattr(module, "modules_to_save"):
        named, copies = module.active_adapter, module.modules_to_save
        active = [named] if isinstance(named, str) else named
        passed_by = module.disable_adapters or not active or any(name not in copies for name in active)
        return module.original_module if passed_by else copies[active[0]]
    if "BaseTunerLayer" in names and module.disable_adapters != module.merged:
        return module.base_layer
    return module


def _refuse_unusable(core: nn.Module, module: nn.Module, *, any_class: bool) -> None:
    """ValueError unless the module's weight and bias alone are what its forward computes."""
    name = f"the head of {type(core).__name__}, a {type(module).__module__}.{type(module).__qualname__},"
    names = _class_names(module)
    if hasattr(module, "base_layer") or not _PEFT_WRAPPERS.isdisjoint(names):
        raise ValueError(
            f"{name} is wrapped by an adapter, which using its weight alone would leave out and never train: train a "
            "copy of the head instead (peft: modules_to_save=['lm_head']), keep it out of target_modules "
            "(exclude_modules=['lm_head']), or merge the adapter; a wrapper of your own that only forwards the call "
            "passes head=HeadSpec(the trained torch.nn.Linear inside)"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} has no weight tensor: {_PASS_A_SPEC}")
    full = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    plain_tensor = type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight)
    if weight.dtype not in full or not plain_tensor or type(module).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"{name} is quantised or of a kind we do not know (its weight is a {type(weight).__name__} of "
            f"{weight.dtype}): leave the head out of quantisation, for instance with llm_int8_skip_modules"
        )
    if _cut_over_ranks(core, module):
        shard_of(f"the weight of {name}", weight)
    if any_class:
        return
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ValueError(f"{name} is not a plain torch.nn.Linear, so what it computes is unknown: {_PASS_A_SPEC}")
    replaced = None if _parallel_forward(module) else vars(module).get("forward")
    if replaced is not None and _forward_attribute(module) == "forward" and not getattr(replaced, "stand_in", False):
        raise ValueError(f"{name} had its forward replaced, so what it computes is unknown: {_PASS_A_SPEC}")


def _cut_over_ranks(model: nn.Module, head: nn.Module) -> bool:
    """Whether the head is tensor-parallel: a DTensor even within its forward, since no FSDP2 module gathers it."""
    return is_dtensor(getattr(head, "weight", None)) and not _fsdp_units_around(model, head)


def _parallel_forward(module: nn.Module) -> bool:
    """Whether the instance's forward is what transformers 5 puts around that of a tensor-parallel layer."""
    name = getattr(vars(module).get("forward"), "__qualname__", "")
    return is_dtensor(module.weight) and name.startswith("TensorParallelLayer.install_forward.")


def _fsdp_units_around(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The FSDP2 modules that hold the head, or are it."""
    units = [module for module in model.modules() if "FSDPModule" in _class_names(module)]
    return [unit for unit in units if any(inner is head for inner in unit.modules())]


def _forward_attribute(module: nn.Module) -> str:
    """accelerate's offloading puts its own forward on the instance and calls `_old_forward` once weights are there."""
    return "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"


def _first_channel(hidden: Tensor) -> Tensor:
    return hidden[..., :1].clone()  # a copy, since LLaDA scales its logits in place


@dataclass
class Capture:
    """What `capture_head` saw. `value` is what `consume` returned, after the head's own forward hooks."""

    value: Any = None
    calls: int = 0


@cache
def _autocast_forgets_gradients() -> bool:
    """Whether this torch serves weights that autocast cast under no_grad to the next forward with gradient of the same
    autocast region (2.6 does), which then silently gets none for them. Where it does not, the cache saves casting
    the weights for every sample."""
    with torch.inference_mode(False), torch.autocast("cpu", dtype=torch.bfloat16):
        weight = nn.Parameter(torch.zeros(1, 1, device="cpu", dtype=torch.float32))
        with torch.no_grad():
            nn.functional.linear(weight.detach(), weight)
        with torch.enable_grad():
            return not nn.functional.linear(weight.detach(), weight).requires_grad


@contextmanager
def without_gradient() -> Iterator[None]:
    """No gradients, and no cast weights left in autocast's cache that a later forward with gradient must not use."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(cached and not _autocast_forgets_gradients())
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def capture_head(
    model: nn.Module,
    spec: HeadSpec,
    consume: Callable[[Tensor], Any],  # takes hidden [.., H], returns a tensor or anything
    *,
    placeholder: Callable[[Tensor], Tensor] = _first_channel,
) -> Iterator[Capture]:
    """Within the context, one call `model(...)` hands the hidden states to `consume` and makes no logits.

    `consume(hidden [.., H])` runs inside the head's forward; it may call `spec.module` itself, which is the real head
    there. What it returns is `Capture.value` once the model has returned. Call backward on that, not on a tensor
    carried out of `consume` by other means: FSDP2 and ZeRO-3 gather the weight for the backward pass by wrapping what
    leaves the head. The model goes on with `placeholder(hidden)`, [.., 1], in place of logits, so its own casts,
    scales, caps and slices cost nothing; code that indexes the vocabulary or takes `labels` cannot work on it.

    The head is restored on leaving, exceptions included. Contexts nest. A recomputation of the head during a backward
    pass within the context (gradient checkpointing around the model) runs `consume` again. Raises RuntimeError when
    the head is called a second time or not at all, and ValueError when its weight is not whole there.
    """
    module, attribute = spec.module, _forward_attribute(spec.module)
    cut = _cut_over_ranks(model, module)
    restore = _restorer(module, attribute)
    capture = Capture()
    standing_in: list[Tensor] = []  # the placeholder on its way from the forward to the last hook

    # Compiled models must run this eagerly: traced, `consume` would be baked into a graph that outlives the context.
    @torch.compiler.disable
    def forward(input: Tensor) -> Any:
        recomputing = torch._C._current_graph_task_id() != -1  # -1: no backward pass is running
        if capture.calls and not recomputing:
            raise RuntimeError(f"{_called(model)} called its head twice; one call per capture_head can be served")
        hidden = local_parts(input, module.weight, None, None)[0] if cut else input
        _refuse_unfit(module, hidden, cut)
        capture.calls += 1
        this = vars(module)[attribute]  # not by its name: a function that holds itself keeps `capture` until a gc run
        restore()
        try:
            value = consume(hidden)
        finally:
            setattr(module, attribute, this)
        standing_in.append(placeholder(hidden))
        return value

    @torch.compiler.disable
    def swap(_module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not standing_in:  # `consume` called the real head
            return None
        capture.value = output
        return _distributed_as(args[0], standing_in[-1]) if cut else standing_in.pop()

    @torch.compiler.disable
    def after_the_plan(*_: Any) -> Tensor | None:
        return standing_in.pop() if standing_in else None

    resume_training = _prepare_mode(model)
    setattr(module, attribute, forward)
    handles = [module.register_forward_hook(swap, prepend=cut)]
    if cut:  # a parallel plan's own hook lies between: it redistributes logits, so it gets the placeholder
        handles.append(module.register_forward_hook(after_the_plan))
    try:
        for unit in _fsdp_units_around(model, module):
            handles += _lead_value_through(unit, capture) if unit is not module else []
        yield capture
    finally:
        for handle in handles:
            handle.remove()
        restore()
        resume_training()
    if not capture.calls:
        raise RuntimeError(
            f"{_called(model)} did not call the head that was found, a {type(module).__name__}: a tied weight used "
            "through F.linear, a fused loss inside the model, or the wrong module given as head="
        )


def _prepare_mode(model: nn.Module) -> Callable[[], None]:
    """Keep the outermost module of a model that skips its head in training mode (SDAR) out of that mode, until the
    returned function is called. The layers inside keep theirs: dropout and checkpointing are decided there."""
    core = _peel(model, _ALL_WRAPPERS)
    known = lookup(core)
    learns_here = core.training or not known.learns_in_training_only
    if not learns_here and torch.is_grad_enabled() and any(p.requires_grad for p in core.parameters()):
        raise ValueError(
            f"parts of {type(core).__name__} run under torch.no_grad in evaluation mode, so its gradients would be "
            "wrong: call model.train() first, or score under torch.no_grad()"
        )
    if not (known.skips_head_in_training and core.training):
        return lambda: None
    core.training = False
    return lambda: setattr(core, "training", True)


def _restorer(module: nn.Module, attribute: str) -> Callable[[], None]:
    """A function that puts the instance attribute back to what it is now, or to being absent."""
    present, original = attribute in vars(module), vars(module).get(attribute)

    def restore() -> None:
        if present:
            setattr(module, attribute, original)
        else:
            vars(module).pop(attribute, None)

    return restore


def _lead_value_through(unit: nn.Module, capture: Capture) -> list[RemovableHandle]:
    """Let the forward hooks of `unit` see the captured value in place of the unit's own output."""
    outputs: list[Any] = []

    @torch.compiler.disable
    def first(_module: nn.Module, _args: Any, output: Any) -> Any:
        if capture.value is not None:
            outputs.append(output)
        return capture.value

    @torch.compiler.disable
    def last(_module: nn.Module, _args: Any, value: Any) -> Any:
        if not outputs:
            return None
        capture.value = value
        return outputs.pop()

    return [unit.register_forward_hook(first, prepend=True), unit.register_forward_hook(last)]


def _called(model: nn.Module) -> str:
    return f"the forward of {type(unwrap(model)).__name__}"


def _distributed_as(input: Any, placeholder: Tensor) -> Tensor:
    """The placeholder as a DTensor where the head's input is one."""
    if not is_dtensor(input):
        return placeholder
    return type(input).from_local(placeholder, input.device_mesh, input.placements, run_check=False)


def _refuse_unfit(module: nn.Module, hidden: Tensor, cut: bool = False) -> None:
    weight: Any = module.weight
    if is_dtensor(weight) and not cut:
        raise ValueError(f"the head's weight is still a DTensor {tuple(weight.shape)} in its forward: not gathered")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"the head's weight is {list(weight.shape)} but the hidden states are {list(hidden.shape)}")
