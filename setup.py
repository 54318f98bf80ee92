"""Builds the compiled engines with ninja and without torch: raw pointers cross, so one build fits any torch.

    bgpo_kernels._cpu    always: C++17, one copy of the kernels per instruction set, chosen at load time
    bgpo_kernels._cuda   when nvcc is found (BGPO_KERNELS_CUDA = auto, the default), must build (1) or not at all (0)

BGPO_KERNELS_ARCHS lists CUDA architectures ("80;90a;90+PTX" by default: sm_80, sm_90a and PTX for compute_90).
With "auto", CUDA sources that do not compile are left out like a missing nvcc, with the compiler's message in the log.
The project metadata is in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CPU_COMMON = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),  # the last: see rounded_product in softmax.h
]
# table name -> -march; the baseline runs anywhere, the others are chosen by CPUID.
CPU_TABLES = {"kernels_baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_TABLES |= {
        "kernels_avx2": "-march=x86-64-v3 -mtune=generic",
        "kernels_avx512": "-march=x86-64-v4 -mprefer-vector-width=512 -mtune=generic",
    }
# For profilers: NVCC_APPEND_FLAGS=-lineinfo, which triples the size.
CUDA_COMMON = ["-O3", "-std=c++17", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
DEFAULT_ARCHS = "80;90a;90+PTX"


def say(line: str) -> None:
    """A line of the build log that pip shows with -v, and always when the build fails."""
    print(f"bgpo_kernels: {line}", file=sys.stderr, flush=True)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file()), None)


def want_cuda() -> str | None:
    """Path of nvcc when the CUDA part is to be built, else None; says which and why."""
    choice = (os.environ.get("BGPO_KERNELS_CUDA") or "auto").lower()
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"bgpo_kernels: BGPO_KERNELS_CUDA must be 0, 1 or auto, not {choice!r}")
    if choice == "0":
        say("CUDA kernels left out (BGPO_KERNELS_CUDA=0); CPU engine and Triton path are complete without them")
        return None
    nvcc = find_nvcc()
    if nvcc is None and choice == "1":
        raise SystemExit("bgpo_kernels: BGPO_KERNELS_CUDA=1 but no nvcc found; set CUDA_HOME or put nvcc on PATH")
    if nvcc is None:
        say("no nvcc found: CUDA kernels left out, GPUs are served by Triton; set CUDA_HOME and reinstall to add them")
    else:
        say(f"building CUDA kernels with {nvcc}")
    return nvcc


def gencode_flags(archs: str) -> list[str]:
    """-gencode flags for a list like "80;90a;90+PTX": SASS for each, PTX only where +PTX is written (then no SASS)."""
    flags = []
    for arch in filter(None, archs.replace(",", ";").split(";")):
        name, ptx, _ = arch.strip().removeprefix("sm_").partition("+PTX")
        if not name.rstrip("abf").isdigit():
            raise SystemExit(f"bgpo_kernels: BGPO_KERNELS_ARCHS has {arch!r}; expected entries like 80, 90a or 90+PTX")
        flags.append(f"-gencode=arch=compute_{name},code={'compute' if ptx else 'sm'}_{name}")
    return flags


def openmp_flags(cxx: str) -> list[str]:
    """-fopenmp where the compiler has it; without it the engine is single-threaded and still right."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [cxx, "-fopenmp", str(source), "-o", str(Path(folder) / "probe")]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return ["-fopenmp"]
    say("the compiler has no OpenMP: the CPU engine will use one thread")
    return []


class NinjaFile:
    """A small ninja file: one compiler (C++ or nvcc, which take the same options), objects, one shared library."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.folder = folder
        self.objects: list[str] = []
        self.lines = [
            f"rule compile\n  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n"
            "  deps = gcc",
            f"rule link\n  command = {compiler} -shared $in -o $out $libs",
        ]

    def compile(self, source: Path, name: str, flags: list[str]) -> None:
        target = f"{name}.o"
        self.lines.append(f"build {target}: compile {source}\n  flags = {' '.join(flags)}")
        self.objects.append(target)

    def build(self, output: Path, libs: list[str]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.lines.append(f"build {output}: link {' '.join(self.objects)}\n  libs = {' '.join(libs)}")
        self.lines.append(f"default {output}\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines))
        command = [sys.executable, "-m", "ninja"] if _has_ninja_module() else ["ninja"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([*command, "-C", str(self.folder), *(["-j", jobs] if jobs else [])], check=True)


def _has_ninja_module() -> bool:
    try:
        import ninja  # noqa: F401
    except ImportError:
        return False
    return True


class BuildEngines(build_ext):
    """Compiles ``_cpu`` and ``_cuda`` through ninja instead of setuptools' own serial compiler."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
        cxx = os.environ.get("CXX", "c++")
        link = ["-undefined dynamic_lookup"] if sys.platform == "darwin" else []
        if ext.name.endswith("_cpu"):
            self.build_cpu(folder, output, cxx, includes, link)
        else:
            self.build_cuda(folder, output, includes)

    def build_cpu(self, folder: Path, output: Path, cxx: str, includes: list[str], link: list[str]) -> None:
        openmp = openmp_flags(cxx)
        ninja = NinjaFile(folder, cxx)
        for table, march in CPU_TABLES.items():
            flags = [*CPU_COMMON, *openmp, "-fopenmp-simd", march, f"-DBGPO_TABLE={table}"]
            ninja.compile(CSRC / "cpu" / "kernels.cpp", table, flags)
        ninja.compile(CSRC / "cpu" / "segments.cpp", "segments", CPU_COMMON)
        ninja.compile(CSRC / "cpu" / "module.cpp", "module", [*CPU_COMMON, *includes])
        ninja.build(output, [*link, *openmp])

    def build_cuda(self, folder: Path, output: Path, includes: list[str]) -> None:
        """nvcc compiles and links everything here, so its own profile finds the toolkit's headers and libraries."""
        nvcc = find_nvcc()
        assert nvcc is not None
        archs = os.environ.get("BGPO_KERNELS_ARCHS") or DEFAULT_ARCHS
        if cxx := os.environ.get("CXX"):
            nvcc = f"{nvcc} -ccbin {cxx}"
        kernels = [*CUDA_COMMON, *gencode_flags(archs)]
        ninja = NinjaFile(folder, nvcc)
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            ninja.compile(source, source.stem, kernels)
        named = f"'-DBGPO_ARCHS=\"{archs}\"'"
        ninja.compile(CSRC / "cuda" / "module.cpp", "module", [*CUDA_COMMON, named, *includes])
        try:
            # The static runtime: no libcudart to find at import, and none to disagree with torch's.
            ninja.build(output, ["-cudart=static", "--no-device-link", "-Xlinker=--exclude-libs,ALL"])
        except subprocess.CalledProcessError as error:
            say("the CUDA kernels did not compile; see the compiler's message above")
            raise CompileError("CUDA kernels") from error


extensions = [Extension("bgpo_kernels._cpu", sources=[])]
if want_cuda():
    required = os.environ.get("BGPO_KERNELS_CUDA") == "1"
    extensions.append(Extension("bgpo_kernels._cuda", sources=[], optional=not required))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildEngines})
