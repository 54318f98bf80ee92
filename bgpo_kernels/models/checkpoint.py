"""Official checkpoints of LLaDA, Dream and DiffuCoder in transformers' own layers: `load_native`.

Names, shapes and dtypes are compared from the headers of all files before a single weight is read; then one tensor
after the other is copied to its place, so the peak is the model and one tensor (the files are mapped, not read whole).
Weights come from safetensors alone: unpickling runs code. The checkpoint's own code is never imported.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .bidirectional import make_bidirectional
from .checkpoint_writing import INDEX, expected, some

_SINGLE = "model.safetensors"
_HUB_FILES = ["*.safetensors", "*.json", "*.py"]  # .py: for save_pretrained to hand on, not to run
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Header(NamedTuple):
    """What a file says of one tensor, which is read without its values."""

    file: str
    shape: list[int]
    kind: str


def load_native(
    path_or_hub_id: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> Any:
    """An official checkpoint of LLaDA, Dream or DiffuCoder in native transformers layers, looking in both directions.

    `find_head` knows the result (scaled logits, tied head, Dream's shift by one), `config.mask_token_id` is the
    checkpoint's, and `save_pretrained` writes the official layout back. It is in evaluation mode.

    Args:
        path_or_hub_id: a folder with config.json and safetensors, or the name of a repository on the hub.
        dtype: of the weights; None keeps that of the files.
        attn_implementation: of transformers: "sdpa" (its default), "eager", "flash_attention_2", ...
        revision: of the repository: a branch, tag or commit.

    Returns:
        A `NativeLLaDA` (a transformers LlamaForCausalLM) or a `NativeDream` (a Qwen2ForCausalLM).

    Raises:
        ValueError: no such folder; another kind of model; an option in config.json that these layers do not carry out;
            weights in pickles only; tensors that are missing, unknown or of another shape or kind.
        TypeError: dtype is no torch.dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    device = torch.device(device)
    folder = _folder(path_or_hub_id, revision)
    official = _read_json(folder / "config.json")
    files = _weight_files(folder)
    model = _empty_model(official, attn_implementation, str(path_or_hub_id))
    headers = _headers(folder, files)
    _drop_tied_head(model, folder, headers)
    _check_headers(model, folder, headers)
    dtype = _dtype_of(folder, headers) if dtype is None else dtype
    _fill(model, folder, headers, dtype, device)
    model.config.dtype = dtype
    model.official_folder = str(folder)
    return make_bidirectional(model).eval()


def _folder(path_or_hub_id: str | PathLike[str], revision: str | None) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the hub, but {path} is a folder here")
        return path
    name = str(path_or_hub_id)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{name} is neither a folder nor the name of a repository on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}")
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, holds a {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> dict[str, list[str] | None]:
    """File names with the tensors that the index promises of each (None: no index)."""
    if (folder / INDEX).is_file():
        promised: dict[str, list[str]] = {}
        for name, file in _read_json(folder / INDEX)["weight_map"].items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX} points to {file!r}, which is no safetensors file beside it")
            promised.setdefault(file, []).append(name)
        if absent := [file for file in promised if not (folder / file).is_file()]:
            raise ValueError(f"{folder} lacks {some(absent)}, which {INDEX} lists")
        return dict(promised)
    if (folder / _SINGLE).is_file():
        return {_SINGLE: None}
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds its weights in pickles only ({some(pickles)}). Unpickling runs whatever code they carry, "
            "so they are not read: use a safetensors copy of the checkpoint"
        )
    raise ValueError(f"{folder} has neither {INDEX} nor {_SINGLE}")


