"""Does full fine-tuning with an 8-bit AdamW fit one 80 GiB card? One whole optimizer step, tried under that cap.

The optimizer's state does not exist before the first step, and does during every later one, so a small first step
comes before the measured one: update at n_mc samples, then the optimizer. Weights and gradients are bf16, layers
checkpointed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _measure import GIB, PeakMemory, is_out_of_memory, synchronize
from _script import OK, OUT_OF_MEMORY

from .batch import Batch, our_update
from .models import NotInstalled, Subject

CAP = 80 * GIB
LEARNING_RATE = 3e-4  # of the order of a bf16 rounding of the weights, so that a step shows in them


def eight_bit_adamw() -> tuple[str, Callable[..., torch.optim.Optimizer]]:
    """The library and its optimizer, torchao's if both are there. Raises NotInstalled."""
    reasons = []
    try:
        from torchao.optim import AdamW8bit

        return "torchao", AdamW8bit
    except ImportError as error:
        reasons.append(f"torchao: {error}")
    try:
        from bitsandbytes.optim import AdamW8bit

        return "bitsandbytes", AdamW8bit
    except ImportError as error:
        reasons.append(f"bitsandbytes: {error}")
    raise NotInstalled("; ".join(reasons))


def optimizer_step(subject: Subject, batch: Batch, n_mc: int, device: torch.device) -> dict[str, Any]:
    """Whether the step fits, and the peaks on the way; out of memory is the answer no."""
    library, optimizer_class = eight_bit_adamw()
    memory = PeakMemory(device)
    found: dict[str, Any] = {"library": library, "cap_bytes": CAP, "peak_bytes": {}, "seconds": {}}
    try:
        optimizer = optimizer_class(subject.trained, lr=LEARNING_RATE)
        our_update(subject.model, batch, 1, seed=0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        memory.start()
        found["held_bytes"] = memory.baseline  # weights, optimizer state, workspace
        watched = subject.trained[-1].detach().clone()
        parts = {"update": lambda: our_update(subject.model, batch, n_mc, seed=1), "optimizer": optimizer.step}
        for part, run in parts.items():
            _timed(part, run, memory, found)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return found | {"status": OUT_OF_MEMORY, "fits": False, "message": str(error).split("\n")[0]}
    if torch.equal(watched, subject.trained[-1]):
        raise AssertionError("the optimizer's step changed nothing")
    return found | {"status": OK, "fits": True}


def _timed(part: str, run: Callable[[], Any], memory: PeakMemory, found: dict[str, Any]) -> None:
    memory.restart()
    begin = time.perf_counter()
    run()
    synchronize(memory.device)
    found["seconds"][part] = time.perf_counter() - begin
    found["peak_bytes"][part] = memory.baseline + memory.above()
    if memory.device.type == "cuda":  # with what the allocator held in reserve
        found.setdefault("reserved_bytes", {})[part] = torch.cuda.max_memory_reserved(memory.device)
