"""Checkpoints that the native layers are not, and what a masked LM does not take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_llada
import pytest
import torch
from plain_checkpoints import (
    INDEX,
    KINDS,
    some_ids,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from bgpo_kernels.models.checkpoint import load_native

REFUSED_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"model_type": "llada2_moe"}, "model_type='llada2_moe'; native layers exist for 'llada' and 'Dream'"),
    ("llada", {"architectures": ["LLaDAMoE"]}, r"architectures=\['LLaDAMoE'\]"),
    ("llada", {"block_type": "sequential"}, "block_type='sequential', fused attention projections"),
    ("llada", {"block_group_size": 2}, "block_group_size=2"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type='default'"),
    ("llada", {"layer_norm_with_affine": False}, "layer_norm_with_affine=False"),
    ("llada", {"activation_type": "swiglu"}, "activation_type='swiglu'"),
    ("llada", {"rope": False}, "rope=False"),
    ("llada", {"rope_scaling": {"type": "linear"}}, "rope_scaling="),
    ("llada", {"alibi": True}, "alibi=True"),
    ("llada", {"attention_layer_norm": True}, "attention_layer_norm=True"),
    ("llada", {"input_emb_norm": True}, "input_emb_norm=True"),
    ("llada", {"include_bias": True}, "include_bias=True"),
    ("llada", {"include_qkv_bias": True}, "include_qkv_bias=True"),
    ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm=True"),
    ("llada", {"residual_dropout": 0.1}, "residual_dropout=0.1"),
    ("llada", {"embedding_dropout": 0.1}, "embedding_dropout=0.1"),
    ("llada", {"n_kv_heads": 2, "multi_query_attention": True}, "n_kv_heads=2, which multi_query_attention=True"),
    ("llada", {"n_kv_heads": 3}, "4 heads and 3 key-value heads for a width of 24"),
    ("llada", {"d_model": None}, "positive integer d_model, has None"),
    ("llada", {"rope_theta": "10k"}, "rope_theta, has '10k'"),
    ("llada", {"mask_token_id": 64}, r"mask_token_id=64, outside the embedding's 0\.\.63"),
    ("llada", {"embedding_size": 128}, r"\[64, 24\] in model.safetensors of .*, but config.json makes it \[128, 24\]"),
    ("llada", {"weight_tying": True}, "the head to the embedding, but model.transformer.ff_out.weight"),
    ("llada", {"quantization_config": {"bits": 4}}, "has a quantization_config"),
    ("dream", {"architectures": ["DreamForCausalLM"]}, r"stand for \['DreamModel'\] only"),
    ("dream", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("dream", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
    ("dream", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("dream", {"use_mrope": True}, "use_mrope=True"),
    ("dream", {"block_size": 32}, "block_size=32"),
    ("dream", {"head_dim": 8}, "head_dim=8, but 4 heads share a width of 24"),
    ("dream", {"num_hidden_layers": 3}, r"lack model\.layers\.2\.input_layernorm.* and 8 more"),
    ("dream", {"num_hidden_layers": 1}, r"hold model\.layers\.1\..*, which a NativeDream does not have"),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED_CONFIGS, ids=lambda value: str(value)[:40])
def test_config_that_the_layers_do_not_carry_out(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, kind)
    (tmp_path / "config.json").write_text(json.dumps(KINDS[kind][1] | change))
    with pytest.raises(ValueError, match=message):
        load_native(tmp_path)


def test_absent_options_count_as_the_remote_codes_defaults(tmp_path: Path) -> None:
    write(tmp_path, "llada")
    for name in ("block_type", "residual_dropout", "activation_type", "rope"):
        config = {key: value for key, value in plain_llada.CONFIG.items() if key != name}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"{name}=.* \(absent, so the default of its own code\)"):
            load_native(tmp_path)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def _indexed(weight_map: dict[str, str]) -> Callable[[Path], None]:
    return lambda folder: _dump(folder / INDEX, {"weight_map": weight_map})


def _dump(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


NORM = "model.norm.weight"
REFUSED_FILES: dict[str, Callable[[Path], Any]] = {
    r"pickles only \(pytorch_model.bin\)": _pickled,
    "has neither model.safetensors.index.json nor model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "must hold a JSON object, holds a list": lambda f: _dump(f / "config.json", []),
    "lack lm_head.weight": _rewritten(lambda t: t.pop("lm_head.weight")),
    "hold a, which a NativeDream does not have": _rewritten(lambda t: t.update(a=torch.ones(1))),
    r"model.norm.weight is \[23\]": _rewritten(lambda t: t.update({NORM: torch.ones(23)})),
    "model.norm.weight is I8": _rewritten(lambda t: t.update({NORM: torch.ones(24, dtype=torch.int8)})),
    r"several kinds, \['BF16', 'F32'\]: choose with dtype=": _rewritten(lambda t: t.update({NORM: t[NORM].bfloat16()})),
    "lacks b.safetensors, which model.safetensors.index.json lists": _indexed({NORM: "b.safetensors"}),
    "'../model.safetensors', which is no safetensors file": _indexed({NORM: "../model.safetensors"}),
    "'a.bin', which is no safetensors file": _indexed({NORM: "a.bin"}),
    "lacks a, which model.safetensors.index.json promises": _indexed({"a": "model.safetensors"}),
    "is in a.safetensors and in model.safetensors": lambda f: (
        shutil.copy(f / "model.safetensors", f / "a.safetensors"),
        _indexed({NORM: "a.safetensors", "lm_head.weight": "model.safetensors"})(f),
    ),
}


@pytest.mark.parametrize("message", REFUSED_FILES)
def test_files_that_are_not_the_model(message: str, tmp_path: Path) -> None:
    REFUSED_FILES[message](write(tmp_path, "dream"))
    with pytest.raises(ValueError, match=message):
        load_native(tmp_path)


def test_mistakes_in_the_arguments(tmp_path: Path) -> None:
    write(tmp_path, "dream")
    with pytest.raises(ValueError, match="neither a folder nor the name of a repository"):
        load_native(tmp_path / "absent")
    with pytest.raises(ValueError, match="revision='main' is for the hub"):
        load_native(tmp_path, revision="main")
    with pytest.raises(TypeError, match=r"dtype must be a floating torch.dtype or None, got 'bfloat16'"):
        load_native(tmp_path, dtype="bfloat16")
    from bgpo_kernels.models.native_models import NativeLLaDA

    with pytest.raises(ValueError, match="holds a NativeDream, not a NativeLLaDA"):
        NativeLLaDA.from_pretrained(tmp_path)


def test_what_a_masked_lm_does_not_take(tmp_path: Path) -> None:
    model = load_native(write(tmp_path, "dream"))
    ids = some_ids()
    with pytest.raises(ValueError, match="does not take labels: the loss of transformers is that of the next token"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="does not take attention_bias"):
        model(ids, attention_bias=torch.zeros(3, 1, 12, 12))
    with pytest.raises(ValueError, match="does not take is_causal"):
        model(ids, is_causal=True)
    with pytest.raises(ValueError, match="attention_mask must be a tensor, None or 'full', got 'causal'"):
        model(ids, attention_mask="causal")
    with pytest.raises(TypeError, match="use the sampler of your trainer"):
        model.generate(ids)
    with torch.no_grad():
        full = model(ids, attention_mask="full", is_causal=False, labels=None).logits
        assert torch.equal(full, model(ids).logits)
