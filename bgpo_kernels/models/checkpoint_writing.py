"""Writing a native model as its official checkpoint: names, shards, config.json, and the files that go with them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))
_COMPANIONS = ("*.py", "generation_config.json")  # what the remote code needs besides; copied, never run


def save_official(
    model: Any,
    save_directory: str | PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    push_to_hub: bool = False,
    variant: str | None = None,
    **_: Any,  # of transformers' save_pretrained, without meaning here: token, save_function, save_peft_format, ...
) -> None:
    """Write `model` so that the remote code, and `load_native`, load it: safetensors, index, config.json.

    config.json is the one that was loaded, with the size of the vocabulary and the dtype brought up to date. The
    remote code's own files and generation_config.json are copied from where the model was loaded, unless they are
    there already. One shard at a time is copied to the host. Weights of an earlier save in the folder go.

    Args:
        is_main_process: False writes nothing, for the other ranks of a distributed run.
        state_dict: what to write instead of the model's own, under transformers' or official names: the gathered
            weights of a sharded model. An empty one leaves weights alone and writes the rest (Trainer under ZeRO-3).

    Raises:
        ValueError: pickles or an upload are asked for; tensors are missing, unknown (an adapter that is not merged),
            of another shape (sharded or quantised), or not whole in this process. Nothing has been written then.
    """
    if not safe_serialization:
        raise ValueError("safe_serialization=False would write pickles; weights are written as safetensors only")
    if push_to_hub or variant is not None:
        raise ValueError("push_to_hub and variant are not served: save, then huggingface_hub.upload_folder(...)")
    if not is_main_process:
        return
    tensors = _official_tensors(model, model.state_dict() if state_dict is None else state_dict)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        _write_shards(folder, tensors, max_shard_size)
    config = json.dumps(_official_config(model, tensors), indent=2, sort_keys=True)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    _copy_companions(model.official_folder, folder)


def expected(model: Any) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the parameters that a checkpoint of this model holds, from its config alone: neither
    adapters, nor sharding, nor quantisation of the live model show. A tied head is not stored."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    for name, parameter in twin.named_parameters():
        if not (model.config.tie_word_embeddings and name == "lm_head.weight"):
            yield name, parameter.shape


def _official_tensors(model: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`given` under official names, in the order of the model; ValueError unless it is the whole model."""
    if not given:
        return {}
    given = {name.replace("_orig_mod.", ""): tensor for name, tensor in given.items()}  # of torch.compile
    wanted = {model.official_name(name): (name, shape) for name, shape in expected(model)}
    tied = {"lm_head.weight", model.official_name("lm_head.weight")} if model.config.tie_word_embeddings else set()
    found = {
        name: given[native] if native in given else given[name]
        for name, (native, _) in wanted.items()
        if native in given or name in given
    }
    known = wanted.keys() | {native for native, _ in wanted.values()} | tied
    if stray := [name for name in given if name not in known]:
        raise ValueError(
            f"cannot save: {some(stray)} {'are' if len(stray) > 1 else 'is'} no part of a {type(model).__name__}; "
            "merge adapters first (peft: model.merge_and_unload())"
        )
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"cannot save: {some(missing)} not in the state dict; pass the whole one as state_dict=")
    for name, tensor in found.items():
        native, shape = wanted[name]
        if type(tensor).__name__ == "DTensor" or tensor.is_meta or tensor.shape != shape:
            kind = f"{type(tensor).__name__} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(
                f"cannot save {native}, a {kind} instead of a whole tensor {list(shape)}: gather a sharded model and "
                "pass state_dict= (accelerate: accelerator.get_state_dict(model)); a quantised one cannot be saved"
            )
    return found


def _write_shards(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> None:
    """Files named as transformers names them; those of an earlier save that are not written again are removed."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=max_shard_size, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        # Copied, since parameters may be views of one flat buffer and safetensors wants tensors of their own.
        own = torch.contiguous_format
        shard = {name: tensors[name].detach().to("cpu", copy=True, memory_format=own) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    written = set(split.filename_to_tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        written.add(INDEX)
    for old in folder.iterdir():
        if _OURS.fullmatch(old.name) and old.name not in written:
            old.unlink()


def _official_config(model: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    official = deepcopy(model.config.official)
    rows = model.config.vocab_size
    size = official.get("embedding_size") or official["vocab_size"]
    if rows != size:  # the vocabulary was resized
        official |= {"vocab_size": rows} | ({"embedding_size": rows} if "embedding_size" in official else {})
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        dtype = str(dtypes.pop()).removeprefix("torch.")
        official |= {name: dtype for name in ("torch_dtype", "dtype") if name in official}
    return official


def _copy_companions(source: str | None, folder: Path) -> None:
    for pattern in _COMPANIONS:
        for file in Path(source).glob(pattern) if source is not None else ():
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def some(names: list[str]) -> str:
    """At most four of them."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
