"""What the compiler makes of every Triton kernel: no spills, wide accesses, barriers where they must be, and one binary
whatever a trainer changes.

Compiled offline by ``compile_triton.py`` in its own processes, since this one has Triton's interpreter switched on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")
from machine_code import find_cuobjdump, is_local, narrow, resident, wide

pytestmark = pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump on PATH or in Triton's package")

ARCHS = (90, 80)
MASKS = Path(__file__).parents[1] / "bgpo_kernels" / "masks" / "triton_kernels.py"
SHARED = 64  # bytes: one number for each of 8 warps, to add them up
DRAW_SHARED = 4096  # the draw passes a block of 512 ids from one layout to another


class Budget(NamedTuple):
    registers: int  # per thread
    programs: int  # that so many registers leave room for on a multiprocessor of sm_90


BUDGETS = {
    # 4 programs of 8 warps keep 64 KiB of loads in flight. Entropy doubles the state of a lane, options the arithmetic.
    ("_statistics_kernel", "plain"): Budget(64, 4),
    ("_statistics_kernel", "ragged"): Budget(64, 4),
    ("_statistics_kernel", "entropy"): Budget(128, 2),
    ("_statistics_kernel", "all options"): Budget(168, 1),
    ("_statistics_kernel", "fp64"): Budget(168, 1),
    ("_gradient_kernel", "plain"): Budget(48, 5),
    ("_gradient_kernel", "ragged"): Budget(48, 5),
    ("_gradient_kernel", "entropy"): Budget(64, 4),
    ("_gradient_kernel", "all options"): Budget(80, 3),
    ("_gradient_kernel", "fp64"): Budget(96, 2),
    ("_bound_gradient_kernel", "plain"): Budget(48, 5),
    ("_bound_gradient_kernel", "ragged"): Budget(48, 5),
    ("_bound_gradient_kernel", "entropy"): Budget(64, 4),
    ("_bound_gradient_kernel", "all options"): Budget(104, 2),
    ("_bound_gradient_kernel", "fp64"): Budget(96, 2),
    ("_segment_sum_kernel", "fp32"): Budget(32, 8),
    ("_segment_sum_kernel", "fp64"): Budget(32, 8),
    ("_bound_kernel", "fp32"): Budget(32, 16),
    ("_bound_kernel", "fp64"): Budget(40, 12),
}
# Narrow accesses outside the main loop. Loads of a row: statistics, target id, upstream gradients; or target id, its
# logit and its bias. Of a segment: its place by bisection, offsets, weight, advantage, length, old sum, and the passes
# of its sum, which the compiler makes four at a time with up to three left over.
SCALAR_LOADS = {"_statistics_kernel": 3, "_gradient_kernel": 6, "_bound_gradient_kernel": 3 + 7 + 7}
SCALAR_STORES = {"_statistics_kernel": 4, "_gradient_kernel": 0, "_bound_gradient_kernel": 2}
RAGGED = 16  # elements per thread of a ragged row's last block, read and written one by one

# Arguments whose alignment or divisibility is compiled in. All others are slices that begin anywhere, or numbers.
ROWS = {"logits", "stride", "bias"}
ALIGNED = {
    "_draw_kernel": {"input_ids", "response_mask", "prompt_mask", "thresholds", "table_weights", "tokens"}
    | {"noisy_ids", "rows", "targets", "counts", "weights", "offsets", "state"},
    "_statistics_kernel": ROWS,
    "_gradient_kernel": ROWS | {"out", "out_stride"},
    "_bound_gradient_kernel": ROWS | {"out", "out_stride"},
    "_segment_sum_kernel": set(),
    "_bound_kernel": set(),
}
# What a trainer changes from step to step: rows and segments (hence strides of 1, 3 and 4096), places, numbers.
OF_ROWS = {"C = 1", "shifted", "of 4096 rows"}
CHANGES = {
    "_draw_kernel": {"another T", "Dream's mask id", "shifted", "other numbers"},
    "_statistics_kernel": OF_ROWS,
    "_gradient_kernel": OF_ROWS,
    "_bound_gradient_kernel": OF_ROWS,
    "_segment_sum_kernel": {"C = 1", "of 4096 rows", "annealed"},
    "_bound_kernel": {"C = 1", "of 4096 rows", "annealed"},
}


class Compiled(NamedTuple):
    kernels: list[str]  # that the package has
    facts: list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Compiled]:
    """By architecture; side by side."""

    def run(arch: int) -> Compiled:
        # A cache of its own: the kernels of today's sources, compiled by today's Triton.
        cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
        command = [sys.executable, str(Path(__file__).with_name("compile_triton.py")), str(arch)]
        done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        kernels, *facts = map(json.loads, done.stdout.splitlines())
        return Compiled(kernels, facts)

    with ThreadPoolExecutor() as pool:
        return dict(zip(ARCHS, pool.map(run, ARCHS), strict=True))


@pytest.fixture
def facts(compiled: dict[int, Compiled]) -> list[dict[str, Any]]:
    return compiled[90].facts


def label(fact: dict[str, Any]) -> str:
    return f"{fact['kernel']}, {fact['name']}"


def narrows(fact: dict[str, Any]) -> bool:
    return fact["out_bytes"] < fact["logit_bytes"]


def row_kernels(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [fact for fact in facts if fact["kernel"] in SCALAR_LOADS]
    assert {fact["kernel"] for fact in found} == SCALAR_LOADS.keys()
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled(compiled: dict[int, Compiled], arch: int) -> None:
    kernels, facts = compiled[arch]
    assert kernels == sorted({fact["kernel"] for fact in facts})


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(compiled: dict[int, Compiled], arch: int) -> None:
    failed = set()
    for fact in compiled[arch].facts:
        spills = {opcode: n for opcode, n in fact["opcodes"].items() if is_local(opcode)}
        if spills or fact["stack"] or fact["local"]:
            failed.add(f"{label(fact)}: {fact['registers']} registers, {fact['stack']} bytes of stack, {spills}")
    assert not failed, "\n".join(sorted(failed))


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_stays_within_budget(compiled: dict[int, Compiled], arch: int) -> None:
    for fact in compiled[arch].facts:
        limit = DRAW_SHARED if fact["kernel"] == "_draw_kernel" else SHARED
        assert fact["shared"] <= limit, f"{label(fact)}: {fact['shared']} bytes"


def budget(fact: dict[str, Any]) -> Budget:
    """Of a kernel and its variant. The draw's is what its source asks for, and promises of its largest programs."""
    if fact["kernel"] != "_draw_kernel":
        return BUDGETS[fact["kernel"], fact["variant"]]
    asked = re.search(r"^MAX_REGISTERS = (\d+)  # (\w+) programs on a multiprocessor", MASKS.read_text(), re.M)
    block = re.search(r"^MAX_BLOCK = (\d+) ", MASKS.read_text(), re.M)
    assert asked and block, "masks/triton_kernels.py no longer says what MAX_REGISTERS is for"
    assert int(asked[1]) == fact["maxnreg"], f"{label(fact)}: MAX_REGISTERS is not what it is compiled with"
    programs = ("one", "two", "three", "four", "five", "six", "seven", "eight").index(asked[2]) + 1
    return Budget(fact["maxnreg"], programs * (int(block[1]) // 4) // fact["threads"])  # 4 tokens a thread


def test_registers_stay_within_budget_and_leave_room_for_the_programs_promised(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        limit, shared = budget(fact), DRAW_SHARED if fact["kernel"] == "_draw_kernel" else SHARED
        assert resident(limit.registers, fact["threads"], shared) >= limit.programs, f"{label(fact)}: too much promised"
        assert fact["registers"] <= limit.registers, f"{label(fact)}: {fact['registers']} registers"
        programs = resident(fact["registers"], fact["threads"], fact["shared"])
        assert programs >= limit.programs, f"{label(fact)}: {programs} programs on a multiprocessor"
    unused = BUDGETS.keys() - {(fact["kernel"], fact["variant"]) for fact in facts}
    assert not unused, unused


def test_the_main_loop_of_a_row_kernel_moves_16_bytes_at_a_time_and_nothing_else(facts: list[dict[str, Any]]) -> None:
    """One block an iteration: 64 bytes of fp32 or fp64 logits a thread, 32 of 16-bit ones; as much of gradients."""
    for fact in row_kernels(facts):
        loop, elements = fact["main_loop"], 8 if fact["logit_bytes"] == 8 else 16
        loads = elements * fact["logit_bytes"] // 16
        stores = 0 if fact["kernel"] == "_statistics_kernel" else elements * fact["out_bytes"] // 16
        assert wide(loop, "LDG") >= loads and wide(loop, "STG") >= stores, f"{label(fact)}: {loop}"
        assert narrow(loop, "LDG") == narrow(loop, "STG") == 0, f"{label(fact)}: {loop}"


def test_outside_its_main_loop_a_row_kernel_has_no_narrow_accesses_but_scalars(facts: list[dict[str, Any]]) -> None:
    for fact in row_kernels(facts):
        ragged = RAGGED if fact["variant"] == "ragged" else 0
        loads, stores = (narrow(fact["opcodes"], kind) for kind in ("LDG", "STG"))
        assert loads <= SCALAR_LOADS[fact["kernel"]] + ragged, f"{label(fact)}: {fact['opcodes']}"
        assert stores <= SCALAR_STORES[fact["kernel"]] + ragged, f"{label(fact)}: {fact['opcodes']}"


def test_narrow_gradients_leave_16_bytes_at_a_time(facts: list[dict[str, Any]]) -> None:
    """16-bit gradients over fp32 logits: a row's stride is twice as many elements, which Triton must be told."""
    gradients = [fact for fact in row_kernels(facts) if narrows(fact) and fact["kernel"] != "_statistics_kernel"]
    assert len({fact["name"] for fact in gradients}) >= 5
    for fact in gradients:
        halves = [opcode for opcode in fact["opcodes"] if opcode.startswith("STG") and ".64" in opcode]
        assert not halves and wide(fact["opcodes"], "STG"), f"{label(fact)}: {fact['opcodes']}"


def test_noisy_ids_are_read_and_written_16_bytes_at_a_time(facts: list[dict[str, Any]]) -> None:
    """Where all rows are aligned. Rows and targets go where their segment begins, 8 bytes a lane; nothing else does."""
    draws = [fact["main_loop"] for fact in facts if fact["kernel"] == "_draw_kernel" and fact["variant"] == "aligned"]
    assert draws and all(wide(loop, "STG") >= 2 and wide(loop, "LDG") >= 2 for loop in draws)
    assert all(narrow(loop, "STG") <= 8 for loop in draws)  # two arrays, 4 tokens a thread


def test_narrow_stores_wait_for_every_warps_loads(facts: list[dict[str, Any]]) -> None:
    """2-byte gradients over fp32 logits: never a store after loads without a barrier (L, B, S in ``memory_order``).

    Races do not show in the interpreter, whose programs run in turn; this is where a lost barrier is noticed.
    """
    for fact in row_kernels(facts):
        if fact["kernel"] == "_statistics_kernel":
            continue
        order = fact["memory_order"].removeprefix("B")  # before the first load: the warps' parts of a segment's sum
        order = order.removeprefix("S")
        if narrows(fact):
            assert "LS" not in order and order.count("BS") == 2, f"{label(fact)}: {order}"
        else:  # a ragged row's last block is loaded element by element, which is no L
            blocks = 1 if fact["variant"] == "ragged" else 2
            assert "B" not in order and order.count("LS") == blocks, f"{label(fact)}: {order}"


def test_other_numbers_rows_and_places_compile_nothing(facts: list[dict[str, Any]]) -> None:
    """A trainer may change temperature, scale, cap and clips at every step, a chunk may have any number of rows and
    begin anywhere, a model any mask token: one compiled kernel serves them all.
    """
    binaries: dict[tuple[str, str], dict[str, list[int]]] = {}
    for fact in facts:
        changes = binaries.setdefault((fact["kernel"], fact["name"]), {})
        changes.setdefault(fact["change"], []).append(fact["compiled"])
    for (kernel, name), changes in binaries.items():
        expected = CHANGES[kernel] | ({"annealed"} if "all options" in name else set())
        assert name.endswith("no prompt") or changes.keys() == expected | {""}, f"{kernel}, {name}: {changes.keys()}"
        for change, compiled in changes.items():
            assert compiled == changes[""], f"{kernel}, {name}, {change}: compiled anew"


def test_the_compiler_knows_of_every_alignment_there_is_and_of_no_other(facts: list[dict[str, Any]]) -> None:
    """Triton compiles in whether an address or a number is a multiple of 16. Whole tensors are: 64 bytes on the CPU,
    where this is compiled, 256 and more from torch's CUDA allocator. So the kernel of a real call is the one with these
    hints; what may be a slice is never asked.
    """
    for fact in facts:
        expected = {
            name
            for name in ALIGNED[fact["kernel"]].intersection(fact["arguments"])
            if fact["integers"].get(name, 16) % 16 == 0
        }
        assert set(fact["divisible"]) == expected, f"{label(fact)}: {fact['divisible']}, expected {sorted(expected)}"


def test_no_atomics(facts: list[dict[str, Any]]) -> None:
    """Results are the same bits on every run. (The draw's ticket and scan words are integers: sums have one value.)"""
    for fact in facts:
        atomics = [op for op in fact["opcodes"] if op.startswith(("ATOM", "RED."))]
        assert bool(atomics) == (fact["kernel"] == "_draw_kernel"), (fact["kernel"], atomics)
