"""The CUDA kernels as a CPU extension: csrc/cuda compiled by g++ against this folder's cuda_runtime.h.

``emulated(cache)`` builds it once per source state and gives the three backend modules (masks, bound, head), which then
take CPU tensors. See cuda_runtime.h for what is and is not modelled.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import bgpo_kernels
import bgpo_kernels.native

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
PACKAGES = ("masks", "bound", "head")


def build(cache: Path) -> Path:
    """``_cuda`` for the CPU, in a folder named after its sources' hash."""
    import pybind11

    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "module.cpp"]
    headers = [*CSRC.glob("bgpo/*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cuh"), *HERE.glob("*.h")]
    state = hashlib.sha256("".join([*FLAGS, *SANITIZE, sys.version]).encode())
    for path in [*sources, *sorted(headers)]:
        state.update(path.read_bytes())
    folder = cache / state.hexdigest()[:16]
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{HERE}", f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        command = ["g++", "-x", "c++", *FLAGS, *SANITIZE, *includes, "-c", str(source), "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / "linking.so"
    subprocess.run(["g++", "-shared", *SANITIZE, *objects, "-o", str(partial)], check=True)
    partial.rename(library)
    return library


def program(source: Path, folder: Path) -> Path:
    """A C++ test that includes kernels' sources, compiled for the CPU."""
    output = folder / source.stem
    command = ["g++", "-x", "c++", *FLAGS, *SANITIZE, f"-I{HERE}", f"-I{source.parent}", str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


def _load(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("bgpo_kernels._cuda", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def emulated(cache: Path) -> SimpleNamespace:
    """The cuda backend modules over the emulator; the package itself is left as it was found."""
    names = ["bgpo_kernels._cuda", *(f"bgpo_kernels.{package}.cuda" for package in PACKAGES)]
    before = {name: sys.modules.pop(name, None) for name in names}
    real, native = getattr(bgpo_kernels, "_cuda", None), bgpo_kernels.native.stream
    module = _load(build(cache))
    try:
        sys.modules["bgpo_kernels._cuda"] = bgpo_kernels._cuda = module
        bgpo_kernels.native.stream = lambda tensor: (0, 0)
        return SimpleNamespace(**{p: importlib.import_module(f"bgpo_kernels.{p}.cuda") for p in PACKAGES})
    finally:
        bgpo_kernels.native.stream = native
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old
        _restore(bgpo_kernels, "_cuda", real)
        for package in PACKAGES:
            _restore(sys.modules[f"bgpo_kernels.{package}"], "cuda", before[f"bgpo_kernels.{package}.cuda"])


def _restore(owner: ModuleType, name: str, value: ModuleType | None) -> None:
    if value is not None:
        setattr(owner, name, value)
    elif hasattr(owner, name):
        delattr(owner, name)
