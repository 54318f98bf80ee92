"""Model FLOPs of one policy update, counted from the shapes: a multiplication and an addition are two.

Per Monte Carlo sample of T tokens, with P the entries of all projection matrices of all layers, W = heads x head size,
N the masked rows of all samples, H hidden and V vocabulary:

    forward of the layers     2 P T  +  4 T^2 W per layer                (scores and values, in both directions)
    backward, full            4 P T  +  8 T^2 W per layer                (for the inputs and for the weights)
    backward, LoRA            2 P T  +  8 T^2 W per layer                (for the inputs alone)
      less in the first layer 2 T (entries of q, k and v, and r H for each of the three)   (nothing below is trained)
    the adapters, LoRA        6 T r (in + out) per projection
    head, once                6 N H V trained, 4 N H V frozen            (masked rows only)

This is the work that the update needs, whoever does it: layers that checkpointing runs again, the old policy's pass,
and the head on rows that are not masked do not count. Norms, activations, rotations and biases, below 1 % at these
widths, do not count either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dimensions:
    """What the count needs to know about a model."""

    hidden: int
    layers: int
    width: int  # heads x head size
    kv_width: int  # key and value heads x head size
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """From a transformers config of the Llama or Qwen2 family."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads * size,
            config.num_key_value_heads * size,
            config.intermediate_size,
            config.vocab_size,
        )

    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every matrix of a layer."""
        h, w, kv, i = self.hidden, self.width, self.kv_width, self.intermediate
        return {
            "q_proj": (w, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, w),
            "gate_proj": (i, h),
            "up_proj": (i, h),
            "down_proj": (h, i),
        }


def update_flops(model: Dimensions, samples: int, tokens: int, masked: int, lora_rank: int | None = None) -> int:
    """FLOPs of an update of `samples` sequences of `tokens` tokens with `masked` masked rows in all."""
    shapes = model.projections()
    matrices = model.layers * sum(out * into for out, into in shapes.values())
    attention = 4 * tokens**2 * model.width * model.layers
    head = masked * model.hidden * model.vocabulary
    if lora_rank is None:
        return samples * (6 * matrices * tokens + 3 * attention) + 6 * head
    adapters = model.layers * sum(lora_rank * (out + into) for out, into in shapes.values())
    first = [shapes[name] for name in ("q_proj", "k_proj", "v_proj")]
    not_needed = 2 * tokens * sum(out * into + lora_rank * into for out, into in first)
    return samples * (4 * matrices * tokens + 3 * attention + 6 * adapters * tokens - not_needed) + 4 * head
