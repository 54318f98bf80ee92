"""Dream's forward pass in plain torch, on a dict of tensors under the official names. Nothing of transformers.

Rotary positions are written with complex numbers here and with pairs of reals in `plain_llada.py`, so that neither is
the copy of the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 58,
    "eos_token_id": 58,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "mask_token_id": 59,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 58,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 64,
}


def tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of every parameter that `config` has, made in fp32."""
    width, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * (width // config["num_attention_heads"])
    layer: dict[str, tuple[int, ...]] = {
        f"self_attn.{n}_proj.weight": (s, width) for n, s in zip("qkv", (width, kv, kv), strict=True)
    }
    layer |= {f"self_attn.{n}_proj.bias": (s,) for n, s in zip("qkv", (width, kv, kv), strict=True)}
    layer |= {"self_attn.o_proj.weight": (width, width), "mlp.down_proj.weight": (width, inner)}
    layer |= {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    layer |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (rows, width)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = 0.2 * torch.randn(shape, generator=generator)
        made[name] = (1 + noise if name.endswith("norm.weight") else noise).to(dtype)
    return made


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [B, T, vocab_size] of ids [B, T]; row i - 1 is the prediction of token i."""
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        start = f"model.layers.{i}."
        layer = {name.removeprefix(start): t for name, t in weights.items() if name.startswith(start)}
        x = x + _attention(config, layer, _norm(config, x, layer["input_layernorm.weight"]))
        y = _norm(config, x, layer["post_attention_layernorm.weight"])
        gate, up = (F.linear(y, layer[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, layer["mlp.down_proj.weight"])
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return F.linear(_norm(config, x, weights["model.norm.weight"]), weights[head])


def _norm(config: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def _attention(config: dict[str, Any], layer: dict[str, Tensor], x: Tensor) -> Tensor:
    batch, length, width = x.shape
    heads = config["num_attention_heads"]
    q, k, v = (
        F.linear(x, layer[f"self_attn.{n}_proj.weight"], layer[f"self_attn.{n}_proj.bias"])
        .view(batch, length, -1, width // heads)
        .transpose(1, 2)  # [B, heads, T, D]
        for n in "qkv"
    )
    q, k = (_rotate(y, config["rope_theta"]) for y in (q, k))
    shared_by = heads // k.shape[1]
    out = []
    for h in range(heads):
        keys, values = k[:, h // shared_by], v[:, h // shared_by]
        score = q[:, h] @ keys.mT / (width // heads) ** 0.5
        out.append(score.softmax(-1) @ values)
    return F.linear(torch.cat(out, dim=-1), layer["self_attn.o_proj.weight"])


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Channels c and c + D/2 of x [B, heads, T, D] are one complex number, turned by t * theta^(-2c/D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2]).double()[:, None] / theta ** (torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
