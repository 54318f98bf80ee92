"""The sweep: every method at every n_mc in a fresh process, and the gradients compared with the exact objective's.

A method that ran out of memory is not tried at a larger n_mc: no method needs less memory for more samples.
"""

from __future__ import annotations

import json
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
    baseline_bytes: int = 0  # process or device memory with the model and its gradients, before the first update
    instrument: str = ""
    peak_bytes: list[int] = field(default_factory=list)  # above the baseline, per update
    seconds: list[float] = field(default_factory=list)  # per update; the first includes first-use costs
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
        """Median seconds of an update, the first left out where there are more."""
        return median(self.seconds[1:] or self.seconds)

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
    for n_mc in options.n_mc:
        row = []
        for method in options.methods:
            if method in exhausted:
                point = Point(method, n_mc, SKIPPED, "a smaller n_mc ran out of memory")
            else:
                point = run_point(options, tokens, method, n_mc, workdir)
            if point.status == OUT_OF_MEMORY:
                exhausted.add(method)
            row.append(point)
            report(point)
        compare_gradients(row, workdir)
        points += row
    return points


def run_point(options: Options, tokens: Tokens, method: str, n_mc: int, workdir: Path) -> Point:
    """Run one point in a fresh process and read its result."""
    result = workdir / "result.json"
    result.unlink(missing_ok=True)
    spec = {
        "method": method,
        "n_mc": n_mc,
        "seed": options.seed,
        "shape": options.shape,
        "model": None if options.model is None else str(options.model),
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "device": options.device,
        "memory_budget": options.memory_budget,
        "mask_token_id": tokens.mask_token_id,
        "tokens": str(workdir / "tokens.npz"),
        "gradient": str(_gradient_file(workdir, method)),
        "result": str(result),
    }
    spec_path = workdir / "spec.json"
    spec_path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "_memory_vs_mc.point", str(spec_path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode == 0 and result.exists():
        return Point(method, n_mc, **json.loads(result.read_text()))
    if done.returncode == -signal.SIGKILL:
        return Point(method, n_mc, OUT_OF_MEMORY, "killed by the system, as it does when memory runs out")
    if any(sign in done.stderr for sign in _ALLOCATION_FAILED):
        return Point(method, n_mc, OUT_OF_MEMORY, "a library failed to allocate")
    reason = done.stderr.strip() or f"exit status {done.returncode}"
    raise PointFailed(f"{METHODS[method].title} at n_mc = {n_mc} failed:\n{reason}")


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
