"""One case: every variant is checked against the truth, called again for its memory and its bits, then all are timed.

A variant whose error is above its bound is "wrong" and not timed. One that cannot run here is "not installed", with the
reason; running out of memory is a result. A peer that fails is a result too; a failure of ours, or of the ceiling,
makes the case failed. Time is taken interleaved, so every ratio is of one run.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _measure import PeakMemory, gpu_state, interleave, is_out_of_memory, median_ratio, synchronize
from _script import FAILED, OK, OUT_OF_MEMORY

import bgpo_kernels as bk
from _head.peers import Call, Unavailable
from _head.problem import Problem, Size, described, make_problem
from _head.report import targets
from _head.truth import FACTOR, PEER_FACTOR, Truth
from _head.variants import GEMM, Variant

WRONG, NOT_INSTALLED = "wrong", "not installed"
LEAST_ROUNDS = 10


@dataclass
class Trial:
    """A variant in a case, and what is known of it so far."""

    variant: Variant
    entry: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None
    seconds: float = 0.0  # of its second call

    def attempt(self, step: Callable[[], object]) -> None:
        """Do a step; an exception ends the trial with a status."""
        try:
            step()
        except Unavailable as reason:
            self._end(NOT_INSTALLED, str(reason))
        except Exception as error:
            status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            if status == FAILED:
                traceback.print_exc(file=sys.stderr)
            self._end(status, f"{type(error).__name__}: {error}".split("\n")[0])

    def _end(self, status: str, message: str) -> None:
        self.entry |= {"status": status, "message": message}
        self.call = None

    def check(self, problem: Problem, truth: Truth) -> None:
        """Errors against the truth, then memory and repeatability by a second call."""
        variant, rows = self.variant, self.variant.rows(problem)
        bk.set_workspace_bytes(variant.workspace)
        self.call = variant.prepare(problem, rows)
        result = self.call()
        errors = truth.errors(result, rows, variant.weighted)
        allowed = truth.bounds(result, variant.weighted, FACTOR if variant.ours else PEER_FACTOR)
        judged = {name: allowed[name] for name in errors if not (variant.approximate and name.endswith(" row"))}
        self.entry |= {"errors": {name: _finite(error) for name, error in errors.items()}, "bounds": judged}
        beyond = [name for name, bound in judged.items() if not errors[name] <= bound]  # also when it is not a number
        if beyond:
            told = ", ".join(f"{name} {errors[name]:.3g} above {judged[name]:.3g}" for name in beyond)
            self._end(WRONG, f"error of {told}")
            return
        bk.set_workspace_bytes(variant.workspace)  # gives the buffer back: it counts as memory of the call
        memory = PeakMemory(problem.device)
        memory.start()
        begin = time.perf_counter()
        again = self.call()
        synchronize(problem.device)
        self.seconds = time.perf_counter() - begin
        extra = memory.above() - again.gradient_bytes
        self.entry |= {"status": OK, "extra_bytes": extra, "memory_by": memory.how, "repeats": again.equals(result)}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def run_case(
    size: Size,
    variants: Sequence[Variant],
    device: torch.device,
    rounds: int,
    seconds: float,
    say: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """The row of one case. At most `rounds` rounds, fewer (but 10) where they would take more than `seconds`."""
    # Measuring memory collects garbage, a fifth of a second each time with torch's objects looked through: not these.
    gc.collect()
    gc.freeze()
    trials = [Trial(variant, _described(variant)) for variant in variants]
    try:
        problem = make_problem(size, device)
        row = described(problem)
        _check(trials, problem, say)
        row["rounds"] = _rounds([trial for trial in trials if trial.call is not None], rounds, seconds)
        before = _state(device)
        say(f"{row['rounds']} rounds")
        _time(trials, row, device)
    finally:
        bk.set_workspace_bytes(None)
        gc.unfreeze()
    if device.type == "cuda":
        row["gpu"] = {"before": before, "after": _state(device)}
    row |= _summary(trials, size)
    row["targets"] = targets({**row, "N": size.N, "H": size.H, "V": size.V, "mode": size.mode})
    return row


def _check(trials: Sequence[Trial], problem: Problem, say: Callable[[str], None]) -> None:
    """Every variant against the truth, which is gone when the timing begins."""
    say("exact values in fp64")
    truth = Truth(problem)
    for trial in trials:
        say(trial.variant.name)
        trial.attempt(lambda trial=trial: trial.check(problem, truth))
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()


def _described(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "family": variant.family,
        "computes": variant.computes,
        "weighted": variant.weighted,
        "recomputes": variant.recomputes,
        "rows": "full" if variant.full else "masked",
        **({"workspace": variant.workspace} if variant.workspace is not None else {}),
    }


def _state(device: torch.device) -> dict[str, Any]:
    return gpu_state(device) if device.type == "cuda" else {}


def _rounds(trials: Sequence[Trial], most: int, seconds: float) -> int:
    a_round = sum(trial.seconds for trial in trials)
    return most if a_round == 0.0 else max(min(most, LEAST_ROUNDS), min(most, int(seconds / a_round)))


def _time(trials: Sequence[Trial], row: dict[str, Any], device: torch.device) -> None:
    """Samples into the entries of the variants that still run. One that fails now ends alone, not the others."""
    running = {trial.variant.name: trial for trial in trials if trial.call is not None}

    def step(trial: Trial) -> Callable[[], None]:
        def run() -> None:
            if trial.call is not None:
                trial.attempt(trial.call)

        return run

    samples = interleave({name: step(trial) for name, trial in running.items()}, row["rounds"], str(device))
    done = {name: samples[name] for name, trial in running.items() if trial.call is not None}
    gemms = [name for name in done if running[name].variant.family == GEMM]
    row["ceiling"] = ceiling = min(gemms, key=lambda name: sorted(done[name])[len(done[name]) // 2], default=None)
    for name, seconds in done.items():
        running[name].entry["seconds"] = seconds
        if ceiling is not None:
            running[name].entry["fraction"] = median_ratio(done, ceiling, name)


def _summary(trials: Sequence[Trial], size: Size) -> dict[str, Any]:
    """Entries with their rates, and the status of the case."""
    entries = [trial.entry for trial in trials]
    for entry in entries:
        if "seconds" in entry:
            middle = sorted(entry["seconds"])[len(entry["seconds"]) // 2]
            entry["tflops"] = size.flops / middle / 1e12
    bad = [
        f"{trial.variant.name}: {trial.entry['message']}"
        for trial in trials
        if (trial.variant.ours or trial.variant.family == GEMM) and trial.entry["status"] in (FAILED, WRONG)
    ]
    if bad:
        return {"variants": entries, "status": FAILED, "message": "; ".join(bad)}
    return {"variants": entries}
