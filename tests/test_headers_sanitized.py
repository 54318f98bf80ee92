"""The arithmetic shared by CPU and CUDA (csrc/bgpo) under sanitizers: headers_check.cpp, one group of checks a test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("headers")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    sanitize = ["-fsanitize=address,undefined"]
    linked = subprocess.run(
        ["g++", *sanitize, str(probe), "-o", str(folder / "probe")], capture_output=True, check=False
    )
    if linked.returncode != 0:
        pytest.skip("this g++ has no sanitizers")
    command = ["g++", *FLAGS, *sanitize, f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "headers_check.cpp")]
    done = subprocess.run([*command, "-o", str(folder / "check")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "check"


@pytest.mark.parametrize("group", ["philox", "select", "counts", "softmax", "gradient", "bound"])
def test_headers(program: Path, group: str) -> None:
    done = subprocess.run([str(program), group], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
