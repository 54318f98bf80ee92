"""Compile a CUDA source for one architecture and read what became of its kernels, without a GPU."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from machine_code import Instruction, disassemble

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))

# Mangled as the Itanium ABI has it: In, sometimes Out (S3_: the same again), then booleans.
BYTES = {"f": 4, "d": 8, "NS0_4HalfE": 2, "NS0_8BFloat16E": 2}
TEMPLATE = re.compile(rf"I({'|'.join(BYTES)})({'|'.join(BYTES)}|S\d_)?((?:Lb[01]E)*)E")
ENTRY = re.compile(r"\.entry (\w+)\((.*?)^\{", re.M | re.S)  # of PTX: name, parameters and launch bounds


class Kernel(NamedTuple):
    name: str
    types: tuple[str, ...]  # mangled: of a logit, or of what a segment kernel computes in; of a gradient
    options: str  # one 0 or 1 each
    code: list[Instruction]
    registers: int  # per thread
    shared: int  # bytes
    memory: tuple[int, ...]  # bytes of stack frame, spill stores and spill loads
    threads: int  # of a CTA
    resident: int | None  # CTAs on a multiprocessor that the launch bounds ask for

    @property
    def label(self) -> str:
        return f"{self.name}<{', '.join(self.types)}; {self.options}>"

    @property
    def bytes(self) -> tuple[int, ...]:
        return tuple(BYTES[name] for name in self.types)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc" if home else "", shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file()), None)


def constant_of_setup(name: str) -> Any:
    """A literal of setup.py, without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def written_kernels() -> list[str]:
    """The names of all ``__global__`` functions of the sources."""
    files = sorted(file for file in CUDA.iterdir() if file.suffix in (".cu", ".cuh"))
    text = re.sub(r"//.*", "", "".join(file.read_text() for file in files))
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?"
    names = re.findall(rf"__global__\s+void\s+{bounds}(\w+)\(", text)
    assert len(names) == text.count("__global__"), "a kernel's declaration was not understood"
    return sorted(names)


def compile_kernels(nvcc: str, cuobjdump: str, source: Path, arch: str, folder: Path) -> list[Kernel]:
    """Every kernel of a source: from ptxas's report, the launch bounds in its PTX, and its machine code."""
    folder.mkdir()
    cubin = folder / f"{source.stem}.cubin"
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-Xptxas=-v", "-keep", f"-keep-dir={folder}"]
    command = [nvcc, *constant_of_setup("CUDA_COMMON"), *options, "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    entries = re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", done.stderr, re.S)
    if not entries:
        return []
    ptx = "".join(file.read_text() for file in folder.glob("*.ptx"))
    bounds = {name: dict(re.findall(r"\.(maxntid|minnctapersm) (\d+)", text)) for name, text in ENTRY.findall(ptx)}
    codes = disassemble(cuobjdump, cubin)
    assert dict(entries).keys() == bounds.keys() == codes.keys(), f"{source.name}: ptxas, PTX, machine code disagree"
    return [_kernel(name, report, bounds[name], codes[name].code) for name, report in entries]


def _kernel(mangled: str, report: str, bounds: dict[str, str], code: list[Instruction]) -> Kernel:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    used, shared = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes smem", report)
    assert frames and used and "maxntid" in bounds, f"not understood: {report}"
    return Kernel(
        *_name_and_template(mangled),
        code=code,
        registers=int(used[1]),
        shared=int(shared[1]) if shared else 0,
        memory=tuple(max(map(int, column)) for column in zip(*frames, strict=True)),
        threads=int(bounds["maxntid"]),
        resident=int(bounds["minnctapersm"]) if "minnctapersm" in bounds else None,
    )


def _name_and_template(mangled: str) -> tuple[str, tuple[str, ...], str]:
    """The last of the nested names, each behind its length, and the template arguments that follow it."""
    rest, name = mangled.removeprefix("_ZN"), ""
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    if not rest.startswith("I"):
        return name, (), ""
    found = TEMPLATE.match(rest)
    assert found, f"template arguments not understood: {mangled}"
    same = found[1] if (found[2] or "").startswith("S") else found[2]
    return name, (found[1], same) if same else (found[1],), "".join(re.findall("[01]", found[3]))
