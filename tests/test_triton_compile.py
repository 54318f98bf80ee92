"""What the compiler makes of every Triton kernel for Hopper: no spills, wide loads, barriers where they must be.

Compiled offline by ``compile_triton.py`` in its own process, since this one has Triton's interpreter switched on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
pytestmark = pytest.mark.skipif(
    not (BIN / "cuobjdump").exists(), reason=f"Triton {triton.__version__} was packaged without cuobjdump in {BIN}"
)
# Registers per thread. The row kernels have 8 warps, so 80, 128 and 255 leave room for 3, 2 and 1 programs on an SM.
REGISTERS = {"plain": 80, "entropy": 128, "all options": 168, "masks": 128, "bound": 64}
MASK_KERNELS = {"_draw_kernel"}
ROW_KERNELS = {"_statistics_kernel", "_gradient_kernel", "_bound_gradient_kernel"}
BOUND_KERNELS = {"_segment_sum_kernel", "_bound_kernel"}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    script = Path(__file__).with_name("compile_triton.py")
    # A cache of its own: the kernels of today's sources, compiled by today's Triton.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def budget(fact: dict) -> int:
    if fact["kernel"] in MASK_KERNELS:
        return REGISTERS["masks"]
    if fact["kernel"] in BOUND_KERNELS:
        return REGISTERS["bound"]
    return next((limit for name, limit in REGISTERS.items() if fact["case"].startswith(name)), REGISTERS["plain"])


def test_every_kernel_compiles(facts: list[dict]) -> None:
    assert {fact["kernel"] for fact in facts} == MASK_KERNELS | ROW_KERNELS | BOUND_KERNELS
    assert len(facts) == 6 + 11 * 3 + 4 * 3


def test_nothing_spills_and_registers_stay_within_budget(facts: list[dict]) -> None:
    for fact in facts:
        spills = [opcode for opcode in fact["opcodes"] if opcode.startswith(("STL", "LDL"))]
        assert not spills, f"{fact['kernel']}, {fact['case']}: {spills}"
        assert fact["registers"] <= budget(fact), f"{fact['kernel']}, {fact['case']}: {fact['registers']} registers"
        assert fact["shared"] <= 227 * 1024


def test_logits_are_read_16_bytes_at_a_time(facts: list[dict]) -> None:
    """Besides wide loads a row kernel has only its scalars' (target id and logit, bias, gradients, statistics: 6)."""
    for fact in facts:
        if fact["kernel"] in ROW_KERNELS:
            narrow = sum(n for op, n in fact["opcodes"].items() if op.startswith("LDG") and not op.endswith(".128"))
            wide = fact["opcodes"].get("LDG.E.128", 0) + sum(n for op, n in fact["opcodes"].items() if "LDGSTS" in op)
            # A ragged row's last block is read element by element: 8 elements per thread fill the 1105 left of 50257.
            allowed = 6 + (16 if fact["case"].startswith("ragged") else 0)
            # The segment: offsets, weight, advantage, length, old sum, and four passes of its sum side by side.
            allowed += 10 if fact["kernel"] == "_bound_gradient_kernel" else 0
            assert wide >= 4 and narrow <= allowed, f"{fact['kernel']}, {fact['case']}: {fact['opcodes']}"


def test_noisy_ids_are_read_and_written_16_bytes_at_a_time(facts: list[dict]) -> None:
    """Rows and targets go where their segment begins, 8 bytes a lane; so does nothing else."""
    draws = [fact["opcodes"] for fact in facts if fact["kernel"] == "_draw_kernel"]
    assert draws and all(ops.get("STG.E.128", 0) >= 2 and ops.get("LDG.E.128", 0) >= 2 for ops in draws)


def test_narrow_stores_wait_for_every_warps_loads(facts: list[dict]) -> None:
    """2-byte gradients over fp32 logits: never a store after loads without a barrier (L, B, S in ``memory_order``).

    Races do not show in the interpreter, whose programs run in turn; this is where a lost barrier is noticed.
    """
    gradients = [fact for fact in facts if fact["kernel"] in ("_gradient_kernel", "_bound_gradient_kernel")]
    for fact in gradients:
        order = fact["memory_order"].removeprefix("B")  # before the first load: the warps' parts of a segment's sum
        order = order.removeprefix("S")
        if "fp32 to" in fact["case"]:
            assert "LS" not in order and order.count("BS") == 2, f"{fact['case']}: {order}"
        else:
            assert "B" not in order and order.count("LS") == 2, f"{fact['case']}: {order}"
    assert sum("fp32 to" in fact["case"] for fact in gradients) == 2 * 7


def test_other_numbers_and_places_compile_nothing(facts: list[dict]) -> None:
    """A trainer may change temperature, scale, cap and clips at every step, and a chunk may begin at any row: one
    compiled kernel serves them all.
    """
    compiled: dict[str, list[tuple[str, int]]] = {}
    for fact in facts:
        compiled.setdefault(fact["case"], []).append((fact["kernel"], fact["compiled"]))
    changed = [case for case in compiled if case.endswith((", annealed", ", shifted"))]
    assert len(changed) == 6
    for case in changed:
        assert compiled[case] == compiled[case.rpartition(", ")[0]], case


def test_no_atomics(facts: list[dict]) -> None:
    """Results are the same bits on every run. (The draw's ticket and scan words are integers, whose sums have one value.)"""
    for fact in facts:
        atomics = [op for op in fact["opcodes"] if op.startswith(("ATOM", "RED."))]
        assert bool(atomics) == (fact["kernel"] == "_draw_kernel"), (fact["kernel"], atomics)
