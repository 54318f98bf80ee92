"""Whether a block-diffusion model attends as the table says, asked of the model itself.

Such a model is causal across blocks by design, so `assert_bidirectional` is the wrong question. Three sequences of
three blocks go through the model under the mask that the scores will use; then one token is edited:

    the last token of block 1 must change hidden states before it in block 1      else the model is causal in a block
    a token of block 0 must change block 2                                        else blocks do not see their past
    a token of block 2 must change nothing in blocks 0 and 1                      else the mask is not obeyed

The last also finds a mask of the wrong kind: an additive model takes 0 and 1 for faint biases, and a model that wants
truth values takes 0 and -inf the wrong way round. Changes are told from rounding as in `probe.py`.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import validation as check
from .block_masks import FLAVOURS, block_layout, block_mask
from .heads import HeadSpec, default_block_length, model_spec, unwrap
from .probe import draws, edit, hidden_states, is_assumed, undisturbed, unseen

_ESCAPE = ". If you know better, call bgpo_kernels.models.assume_bidirectional(model)."
_BLOCKS = 3

_passed: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()


def resolve_block_length(model: nn.Module, given: int | None) -> int:
    """`given`, or what the config names, or what the table of known models says."""
    found = default_block_length(model) if given is None else given
    if found is None:
        raise ValueError(f"block_length is missing: neither the config of {_name(model)} nor our table has one")
    return check.integer("block_length", found, 1)


def resolve_flavour(model: nn.Module, given: str) -> str:
    """The kind of mask `model` takes, unless `given` names one.

    A model that calls flex_attention in training mode only (SDAR) takes a BlockMask there and a dense mask elsewhere.
    """
    if given != "auto":
        if given not in FLAVOURS:
            raise ValueError(f"flavour must be auto, {', '.join(FLAVOURS)}; got {given!r}")
        return given
    dense = model_spec(model).block_mask
    if dense is None:
        raise ValueError(
            f"flavour is missing: our table does not say which kind of mask {_name(model)} takes. Pass one of "
            f"{', '.join(FLAVOURS)}, or register the model with a ModelSpec(block_mask=...)"
        )
    trained = {type(module) for module in model.modules() if module.training}
    return "flex" if dense == "bool" and any(_turns_to_flex(kind) for kind in trained) else dense


def _turns_to_flex(kind: type[nn.Module]) -> bool:
    """Whether the forward of this class of modules asks for its mode and calls some flex_attention."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = () if code is None else code.co_names
    return "training" in names and any("flex_attention" in name for name in names)


def mask_dtype(model: nn.Module, spec: HeadSpec, device: torch.device) -> torch.dtype:
    """What an additive mask must be: the dtype of the queries."""
    weight: Any = next((p for p in model.parameters() if p.is_floating_point()), spec.module.weight)
    if torch.is_autocast_enabled(device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def assert_block_semantics(model: nn.Module, head_spec: HeadSpec, block_length: int, *, flavour: str = "auto") -> None:
    """ValueError unless `model` sees its block of `block_length` both ways, earlier blocks, and nothing else.

    Takes the place of `assert_bidirectional` for block-diffusion models. A pass is remembered per model, block length
    and kind of mask. The model runs in evaluation mode without gradients; nothing of it is changed.
    """
    core = unwrap(model)
    if is_assumed(core):
        return
    block_length = check.integer("block_length", block_length, 1)
    implementation = str(getattr(getattr(core, "config", None), "_attn_implementation", None))
    with undisturbed(core):
        flavour = resolve_flavour(core, flavour)
        key = (block_length, flavour, implementation, head_spec.logit_scale, head_spec.softcap)
        if key in _passed.get(core, ()):
            return
        _probe(core, head_spec, block_length, flavour)
    _passed.setdefault(core, set()).add(key)


def _probe(model: nn.Module, spec: HeadSpec, block_length: int, flavour: str) -> None:
    length, largest = _BLOCKS * block_length, 0.0
    effect = dict.fromkeys(("others", "within", "past", "future"), 0.0)
    for ids, other in draws(model, spec, length):
        kwargs = _clean_only(ids, block_length, flavour, mask_dtype(model, spec, ids.device))
        before = hidden_states(model, spec, ids, kwargs)
        largest = max(largest, float(before.abs().max()))

        def moved(edited: Tensor, start: int, end: int, before: Tensor = before, kwargs: dict = kwargs) -> float:
            after = hidden_states(model, spec, edited, kwargs)
            return float((before[0, start:end] - after[0, start:end]).abs().max()) if end > start else 0.0

        measured = {
            "others": moved(torch.cat([ids[:1], other[1:]]), 0, length),
            "within": moved(edit(ids, other, 2 * block_length - 1), block_length, 2 * block_length - 1),
            "past": moved(edit(ids, other, 0), 2 * block_length, length),
            "future": moved(edit(ids, other, 2 * block_length), 0, 2 * block_length),
        }
        effect = {name: max(value, measured[name]) for name, value in effect.items()}
    _judge(_name(model), block_length, flavour, effect, unseen(effect["others"], largest))


def _judge(name: str, block_length: int, flavour: str, effect: dict[str, float], rounding: float) -> None:
    if effect["future"] > rounding:
        raise ValueError(
            f"{name} does not obey a block mask of the kind {flavour!r}: a token moves the hidden states of earlier "
            f"blocks of {block_length} by up to {effect['future']:.2g}. Another flavour, or another attention "
            f"implementation, may be what it takes{_ESCAPE}"
        )
    if effect["within"] <= rounding and block_length > 1:
        raise ValueError(
            f"{name} is causal within blocks of {block_length}: the last token of a block does not change the hidden "
            f"states before it, so it cannot score masked tokens{_ESCAPE}"
        )
    if effect["past"] <= rounding:
        raise ValueError(f"{name} does not see earlier blocks of {block_length}, so it cannot see a prompt{_ESCAPE}")


def _clean_only(ids: Tensor, block_length: int, flavour: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for ids [B, T] alone, without a noisy half: the prompt of a layout is that."""
    batch, tokens = ids.shape
    layout = block_layout(tokens + 1, tokens, block_length, device=ids.device)
    clean = type(layout)(layout.place[:tokens], layout.noisy[:tokens], layout.block[:tokens], tokens)
    mask = block_mask(clean, flavour, dtype)
    if isinstance(mask, Tensor):
        mask = mask.expand(batch, -1, -1, -1)
    return {"attention_mask": mask, "position_ids": clean.place.expand(batch, -1)}


def _name(model: nn.Module) -> str:
    return type(unwrap(model)).__name__
