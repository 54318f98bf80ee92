"""What the GPU suite makes of tests, sanitizers and JSON files: crashes and hangs of tests, errors found, the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "gpu_suite.py",
    "commit": "abc123",
    "versions": {"torch": "2.11"},
    "device": "Some GPU",
    "cpu": "Some CPU",
}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The suite's package, importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _gpu_suite

    return _gpu_suite


# --- build -----------------------------------------------------------------------------------------------------------


def test_engines_that_a_device_needs(package: ModuleType) -> None:
    from _gpu_suite.build import CHECKS

    info = {
        "engines": {"cpu": {"built": True, "instruction_set": "avx512"}, "cuda": {"built": False, "reason": "no nvcc"}},
        "devices": {"cpu": {"auto": "cpu"}, "cuda:0": {"auto": None}},
    }
    found = {(check, kind): judge(info, kind) for check, judge in CHECKS.items() for kind in ("cpu", "cuda")}
    assert found["CPU engine", "cuda"] == {"message": "built: instruction_set avx512"}
    assert found["CUDA kernels", "cpu"]["status"] == "not available"
    assert found["CUDA kernels", "cuda"]["status"] == "failed"
    assert found["CUDA kernels", "cuda"]["message"].startswith("no nvcc; build it with `pip install .`, `make install`")
    assert found["device served", "cpu"] == {"message": "cpu by cpu"}
    assert found["device served", "cuda"] == {"status": "failed", "message": "nothing serves cuda:0"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses, which a GPU makes superfluous")
def test_what_is_built_here(package: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from _gpu_suite import build

    assert build.main(["--dry-run", "--out", str(tmp_path / "build.json")]) == 0
    rows = json.loads((tmp_path / "build.json").read_text())["rows"]
    assert [row["check"] for row in rows] == ["info", "CPU engine", "CUDA kernels", "device served"]
    assert rows[0]["info"]["engines"]["cpu"]["built"] and "CPU engine: ok" in capfd.readouterr().out


# --- tests -----------------------------------------------------------------------------------------------------------

TESTS = """
import os, pathlib, signal, time
import pytest

pytestmark = pytest.mark.gpu
HERE = pathlib.Path(__file__).parent

def test_passes(): (HERE / "passes").open("a").write("x")
def test_fails(): assert 1 + 1 == 3, "arithmetic"
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs(): time.sleep(60)
def test_skips(): pytest.skip("no reason")
@pytest.fixture
def broken(): raise RuntimeError("fixture")
def test_cannot_begin(broken): pass
def test_passes_after_all(): pass
"""


@pytest.fixture
def folder_of_tests(package: ModuleType, tmp_path: Path) -> Path:
    """A folder of GPU tests that do what tests can do, and a file that does not import."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    (folder / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--rehearse', action='store_true')"
    )
    (folder / "test_a.py").write_text(TESTS)
    (folder / "test_b.py").write_text("import a_module_that_is_not_there\n")
    (folder / "test_c.py").write_text("def test_not_for_the_gpu(): pass\n")
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses, which a GPU makes superfluous")
def test_every_test_is_a_row_whatever_it_does(folder_of_tests: Path, tmp_path: Path) -> None:
    from _gpu_suite import gpu_tests

    out = tmp_path / "tests.json"
    options = ["--dry-run", "--out", str(out), "--tests", str(folder_of_tests), "--test-seconds", "3"]
    assert gpu_tests.main(options) == 1
    rows = {row["test"].split("::")[-1]: row for row in json.loads(out.read_text())["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "test_b.py": "failed",
        "test_passes": "ok",
        "test_fails": "failed",
        "test_crashes": "failed",
        "test_hangs": "failed",
        "test_skips": "skipped",
        "test_cannot_begin": "failed",
        "test_passes_after_all": "ok",
    }
    assert rows["test_crashes"]["message"] == "killed by SIGSEGV"
    assert rows["test_hangs"]["message"] == "it hung"
    assert "arithmetic" in rows["test_fails"]["message"] and "1 + 1" in rows["test_fails"]["detail"]
    assert rows["test_skips"]["message"] == "no reason"
    assert "fixture" in rows["test_cannot_begin"]["message"]
    assert "a_module_that_is_not_there" in rows["test_b.py"]["message"]
    # Resumed: what is mended passes now, and what had passed does not run again.
    (folder_of_tests / "test_b.py").unlink()
    (folder_of_tests / "test_a.py").write_text(
        TESTS.replace("SIGSEGV", "SIGCONT").replace("60", "0").replace("== 3", "== 2")
    )
    assert gpu_tests.main([*options, "--resume"]) == 1
    statuses = [row["status"] for row in json.loads(out.read_text())["rows"]]
    assert sorted(statuses) == ["failed", *["ok"] * 5, "skipped"]
    assert (folder_of_tests / "passes").read_text() == "x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses, which a GPU makes superfluous")
