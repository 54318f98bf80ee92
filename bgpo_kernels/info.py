"""What is installed here and which engine serves which device: ``python -m bgpo_kernels.info [--json]``.

Reports and never raises on what a machine lacks: every absence becomes a sentence.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from . import __version__, backends, workspace

_OPTIONAL = ("triton", "transformers")
_NAMES = tuple(name for name in backends.BACKENDS if name != "auto")


def collect() -> dict[str, Any]:
    """Versions, engines, GPUs, workspace sizes and, per device, why each backend does not serve it (None: it does)."""
    gpus, no_gpu = _gpus()
    devices = ["cpu", *(gpu["device"] for gpu in gpus)]
    table = {name: _backends(torch.device(name)) for name in devices}
    if no_gpu is not None:
        not_cuda = backends.why_not("cpu", torch.device("cuda"))
        table["cuda"] = {"serves": {name: not_cuda if name == "cpu" else no_gpu for name in _NAMES}, "auto": None}
    return {
        "versions": {
            "bgpo_kernels": __version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda or torch.version.hip,
            **{name: _version(name) for name in _OPTIONAL},
        },
        "engines": {"cpu": _cpu_engine(), "cuda": _cuda_engine()},
        "triton_interpreted": backends.triton_interpreted(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "no_gpu": no_gpu,
        "devices": table,
        "workspace_bytes": {kind: workspace.workspace_bytes(kind) for kind in ("cpu", "cuda")},
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiled(name: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module, or why there is none."""
    try:
        return importlib.import_module(f"bgpo_kernels.{name}"), None
    except ImportError as error:
        return None, str(error)


def _cpu_engine() -> dict[str, Any]:
    module, reason = _compiled("_cpu")
    if module is None:
        return {"built": False, "reason": reason}
    return {"built": True, "instruction_set": module.isa().removeprefix("kernels_")}


def _cuda_engine() -> dict[str, Any]:
    module, reason = _compiled("_cuda")
    if module is None:
        return {"built": False, "reason": reason}
    return {"built": True, "archs": getattr(module, "ARCHS", None), "toolkit": getattr(module, "TOOLKIT_VERSION", None)}


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Every GPU that torch can use, or why there is none."""
    if torch.version.cuda is None and torch.version.hip is None:
        return [], f"torch {torch.__version__} is built without CUDA"
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = [_gpu(index) for index in range(count)]
    except (RuntimeError, AssertionError, OSError) as error:  # a driver that is there and does not work
        return [], str(error)
    return found, None if found else "torch finds no device or no driver"


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _backends(device: torch.device) -> dict[str, Any]:
    serves = {name: backends.why_not(name, device) for name in _NAMES}
    return {"serves": serves, "auto": backends.resolve("auto", device)}


def render(info: dict[str, Any]) -> str:
    """The report that people read."""
    lines = [f"{name:<14}{text}" for name, text in _facts(info)]
    lines += ["", f"{'device':<10}{'backend':<12}serves"]
    for device, row in info["devices"].items():
        for name, reason in row["serves"].items():
            verdict = "yes" if reason is None else f"no: {reason}"
            chosen = "  <- auto" if row["auto"] == name else ""
            lines.append(f"{device:<10}{name:<12}{verdict}{chosen}")
    return "\n".join(lines)


def _facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    versions, cpu, cuda = info["versions"], info["engines"]["cpu"], info["engines"]["cuda"]
    interpreted = ", interpreted (TRITON_INTERPRET)" if info["triton_interpreted"] else ""
    gpus = [
        f"{gpu['device']} {gpu['name']} ({gpu['capability']}, {_size(gpu['memory_bytes'])})" for gpu in info["gpus"]
    ]
    return [
        ("bgpo_kernels", versions["bgpo_kernels"]),
        ("python", f"{versions['python']}, {versions['platform']}"),
        ("torch", f"{versions['torch']}, {info['threads']} threads on {info['cores']} cores"),
        ("triton", (versions["triton"] or "not installed") + interpreted),
        ("transformers", versions["transformers"] or "not installed"),
        ("CPU engine", f"{cpu['instruction_set']} kernels" if cpu["built"] else f"none: {cpu['reason']}"),
        ("CUDA kernels", _cuda_text(cuda)),
        ("GPUs", "; ".join(gpus) or f"none: {info['no_gpu']}"),
        ("workspace", ", ".join(f"{_size(size)} on {kind}" for kind, size in info["workspace_bytes"].items())),
    ]


def _cuda_text(cuda: dict[str, Any]) -> str:
    if not cuda["built"]:
        return f"none: {cuda['reason']} (the log of `pip install -v .` says why)"
    toolkit = cuda["toolkit"]
    version = "" if toolkit is None else f" by CUDA {toolkit // 1000}.{toolkit % 1000 // 10}"
    return f"built for {cuda['archs'] or 'unknown architectures'}{version}"


def _size(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.4g} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0 always, for what is missing here is what it reports."""
    parser = argparse.ArgumentParser(
        prog="python -m bgpo_kernels.info",
        description="Versions, compiled engines and GPUs, and which backend serves which device here.",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON; a null reason means that it serves")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
