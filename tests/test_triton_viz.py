"""No Triton kernel reads or writes beside its tensors, says triton-viz; and what is beside them, it finds.

``triton_viz_run.py`` says how, and runs in a process of its own. ``test_triton_memory.py`` asks the hardware the same,
which sees one byte too many at a tensor's end and nothing that lands in another tensor or between two rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton_viz") is None, reason="triton-viz is not installed"),
]


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """The kernels found, then the facts."""
    script = Path(__file__).with_name("triton_viz_run.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    # A solver or an interpreter that never ends is a failure, too.
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels(lines: list[dict]) -> dict[str, bool]:
    """The package's kernels, and whether each has a ``while`` loop."""
    return lines[0]["kernels"]


@pytest.fixture(scope="module")
def facts(lines: list[dict]) -> list[dict]:
    return lines[1:]


def test_every_kernel_is_checked(kernels: dict[str, bool], facts: list[dict]) -> None:
    checked = {(fact["check"], fact["kernel"]) for fact in facts if not fact["faulty"] and fact["accesses"]}
    straight = {name for name, has_while in kernels.items() if not has_while}
    assert straight and len(straight) < len(kernels)
    assert checked == {("concrete", name) for name in kernels} | {("sanitizer", name) for name in straight}


def test_no_access_is_out_of_bounds(facts: list[dict]) -> None:
    assert not [fact for fact in facts if not fact["faulty"] and fact["finding"]]


def test_every_fault_is_found(facts: list[dict]) -> None:
    faults = {(fact["case"], fact["check"]): fact["finding"] for fact in facts if fact["faulty"]}
    unseen = {key for key, finding in faults.items() if not finding}
    assert {check for _, check in faults} == {"concrete", "sanitizer"}
    # To triton-viz's own sanitizer an address inside any argument will do.
    assert unseen <= {("load of a neighbour", "sanitizer")}
    assert len(faults) == 2 * 6 - 1  # that with a while loop is for one of them only
