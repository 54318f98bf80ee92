"""The sweep: every method at every n_mc in a fresh process, and the gradients compared with the exact objective's.

A method that ran out of memory is not tried at a larger n_mc: no method needs less memory for more samples.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _measure import child_environment

from _memory_vs_mc.data import Tokens
from _memory_vs_mc.methods import METHODS
from _memory_vs_mc.options import Options

OK, OUT_OF_MEMORY, SKIPPED = "ok", "out of memory", "skipped"
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
    """A measuring process ended with an error that is not a lack of memory."""


def sweep(options: Options, tokens: Tokens, workdir: Path, report: Callable[[Point], None]) -> list[Point]:
    """Measure all points, smallest n_mc first, calling `report` after each; PointFailed carries a process's error."""
    tokens.save(workdir / "tokens.npz")
    points: list[Point] = []
    exhausted: set[str] = set()
    with Launcher(options.device) as launcher:
        for n_mc in options.n_mc:
            row = []
            for method in options.methods:
                if method in exhausted:
                    point = Point(method, n_mc, SKIPPED, "a smaller n_mc ran out of memory")
                else:
                    point = run_point(launcher, _spec(options, tokens, method, n_mc, workdir), workdir)
                if point.status == OUT_OF_MEMORY:
                    exhausted.add(method)
                row.append(point)
                report(point)
            compare_gradients(row, workdir)
            points += row
    return points


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
    """Runs points, each in a process of its own: forked from a server on a CPU, started from nothing for CUDA."""

    command = (sys.executable, "-m", "_memory_vs_mc.point")

    def __init__(self, device: str) -> None:
        self._forks = device == "cpu" and hasattr(os, "fork")
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Launcher:
        if self._forks:
            self._server = subprocess.Popen(
                self.command, env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.communicate()  # closes its stdin, which ends it

    def run(self, spec_path: Path) -> tuple[int, str]:
        """Exit status (negative: the signal) and stderr of the process that ran the point."""
        if self._server is None or self._server.stdin is None or self._server.stdout is None:
            done = subprocess.run(
                [*self.command, str(spec_path)], env=child_environment(), capture_output=True, text=True, check=False
            )
            return done.returncode, done.stderr
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
    raise PointFailed(f"{METHODS[method].title} at n_mc = {n_mc} failed:\n{stderr.strip() or f'exit status {status}'}")


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
