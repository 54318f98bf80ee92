"""benchmarks/integrations.py: every trainer's entry gives the same result both ways; the record, pages, failures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
TRAINERS = sorted(p.stem for p in (BENCHMARKS / "_integrations").glob("[a-z]*.py"))
TRAINERS = [name for name in TRAINERS if name not in ("case", "report", "worker")]
RECORD = BENCHMARKS / "results" / "integrations_cpu.json"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' modules can be imported, and their processes run on one thread."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def worker() -> ModuleType:
    return importlib.import_module("_integrations.worker")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_both_ways_give_the_same(trainer: str, worker: ModuleType) -> None:
    row = worker.run(trainer, "tiny", 1)
    assert row["status"] == worker.OK, row
    assert 0 < row["our_rows"] <= row["plain_rows"]
    assert all(len(times) == 1 and times[0] > 0 for times in row["seconds"].values())


def entry(monkeypatch: pytest.MonkeyPatch, change: Any) -> str:
    """An entry of a trainer whose function and ours differ by `change(value)`."""

    def case(_size: Any) -> Any:
        from _integrations.case import Case

        model = torch.nn.Linear(3, 2)
        return Case(model, lambda: model(torch.ones(3)), lambda: change(model(torch.ones(3))), 2, 1)

    module = type(sys)("_integrations.made_up")
    module.TITLE, module.case = "made up", case
    monkeypatch.setitem(sys.modules, "_integrations.made_up", module)
    return "made_up"


def test_what_differs_is_seen(monkeypatch: pytest.MonkeyPatch, worker: ModuleType) -> None:
    def status(change: Any) -> str:
        return worker.run(entry(monkeypatch, change), "tiny", 1)["status"]

    assert status(lambda v: v) == worker.OK
    assert status(lambda v: v * 1.001) == worker.DIFFERS
    assert status(lambda v: v.detach() + 1.001 * (v - v.detach())) == worker.DIFFERS, "a gradient alone"
    with pytest.raises(AssertionError, match="on one side only"):
        status(lambda v: v.detach())
    with pytest.raises(AssertionError, match="shapes"):
        status(lambda v: v[:1])


def test_the_script_runs_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = [sys.executable, str(BENCHMARKS / "integrations.py"), "--size", "tiny", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--only", "d1", "--out", str(out)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "d1 ... equal" in done.stdout and "same result" in done.stdout
    record = json.loads(out.read_text())
    assert [row["trainer"] for row in record["rows"]] == ["d1"] and record["environment"]["versions"]["torch"]
    wrong = subprocess.run([*command, "--pages"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "--pages needs --out and --size small" in wrong.stderr


def test_a_process_that_fails_is_a_row_and_an_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = importlib.import_module("integrations")
    failed = {"trainer": "d1", "status": script.FAILED, "message": "ValueError: no"}
    monkeypatch.setattr(script, "_in_a_process", lambda name, options: failed)
    assert script.main(["--only", "d1"]) == 1
    assert "ValueError: no" in capsys.readouterr().out


def test_pages_show_the_figures_of_the_record(worker: ModuleType) -> None:
    report = importlib.import_module("_integrations.report")
    record = json.loads(RECORD.read_text())
    assert record["size"] == "small"
    assert [row["trainer"] for row in record["rows"]] == worker.trainers() == TRAINERS, "every trainer was measured"
    for row in record["rows"]:
        assert row["status"] == worker.OK
        page = (ROOT / "docs" / "integrations" / f"{row['trainer']}.md").read_text()
        assert f"<!-- figures: {row['trainer']} -->\n{report.figures(row)}" in page, row["trainer"]
