"""The sweep: every method at every n_mc in a fresh process, and the gradients compared with the exact objective's.

A method that ran out of memory is not tried at a larger n_mc: no method needs less memory for more samples. One that
failed otherwise is not tried again at all, and the other methods go on. Under a time limit the least n_mc and the most
come first, since the comparison needs both ends.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _measure import child_environment

from _memory_vs_mc.data import Tokens
from _memory_vs_mc.options import Options

OK, OUT_OF_MEMORY, FAILED, SKIPPED = "ok", "out of memory", "failed", "skipped"
# What a C++ library prints before it aborts because an allocation failed.
_ALLOCATION_FAILED = (
    "bad_alloc",
    "Cannot allocate memory",
    "cannot allocate memory",
    "Resource temporarily unavailable",
)


@dataclass
class Point:
    """One method at one n_mc: its outcome, every raw sample, and how its gradient compares with the reference's."""

    method: str
    n_mc: int
    status: str
    message: str = ""
    baseline_bytes: int = 0  # process or device memory with the model alone
    gradient_bytes: int = 0
    instrument: str = ""
    peak_bytes: list[int] = field(default_factory=list)  # above baseline and gradients, per update
    seconds: list[float] = field(default_factory=list)  # per update
    gradient_entries: int = 0
    gradient_compared: int = 0
    reference: str = ""  # the method whose gradient this one is compared with
    cosine: float | None = None
    relative_max: float | None = None  # max |g - g_ref| / max |g_ref|
    relative_l2: float | None = None  # |g - g_ref| / |g_ref|

    @property
    def peak(self) -> int:
        """Peak bytes above the model and its gradients, over all updates."""
        return max(self.peak_bytes)

    @property
    def seconds_per_update(self) -> float:
        """Median seconds of an update."""
        return median(self.seconds)

    def record(self) -> dict[str, Any]:
        """Everything about the point, for JSON."""
        return asdict(self)


class PointFailed(RuntimeError):
    """No measuring process can start."""


def sweep(options: Options, tokens: Tokens, workdir: Path, report: Callable[[Point], None]) -> list[Point]:
    """All points, by n_mc, `report` called after each; a point that failed carries its error.

    Raises PointFailed when no measuring process can start.
    """
    end = time.monotonic() + (math.inf if options.seconds is None else options.seconds)
    tokens.save(workdir / "tokens.npz")
    points: list[Point] = []
    exhausted: dict[str, tuple[int, str]] = {}  # per method: from which n_mc on it is not tried, and why
    with Launcher(options.device) as launcher:
        for n_mc in options.n_mc if options.seconds is None else ends_first(options.n_mc):
            row = []
            for method in options.methods:
                limit, why = exhausted.get(method, (math.inf, ""))
                if n_mc >= limit:
                    point = Point(method, n_mc, SKIPPED, why)
                elif time.monotonic() > end:
                    point = Point(method, n_mc, SKIPPED, "no time left")
                else:
                    point = run_point(launcher, _spec(options, tokens, method, n_mc, workdir), workdir)
                if point.status == OUT_OF_MEMORY:
                    exhausted[method] = n_mc, "a smaller n_mc ran out of memory"
                elif point.status == FAILED:
                    exhausted[method] = 0, "it failed before"
                row.append(point)
                report(point)
            compare_gradients(row, workdir)
            points += row
    return sorted(points, key=lambda point: point.n_mc)


def ends_first(counts: Sequence[int]) -> list[int]:
    """Sorted counts with the last one moved to the second place."""
    return [*counts[:1], *counts[1:][-1:], *counts[1:-1]]


def _spec(options: Options, tokens: Tokens, method: str, n_mc: int, workdir: Path) -> dict[str, Any]:
    """Everything a measuring process needs to know."""
    return {
        "method": method,
        "n_mc": n_mc,
        "seed": options.seed,
        "shape": options.shape,
        "model": None if options.model is None else str(options.model),
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "device": options.device,
        "memory_budget": options.memory_budget,
        "workspace": options.workspace,
        "mask_token_id": tokens.mask_token_id,
        "tokens": str(workdir / "tokens.npz"),
        "gradient": str(_gradient_file(workdir, method)),
        "result": str(workdir / "result.json"),
    }


