"""Loading models whose code comes with their weights (LLaDA-MoE, LLaDA2, SDAR, TraDo, MMaDA, ...), checked at load.

Such a folder or hub repository names Python files in the `auto_map` of its config.json, and transformers *runs* them.
`load_remote` runs them only when told to, reads weights from safetensors only (a pickle is a program as well, though
nothing binds the remote code itself), and asks the loaded model whether it attends as its kind should.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .block_probe import assert_block_semantics, resolve_block_length
from .heads import HeadSpec, find_head, model_spec, unwrap
from .probe import assert_bidirectional

_AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")  # the first that comes with a head
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_padding: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def load_remote(
    path_or_hub_id: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **from_pretrained_kwargs: Any,
) -> nn.Module:
    """A model with its own code, in evaluation mode, on `device` (unless a `device_map` is passed).

    Args:
        path_or_hub_id: a local folder, or a repository of the Hugging Face hub.
        trust_remote_code: True runs the Python files that the config's `auto_map` names. Read them first.
        dtype: of the weights; None: that of the checkpoint.
        from_pretrained_kwargs: passed on (`revision`, `attn_implementation`, `device_map`, ...).

    A model that is causal is refused. One that turns causal, or attends to padding, only when it is given a padding
    mask is accepted with a warning, since the calls of this package cut padding away and never pass one;
    `padding_problem(model)` tells later.

    Raises:
        ValueError: no `auto_map`; remote code that you did not ask for (the message names its files); weights that are
            pickles; an attention that is not what the kind of model should have; a head that cannot be used.
        RuntimeError: the remote code does not run with the installed transformers.
    """
    import transformers

    if from_pretrained_kwargs.pop("use_safetensors", True) is not True:
        raise ValueError("use_safetensors must be True: weights are not read from pickles, which can run code")
    where = str(path_or_hub_id)
    hub = {k: v for k, v in from_pretrained_kwargs.items() if k in _HUB_OPTIONS}
    config, _ = transformers.PretrainedConfig.get_config_dict(where, **hub)
    auto_map: dict[str, Any] = config.get("auto_map") or {}
    kind = next((name for name in _AUTO_CLASSES if name in auto_map), None)
    if kind is None or "AutoConfig" not in auto_map:
        raise ValueError(
            f"the config of {where} has no auto_map with AutoConfig and one of {', '.join(_AUTO_CLASSES)}, so no "
            "model code comes with it: load it with transformers' own class, or LLaDA and Dream with "
            "bgpo_kernels.models.load_native"
        )
    if trust_remote_code is not True:
        raise ValueError(
            f"loading {where} would run these Python files on this machine: {', '.join(_code_files(where, auto_map))}. "
            "Read them and pass trust_remote_code=True. LLaDA and Dream need none of it: "
            "bgpo_kernels.models.load_native runs transformers' own layers"
        )
    _refuse_pickles(where)
    named = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"  # before 4.56
    options = from_pretrained_kwargs | {named: "auto" if dtype is None else dtype}
    try:
        model = _load(where, auto_map, kind, options)
    except (AttributeError, ImportError, KeyError, NameError, TypeError) as error:
        raise RuntimeError(
            f"the code of {where}, written for transformers {config.get('transformers_version', '?')}, does not run "
            f"with transformers {transformers.__version__} and what else is installed here ({type(error).__name__}: "
            f"{error}). Install what it asks for; LLaDA and Dream load by bgpo_kernels.models.load_native without it"
        ) from error
    if "device_map" not in from_pretrained_kwargs:
        model = model.to(device)
    model.eval()
    _check(model)
    return model


def padding_problem(model: nn.Module) -> str | None:
    """What `load_remote` found wrong with this model under a padding mask, or None."""
    return _padding.get(unwrap(model))


def _load(where: str, auto_map: dict[str, Any], kind: str, options: dict[str, Any]) -> Any:
    """The model, by the very classes its own files define.

    Not by transformers' auto classes: they remember the first model class of a configuration class, and so load the
    second of two forks that differ in their modeling file alone with the code of the first.
    """
    from transformers import PreTrainedModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    source = {k: v for k, v in options.items() if k in (*_HUB_OPTIONS, "code_revision")}
    options = {k: v for k, v in options.items() if k != "code_revision"}
    config_class: Any = get_class_from_dynamic_module(auto_map["AutoConfig"], where, **source)
    model_class: Any = get_class_from_dynamic_module(auto_map[kind], where, **source)
    config_class.register_for_auto_class()  # so that save_pretrained writes the code beside the weights
    model_class.register_for_auto_class(kind)
    options.setdefault("config", config_class.from_pretrained(where, **{k: options[k] for k in source if k in options}))
    inherited: Any = PreTrainedModel.from_pretrained
    if model_class.from_pretrained.__func__ is not inherited.__func__:  # Dream's, which hands nothing on but the model
        return model_class.from_pretrained(where, use_safetensors=True, **options)
    model, info = model_class.from_pretrained(where, use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"the weights of {where} lack {len(missing)} of the tensors of {model_class.__name__}, which would start "
            f"at random: {', '.join(missing[:4])}"
        )
    return model


def _check(model: nn.Module) -> None:
    """Refuse a model that attends in another way than its kind should; note what it does under a padding mask."""
    spec = find_head(model)
    if model_spec(model).attention == "block":
        assert_block_semantics(model, spec, resolve_block_length(model, None))
        return
    assert_bidirectional(model, spec)
    problem = _under_padding(model, spec)
    if problem is not None:
        _padding[unwrap(model)] = problem
        warnings.warn(
            f"{problem} This package never passes a padding mask, so its results are right; calls of your own with "
            "one (generation in batches, say) are not",
            stacklevel=3,
        )


def _under_padding(model: nn.Module, spec: HeadSpec) -> str | None:
    if "attention_mask" not in inspect.signature(unwrap(model).forward).parameters:
        return None
    try:
        assert_bidirectional(model, spec, padded=True)
    except ValueError as error:
        return str(error)
    except Exception as error:  # whatever foreign code raises: Dream's takes no [B, T] mask at all
        return f"{type(model).__name__} fails under a padding mask: {type(error).__name__}: {error}."
    return None


def _refuse_pickles(where: str) -> None:
    """For a folder; on the hub, `use_safetensors=True` finds no weights."""
    folder = Path(where)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{where} has no *.safetensors, only {', '.join(pickles[:4])}: pickles can run code and are not read. "
            "Convert them once, on a machine you can lose: model.save_pretrained(folder, safe_serialization=True)"
        )
    raise ValueError(f"{where} has no *.safetensors")


def _code_files(where: str, auto_map: dict[str, Any]) -> list[str]:
    """Python files that loading would run: those named, and what they import from beside them (in a local folder)."""
    found: dict[str, None] = {}
    for reference in _references(auto_map):
        repository, _, name = reference.rpartition("--")
        module = name.split(".")[0]
        if repository:
            found[f"{module}.py of {repository}"] = None
        else:
            found |= dict.fromkeys(_with_imports(Path(where), module))
    return list(found)


def _references(auto_map: dict[str, Any]) -> Iterator[str]:
    """Of the form "repository--module.Class" or "module.Class"; what tokenizers name is not run by loading a model."""
    for name, value in auto_map.items():
        if isinstance(value, str) and (name == "AutoConfig" or name in _AUTO_CLASSES):
            yield value


def _with_imports(folder: Path, module: str) -> list[str]:
    waiting, found = [module], []
    while waiting:
        name = waiting.pop(0)
        if f"{name}.py" in found:
            continue
        found.append(f"{name}.py")
        path = folder / f"{name}.py"
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                waiting += [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
    return found
