"""Run every Triton kernel under triton-viz, through the functions that launch it, and print what was found as JSON.

Run by ``test_triton_viz.py`` in a process of its own: triton-viz changes Triton's interpreter as it is imported. One
JSON object per line: first the package's kernels and whether each has a ``while`` loop; then, for every case of
``triton_viz_cases.py``, check and kernel, how many accesses were checked and the finding, if any. Two checks:

* ``sanitizer``, triton-viz's own. A solver is asked for a program and a lane whose address lies outside all arguments.
  It evaluates no condition: it would never leave a ``while`` loop, and of an ``if`` on a value that was loaded it sees
  the first side only. Kernels with ``while`` are left to the second check.
* ``concrete``, a client of triton-viz, below. The interpreter executes the kernel on the case's values, and each
  address must be an element of the very argument that its pointer was computed from: neither the gap between two rows
  of a strided matrix nor a neighbouring tensor, which the hardware would let pass.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

os.environ |= {"TRITON_INTERPRET": "1", "ENABLE_SANITIZER": "1"}  # the second is triton-viz's own switch

import numpy as np
import torch
import triton_viz
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton_viz.clients.sanitizer.sanitizer import SymbolicSanitizer
from triton_viz.core import data as ops
from triton_viz.core.callbacks import ForLoopCallbacks, OpCallbacks
from triton_viz.core.client import Client
from triton_viz.core.patch import _loop_patcher

sys.path.insert(0, str(Path(__file__).parents[1]))
import triton_viz_cases

import bgpo_kernels

Kernels = dict[str, tuple[ModuleType, InterpretedFunction]]

ORIGIN = "argument"  # an attribute of pointers: the name of the argument that they were computed from
CARRY_POINTERS = (ops.AddPtr, ops.Splat, ops.Broadcast, ops.ExpandDims, ops.Reshape, ops.Bitcast)
ACCESSES = (ops.RawLoad, ops.Load, ops.RawStore, ops.Store, ops.AtomicRMW, ops.AtomicCas)


class OutOfBounds(Exception):
    """Raised in place of an access that must not be made."""


@dataclass(frozen=True)
class Elements:
    """Which addresses are elements of a tensor."""

    start: int
    size: int
    valid: np.ndarray  # of each element from the first to the last in memory

    @classmethod
    def of(cls, tensor: Tensor) -> Elements:
        places = np.zeros(1, dtype=np.int64)
        for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
            places = np.add.outer(places, np.arange(extent) * stride).ravel()
        valid = np.zeros(places.max(initial=-1) + 1, dtype=bool)
        valid[places] = True
        return cls(tensor.data_ptr(), tensor.element_size(), valid)

    def hold(self, addresses: np.ndarray) -> np.ndarray:
        index, rest = np.divmod(addresses.astype(np.int64) - self.start, self.size)
        inside = (rest == 0) & (index >= 0) & (index < len(self.valid))
        return inside & np.append(self.valid, False)[np.where(inside, index, -1)]


class ConcreteSanitizer(Client):
    """Raises ``OutOfBounds`` instead of an access outside the elements of the pointer's own argument."""

    NAME = "concrete"

    def __init__(self) -> None:
        super().__init__()
        self.accesses = 0
        self.finding: str | None = None
        self.arguments: dict[str, Elements] = {}

    def arg_callback(self, name: str, arg: object, converted: object) -> None:
        if isinstance(arg, Tensor):
            self.arguments[name] = Elements.of(arg)
            converted.handle.attr[ORIGIN] = name

    def register_op_callback(self, op_type: type[ops.Op]) -> OpCallbacks:
        if op_type in CARRY_POINTERS:
            return OpCallbacks(after_callback=self.carry)
        if op_type in (ops.Load, ops.Store):  # the interpreter turns accesses without a mask into these
            return OpCallbacks(before_callback=lambda ptr, mask, _: self.check(ptr, mask, op_type))
        if op_type is ops.AtomicRMW:
            return OpCallbacks(before_callback=lambda _, ptr, value, mask, *rest: self.check(ptr, mask, op_type))
        if op_type is ops.AtomicCas:
            return OpCallbacks(before_callback=lambda ptr, *rest: self.check(ptr, None, op_type))
        return OpCallbacks()

    @staticmethod
    def carry(result: TensorHandle, *given: object) -> None:
        for handle in given:
            if isinstance(handle, TensorHandle) and ORIGIN in handle.attr:
                result.attr[ORIGIN] = handle.attr[ORIGIN]

    def check(self, ptr: TensorHandle, mask: TensorHandle | None, op_type: type[ops.Op]) -> None:
        addresses = ptr.data if mask is None else ptr.data[np.broadcast_to(mask.data, ptr.data.shape)]
        self.accesses += addresses.size
        name = ptr.attr[ORIGIN]  # a KeyError is an operation on pointers that CARRY_POINTERS lacks
        held = self.arguments[name].hold(addresses)
        if not held.all():
            at = int(addresses[~held][0]) - self.arguments[name].start
            lanes = f"{(~held).sum()} lanes in program {self.grid_idx[0]}"
            self.finding = f"{op_type.__name__} of {name} at byte {at}, {lanes}"
            raise OutOfBounds(self.finding)

    def grid_idx_callback(self, grid_idx: tuple[int, ...]) -> None:
        self.grid_idx = grid_idx

    def pre_run_callback(self, fn: Callable) -> bool:
        return True  # run this program, and, below, the next one

    def post_run_callback(self, fn: Callable) -> bool:
        return True

    def pre_warmup_callback(self, jit_fn: Callable, *args: object, **kwargs: object) -> bool:
        return False

    def post_warmup_callback(self, jit_fn: Callable, ret: object) -> None: ...

    def grid_callback(self, grid: tuple[int, ...]) -> None: ...

    def register_for_loop_callback(self) -> ForLoopCallbacks:
        return ForLoopCallbacks()

    def finalize(self) -> list:
        return []