class Launcher:
    """Runs points, each in a process of its own: forked from a server on a CPU, started from nothing for CUDA.

    The next process for CUDA imports the libraries while a point runs. It does not touch the GPU before its turn.
    """

    command = (sys.executable, "-m", "_memory_vs_mc.point")

    def __init__(self, device: str) -> None:
        self._forks = device == "cpu" and hasattr(os, "fork")
        self._server: subprocess.Popen[str] | None = None
        self._next: subprocess.Popen[str] | None = None

    def __enter__(self) -> Launcher:
        if self._forks:
            self._server = subprocess.Popen(
                self.command, env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        else:
            self._next = self._waiting()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.communicate()  # closes its stdin, which ends it
        if self._next is not None:
            self._next.kill()
            self._next.communicate()

    def _waiting(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, "--wait"],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, spec_path: Path) -> tuple[int, str]:
        """Exit status (negative: the signal) and stderr of the process that ran the point."""
        if self._next is not None:
            process, self._next = self._next, self._waiting()
            _, errors = process.communicate(f"{spec_path}\n")
            return process.returncode, errors
        assert self._server is not None and self._server.stdin is not None and self._server.stdout is not None
        try:
            self._server.stdin.write(f"{spec_path}\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below is then empty, too
        answer = self._server.stdout.readline()
        if not answer:
            raise PointFailed("the measuring process could not start; its error stands above")
        return int(answer), Path(f"{spec_path}.stderr").read_text()


def run_point(launcher: Launcher, spec: dict[str, Any], workdir: Path) -> Point:
    """Run one point in a fresh process and read its result."""
    method, n_mc, result = spec["method"], spec["n_mc"], Path(spec["result"])
    result.unlink(missing_ok=True)
    spec_path = workdir / "spec.json"
    spec_path.write_text(json.dumps(spec))
    status, stderr = launcher.run(spec_path)
    if status == 0 and result.exists():
        return Point(method, n_mc, **json.loads(result.read_text()))
    if status == -signal.SIGKILL:
        return Point(method, n_mc, OUT_OF_MEMORY, "killed by the system, as it does when memory runs out")
    if any(sign in stderr for sign in _ALLOCATION_FAILED):
        return Point(method, n_mc, OUT_OF_MEMORY, "a library failed to allocate")
    return Point(method, n_mc, FAILED, stderr.strip() or f"exit status {status}")


def _gradient_file(workdir: Path, method: str) -> Path:
    return workdir / f"gradient-{method}.f32"


def compare_gradients(row: list[Point], workdir: Path) -> None:
    """Fill in the agreement of all points of one n_mc, then delete the gradients.

    The reference is the exact objective with its graphs kept; where that did not fit, the exact objective by replay.
    """
    finished = {point.method: point for point in row if point.status == OK}
    reference = next((method for method in ("exact", "replay") if method in finished), None)
    for method, point in finished.items():
        if reference is not None and method != reference:
            point.reference = reference
            point.cosine, point.relative_max, point.relative_l2 = agreement(
                *(np.memmap(_gradient_file(workdir, m), dtype=np.float32, mode="r") for m in (method, reference))
            )
    for method in finished:
        _gradient_file(workdir, method).unlink()


def agreement(gradient: np.ndarray, reference: np.ndarray, chunk: int = 1 << 22) -> tuple[float, float, float]:
    """(cosine, max |g - r| / max |r|, |g - r| / |r|) of two fp32 vectors, accumulated in fp64 chunk by chunk."""
    dot = square_g = square_r = square_difference = largest = largest_difference = 0.0
    for begin in range(0, len(reference), chunk):
        g, r = (np.asarray(v[begin : begin + chunk], dtype=np.float64) for v in (gradient, reference))
        dot, square_g, square_r = dot + g @ r, square_g + g @ g, square_r + r @ r
        square_difference += (g - r) @ (g - r)
        largest = max(largest, float(np.abs(r).max()))
        largest_difference = max(largest_difference, float(np.abs(g - r).max()))
    cosine = dot / np.sqrt(square_g * square_r)
    return float(cosine), largest_difference / largest, float(np.sqrt(square_difference / square_r))
