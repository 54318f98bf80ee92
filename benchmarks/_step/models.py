"""The models: LLaDA-8B's and Dream-7B's shapes in bf16, random weights made on the device, in three ways to train them.

    lora                 peft's adapters of rank 64 on the attention and MLP projections, head and all else frozen
    full+checkpointing   every parameter, each layer run again in the backward (use_reentrant=False)
    full                 every parameter, all activations kept

Dream's row i-1 predicts token i; random weights have no such convention, and the work is the same either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bgpo_kernels.models.llada import build_llada, llada_config

LORA_RANK = 64
MODES = ("lora", "full+checkpointing", "full")
# For dry runs: the family's kind of block, and little of it.
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "vocab_size": 320, "mask_token_id": 318, "eos_token_id": 317}  # fmt: skip
_TINY_KEYS = {"llada-8b": 4, "dream-7b": 2}


class NotInstalled(RuntimeError):
    """An optional library is missing; the message says which."""


@dataclass(frozen=True)
class Subject:
    """A model ready for updates."""

    model: nn.Module
    config: Any
    lora_rank: int | None

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients of an update."""
        return sum(parameter.nbytes for parameter in self.trained)


def build(shape: str, mode: str, device: torch.device, tiny: bool = False) -> Subject:
    """Raises NotInstalled without peft for "lora", ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    config = llada_config(shape, **(_TINY | {"num_key_value_heads": _TINY_KEYS[shape]} if tiny else {}))
    peft = _peft() if mode == "lora" else None
    # In training mode, in which alone transformers checkpoints; there is no dropout in these models.
    model: Any = build_llada(config, torch.bfloat16, device).train()
    if mode == "full+checkpointing":
        # Later versions of transformers renamed it; both names take the same dictionary.
        name = "activation_checkpointing_enable"
        enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})
    if peft is None:
        return Subject(model, config, None)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, lora_dropout=0.0, target_modules=targets)
    # Adapters in bf16, as the model is; peft's default would put fp32 GEMMs beside every bf16 one.
    return Subject(peft.get_peft_model(model, adapters, autocast_adapter_dtype=False), config, LORA_RANK)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise NotInstalled(f"peft: {error}") from error
    return peft
