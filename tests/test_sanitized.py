"""C++ under sanitizers: the arithmetic shared by CPU and CUDA (csrc/bgpo), and the CPU engine's mask kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"]
SANITIZE = ["-fsanitize=address,undefined"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where to build; skips where sanitizers cannot be linked."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "probe.cpp").write_text("int main() {}\n")
    command = ["g++", *SANITIZE, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this g++ has no sanitizers")
    return folder


def build(folder: Path, source: str, *flags: str) -> Path:
    output = folder / Path(source).stem
    command = ["g++", *FLAGS, *SANITIZE, *flags, f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def assert_clean(program: Path, *arguments: str) -> None:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def headers(folder: Path) -> Path:
    return build(folder, "headers_check.cpp")


@pytest.mark.parametrize("group", ["philox", "select", "counts", "softmax", "gradient", "bound"])
def test_headers(headers: Path, group: str) -> None:
    assert_clean(headers, group)


@pytest.mark.parametrize("march", ["", "-march=native"], ids=["baseline", "native"])
def test_mask_kernels(folder: Path, march: str) -> None:
    quiet = ["-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]  # the last: see lanes.h
    assert_clean(build(folder, "cpu_masks_check.cpp", *quiet, *filter(None, [march])))