class CountingSanitizer(SymbolicSanitizer):
    """triton-viz's sanitizer, which counts what it checks."""

    def __init__(self) -> None:
        super().__init__(abort_on_error=False)
        self.accesses = 0

    def register_op_callback(self, op_type: type[ops.Op]) -> OpCallbacks:
        callbacks = super().register_op_callback(op_type)
        if op_type in ACCESSES:
            override = callbacks.op_overrider

            def counted(*args: object) -> object:
                self.accesses += 1
                return override(*args)

            callbacks.op_overrider = counted
        return callbacks

    @property
    def finding(self) -> str | None:
        for record in self.records:
            at = record.violation_address - record.tensor.data_ptr()
            return f"{record.op_type.__name__} of {record.tensor_name} at byte {at}"
        return None


def kernel_modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(bgpo_kernels.__path__, "bgpo_kernels.")
    return [importlib.import_module(info.name) for info in found if info.name.endswith(".triton_kernels")]


def kernels_of(module: ModuleType) -> dict[str, InterpretedFunction]:
    """The kernels that a module defines; what it imports is another's."""
    every = {name: value for name, value in vars(module).items() if isinstance(value, InterpretedFunction)}
    return {name: f for name, f in every.items() if name.endswith("_kernel") and f.fn.__module__ == module.__name__}


def has_while(function: Callable) -> bool:
    """Whether a kernel, or a function that it calls, has a ``while`` loop."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    return any(isinstance(node, ast.While) for node in ast.walk(tree)) or any(
        has_while(f.fn) for f in called if isinstance(f, InterpretedFunction)
    )


@contextmanager
def under(clients: dict[str, Client], kernels: Kernels) -> Iterator[None]:
    """While this lasts, every launch of a kernel goes through its own sanitizer."""
    for name, (module, kernel) in kernels.items():
        setattr(module, name, triton_viz.trace(client=clients[name])(kernel))
    try:
        yield
    finally:
        for name, (module, kernel) in kernels.items():
            setattr(module, name, kernel)


def check(call: Callable[[], object], clients: dict[str, Client], kernels: Kernels) -> list[dict]:
    """What the sanitizers of the kernels say of a call; its launches end with the first finding."""
    try:
        with under(clients, kernels):
            call()
    except Exception:  # Triton wraps what is raised in a function that a kernel calls
        if not any(client.finding for client in clients.values()):
            raise
    return [
        {"check": client.NAME, "kernel": name, "accesses": client.accesses, "finding": client.finding}
        for name, client in clients.items()
        if client.accesses
    ]


def report(cases: triton_viz_cases.Cases, modules: list[ModuleType], faulty: bool) -> None:
    kernels = {name: (module, kernel) for module in modules for name, kernel in kernels_of(module).items()}
    straight = {name for name, (_, kernel) in kernels.items() if not has_while(kernel.fn)}
    for case, call in cases:
        facts = check(call, {name: ConcreteSanitizer() for name in kernels}, kernels)
        if any(fact["kernel"] in straight for fact in facts):
            which = {name: CountingSanitizer if name in straight else ConcreteSanitizer for name in kernels}
            facts += check(call, {name: sanitizer() for name, sanitizer in which.items()}, kernels)
        for fact in facts:
            print(json.dumps({"faulty": faulty, "case": case} | fact), flush=True)


def main() -> None:
    modules = kernel_modules()
    # triton-viz makes every `for` ask this object, but leaves it only in the module of the kernel, not of its callees.
    for name, module in list(sys.modules.items()):
        if name.startswith("bgpo_kernels."):
            module._triton_viz_loop_patcher = _loop_patcher
    found = {name: has_while(kernel.fn) for module in modules for name, kernel in kernels_of(module).items()}
    print(json.dumps({"kernels": found}), flush=True)
    torch.manual_seed(0)
    report(triton_viz_cases.all_cases(), modules, faulty=False)
    report(triton_viz_cases.faulty_cases(), [triton_viz_cases], faulty=True)


if __name__ == "__main__":
    main()
