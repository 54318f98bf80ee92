"""Turning a transformers decoder around: every token sees every other, before and after it.

Two switches do it. `config.is_causal = False` makes transformers 5 build bidirectional masks. The `is_causal = False`
of every attention module keeps scaled-dot-product attention from going causal when there is no mask at all, and flash
attention always.

transformers 4 builds a causal mask whatever the config says, but passes a prepared one `[B, 1, T, T]` through. So there
a hook on the backbone prepares it: a view of the padding mask that costs no memory, or, without padding, one number
seen from everywhere, which a hook on every attention module takes away again, as no mask is what the fast kernels want.
Both hooks hold no state (checkpointed layers run again at any time) and rest while `config.is_causal` is not False.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def make_bidirectional(model: Model) -> Model:
    """Let every attention layer of `model` look in both directions, in place, with and without an attention mask.

    For models of native transformers layers, such as Llama or Qwen2 with the weights of LLaDA or Dream. Raises
    ValueError when no layer has the `is_causal` switch, since such a model would silently stay as it is; with
    transformers 4, a forward raises ValueError under an attention implementation other than sdpa, eager and flash.
    """
    switches = [module for module in model.modules() if hasattr(module, "is_causal")]
    if not switches:
        raise ValueError(f"{type(model).__name__} has no attention layer with an is_causal switch")
    config: Any = model.config
    config.is_causal = False
    for module in switches:
        setattr(module, "is_causal", False)  # noqa: B010 - plain assignment does not type-check on a Module
    backbone: Any = model.base_model
    if _masks_ignore_the_config() and _prepare_mask not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(_prepare_mask, with_kwargs=True)
        for module in switches:
            module.register_forward_pre_hook(_drop_mask_of_nothing, with_kwargs=True)
    return model


def _masks_ignore_the_config() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5


def _prepare_mask(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the backbone's forward: its `attention_mask` [B, T] or None becomes [B, 1, T, T]."""
    implementation = str(backbone.config._attn_implementation)
    given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    prepared = given is not None and not (isinstance(given, Tensor) and given.dim() == 2)
    if getattr(backbone.config, "is_causal", True) or "flash" in implementation or prepared:
        return None
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation={implementation!r} stays causal with transformers 4: use 'sdpa', 'eager' or a flash "
            "attention, or transformers 5"
        )
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    batch, length = tokens.shape[:2]
    visible = torch.ones(1, 1, dtype=torch.bool, device=tokens.device) if given is None else given.bool()
    if implementation == "eager":  # which adds its mask to the scores
        visible = torch.where(visible, 0.0, torch.finfo(backbone.dtype).min).to(backbone.dtype)
    mask = visible[:, None, None, :].expand(batch, 1, length, length)
    if len(args) > 1:
        return (args[0], mask, *args[2:]), kwargs
    return args, kwargs | {"attention_mask": mask}


def _drop_mask_of_nothing(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before an attention module's forward: a mask that is one number seen from everywhere is no mask."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    one_number = all(size == 1 or stride == 0 for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return (args, kwargs | {"attention_mask": None}) if one_number else None
