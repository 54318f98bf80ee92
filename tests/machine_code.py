"""What a compiled kernel is made of: its instructions, loops and resources, and how many fit a multiprocessor."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Of `cuobjdump -sass`: "/*0a30*/  @!P0 BRA 0x420 ;"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*);", re.M)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    target: int | None  # of a branch


class Kernel(NamedTuple):
    name: str
    registers: int  # per thread
    stack: int  # bytes, as shared and local
    shared: int
    local: int
    code: list[Instruction]


def find_cuobjdump(*folders: Path) -> str | None:
    """In one of the folders, on PATH or in Triton's package."""
    candidates = [str(folder / "cuobjdump") for folder in folders] + [shutil.which("cuobjdump") or ""]
    try:
        import triton

        candidates.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    except ImportError:
        pass
    return next((c for c in candidates if c and Path(c).is_file()), None)


def disassemble(cuobjdump: str, cubin: Path) -> dict[str, Kernel]:
    """Every kernel of a cubin, by its (mangled) name."""
    sass, usage = (
        subprocess.run([cuobjdump, flag, str(cubin)], capture_output=True, text=True, check=True).stdout
        for flag in ("-sass", "-res-usage")
    )
    code = {}
    for text in sass.split("Function : ")[1:]:
        name, _, body = text.partition("\n")
        code[name.strip()] = [_instruction(*match) for match in INSTRUCTION.findall(body)]
    resources = {name: RESOURCES.search(line) for name, line in re.findall(r"Function (\S+):\s+(.*)", usage)}
    kernels = {}
    for name, found in resources.items():
        assert found and code.get(name), f"cuobjdump's output on {name} was not understood"
        kernels[name] = Kernel(name, *map(int, found.groups()), code[name])
    assert kernels.keys() == code.keys(), "cuobjdump's output was not understood"
    return kernels


def _instruction(address: str, opcode: str, operands: str) -> Instruction:
    target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.split(".")[0] == "BRA" else None
    return Instruction(int(address, 16), opcode, int(target[1], 16) if target else None)


def opcodes(code: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode occurs."""
    return Counter(instruction.opcode for instruction in code)


def is_local(opcode: str) -> bool:
    """Whether it moves a register to or from memory of the thread: a spill, or an array that is indexed at run time."""
    return opcode.split(".")[0] in ("LDL", "STL")


def wide(counts: Counter[str] | dict[str, int], kind: str) -> int:
    """16-byte accesses of a kind: LDG (with its asynchronous form) or STG."""
    return sum(n for opcode, n in counts.items() if opcode.startswith(kind) and "128" in opcode.split("."))


def narrow(counts: Counter[str] | dict[str, int], kind: str) -> int:
    """The other accesses of that kind."""
    return sum(n for opcode, n in counts.items() if opcode.startswith(kind)) - wide(counts, kind)


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop that moves the most memory 16 bytes at a time (none: an empty list)."""
    loops = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[i for i in code if begin <= i.address <= end] for begin, end in innermost]
    return max(bodies, key=lambda body: wide(opcodes(body), "LDG") + wide(opcodes(body), "STG"), default=[])


def resident(registers: int, threads: int, shared: int, arch: int = 90) -> int:
    """Blocks on a multiprocessor: the CUDA programming guide's limits for compute capability 8.0 or 9.0.

    A warp lives on one of four partitions, each with a quarter of the 65536 registers and of the 64 warps, and takes
    registers in units of 256 (8 a thread). A block takes shared memory in units of 128 bytes and 1 KiB on top.
    """
    total_shared = {80: 164, 90: 228}[arch] * 1024
    warps = -(-threads // 32)
    per_warp = -(-registers // 8) * 256
    by_registers = 4 * (65536 // 4 // per_warp) // warps
    by_shared = total_shared // (-(-shared // 128) * 128 + 1024)
    return min(32, 64 // warps, by_registers, by_shared)