def test_dead_cuda_context_fails_one_test_and_not_the_next(folder_of_tests: Path, tmp_path: Path) -> None:
    from _gpu_suite import gpu_tests

    (folder_of_tests / "test_b.py").unlink()
    (folder_of_tests / "test_a.py").write_text(
        "import pytest, torch\n"
        "pytestmark = pytest.mark.gpu\n"
        "def dead(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_breaks_it():\n"
        "    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, dead\n"
        "    dead()\n"
        "def test_next(): assert not torch.cuda.is_initialized()\n"
    )
    out = tmp_path / "tests.json"
    assert gpu_tests.main(["--dry-run", "--tests", str(folder_of_tests), "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "ok"] and "illegal memory access" in rows[0]["message"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses, which a GPU makes superfluous")
def test_no_test_that_passes_is_a_failure(package: ModuleType, folder_of_tests: Path, tmp_path: Path) -> None:
    from _gpu_suite import gpu_tests

    out, options = tmp_path / "tests.json", ["--dry-run", "--tests", str(folder_of_tests / "test_c.py")]
    assert gpu_tests.main([*options, "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "failed" and "no test passed" in row["message"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses, which a GPU makes superfluous")
def test_tests_without_time_are_rows_too(package: ModuleType, folder_of_tests: Path, tmp_path: Path) -> None:
    from _gpu_suite import gpu_tests

    (folder_of_tests / "test_a.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('i', range(9))\n"
        "def test_slow(i): time.sleep(3)\n"
    )
    (folder_of_tests / "test_b.py").unlink()
    out = tmp_path / "tests.json"
    assert gpu_tests.main(["--dry-run", "--tests", str(folder_of_tests), "--out", str(out), "--seconds", "4"]) == 0
    statuses = [row["status"] for row in json.loads(out.read_text())["rows"]]
    assert len(statuses) == 9 and 1 <= statuses.count("ok") <= 3
    assert statuses.count("ok") + statuses.count("no time left") == 9


# --- sanitizer -------------------------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\nall kernels agree\n========= ERROR SUMMARY: 0 errors\n"
FOUND = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 4 bytes\n=========     at write+0x50\n"
    "========= ERROR SUMMARY: 32 errors\n"
)
REFUSED = (
    "========= COMPUTE-SANITIZER\n"
    '========= Error: Device not supported. Please refer to the "Supported Devices" section of the documentation\n'
)


@pytest.mark.parametrize(
    ("exit_code", "in_time", "output", "status", "message"),
    [
        (0, True, CLEAN, "ok", "0 errors"),
        (0, True, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "ok", "0 errors"),
        (0, True, FOUND, "failed", "32 errors, the first: Invalid __global__ write of size 4 bytes"),
        (0, True, FOUND.replace("32 errors", "1 error"), "failed", "1 errors, the first: Invalid __global__ write"),
        (0, True, "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", "failed", "2 errors"),
        (1, True, CLEAN, "failed", "no error found, but exit status 1"),
        (-11, True, CLEAN, "failed", "no error found, but killed by SIGSEGV"),
        (0, True, "nothing\n", "failed", "no summary of errors, exit status 0: nothing"),
        (1, True, "========= Error: Target application terminated before first instrumented API call\n", "failed",
         "no summary of errors, exit status 1"),
        (1, True, REFUSED, "not available", "Error: Device not supported."),
        (1, True, REFUSED + "========= ERROR SUMMARY: 1 error\n", "not available", "Error: Device not supported."),
        (-15, False, "========= COMPUTE-SANITIZER\n", "no time left", "ended at its limit after 3 s"),
        (-15, False, FOUND, "failed", "32 errors"),
    ],
)  # fmt: skip
def test_what_a_sanitizer_prints_decides(
    package: ModuleType, exit_code: int, in_time: bool, output: str, status: str, message: str
) -> None:
    from _gpu_suite.process import Ended
    from _gpu_suite.sanitizer import judge

    row = judge(Ended(exit_code, in_time, 3.0), output)
    assert row["status"] == status and message in row["message"], row


@pytest.mark.parametrize("finds", [True, False])
def test_sanitizer_that_finds_nothing_planted_proves_nothing(package: ModuleType, tmp_path: Path, finds: bool) -> None:
    """A tool that reports no error whatever it is given: clean rows, and a failed last one."""
    from _gpu_suite.sanitizer import TOOLS, Check

    tool = tmp_path / "compute-sanitizer"
    planted = f"*out_of_bounds.py) cat {tmp_path}/found ;; " if finds else ""
    tool.write_text(f'#!/bin/sh\necho "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\ncase "$*" in {planted}'
                    f"*) cat {tmp_path}/clean ;; esac\n")  # fmt: skip
    tool.chmod(0o755)
    (tmp_path / "clean").write_text(CLEAN)
    (tmp_path / "found").write_text(FOUND)
    options = SimpleNamespace(
        sanitizer=str(tool),
        device=torch.device("cuda"),
        tools=list(TOOLS),
        script=tmp_path / "kernels.py",
        seconds=60.0,
    )
    rows = [case | run() for case, run in Check(options, tmp_path).cases()]
    assert [row["tool"] for row in rows] == [*TOOLS, "memcheck"]
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["ok" if finds else "failed"]
    assert "caching off: 1" in (tmp_path / "sanitizer-memcheck-kernels.log").read_text()
    assert rows[0]["command"][-2:] == [sys.executable, str(tmp_path / "kernels.py")]


# --- figures and table -----------------------------------------------------------------------------------------------


def lines_of(gather: Callable[[dict[str, Any]], Any], *rows: dict[str, Any]) -> list[tuple[Any, ...]]:
    return list(gather({"rows": list(rows)}))


def test_lines_of_tests(package: ModuleType) -> None:
    from _gpu_suite.figures import tests

    rows = [{"test": f"t{i}", "status": "ok", "seconds": 2.0} for i in range(3)]
    assert [line[-1] for line in lines_of(tests, *rows)] == [True, True, True]
    lines = lines_of(
        tests, *rows, {"test": "t9", "status": "failed", "message": "why"}, {"test": "u", "status": "no time left"}
    )
    assert lines[0] == ("all", "failed", "1 of 5", "<= 0", False)
    assert lines[1] == ("all", "not run for want of time", "1", "<= 0", False)
    assert lines[2] == ("all", "passed", "3 in 6 s", ">= 1", True)
    assert lines[-1] == ("t9", "failed", "why", "ok", False)


def test_lines_of_the_head(package: ModuleType) -> None:
    from _gpu_suite.figures import head

    entries = [
        {"name": "bare GEMMs", "family": "gemm", "status": "ok", "fraction": 1.0, "tflops": 790.0},
        {"name": "ours cuda, 1 GiB", "family": "ours-cuda", "status": "ok", "fraction": 0.8, "tflops": 632.0},
        {"name": "ours triton, 1 GiB", "family": "ours-triton", "status": "wrong", "message": "error"},
        {"name": "somebody", "family": "somebody", "status": "not installed", "message": "no module"},
    ]
    targets = [
        ("ours cuda, 1 GiB: fraction of the GEMMs", 0.8, ">=", 0.85, False),
        ("ours cuda, 1 GiB: repeats bit for bit", 1.0, ">=", 1.0, True),
        ("naive / ours cuda, 1 GiB, time", 2.5, ">=", 1.0, True),
    ]
    names = ("name", "figure", "relation", "target", "met")
    row = {
        "head": "llada", "N": 4096, "mode": "trained", "rows": "masked", "status": "failed", "message": "wrong",
        "variants": entries, "targets": [dict(zip(names, target, strict=True)) for target in targets],
    }  # fmt: skip
    case = "llada N 4096 trained"
    assert lines_of(head, row) == [
        (case, "bare GEMMs: share of the GEMMs' rate", "1.000 (790 TFLOP/s)"),
        (case, "ours cuda, 1 GiB: share of the GEMMs' rate", "0.800 (632 TFLOP/s)", ">= 0.85", False),
        (case, "ours triton, 1 GiB", "wrong: error", "right", False),
        (case, "ours: repeats bit for bit", "1 of 1", "all", True),
        (case, "naive / ours cuda, 1 GiB, time", "2.500", ">= 1", True),
        (case, "failed", "wrong", "ok", False),
        ("all", "not installed", "somebody"),
    ]


def test_lines_of_the_step_and_of_the_main_job(package: ModuleType) -> None:
    from _gpu_suite.figures import main, step

    subject = {"shape": "llada-8b", "mode": "lora"}
    rate = {"mc_samples_per_second": 7.0, "utilisation": 0.5}
    lines = lines_of(
        step,
        subject | {"measure": "against plain", "n_mc": 4, "status": "ok", "times_plain": 1.4},
        *(subject | {"measure": "memory", "n_mc": n, "status": "ok", "above_weights_and_gradients_bytes": 1000 + n}
          for n in (1, 65)),
        subject | {"measure": "throughput", "n_mc": 64, "status": "ok", **rate},
        subject | {"measure": "throughput", "n_mc": 4, "status": "out of memory", "message": "too much"},
    )  # fmt: skip
    assert ("llada-8b, lora", "MC samples/s, times plain", "1.40", ">= 1.5", False) in lines
    assert ("llada-8b, lora", "MC samples/s, best n_mc", "7.00 (50% of the GEMM rate)") in lines
    assert ("llada-8b, lora", "peak, most n_mc / least - 1", "+6.394%", "<= 0.01", False) in lines
    assert ("llada-8b, lora: throughput 4", "out of memory", "too much", "", None) in lines
    point = {"method": "exact", "n_mc": 8, "status": "skipped", "message": "no time left"}
    rest = {"findings": {}, "largest_fitting": {}, "points": [point, point | {"status": "failed", "message": "why"}]}
    assert list(main(rest)) == [("exact at n_mc 8", "failed", "why", "ok", False), ("all", "no time left", "1 cases")]
    committed = json.loads((BENCHMARKS / "results" / "memory_vs_mc_cpu.json").read_text())
    shown = {line[:2]: line[2] for line in main(committed)}
    memory = committed["findings"]["exact_over_bgpo"]["memory"]
    assert shown["exact / BGPO", "memory at n_mc 16"] == f"{memory:.1f}"
    assert ("BGPO", "peak at n_mc 32 / n_mc 1 - 1") in shown


def write_results(folder: Path, dry_run: bool, **documents: dict[str, Any]) -> None:
    parts = {name: {"status": "ok", "message": ""} for name in documents}
    record = {"suite": "gpu_suite", "dry_run": dry_run, "environment": ENVIRONMENT, "earlier_environments": []}
    (folder / "suite.json").write_text(json.dumps(record | {"parts": parts}))
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps({"dry_run": dry_run, "environment": ENVIRONMENT, **document}))


