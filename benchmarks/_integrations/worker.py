"""One trainer, measured in this process: `python -m _integrations.worker TRAINER SIZE ROUNDS RESULT.json`.

A round is the value and its gradient, for a loss with fixed random weights. Both ways run once before they are timed;
then they take turns. Peak memory is that above the model and its gradients, the workspace of bgpo_kernels included.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import PeakMemory
from torch import Tensor, nn

import bgpo_kernels as bk

from .case import SIZES, Case

# fp32 on both sides: sums of some 100 log-probabilities near 12, and gradients summed in different orders.
VALUE_RTOL, GRADIENT_RTOL = 1e-5, 1e-4
OK, DIFFERS = "equal", "DIFFERS"


def trainers() -> list[str]:
    """Names of all entries."""
    own = {"__init__", "case", "report", "worker"}
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in own)


def run(name: str, size: str, rounds: int) -> dict[str, Any]:
    """The row of one trainer."""
    entry = importlib.import_module(f"_integrations.{name}")
    torch.manual_seed(0)
    case: Case = entry.case(SIZES[size])
    ways = {"plain": case.plain, "ours": case.ours}
    values, gradients = {}, {}
    for way, function in ways.items():  # warms up, too
        values[way] = _round(case.model, function)
        gradients[way] = {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}
    row = {"trainer": name, "title": entry.TITLE, "plain_rows": case.plain_rows, "our_rows": case.our_rows}
    row |= _compare(values, gradients)
    del values, gradients
    return row | _measure(case, ways, rounds)


def _round(model: nn.Module, function: Callable[[], Tensor]) -> Tensor:
    """The value, detached; its gradient is in .grad."""
    model.zero_grad(set_to_none=True)
    value = function()
    if value.requires_grad:
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        (value * weights).sum().backward()
    return value.detach()


def _compare(values: dict[str, Tensor], gradients: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Largest differences, relative to the largest value and, per parameter, to the largest gradient entry.

    A trainer's function that makes no gradient (an evaluation) has none on either side, and an error of 0.
    """
    value = _relative(values["plain"], values["ours"])
    if gradients["plain"].keys() != gradients["ours"].keys():
        raise AssertionError(f"gradients of {gradients['plain'].keys() ^ gradients['ours'].keys()} on one side only")
    errors = [_relative(g, gradients["ours"][name]) for name, g in gradients["plain"].items()]
    gradient = max(errors, default=0.0)
    equal = value <= VALUE_RTOL and gradient <= GRADIENT_RTOL
    return {"status": OK if equal else DIFFERS, "value_error": value, "gradient_error": gradient}


def _relative(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise AssertionError(f"shapes {list(expected.shape)} and {list(found.shape)}")
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((expected - found).abs().max() / scale)


def _measure(case: Case, ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    memory = PeakMemory("cpu")
    bk.set_workspace_bytes(None)
    memory.start()  # with the gradients of the last round, which every round makes anew
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peak: dict[str, int] = dict.fromkeys(ways, 0)
    for _ in range(rounds):
        for way, function in ways.items():
            bk.set_workspace_bytes(None)  # given back, so that it counts as memory of the call that needs it
            memory.restart()
            begin = time.perf_counter()
            _round(case.model, function)
            seconds[way].append(time.perf_counter() - begin)
            peak[way] = max(peak[way], memory.above())
    return {"seconds": seconds, "peak_bytes": peak, "instrument": memory.how}


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