def _empty_model(official: dict[str, Any], attn_implementation: str | None, name: str) -> Any:
    """The model on the meta device: no memory, no initialisation."""
    kind = official.get("model_type")
    if kind not in ("llada", "Dream"):
        raise ValueError(f"config.json of {name} has model_type={kind!r}; native layers exist for 'llada' and 'Dream'")
    import transformers

    from .native_layouts import dream_fields, llada_fields
    from .native_models import NativeDream, NativeLLaDA

    configs: Any = transformers  # typed so, as mypy would match each field with each value
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        if kind == "llada":
            model: Any = NativeLLaDA(configs.LlamaConfig(**llada_fields(official), **options))
            model.model.embed_tokens.padding_idx = None  # LLaDA trains the embedding of its padding, the eos token
        else:
            model = NativeDream(configs.Qwen2Config(**dream_fields(official), **options))
    # The angles are a buffer that no checkpoint holds: made again where they have values.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.config._name_or_path = model.name_or_path = name
    return model


def _headers(folder: Path, files: dict[str, list[str] | None]) -> dict[str, Header]:
    """Of every tensor in the files, which must hold what the index promises, once."""
    from safetensors import safe_open

    found: dict[str, Header] = {}
    for file, promised in files.items():
        with safe_open(folder / file, framework="pt") as tensors:
            names = sorted(tensors.keys())
            if absent := sorted(set(promised or ()) - set(names)):
                raise ValueError(f"{folder / file} lacks {some(absent)}, which {INDEX} promises")
            for name in names:
                if name in found:
                    raise ValueError(f"{name} is in {found[name].file} and in {file} of {folder}")
                header = tensors.get_slice(name)
                found[name] = Header(file, list(header.get_shape()), header.get_dtype())
    return found


def _drop_tied_head(model: Any, folder: Path, headers: dict[str, Header]) -> None:
    """A head that config.json ties to the embedding may be stored too; ValueError if it is not the same."""
    head, embedding = (model.official_name(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if not model.config.tie_word_embeddings or head not in headers or embedding not in headers:
        return
    if not torch.equal(_tensor(folder, headers, head), _tensor(folder, headers, embedding)):
        raise ValueError(f"config.json ties the head to the embedding, but {head} and {embedding} differ in {folder}")
    del headers[head]


def _tensor(folder: Path, headers: dict[str, Header], name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(folder / headers[name].file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _check_headers(model: Any, folder: Path, headers: dict[str, Header]) -> None:
    """ValueError unless the tensors of the files are the parameters of the model."""
    shapes = {model.official_name(name): list(shape) for name, shape in expected(model)}
    if missing := sorted(shapes.keys() - headers.keys()):
        raise ValueError(f"the files of {folder} lack {some(missing)}")
    if unknown := sorted(headers.keys() - shapes.keys()):
        raise ValueError(f"the files of {folder} hold {some(unknown)}, which a {type(model).__name__} does not have")
    for name, (file, shape, kind) in headers.items():
        if shape != shapes[name]:
            raise ValueError(f"{name} is {shape} in {file} of {folder}, but config.json makes it {shapes[name]}")
        if kind not in _DTYPES:
            raise ValueError(f"{name} is {kind} in {file} of {folder}: only {', '.join(_DTYPES)} are read")


def _dtype_of(folder: Path, headers: dict[str, Header]) -> torch.dtype:
    kinds = {header.kind for header in headers.values()}
    if len(kinds) > 1:
        raise ValueError(f"the files of {folder} hold tensors of several kinds, {sorted(kinds)}: choose with dtype=")
    return _DTYPES[kinds.pop()]


def _fill(model: Any, folder: Path, headers: dict[str, Header], dtype: torch.dtype, device: torch.device) -> None:
    """Every parameter on `device` in `dtype`, one after the other."""
    from safetensors import safe_open

    native = {model.official_name(name): name for name, _ in expected(model)}
    for file in sorted({header.file for header in headers.values()}):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in [name for name, header in headers.items() if header.file == file]:
                owner, _, leaf = native[name].rpartition(".")
                # A copy: what safetensors returns on a CPU is the mapped file, which a later save may overwrite.
                value = tensors.get_tensor(name).to(device, dtype, copy=True)
                model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb.to(device)
    if empty := [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]:
        raise RuntimeError(f"{some(empty)} got no value, which this version of transformers must have added")
