"""LLaDA's forward pass in plain torch, on a dict of tensors under the official names. Nothing of transformers.

Shared with `plain_dream.py` is nothing but torch: each architecture is written down once, on its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 24,
    "embedding_dropout": 0.0,
    "embedding_size": 64,  # beyond vocab_size: rows that no token has
    "eos_token_id": 58,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "meta",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 59,
    "max_sequence_length": 128,
    "mlp_hidden_size": 40,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 58,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 60,
    "weight_tying": False,
}


def tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of every parameter that `config` has, made in fp32."""
    width, inner, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = config["n_kv_heads"] * (width // config["n_heads"])
    block = {"q_proj": (width, width), "k_proj": (kv, width), "v_proj": (kv, width), "attn_out": (width, width)}
    block |= {"ff_proj": (inner, width), "up_proj": (inner, width), "ff_out": (width, inner)}
    block |= {"attn_norm": (width,), "ff_norm": (width,)}
    shapes = {"wte": (rows, width), "ln_f": (width,)} | ({} if config["weight_tying"] else {"ff_out": (rows, width)})
    shapes |= {f"blocks.{i}.{name}": shape for i in range(config["n_layers"]) for name, shape in block.items()}
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        made[f"model.transformer.{name}.weight"] = (1 + 0.2 * noise if len(shape) == 1 else 0.2 * noise).to(dtype)
    return made


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [B, T, embedding_size] of ids [B, T]."""
    w = {name.removeprefix("model.transformer.").removesuffix(".weight"): x for name, x in weights.items()}
    x = w["wte"][ids]
    for i in range(config["n_layers"]):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        x = x + _attention(config, block, _norm(config, x, block["attn_norm"]))
        y = _norm(config, x, block["ff_norm"])
        x = x + (F.silu(y @ block["ff_proj"].T) * (y @ block["up_proj"].T)) @ block["ff_out"].T
    out = _norm(config, x, w["ln_f"]) @ w["wte" if config["weight_tying"] else "ff_out"].T
    return out / math.sqrt(config["d_model"]) if config["scale_logits"] else out


def _norm(config: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weight


def _attention(config: dict[str, Any], block: dict[str, Tensor], x: Tensor) -> Tensor:
    heads, size = config["n_heads"], config["d_model"] // config["n_heads"]
    q, k, v = ((x @ block[f"{name}_proj"].T).unflatten(-1, (-1, size)) for name in "qkv")  # [B, T, heads, D]
    q, k = (_rotate(y, config["rope_theta"]) for y in (q, k))
    k, v = (y.repeat_interleave(heads // y.shape[2], dim=2) for y in (k, v))
    weight = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(size)).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weight, v).flatten(-2) @ block["attn_out"].T


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Channels c and c + D/2 of x [B, T, heads, D] are the two coordinates of a point, turned by t * theta^(-2c/D)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed)[:, None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
