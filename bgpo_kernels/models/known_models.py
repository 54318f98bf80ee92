"""The table of known models: what the package cannot read off a model or its config. One entry per class name.

Entries are found by the names of a model's classes, most derived first, so nothing is imported and a fork that keeps
the class name, or derives from it, is found too. Where a config names a mask id or a block length, the config decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_ATTENTION = ("bidirectional", "block")
_BLOCK_MASKS = ("bool", "additive")


@dataclass(frozen=True)
class ModelSpec:
    """A kind of model, apart from its head. Raises ValueError for values outside those named here."""

    mask_token_id: int | None = None  # used when neither the call nor the config names one
    attention: str = "bidirectional"  # or "block": both ways within a block, back to earlier blocks
    block_length: int | None = None  # used when neither the call nor the config names one
    block_mask: str | None = None  # the dense mask that forward(attention_mask=...) takes: "bool" or "additive"
    skips_head_in_training: bool = False  # in training mode its forward computes a loss of its own instead of logits
    learns_in_training_only: bool = False  # in evaluation mode parts of it run under torch.no_grad

    def __post_init__(self) -> None:
        if self.attention not in _ATTENTION:
            raise ValueError(f"ModelSpec.attention must be one of {_ATTENTION}, got {self.attention!r}")
        if self.block_mask not in (None, *_BLOCK_MASKS):
            raise ValueError(f"ModelSpec.block_mask must be None or one of {_BLOCK_MASKS}, got {self.block_mask!r}")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"ModelSpec.block_length must be None or at least 1, got {self.block_length}")


_models: dict[str, ModelSpec] = {
    "LLaDAModelLM": ModelSpec(mask_token_id=126336),  # MMaDA's MMadaModelLM derives from it
    "LLaDAMoEModelLM": ModelSpec(mask_token_id=156895),
    "DreamModel": ModelSpec(mask_token_id=151666),  # Dream-Coder and DiffuCoder as well
    # LLaDA 2.0 and 2.1 add their mask to the attention scores; their experts' path for evaluation is under no_grad.
    "LLaDA2MoeModelLM": ModelSpec(
        156895, "block", block_length=32, block_mask="additive", learns_in_training_only=True
    ),
    # SDAR and TraDo read their mask as a truth value, so an additive one would be read the wrong way round.
    "SDARForCausalLM": ModelSpec(151669, "block", block_length=4, block_mask="bool", skips_head_in_training=True),
    "SDARMoeForCausalLM": ModelSpec(151669, "block", block_length=4, block_mask="bool"),
}


def remember(model_class_name: str, spec: ModelSpec) -> None:
    """Put an entry into the table, replacing an earlier one of that name."""
    _models[model_class_name] = spec


def lookup(core: nn.Module) -> ModelSpec:
    """The entry of a model that is not wrapped; one of nothing but defaults for an unknown model."""
    return next((_models[cls.__name__] for cls in type(core).__mro__ if cls.__name__ in _models), ModelSpec())


def config_integer(core: nn.Module, *names: str) -> int | None:
    """The first of the named fields that the model's config holds."""
    config: Any = getattr(core, "config", None)
    found = (config.get(n) if isinstance(config, Mapping) else getattr(config, n, None) for n in names)
    return next((int(value) for value in found if value is not None), None)