TESTED = {"rows": [{"test": "t", "status": "ok", "seconds": 1.0}]}
MASKED = {
    "B": 1, "n_mc": 2, "T": 3, "scheme": "exact", "backend": "cuda", "status": "ok",
    "seconds": {"call": [2e-5, 3e-5, 4e-5], "memcpy": [1e-5] * 3}, "target": {"call / memcpy": 3.0, "met": True},
    "ratios": {"call / memcpy": 2.9, "GPU of call / GPU of memcpy": 1.5, "loop / call": None},
}  # fmt: skip


def test_markdown_says_where_its_figures_come_from(package: ModuleType, tmp_path: Path) -> None:
    from _gpu_suite import table

    write_results(tmp_path, False, tests=TESTED, mask={"rows": [MASKED]})
    text = table.markdown(tmp_path)
    assert text.startswith("Some GPU; torch 2.11; commit abc123; 2026-01-02")
    assert "| 1 x 2 x 3 exact, cuda | call / memcpy of its output | 2.90 (30.0 us) | <= 3 | met |" in text
    assert "| 1 x 2 x 3 exact, cuda | GPU of call / GPU of memcpy | 1.50 |  | - |" in text
    assert "2 of 2 parts finished; 4 targets met, 0 missed" in text and "dry" not in text.lower()
    MASKED["ratios"]["call / memcpy"], before = 3.5, MASKED["ratios"]["call / memcpy"]
    write_results(tmp_path, False, mask={"rows": [MASKED]})
    MASKED["ratios"]["call / memcpy"] = before
    assert "| 3.50 (30.0 us) | <= 3 | MISSED |" in table.markdown(tmp_path)


