"""Compile every Triton kernel without a GPU, exactly as its public caller would launch it; print JSON.

    python tests/compile_triton.py [90 | 80]

Run by ``test_triton_compile.py`` in processes of its own, where Triton's interpreter is off. The backend functions are
called on CPU tensors with a driver that names a GPU and a launch that stops after compilation, so that signature,
divisibility hints, options and tiles are those of a real call. The first line lists the package's kernels; then comes
one object per launch. Launches of one compiled kernel share its number ``compiled``. A case with a ``change`` is the
case of the same name with what a caller may change from step to step, which must compile nothing; only sm_90 has them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine_code import disassemble, find_cuobjdump, main_loop, opcodes
from mask_model import make_spec

import bgpo_kernels
from bgpo_kernels.bound import triton_kernels as bound
from bgpo_kernels.bound.segments import RowSegments, SegmentBound
from bgpo_kernels.head import triton_kernels as head
from bgpo_kernels.head.options import LogitTransform
from bgpo_kernels.masks import triton_kernels as masks
from bgpo_kernels.masks.reference import Counts
from bgpo_kernels.masks.schedule import HARMONIC, CountSchedule

LLADA_MASK_ID, DREAM_MASK_ID = 126336, 151666


class Case(NamedTuple):
    name: str
    variant: str  # of the kernel's budget
    call: Callable[[], object]
    change: str = ""
    logit_bytes: int = 0
    out_bytes: int = 0


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    compiled: Any


class Driver:
    """The few driver calls that compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def collect_launches(arch: int) -> list[Launch]:
    """From here on a launch only compiles; returns the growing list of launches."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, warmup: bool, **options: object) -> object:
        compiled = run(self, *args, warmup=True, **options)
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | options, compiled))
        return compiled

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Driver(arch))
    return launches


def kernel_names() -> list[str]:
    """Every JIT function called ``*_kernel`` of every Triton module of the package."""
    names = []
    for found in pkgutil.walk_packages(bgpo_kernels.__path__, "bgpo_kernels."):
        if "triton" in found.name.rpartition(".")[2]:
            members = vars(importlib.import_module(found.name)).values()
            kernels = [m.fn for m in members if isinstance(m, JITFunction) and m.fn.__name__.endswith("_kernel")]
            names += [fn.__name__ for fn in kernels if fn.__module__ == found.name]
    return sorted(names)


def memory_order(codes: list[str]) -> str:
    """Vector loads (L), barriers (B) and global stores (S) in program order, repeats merged."""
    kinds = {"LDG.E.128": "L", "BAR": "B", "STG": "S"}
    letters = (kinds.get(op) or kinds.get(op.split(".")[0], "") for op in codes)
    return re.sub(r"(.)\1+", r"\1", "".join(letters))


def divisible_arguments(launch: Launch) -> tuple[list[str], list[str]]:
    """The arguments left in the compiled kernel, and those of them that the compiler was told are multiples of 16."""
    ttir = launch.compiled.asm["ttir"]
    header = ttir[ttir.index("tt.func public") :].partition(" attributes ")[0]
    names, hints = re.findall(r"%(\w+): ", header), re.split(r"%\w+: ", header)[1:]
    if "arg0" in names:  # older Triton numbers them
        names = [p.name for p in launch.kernel.params if not p.is_constexpr and launch.arguments[p.name] is not None]
    return names, [name for name, hint in zip(names, hints, strict=True) if "tt.divisibility = 16" in hint]


def mask_cases() -> Iterator[Case]:
    """Every law at a T whose rows are all aligned, at an odd one, and at one that a single warp holds."""
    laws: dict[str, tuple[str, str | CountSchedule]] = {
        "exact": ("exact", "stratified"),
        "table": ("exact", HARMONIC),
        "bernoulli": ("bernoulli", "stratified"),
        "coupled": ("coupled", "uniform"),
        "full": ("full", "stratified"),
    }

    def draw(law: str, tokens: int, samples: int = 4, shift: int = 0, prompt: bool = True, **changed: int) -> None:
        ids = torch.zeros(2, tokens, dtype=torch.int64)
        response = ids == 0
        threshold = 1 << 30 if prompt else 0
        spec = make_spec(*laws[law], 4, [tokens, tokens], (4 - samples, 4), prompt_threshold=threshold)
        spec = dataclasses.replace(spec, **({"mask_token_id": LLADA_MASK_ID} | changed))
        counts = Counts(*(torch.full((2 * samples + 1,), 5),) * 3)
        masks.draw(ids, response, response if prompt else None, torch.arange(4)[shift:][:2], spec, counts)

    for variant, tokens, others in ("aligned", 1024, 2048), ("odd", 1025, 3001), ("one warp", 37, 61):
        for law in laws:
            changes: dict[str, dict[str, Any]] = {
                "": {},
                "another T": {"tokens": others},
                "Dream's mask id": {"mask_token_id": DREAM_MASK_ID},
                "shifted": {"samples": 2, "shift": 1},
                "other numbers": {"seed": 2**64 - 1, "n_mc": 16},
            }
            for change, arguments in changes.items():
                call = partial(draw, **({"law": law, "tokens": tokens} | arguments))
                yield Case(f"{law}, T = {tokens}", variant, call, change)
    yield Case("exact, T = 1024, no prompt", "aligned", partial(draw, "exact", 1024, prompt=False))


class Rows(NamedTuple):
    """A chunk as the engine has it: slices of larger tensors, aligned by chance only."""

    rows: int = 3
    columns: int = 3  # of the call's statistics: their stride
    begin: int = 0


class Options(NamedTuple):
    transform: LogitTransform = LogitTransform()
    extras: bool = False  # bias, entropy, off-policy and lengths
    clip: tuple[float, float, float] = (math.inf,) * 3


def head_rows(vocab: int, dtype: torch.dtype, out: torch.dtype, options: Options, chunk: Rows) -> None:
    """The three row kernels on one chunk."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    part = slice(chunk.begin, chunk.begin + chunk.rows)
    step = 16 // dtype.itemsize  # ragged vocabularies have 16-byte aligned rows in the workspace
    logits = torch.zeros(chunk.rows, -(-vocab // step) * step, dtype=dtype)[:, :vocab]
    targets = torch.zeros(chunk.columns, dtype=torch.int64)[part]
    stats, g = torch.ones(4, chunk.columns, dtype=acc)[:, part], torch.zeros(chunk.columns, dtype=acc)[part]
    bias = torch.zeros(vocab, dtype=acc) if options.extras else None
    head.row_statistics(logits, targets, bias, options.transform, stats, options.extras)
    head.dlogits_(logits, targets, bias, options.transform, stats, g, g if options.extras else None, out)
    shape = (chunk.columns, 1)  # every row a segment, every segment a sequence
    old, length = (torch.zeros(shape, dtype=acc), torch.ones(shape[0])) if options.extras else (None, None)
    law = SegmentBound(torch.zeros(shape[0], dtype=acc), old, length, options.clip, 4.0, shape, "triton")
    offsets, weight = torch.arange(shape[0] + 1)[part.start :][: chunk.rows + 1], torch.ones(shape[0])[part]
    segments = RowSegments(offsets, weight, part.start, part.stop, part.start, part.stop, law)
    sums = torch.zeros(shape[0], dtype=acc)[part]
    head.bound_dlogits_(logits, targets, bias, options.transform, stats, segments, sums, out)


def head_cases() -> Iterator[Case]:
    """Both models' heads in the dtypes of the engine, a ragged vocabulary, and the options."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    entropy = Options(extras=True)
    everything = Options(LogitTransform(scale=0.5, softcap=30.0, temperature=0.7), True)
    annealed = Options(LogitTransform(scale=-3.0, softcap=5.0, temperature=16.0), True, (0.2, 0.3, 3.0))
    places = {"": Rows(), "C = 1": Rows(1, 1), "shifted": Rows(2, 3, 1), "of 4096 rows": Rows(3, 4096, 48)}
    for name, variant, vocab, dtype, out, options in (
        ("llada fp32", "plain", 126464, f32, f32, Options()),
        ("llada fp32 to bf16", "plain", 126464, f32, bf16, Options()),
        ("llada bf16", "plain", 126464, bf16, bf16, Options()),
        ("dream fp32 to fp16", "plain", 152064, f32, f16, Options()),
        ("ragged fp32 to bf16", "ragged", 50257, f32, bf16, Options()),
        ("ragged bf16", "ragged", 50257, bf16, bf16, Options()),
        ("entropy fp32 to bf16", "entropy", 126464, f32, bf16, entropy),
        ("all options fp32 to bf16", "all options", 126464, f32, bf16, everything),
        ("all options fp64", "fp64", 126464, f64, f64, everything),
    ):
        changes = {change: (options, place) for change, place in places.items()}
        if options is everything:
            changes["annealed"] = (annealed, Rows())
        for change, arguments in changes.items():
            call = partial(head_rows, vocab, dtype, out, *arguments)
            yield Case(name, variant, call, change, dtype.itemsize, out.itemsize)


def bound_cases() -> Iterator[Case]:
    """Segment sums, and the bound off-policy with lengths and on-policy without."""
    clips, annealed = ((0.2, 0.2, 3.0), (math.inf,) * 3), ((1.0, 0.0, 1.5), (0.3, 16.0, math.inf))

    def both(dtype: torch.dtype, sequences: int, samples: int, clips: tuple) -> None:
        segments = sequences * samples
        offsets, logprob = torch.zeros(segments + 1, dtype=torch.int64), torch.zeros(sequences, samples, dtype=dtype)
        bound.segment_sum(torch.zeros(99, dtype=dtype), offsets, torch.ones(segments))
        per_sequence = torch.ones(sequences)
        bound.bound(logprob, per_sequence, logprob, per_sequence, *clips[0])
        bound.bound(logprob, per_sequence, None, None, *clips[1])

    for name, dtype in ("fp32", torch.float32), ("fp64", torch.float64):
        for change, arguments in {
            "": (8, 16, clips), "annealed": (8, 16, annealed), "C = 1": (1, 1, clips), "of 4096 rows": (256, 16, clips),
        }.items():  # fmt: skip
            yield Case(name, name, partial(both, dtype, *arguments), change)


def machine_code(cuobjdump: str, launch: Launch) -> dict[str, Any]:
    """What became of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        (kernel,) = disassemble(cuobjdump, Path(file.name)).values()
    arguments, divisible = divisible_arguments(launch)
    return {
        "registers": kernel.registers,
        "stack": kernel.stack,
        "local": kernel.local,
        "shared": launch.compiled.metadata.shared,
        "threads": 32 * launch.compiled.metadata.num_warps,
        "maxnreg": launch.compiled.metadata.maxnreg,
        "opcodes": opcodes(kernel.code),
        "main_loop": opcodes(main_loop(kernel.code)),
        "memory_order": memory_order([instruction.opcode for instruction in kernel.code]),
        "arguments": arguments,
        "divisible": divisible,
    }


def main(arch: int) -> None:
    cuobjdump = find_cuobjdump()
    assert cuobjdump, "no cuobjdump on PATH or in Triton"
    print(json.dumps(kernel_names()), flush=True)
    launches = collect_launches(arch)
    seen: dict[int, dict[str, Any]] = {}  # Triton keeps every compiled kernel for as long as the process runs
    for case in [*mask_cases(), *head_cases(), *bound_cases()]:
        if case.change and arch != 90:
            continue
        launches.clear()
        case.call()
        for launch in launches:
            number = id(launch.compiled)
            if number not in seen:
                seen[number] = machine_code(cuobjdump, launch)
            integers = {name: x for name, x in launch.arguments.items() if type(x) is int}
            facts = case._asdict() | {"kernel": launch.kernel.fn.__name__, "compiled": number, "integers": integers}
            del facts["call"]
            print(json.dumps(facts | seen[number]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
