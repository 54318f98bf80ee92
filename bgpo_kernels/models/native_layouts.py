"""What LLaDA's and Dream's own files say, in the terms of transformers' Llama and Qwen2: names and config fields.

LLaDA's block is the Llama block under other names, Dream's is the Qwen2 block under the same ones:

    native, model.layers.N.               LLaDA, model.transformer.blocks.N.
    input_layernorm                       attn_norm
    self_attn.{q,k,v}_proj                {q,k,v}_proj
    self_attn.o_proj                      attn_out
    post_attention_layernorm              ff_norm
    mlp.gate_proj, up_proj, down_proj     ff_proj, up_proj, ff_out
    outside of the layers
    model.embed_tokens                    model.transformer.wte
    model.norm                            model.transformer.ln_f
    lm_head                               model.transformer.ff_out, absent where weight_tying is true

Either remote code knows more options than its published models use. One that these layers would not carry out is
refused here with its name; a field that config.json leaves out counts as the remote code's default.
"""

from __future__ import annotations

import re
from typing import Any

_LLADA_OUTSIDE = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
_LLADA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def llada_name(native: str) -> str:
    """LLaDA's name of a parameter of a native model; KeyError for one that LLaDA does not have."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", native)
    if layer is None:
        return _LLADA_OUTSIDE[native]
    return f"model.transformer.blocks.{layer[1]}.{_LLADA_LAYER[layer[2]]}.weight"


def dream_name(native: str) -> str:
    """Dream's names are those of Qwen2."""
    return native


# Per option: the remote code's default, what the native layers do, and what another value would ask for.
_LLADA_FIXED: dict[str, tuple[Any, Any, str]] = {
    "block_type": ("sequential", "llama", "fused attention projections"),
    "block_group_size": (1, 1, "grouped blocks under other names"),
    "layer_norm_type": ("default", "rms", "another normalisation than RMSNorm"),
    "layer_norm_with_affine": (True, True, "normalisation without a weight"),
    "activation_type": ("swiglu", "silu", "another activation"),
    "rope": (False, True, "learned positions"),
    "rope_scaling": (None, None, "scaled rotary frequencies"),
    "alibi": (False, False, "ALiBi"),
    "attention_layer_norm": (False, False, "normalised queries and keys"),
    "input_emb_norm": (False, False, "scaled embeddings"),
    "include_bias": (False, False, "biases"),
    "include_qkv_bias": (False, False, "biases of the attention projections"),
    "bias_for_layer_norm": (None, False, "biases of the normalisations"),
    "residual_dropout": (0.1, 0.0, "dropout on the residual stream"),
    "embedding_dropout": (0.1, 0.0, "dropout on the embeddings"),
}
_DREAM_FIXED: dict[str, tuple[Any, Any, str]] = {
    "hidden_act": ("silu", "silu", "another activation"),
    "rope_scaling": (None, None, "scaled rotary frequencies"),
    "use_sliding_window": (False, False, "attention within a window"),
    "use_mrope": (False, False, "positions in several dimensions"),
    "block_size": (None, None, "blocks that are decoded one after the other"),
}
_REMOTE = "use the checkpoint's own code instead (transformers, trust_remote_code=True)"


