"""Which engines exist here, and which one serves a call.

    reference   plain torch, any device: the specification
    cpu         compiled C++ engine (``bgpo_kernels._cpu``), CPU tensors
    triton      Triton kernels: CUDA tensors, and CPU tensors under the interpreter (TRITON_INTERPRET=1)
    cuda        compiled CUDA kernels (``bgpo_kernels._cuda``), CUDA tensors, compute capability 8.0 and newer

``backend="auto"`` takes cpu on CPU tensors and cuda, then triton, on CUDA tensors, and falls back to the reference.
Every op keeps one module per engine with the same functions; ``engine(package, name)`` imports it on first use, so that
importing the package needs no compiler, driver or Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_kernels", "cuda": "cuda"}


@cache
def _compiled(name: str) -> str | None:
    """None when ``bgpo_kernels.<name>`` imports, else the reason."""
    try:
        importlib.import_module(f"bgpo_kernels.{name}")
    except ImportError as error:
        if importlib.util.find_spec(f"bgpo_kernels.{name}") is None:
            return f"bgpo_kernels.{name} was not built"
        return f"bgpo_kernels.{name} does not import: {error}"
    return None


@cache
def _triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        missing = importlib.util.find_spec("triton") is None
        return "Triton is not installed" if missing else f"Triton does not import: {error}"
    # The module's own version: distributions of it go by several names (triton, pytorch-triton, ...).
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 2) else f"Triton {version[0]}.{version[1]} is older than 3.2"


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (on the CPU, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def why_not(backend: str, device: torch.device) -> str | None:
    """None when ``backend`` serves tensors on ``device``, else a sentence that says why it does not."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return _compiled("_cpu") if device.type == "cpu" else f"the cpu backend serves CPU tensors, not {device.type}"
    if backend == "triton":
        if device.type == "cpu" and not triton_interpreted():
            return "the triton backend serves CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
        if device.type not in ("cpu", "cuda"):
            return f"the triton backend serves CUDA tensors, not {device.type}"
        return _triton()
    if device.type != "cuda":
        return f"the cuda backend serves CUDA tensors, not {device.type}"
    if (reason := _compiled("_cuda")) is not None:
        return f"{reason} (no nvcc when the package was built, or BGPO_KERNELS_CUDA=0)"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def resolve(backend: str, device: torch.device) -> str:
    """The engine that serves this call.

    Raises:
        ValueError: an unknown name, or an engine that cannot serve the device (with the reason).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        order = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        return next((name for name in order if why_not(name, device) is None), "reference")
    if (reason := why_not(backend, device)) is not None:
        raise ValueError(f"backend={backend!r} cannot serve tensors on {device}: {reason}")
    return backend


@cache
def engine(package: str, backend: str) -> ModuleType:
    """Module of an op's package ("masks", "head", "bound") that implements it for a resolved backend."""
    return importlib.import_module(f"bgpo_kernels.{package}.{_MODULES[backend]}")
