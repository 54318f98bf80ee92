"""Small random checkpoints in the official layouts, and what plain torch makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import plain_dream
import plain_llada
import pytest
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

MASK = 59
INDEX = "model.safetensors.index.json"
KINDS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "llada": (plain_llada, plain_llada.CONFIG),
    "llada scaled": (plain_llada, plain_llada.CONFIG | {"scale_logits": True}),
    "llada tied": (plain_llada, plain_llada.CONFIG | {"weight_tying": True}),
    "dream": (plain_dream, plain_dream.CONFIG),
    "dream tied": (plain_dream, plain_dream.CONFIG | {"tie_word_embeddings": True}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("kind", ["llada", "dream"])


def write(folder: Path, kind: str, *, shards: int = 1, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A checkpoint as its authors publish them."""
    plain, base = KINDS[kind]
    config = base | config
    tensors = plain.tensors(config, dtype)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('the remote code was run')\n")
    (folder / "generation_config.json").write_text('{"mask_token_id": 59}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def plain_logits(kind: str, weights: dict[str, Tensor], ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    plain, config = KINDS[kind]
    return plain.logits(config, {name: tensor.to(dtype) for name, tensor in weights.items()}, ids)


def some_ids(batch: int = 3, length: int = 12) -> Tensor:
    return torch.randint(0, 58, (batch, length), generator=torch.Generator().manual_seed(8))


def assert_is_plain(model: Any, kind: str, weights: dict[str, Tensor]) -> None:
    ids = some_ids()
    with torch.no_grad():
        ours = model(ids).logits
    assert_as_good_as_torch(ours, plain_logits(kind, weights, ids, torch.float32), plain_logits(kind, weights, ids))
