"""Compile every Triton kernel for Hopper without a GPU, exactly as its public caller would launch it; print JSON.

Run by ``test_triton_compile.py`` in a process of its own, where Triton's interpreter is off. The backend functions are
called on CPU tensors with a driver that says "sm_90" and a launch that stops after compilation, so that signature,
divisibility hints, options and tiles are those of a real call. One JSON object per line and launch: the kernel's name
and case, a number that launches of one compiled kernel share, registers, shared bytes, SASS opcodes with their counts,
and the order of its memory operations. Case "x, annealed" is case "x" with every number changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))
from mask_model import make_spec

from bgpo_kernels.bound import triton_kernels as bound
from bgpo_kernels.bound.segments import RowSegments, SegmentBound
from bgpo_kernels.head import triton_kernels as head
from bgpo_kernels.head.options import LogitTransform
from bgpo_kernels.masks import triton_kernels as masks
from bgpo_kernels.masks.reference import Counts
from bgpo_kernels.masks.schedule import HARMONIC, CountSchedule

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Hopper:
    """The few driver calls that compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def collect_launches() -> list[tuple[str, object]]:
    """From here on a launch only compiles; returns the growing list of (kernel name, compiled kernel)."""
    compiled: list[tuple[str, object]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *args, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Hopper())
    return compiled


def disassemble(cubin: bytes) -> tuple[list[str], int]:
    """SASS opcodes with their modifiers, in program order, and registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    registers = re.search(r"REG:(\d+)", usage)
    assert opcodes and registers, "cuobjdump's output was not understood"
    return opcodes, int(registers.group(1))


def memory_order(opcodes: list[str]) -> str:
    """Vector loads (L), barriers (B) and global stores (S) in program order, repeats merged."""
    kinds = {"LDG.E.128": "L", "BAR": "B", "STG": "S"}
    letters = (kinds.get(op) or kinds.get(op.split(".")[0], "") for op in opcodes)
    return re.sub(r"(.)\1+", r"\1", "".join(letters))


def mask_cases() -> dict[str, Callable[[], object]]:
    tokens, n_mc = 1024, 4
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    response = ids == 0
    laws = {
        "exact": ("exact", "stratified"),
        "table": ("exact", HARMONIC),
        "bernoulli": ("bernoulli", "stratified"),
        "coupled": ("coupled", "uniform"),
        "full": ("full", "stratified"),
        "exact, shifted": ("exact", "stratified", 2, 1 << 32),
    }

    def draw(scheme: str, schedule: str | CountSchedule, samples: int = n_mc, threshold: int = 1 << 30) -> None:
        spec = make_spec(scheme, schedule, n_mc, [tokens, tokens], (1, samples), prompt_threshold=threshold)
        counts = Counts(*(torch.full((2 * spec.samples + 1,), 5),) * 3)
        masks.draw(ids, response, response, torch.arange(4)[4 - samples :][:2], spec, counts)

    return {name: lambda law=law: draw(*law) for name, law in laws.items()}


def head_cases() -> dict[str, Callable[[], object]]:
    every_option = LogitTransform(scale=0.5, softcap=30.0, temperature=0.7)
    annealed = LogitTransform(scale=-3.0, softcap=5.0, temperature=16.0)

    def rows(
        vocab: int, dtype: torch.dtype, out: torch.dtype, transform: LogitTransform, extras: bool, shifted: bool = False
    ) -> None:
        clip = (0.2, 0.3, 3.0) if transform is annealed else (math.inf,) * 3
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        shift = 1 if shifted else 0  # slices of larger tensors, as chunks have them, are aligned by chance only
        step = 16 // dtype.itemsize  # ragged vocabularies have 16-byte aligned rows in the workspace
        stride = -(-vocab // step) * step
        logits = torch.zeros(2, stride, dtype=dtype)[:, :vocab]
        targets, stats = torch.zeros(3, dtype=torch.int64)[shift:][:2], torch.ones(4, 3, dtype=acc)[:, shift:][:, :2]
        bias = torch.zeros(vocab, dtype=acc) if extras else None
        g = torch.zeros(3, dtype=acc)[shift:][:2]
        head.row_statistics(logits, targets, bias, transform, stats, extras)
        head.dlogits_(logits, targets, bias, transform, stats, g, g if extras else None, out)
        old = torch.zeros(2, 2, dtype=acc) if extras else None  # off-policy with all options, on-policy without
        bound = SegmentBound(g, old, torch.ones(2) if extras else None, clip, 4.0, (2, 2), "triton")
        offsets, weight = torch.tensor([4, 5, 6, 7])[1 - shift :][:3], torch.ones(3)[shift:][:2]
        segments = RowSegments(offsets, weight, 5 - shift, 7 - shift, 2, 4, bound)
        sums = torch.zeros(3, dtype=acc)[shift:][:2]
        head.bound_dlogits_(logits, targets, bias, transform, stats, segments, sums, out)

    f32, f64, bf16, f16, plain = torch.float32, torch.float64, torch.bfloat16, torch.float16, LogitTransform()
    arguments = {
        "llada fp32": (126464, f32, f32, plain, False),
        "llada fp32 to bf16": (126464, f32, bf16, plain, False),
        "llada bf16": (126464, bf16, bf16, plain, False),
        "dream fp32 to fp16": (152064, f32, f16, plain, False),
        "ragged fp32 to bf16": (50257, f32, bf16, plain, False),
        "entropy fp32 to bf16": (126464, f32, bf16, plain, True),
        "all options fp32 to bf16": (126464, f32, bf16, every_option, True),
        "llada fp32 to bf16, shifted": (126464, f32, bf16, plain, False, True),
        "all options fp64": (126464, f64, f64, every_option, True),
        "all options fp32 to bf16, annealed": (126464, f32, bf16, annealed, True),
        "all options fp64, annealed": (126464, f64, f64, annealed, True),
    }
    return {name: lambda a=a: rows(*a) for name, a in arguments.items()}


def bound_cases() -> dict[str, Callable[[], object]]:
    offsets, weight = torch.zeros(33, dtype=torch.int64), torch.ones(32)

    def both(dtype: torch.dtype, clip: tuple[float, float, float], off: tuple[float, float, float]) -> None:
        samples = torch.zeros(8, 16, dtype=dtype)
        bound.segment_sum(torch.zeros(99, dtype=dtype), offsets, weight)
        bound.bound(samples, weight[:8], samples, weight[:8], *clip)
        bound.bound(samples, weight[:8], None, None, *off)

    numbers = {"": ((0.2, 0.2, 3.0), (math.inf,) * 3), ", annealed": ((1.0, 0.0, 1.5), (0.3, 16.0, math.inf))}
    dtypes = {"fp32": torch.float32, "fp64": torch.float64}
    return {
        name + when: lambda dtype=dtype, clips=clips: both(dtype, *clips)
        for name, dtype in dtypes.items()
        for when, clips in numbers.items()
    }


def main() -> None:
    compiled = collect_launches()
    for name, call in (mask_cases() | head_cases() | bound_cases()).items():
        compiled.clear()
        call()
        for kernel_name, kernel in compiled:
            opcodes, registers = disassemble(kernel.asm["cubin"])
            facts = {
                "case": name,
                "kernel": kernel_name,
                "compiled": id(kernel),  # Triton keeps every compiled kernel for as long as the process runs
                "registers": registers,
                "shared": kernel.metadata.shared,
                "opcodes": Counter(opcodes),
                "memory_order": memory_order(opcodes),
            }
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