def llada_fields(official: dict[str, Any]) -> dict[str, Any]:
    """The fields of the LlamaConfig of a LLaDA config.json; ValueError for what a Llama does not do."""
    _check(official, "LLaDAModelLM", _LLADA_FIXED)
    width, heads = _count(official, "d_model"), _count(official, "n_heads")
    padded, inner = official.get("embedding_size"), official.get("mlp_hidden_size")
    fields = {
        "vocab_size": _count(official, "vocab_size" if padded is None else "embedding_size"),
        "hidden_size": width,
        "intermediate_size": _count(official, "mlp_hidden_size") if inner else width * _count(official, "mlp_ratio"),
        "num_hidden_layers": _count(official, "n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _llada_kv_heads(official, heads),
        "max_position_embeddings": _count(official, "max_sequence_length"),
        "rms_norm_eps": _number(official, "rms_norm_eps", 1e-5),
        "rope_theta": _number(official, "rope_theta", 10_000.0),
        "attention_dropout": _number(official, "attention_dropout", 0.1),
        "tie_word_embeddings": bool(official.get("weight_tying", True)),
        # Not Llama's; the model reads them.
        "scale_logits": bool(official.get("scale_logits", False)),
        "rope_full_precision": bool(official.get("rope_full_precision", True)),
    }
    return _completed(fields, official)


def dream_fields(official: dict[str, Any]) -> dict[str, Any]:
    """The fields of the Qwen2Config of a Dream or DiffuCoder config.json; ValueError for what a Qwen2 does not do."""
    _check(official, "DreamModel", _DREAM_FIXED)
    fields = {
        "vocab_size": _count(official, "vocab_size"),
        "hidden_size": _count(official, "hidden_size"),
        "intermediate_size": _count(official, "intermediate_size"),
        "num_hidden_layers": _count(official, "num_hidden_layers"),
        "num_attention_heads": _count(official, "num_attention_heads"),
        "num_key_value_heads": _count(official, "num_key_value_heads"),
        "max_position_embeddings": _count(official, "max_position_embeddings"),
        "rms_norm_eps": _number(official, "rms_norm_eps", 1e-6),
        "rope_theta": _number(official, "rope_theta", 10_000.0),
        "attention_dropout": _number(official, "attention_dropout", 0.0),
        "tie_word_embeddings": bool(official.get("tie_word_embeddings", False)),
    }
    return _completed({"mask_token_id": 151666, "pad_token_id": 151643} | fields, official)


def _check(official: dict[str, Any], architecture: str, fixed: dict[str, tuple[Any, Any, str]]) -> None:
    """ValueError unless `official` is of this architecture and asks for nothing but the `fixed` values."""
    named = official.get("architectures") or [architecture]
    if named != [architecture]:
        raise ValueError(
            f"config.json has architectures={named}; the native layers stand for [{architecture!r}] only: {_REMOTE}"
        )
    if official.get("quantization_config") is not None:
        raise ValueError("config.json has a quantization_config; load the checkpoint that it was quantised from")
    for name, (default, needed, meaning) in fixed.items():
        value = official.get(name, default)
        if value != needed and (value or needed):  # None, False and 0 all mean off
            absent = "" if name in official else " (absent, so the default of its own code)"
            raise ValueError(
                f"config.json asks for {name}={value!r}{absent}, {meaning}, which the native layers do not do (they "
                f"need {needed!r}): {_REMOTE}"
            )


def _completed(fields: dict[str, Any], official: dict[str, Any]) -> dict[str, Any]:
    """`fields` with the token ids and what holds for every masked LM; ValueError for values that disagree."""
    width, heads, kv_heads = fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"]
    if width % heads or heads % kv_heads or width // heads % 2:
        raise ValueError(f"config.json has {heads} heads and {kv_heads} key-value heads for a width of {width}")
    if official.get("head_dim") not in (None, width // heads):
        raise ValueError(f"config.json has head_dim={official['head_dim']}, but {heads} heads share a width of {width}")
    rows = fields["vocab_size"]
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "mask_token_id": None}
    fields = tokens | fields | {name: official[name] for name in tokens if name in official}
    for name in ("mask_token_id", "pad_token_id"):
        if fields[name] is not None and not 0 <= fields[name] < rows:
            raise ValueError(f"config.json has {name}={fields[name]}, outside the embedding's 0..{rows - 1}")
    # Not reused: a masked LM sees every token anew, so a cache would only hold memory.
    return fields | {"hidden_act": "silu", "is_causal": False, "use_cache": False, "official": official}


def _llada_kv_heads(official: dict[str, Any], heads: int) -> int:
    """`multi_query_attention` (one key-value head, or one per head) and `n_kv_heads` may not contradict each other."""
    multi_query, given = official.get("multi_query_attention"), official.get("n_kv_heads")
    implied = None if multi_query is None else 1 if multi_query else heads
    if given is None:
        return heads if implied is None else implied
    if implied not in (None, given):
        raise ValueError(f"config.json has n_kv_heads={given}, which multi_query_attention={multi_query} contradicts")
    return _count(official, "n_kv_heads")


def _count(official: dict[str, Any], name: str) -> int:
    value = official.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json must hold a positive integer {name}, has {value!r}")
    return value


def _number(official: dict[str, Any], name: str, default: float) -> float:
    value = official.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"config.json must hold a number >= 0 as {name}, has {value!r}")
    return float(value)
