"""The package imports and works where things are missing; its engines need no torch; its pins and versions agree.

What setup.py makes of nvcc and BGPO_KERNELS_CUDA is tested in test_cuda_build.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import bgpo_kernels as bk

ROOT = Path(__file__).parent.parent
ENGINES = [path for name in ("_cpu", "_cuda") for path in sorted((ROOT / "bgpo_kernels").glob(f"{name}.*.so"))]


# A machine that lacks things: importing a name whose entry in sys.modules is None fails as if it were not installed.

BARE = """
import json, sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import torch
import bgpo_kernels as bk
from bgpo_kernels import backends

loaded = [name for name, module in sys.modules.items() if module is not None]
cpu = torch.device("cpu")
ids = torch.arange(40).view(2, 20)
draw = bk.random_mask(ids, ids % 20 >= 5, mask_token_id=99, n_mc=4, seed=7)
hidden, weight = torch.arange(160 * 8).sin().view(160, 8), torch.arange(99 * 8).cos().view(99, 8)
logprob = bk.masked_logprob(hidden, weight, draw.targets, rows=draw.rows)
try:
    bk.random_mask(ids, ids % 20 >= 5, mask_token_id=99, n_mc=4, seed=7, backend="cpu")
    refused = None
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "auto": backends.resolve("auto", cpu),
    "why_not": {name: backends.why_not(name, cpu) for name in ("reference", "cpu", "triton")},
    "noisy_ids": draw.noisy_ids.tolist(),
    "logprob": logprob.tolist(),
    "refused": refused,
    "loaded": loaded,
}))
"""
MISSING = ["triton", "transformers", "peft", "bgpo_kernels._cpu", "bgpo_kernels._cuda"]


@cache
def on_a_machine_without(*missing: str) -> dict[str, Any]:
    """What BARE reports from a fresh interpreter, Triton's interpreter off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BARE, *missing]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_anything_optional_the_reference_serves_and_says_why() -> None:
    bare = on_a_machine_without(*MISSING)
    assert bare["auto"] == "reference"
    assert bare["why_not"]["reference"] is None
    assert bare["why_not"]["cpu"] == "bgpo_kernels._cpu was not built"
    assert "interpreter" in bare["why_not"]["triton"]
    assert "bgpo_kernels._cpu was not built" in bare["refused"] and "backend='cpu'" in bare["refused"]


@pytest.mark.skipif(not ENGINES, reason="no compiled engine to compare with")
def test_the_fallback_gives_the_engines_result() -> None:
    bare, full = on_a_machine_without(*MISSING), on_a_machine_without()
    assert full["auto"] == "cpu" and full["refused"] is None
    assert bare["noisy_ids"] == full["noisy_ids"]
    assert len(bare["logprob"]) > 8
    assert bare["logprob"] == pytest.approx(full["logprob"], rel=1.3e-6, abs=1e-5)  # assert_close's for fp32


def test_importing_loads_nothing_optional() -> None:
    loaded = set(on_a_machine_without()["loaded"])
    assert "bgpo_kernels.masks" in loaded
    assert not loaded & {*MISSING, "matplotlib", "rich"}  # torch itself loads tqdm


# The compiled engines


