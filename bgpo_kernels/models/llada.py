"""Masked diffusion LMs with the published shapes, made of native transformers layers: no remote code, no download.

LLaDA is the Llama block (RMSNorm, SwiGLU, RoPE, no bias, head not tied) and Dream the Qwen2 block, both with
attention in both directions (`bidirectional.py`).

Dream's row i-1 predicts token i; a randomly initialised model of its shape has no such convention and is used
unshifted.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .bidirectional import make_bidirectional

# The token ids of each family; `mask_token_id` is stored on the config, where `bgpo_kernels` looks for it. Padding is
# the eos token; the config does not say so because transformers would then freeze the embedding of eos, which is also
# scored.
_LLADA_TOKENS = {"vocab_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": None}
_DREAM_TOKENS = {"vocab_size": 152064, "mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": None}
_LLADA = _LLADA_TOKENS | {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 4096}


def _width(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLADA | _width(hidden=16, layers=2, heads=2, kv_heads=2, intermediate=32),  # for tests
    "small": _LLADA | _width(hidden=128, layers=4, heads=4, kv_heads=4, intermediate=384),  # for two CPU cores
    "llada-8b": _LLADA | _width(hidden=4096, layers=32, heads=32, kv_heads=32, intermediate=12288),
    "dream-7b": _DREAM_TOKENS
    | _width(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944)
    | {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 131072},
}


def llada_config(shape: str = "small", **overrides: Any) -> PretrainedConfig:
    """The transformers config of a bidirectional masked LM of the named shape: a key of `SHAPES`.

    "tiny" and "small" keep LLaDA's vocabulary of 126464 and its token ids at a narrow width. `overrides` are config
    fields (hidden_size=..., vocab_size=..., mask_token_id=...). Raises ValueError for an unknown shape and for a mask
    token id outside the vocabulary.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    fields = SHAPES[shape] | overrides
    if not 0 <= fields["mask_token_id"] < fields["vocab_size"]:
        raise ValueError(f"mask_token_id {fields['mask_token_id']} is outside 0..{fields['vocab_size'] - 1}")
    fields |= {"is_causal": False, "tie_word_embeddings": False, "bos_token_id": None}
    fields["use_cache"] = False  # a masked LM never reuses keys and values, so a cache would only hold memory
    return (Qwen2Config if shape.startswith("dream") else LlamaConfig)(**fields)


def build_llada(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A randomly initialised bidirectional masked LM of `config`, in evaluation mode (these models have no dropout).

    The weights are made on `device` in `dtype` and depend on (config, dtype, kind of device, seed) alone; the global
    random state is left as it was. `forward(input_ids [B, T])` gives logits [B, T, V]. Raises ValueError for a config
    that is neither a Llama nor a Qwen2 config.
    """
    classes = {LlamaConfig: LlamaForCausalLM, Qwen2Config: Qwen2ForCausalLM}
    if type(config) not in classes:
        raise ValueError(f"config must come from llada_config, got {type(config).__name__}")
    device = torch.device(device)
    previous = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model = classes[type(config)](config)
        finally:
            torch.set_default_dtype(previous)
    return make_bidirectional(model).eval()
