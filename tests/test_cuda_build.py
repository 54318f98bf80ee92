"""What can be said of the CUDA build without a GPU: it compiles, spills nothing, moves 16 bytes at a time, and tells a
machine with no nvcc or no driver so.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Registers per thread: 65536 / (256 threads * CTAs wanted on a multiprocessor), a multiple of 8. Row kernels want five
# CTAs in fp32 and four in fp64; the others, which are short, four.
BUDGET, ROW_BUDGET = 64, 48
ROW_KERNELS = {"row_statistics": {"LDG.E.128"}, "dlogits": {"LDG.E.128", "STG.E.128"}}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc" if home else "", shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file()), None)


def find_cuobjdump(nvcc: str) -> str | None:
    candidates = [str(Path(nvcc).parent / "cuobjdump"), shutil.which("cuobjdump") or ""]
    try:
        import triton

        candidates.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    except ImportError:
        pass
    return next((c for c in candidates if c and Path(c).is_file()), None)


def constant_of_setup(name: str) -> list[str]:
    """A list literal of setup.py, without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.stem)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str, str]:
    """Kernel file, its sm_90a cubin, ptxas's report, nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: set CUDA_HOME or put it on PATH")
    source = request.param
    cubin = tmp_path_factory.mktemp("cubin") / f"{source.stem}.cubin"
    options = ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas=-v", "-o", str(cubin)]
    command = [nvcc, *constant_of_setup("CUDA_COMMON"), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return source.stem, cubin, done.stderr, nvcc


def test_no_spills_and_registers_within_budget(compiled: tuple[str, Path, str, str]) -> None:
    stem, _, report, _ = compiled
    assert "warning" not in report, report
    names = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", report)]
    assert len(names) == len(registers) and (names or stem == "device")
    assert all(pair == ("0", "0") for pair in spills), report
    for name, used in zip(names, registers, strict=True):
        in_fp64 = re.search(r"kernelI(d|dd)L", name)
        budget = ROW_BUDGET if stem in ROW_KERNELS and not in_fp64 else BUDGET
        assert used <= budget, f"{name}: {used} registers, budget {budget}"


def test_row_kernels_move_16_bytes_at_a_time(compiled: tuple[str, Path, str, str]) -> None:
    stem, cubin, _, nvcc = compiled
    if stem not in ROW_KERNELS:
        pytest.skip("not a row kernel")
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        pytest.skip("no cuobjdump beside nvcc, on PATH or in Triton")
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = sass.split("Function : ")[1:]
    assert functions
    for function in functions:
        name = function.split("\n", 1)[0]
        opcodes = set(re.findall(r"\b((?:LDG|STG|LDL|STL)(?:\.\w+)*)", function))
        assert opcodes >= ROW_KERNELS[stem], f"{name}: {sorted(opcodes)}"
        assert not any(op.startswith(("LDL", "STL")) for op in opcodes), f"{name} uses local memory"
        if stem == "dlogits":  # it overwrites what it loads, so nothing may come through the read-only path
            assert "LDG.E.128.CONSTANT" not in opcodes, name


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