@pytest.fixture(params=ENGINES, ids=lambda path: path.name.partition(".")[0])
def engine(request: pytest.FixtureRequest) -> Path:
    for tool in ("readelf", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    return request.param


def test_engines_link_to_the_c_and_cpp_runtimes_alone(engine: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", str(engine)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    runtimes = r"lib(stdc\+\+|c\+\+|c\+\+abi|gcc_s|gomp|omp|m|c|pthread|dl|rt)\.so.*|ld-linux.*"
    assert needed and not [library for library in needed if not re.fullmatch(runtimes, library)]


def test_engines_want_no_symbol_of_torch_or_cuda(engine: Path) -> None:
    command = ["nm", "-D", "--undefined-only", str(engine)]
    symbols = re.findall(r"\bU (\S+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert any(name.startswith("Py") for name in symbols)
    assert not [name for name in symbols if re.search(r"torch|c10|2at[0-9]|THP|^cuda|^cu[A-Z]|^nv", name)]


# Versions, pins and files


def test_one_version_everywhere() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert declared is not None
    assert declared[1] == bk.__version__ == importlib.metadata.version("bgpo_kernels")
    released = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert released is not None and released[1] == bk.__version__


def pins() -> dict[str, str]:
    """Exact version of every name that constraints.txt pins for this interpreter."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        if pin.marker is None or pin.marker.evaluate():
            assert found.setdefault(canonicalize_name(pin.name), specifier.version) == specifier.version, line
    return found


def closure(name: str, extra: str) -> set[str]:
    """Names of all distributions that ``name[extra]`` installs here."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen: set[tuple[str, str]] = set()
    todo = [(name, extra)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # an extra that this environment was not given
            continue
        for needed in map(Requirement, lines):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(needed.name), e) for e in ("", *needed.extras)]
    return {name for name, _ in seen} - {"bgpo-kernels", "bgpo_kernels"}


def test_constraints_pin_all_that_the_tests_install() -> None:
    installed = closure("bgpo_kernels", "test")
    assert installed >= {"torch", "numpy", "transformers", "pytest"}
    of_torch = re.compile(r"(nvidia|cuda)-.*")  # which torch's wheels for CUDA pin themselves
    assert not [name for name in sorted(installed - set(pins())) if not of_torch.fullmatch(name)]


def test_constraints_pin_the_build_and_the_torch_that_was_run() -> None:
    found = pins()
    assert found["torch"] == "2.13.0"
    build = re.search(r"^requires = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert build is not None
    assert set(re.findall(r'"([\w-]+)', build[1])) <= set(found)


def test_empty_settings_are_unset_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    asked: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: asked.update(arguments))
    monkeypatch.setenv("BGPO_KERNELS_CUDA", "")
    runpy.run_path(str(ROOT / "setup.py"))
    assert asked["ext_modules"][0].name == "bgpo_kernels._cpu"


def test_source_distribution_holds_what_ninja_compiles(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    settings = {**os.environ, "BGPO_KERNELS_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*")}
    assert sources | {"LICENSE", "constraints.txt", "bgpo_kernels/py.typed"} <= packed
    assert not [name for name in packed if name.endswith(".so")]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_lists_the_commands_of_the_readme() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    promised = set(re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(), flags=re.M))
    assert promised and promised <= set(re.findall(r"^make ([\w-]+)", listed, flags=re.M))


# Foot-guns: the patterns of .pre-commit-config.yaml, each with a line that it must catch

CAUGHT = {
    "triton-random": "    x = tl.rand(seed, offsets)",
    "global-random": "order = torch.randperm(length)",
    "host-sync": "if bad.any().item():",
    "atomics": "    atomicAdd(&sum[row], value);",
    "autotune": "@triton.autotune(configs)",
    "address-of-temporary": "_cpu.select(address(ids.contiguous()), 0)",
    "torch-in-csrc": "#include <torch/extension.h>",
}


def foot_guns() -> dict[str, tuple[re.Pattern, re.Pattern]]:
    """Pattern of the file's path and of the line, by id."""
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    found = [hook for hook in hooks if hook["language"] == "pygrep"]
    return {hook["id"]: (re.compile(hook["files"]), re.compile(hook["entry"])) for hook in found}


def test_no_foot_guns() -> None:
    patterns = foot_guns()
    assert patterns.keys() == CAUGHT.keys()
    files = [p for top in ("bgpo_kernels", "csrc") for p in (ROOT / top).rglob("*") if p.suffix not in (".so", ".pyc")]
    sources = {str(p.relative_to(ROOT)): p.read_text().splitlines() for p in files if p.is_file()}
    for name, (where, pattern) in patterns.items():
        assert pattern.search(CAUGHT[name])
        assert any(where.search(path) for path in sources), f"{name} looks at no file"
        hits = [
            f"{path}:{number}: {line.strip()}"
            for path, lines in sources.items()
            if where.search(path)
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
        assert not hits, (name, hits)
