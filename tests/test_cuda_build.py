"""What can be said of the CUDA build without a GPU: it compiles, spills nothing, moves 16 bytes at a time, and tells a
machine with no nvcc or no driver so.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from compile_cuda import ROOT, SOURCES, Kernel, compile_kernels, constant_of_setup, find_nvcc, written_kernels
from machine_code import find_cuobjdump, is_local, main_loop, narrow, opcodes, resident, wide

ARCHS = [arch for arch in constant_of_setup("DEFAULT_ARCHS").split(";") if "+PTX" not in arch]


class Budget(NamedTuple):
    registers: int  # per thread
    shared: int  # bytes
    resident: int  # CTAs that both leave room for on a multiprocessor


# By kernel and bytes of what it computes in. Row kernels: kResident of rows.cuh; shared memory holds what 8 warps leave
# for one another, 3 numbers each or an fp64 sum. The draw: kResident of mask.cu; a histogram of 256 counters, and a few
# words a warp. The others are short.
BUDGETS = {
    ("row_statistics_kernel", 4): Budget(48, 8 * 3 * 4, 5),
    ("row_statistics_kernel", 8): Budget(64, 8 * 3 * 8, 4),
    ("dlogits_kernel", 4): Budget(48, 0, 5),
    ("dlogits_kernel", 8): Budget(64, 0, 4),
    ("bound_dlogits_kernel", 4): Budget(48, 8 * 8, 5),
    ("bound_dlogits_kernel", 8): Budget(64, 8 * 8, 4),
    ("draw_kernel", 0): Budget(64, 256 * 4 + 128, 4),
    ("segment_sum_kernel", 4): Budget(40, 8 * 8, 6),
    ("segment_sum_kernel", 8): Budget(40, 8 * 8, 6),
    ("bound_kernel", 4): Budget(40, 0, 6),
    ("bound_kernel", 8): Budget(40, 0, 6),
}
LEFT_TO_THE_COMPILER = {"segment_sum_kernel", "bound_kernel"}  # no number of CTAs in their launch bounds
# Narrow accesses that move no row. Loads: target id, statistics, upstream gradients; a segment's place by bisection,
# its numbers, and its sum in a loop that the compiler unrolls. Stores: statistics; a segment's sum, a row's gradient.
SCALAR_LOADS = {"row_statistics_kernel": 1, "dlogits_kernel": 6, "bound_dlogits_kernel": 4 + 40}
SCALAR_STORES = {"row_statistics_kernel": 4, "dlogits_kernel": 0, "bound_dlogits_kernel": 2}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Kernel]]:
    """Every kernel by architecture."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: set CUDA_HOME or put it on PATH")
    cuobjdump = find_cuobjdump(Path(nvcc).parent)
    if cuobjdump is None:
        pytest.skip("no cuobjdump beside nvcc, on PATH or in Triton")
    folder = tmp_path_factory.mktemp("cubins")

    def compile_for(arch: str, source: Path) -> list[Kernel]:
        return compile_kernels(nvcc, cuobjdump, source, arch, folder / f"{source.stem}_{arch}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {arch: [pool.submit(compile_for, arch, source) for source in SOURCES] for arch in ARCHS}
        return {arch: [kernel for job in jobs[arch] for kernel in job.result()] for arch in ARCHS}


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(compiled: dict[str, list[Kernel]], arch: str) -> list[Kernel]:
    return compiled[arch]


@pytest.fixture
def row_kernels(kernels: list[Kernel]) -> list[Kernel]:
    found = [kernel for kernel in kernels if kernel.name in SCALAR_LOADS]
    assert {kernel.name for kernel in found} == SCALAR_LOADS.keys()
    return found


def budget_key(kernel: Kernel) -> tuple[str, int]:
    return kernel.name, max(4, *kernel.bytes) if kernel.types else 0


def test_hopper_is_among_the_architectures() -> None:
    assert "90a" in ARCHS


def test_every_kernel_of_the_sources_is_compiled_for_every_choice_of_options(kernels: list[Kernel]) -> None:
    assert written_kernels() == sorted({kernel.name for kernel in kernels})
    for name in written_kernels():
        variants = [(kernel.types, kernel.options) for kernel in kernels if kernel.name == name]
        choices = map("".join, product("01", repeat=len(variants[0][1])))
        assert sorted(variants) == sorted(product({types for types, _ in variants}, choices)), name


def test_nothing_spills_or_has_a_stack(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.memory == (0, 0, 0), f"{kernel.label}: bytes of stack, spill stores, spill loads {kernel.memory}"
        local = [instruction.opcode for instruction in kernel.code if is_local(instruction.opcode)]
        assert not local, f"{kernel.label}: {local}"


def test_registers_and_shared_memory_leave_room_for_the_ctas_promised(kernels: list[Kernel], arch: str) -> None:
    for kernel in kernels:
        budget = BUDGETS[budget_key(kernel)]
        assert kernel.registers <= budget.registers, f"{kernel.label}: {kernel.registers} registers"
        assert kernel.shared <= budget.shared, f"{kernel.label}: {kernel.shared} bytes of shared memory"
        fits = resident(kernel.registers, kernel.threads, kernel.shared, int(re.sub(r"\D", "", arch)))
        assert fits >= budget.resident, f"{kernel.label}: {fits} CTAs on a multiprocessor of sm_{arch}"
        asked = None if kernel.name in LEFT_TO_THE_COMPILER else budget.resident
        assert kernel.resident == asked, f"{kernel.label}: launch bounds ask for {kernel.resident} CTAs"
    unused = BUDGETS.keys() - {budget_key(kernel) for kernel in kernels}
    assert not unused, unused


class Row(NamedTuple):
    """How a row kernel is to move its row, in elements of a thread."""

    tile: int
    group: int  # consecutive ones, the least that are 16 bytes of logits and of gradients
    loads: int  # bytes of a logit
    stores: int  # bytes of a gradient, 0 without
    biases: int  # reads of one: for each of the two paths below at most


def row_of(kernel: Kernel) -> Row:
    logit, *out = kernel.bytes
    return Row(8 if logit == 8 else 16, 16 // min(kernel.bytes), logit, sum(out), 2 * int(kernel.options[0]))


def test_the_main_loop_of_a_row_kernel_moves_a_tile_16_bytes_at_a_time(row_kernels: list[Kernel]) -> None:
    """Rows that are not aligned are moved element by element: a loop has that path, too, once."""
    for kernel in row_kernels:
        row, loop = row_of(kernel), opcodes(main_loop(kernel.code))
        assert wide(loop, "LDG") >= row.tile * row.loads // 16, f"{kernel.label}: {loop}"
        assert wide(loop, "STG") >= row.tile * row.stores // 16, f"{kernel.label}: {loop}"
        assert narrow(loop, "LDG") <= row.tile * (1 + row.biases), f"{kernel.label}: {loop}"
        assert narrow(loop, "STG") <= (row.tile if row.stores else 0), f"{kernel.label}: {loop}"


def test_narrow_accesses_are_those_of_unaligned_rows_and_scalars(row_kernels: list[Kernel]) -> None:
    """Beyond the tile: a group behind the last one, then single elements, and the target's. Gradients of a dead row are
    zeroed group by group, in a loop that the compiler may double, and singly at the end.
    """
    for kernel in row_kernels:
        row, counts = row_of(kernel), opcodes(kernel.code)
        loads = (row.tile + row.group + 2) * (1 + row.biases) + SCALAR_LOADS[kernel.name]
        stores = (row.tile + 3 * row.group + 3 if row.stores else 0) + SCALAR_STORES[kernel.name]
        assert narrow(counts, "LDG") <= loads, f"{kernel.label}: {narrow(counts, 'LDG')}, {loads} allowed"
        assert narrow(counts, "STG") <= stores, f"{kernel.label}: {narrow(counts, 'STG')}, {stores} allowed"
        assert wide(counts, "LDG") >= (row.tile + row.group) * row.loads // 16, f"{kernel.label}: {counts}"
        assert wide(counts, "STG") >= (row.tile + 2 * row.group) * row.stores // 16, f"{kernel.label}: {counts}"


def test_gradients_are_not_read_through_the_read_only_path(row_kernels: list[Kernel]) -> None:
    """They overwrite what they load."""
    for kernel in row_kernels:
        loads = {i.opcode for i in kernel.code if i.opcode.startswith("LDG")}
        constant = {opcode for opcode in loads if "CONSTANT" in opcode.split(".")}
        assert kernel.name == "row_statistics_kernel" or not constant, f"{kernel.label}: {constant}"


NO_DRIVER = """
import bgpo_kernels._cuda as cuda
assert cuda.device_count() == 0 and cuda.TOOLKIT_VERSION >= 12000 and cuda.ARCHS
try:
    cuda.segment_sum_f32(cuda.Queue(0, 0), 0, 0, 0, 1, 0)
except RuntimeError as error:
    print(error)
"""


@pytest.fixture
def built() -> Path:
    path = next(iter((ROOT / "bgpo_kernels").glob("_cuda.*.so")), None)
    if path is None:
        pytest.skip("bgpo_kernels._cuda is not built here")
    return path


def test_imports_without_a_device_and_says_why_it_cannot_launch(built: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", NO_DRIVER], capture_output=True, text=True, env=hidden, check=False)
    assert done.returncode == 0, done.stderr
    assert "segment_sum: cudaError" in done.stdout


def test_needs_no_cuda_or_torch_library(built: Path) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run([readelf, "-d", str(built)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    assert needed and not [lib for lib in needed if re.search("cuda|torch|c10", lib)], needed


# setup.py's choice


def run_setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, choice: str | None, nvcc: bool) -> list:
    """The extensions setup.py asks for on a machine with or without nvcc."""
    asked: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: asked.update(arguments))
    for name in ("BGPO_KERNELS_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    if choice is not None:
        monkeypatch.setenv("BGPO_KERNELS_CUDA", choice)
    compiler = tmp_path / "nvcc"
    if nvcc:
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) and path.is_relative_to(tmp_path))
    runpy.run_path(str(ROOT / "setup.py"))
    return asked["ext_modules"]


@pytest.mark.parametrize("choice", [None, "auto"])
def test_without_nvcc_the_cpu_engine_is_built_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture, choice: str | None
) -> None:
    extensions = run_setup(monkeypatch, tmp_path, choice, nvcc=False)
    assert [ext.name for ext in extensions] == ["bgpo_kernels._cpu"]
    assert "no nvcc found: CUDA kernels left out" in capfd.readouterr().err


def test_nvcc_is_used_when_found_and_its_failure_is_fatal_only_on_demand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for choice, optional in (("auto", True), ("1", False)):
        extensions = run_setup(monkeypatch, tmp_path, choice, nvcc=True)
        assert [(ext.name, ext.optional) for ext in extensions[1:]] == [("bgpo_kernels._cuda", optional)]


def test_cuda_can_be_refused_or_demanded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert len(run_setup(monkeypatch, tmp_path, "0", nvcc=True)) == 1
    assert "BGPO_KERNELS_CUDA=0" in capfd.readouterr().err
    (tmp_path / "nvcc").unlink()
    with pytest.raises(SystemExit, match="no nvcc found"):
        run_setup(monkeypatch, tmp_path, "1", nvcc=False)
    with pytest.raises(SystemExit, match="must be 0, 1 or auto"):
        run_setup(monkeypatch, tmp_path, "yes", nvcc=False)


def test_architecture_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    monkeypatch.setenv("BGPO_KERNELS_CUDA", "0")
    gencode_flags = runpy.run_path(str(ROOT / "setup.py"))["gencode_flags"]
    assert gencode_flags("80;90a, 90+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    with pytest.raises(SystemExit, match="BGPO_KERNELS_ARCHS"):
        gencode_flags("hopper")
