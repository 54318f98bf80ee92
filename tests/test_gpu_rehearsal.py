"""The GPU tests run where there is no GPU, at tiny sizes, on the CPU engine: so that they are right when one is there.

(With Triton's interpreter, too, by `pytest tests/gpu --rehearse`: minutes instead of seconds.)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run by themselves: pytest -m gpu")
def test_gpu_tests_pass_in_rehearsal() -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / "gpu"), "--rehearse", "-k", "not triton"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    ran = re.search(r"^[.sx]+", done.stdout, re.M)
    assert ran is not None and ran[0].count(".") >= 40, done.stdout[-2000:]