def test_dry_runs_and_measurements_never_mix(package: ModuleType, tmp_path: Path) -> None:
    from _gpu_suite import table

    write_results(tmp_path, True, tests=TESTED, mask={"rows": [MASKED]})
    text = table.markdown(tmp_path)
    assert text.startswith("DRY RUN: NUMBERS MEAN NOTHING")
    assert "| call / memcpy of its output | 2.90 (30.0 us) | <= 3 | - |" in text  # judged by no target
    write_results(tmp_path, False, tests=TESTED, mask={"rows": [MASKED], "dry_run": True})
    text = table.text(tmp_path)
    assert "left out" in text and "2.90" not in text


def test_several_commits_and_files_that_are_not_understood_are_said(package: ModuleType, tmp_path: Path) -> None:
    from _gpu_suite import table

    write_results(
        tmp_path, False, tests=TESTED | {"environment": ENVIRONMENT | {"commit": "def456"}}, mask={"rows": [{}]}
    )
    text = table.text(tmp_path)
    assert "commit abc123" in text and "commit def456" in text and "Figures of more than one commit" in text
    assert "not understood" in text and "KeyError" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shapes of a dry run tell nothing on a GPU")
def test_dry_run_of_a_real_part(package: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_suite

    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--dry-run", "--only", "mask"]) == 0
    printed = capsys.readouterr().out
    assert "DRY RUN" in printed and "not understood" not in printed
    assert "loop / call" in printed
    assert gpu_suite.main(["--report", str(out), "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == (out / "table.md").read_text().strip()
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main(["--out", str(out), "--dry-run"])
    assert "--resume goes on with them" in capsys.readouterr().err
