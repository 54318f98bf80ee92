"""The counted prediction of the head's cost: against a count by hand, and as the documentation quotes it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bgpo_kernels.head.engine import PANEL_ROWS

ROOT = Path(__file__).parent.parent
GIB = 1 << 30


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("predict")


def test_a_case_counted_by_hand(predict: ModuleType) -> None:
    """300 rows of H = 10, V = 1000: one panel, filled up from 300 rows to 512."""
    case, rates = predict.Case(300, 10, 1000, "trained", GIB), predict.Rates(flops=1e9, bytes=1e8)
    flops = 2 * 10 * 1000 * (512 + 300 + 300)
    moved = 300 * 1000 * (4 + 6) + 4 * 10 * 1000
    assert case.seconds(rates) == pytest.approx(flops / 1e9 + moved / 1e8)
    assert case.bare(rates) == pytest.approx(3 * 2 * 300 * 10 * 1000 / 1e9)
    assert predict.Case(300, 10, 1000, "forward", GIB).seconds(rates) == pytest.approx(
        2 * 10 * 1000 * 512 / 1e9 + 300 * 1000 * 4 / 1e8
    )


def test_chunks_are_the_engines(predict: ModuleType) -> None:
    """Whole panels of the workspace, as tests/test_head_meta.py sees the engine cut them."""
    assert predict.PANEL == PANEL_ROWS
    assert predict.Case(8000, 4096, 126464, "trained", GIB).chunks == [2048, 2048, 2048, 1856]
    assert predict.Case(1000, 4096, 126464, "trained", 64 << 20).chunks == [128] * 7 + [104]


def test_the_documentation_quotes_it(predict: ModuleType, capsys: pytest.CaptureFixture) -> None:
    page = (ROOT / "docs" / "gpu_path.md").read_text()
    quoted = re.search(r"<!-- predict.py (.+?) -->\n(.+?)\n<!-- end -->", page, re.S)
    assert quoted is not None
    predict.main(quoted[1].split())
    assert capsys.readouterr().out.strip() == quoted[2].strip()


def test_rates_are_demanded() -> None:
    for arguments in ([], ["--tflops", "0", "--terabytes", "1"]):
        command = [sys.executable, str(ROOT / "benchmarks" / "predict.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and ("required" in done.stderr or "positive" in done.stderr)
