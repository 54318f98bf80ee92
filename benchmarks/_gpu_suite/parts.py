"""What the suite runs, in order of worth, and the share of the time that each part is meant to take.

A part is a script with the options of `_script.py`. It writes OUT/<name>.json row by row, so that whatever ends it
costs the row at work and no other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
ROOT = BENCHMARKS.parent
BUILD_SECONDS = 200.0  # what a build from nothing may take


@dataclass(frozen=True)
class Call:
    """How a part is to run this time."""

    out: Path  # the folder of results, absolute
    seconds: float  # after this long the part should begin nothing new
    device: str = "cuda"
    dry_run: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Part:
    """One part: `share` seconds of the default total, given to it and those after it in proportion."""

    name: str
    title: str
    share: float
    needs: Path  # a file without which there is no such part
    command: Callable[[Call], list[str]]
    plot: Callable[[Path], list[str]] | None = None  # draws OUT/<name>.png from OUT/<name>.json


def common(name: str, call: Call) -> list[str]:
    """The options that all scripts of the suite have."""
    options = ["--out", str(call.out / f"{name}.json"), "--seconds", f"{call.seconds:.0f}"]
    return options + ["--resume"] * call.resume + ["--dry-run"] * call.dry_run


def helper(name: str, module: str, title: str, share: float, *options: str, needs: Path = BENCHMARKS) -> Part:
    """A part whose script is a module of this package."""

    def command(call: Call) -> list[str]:
        return [sys.executable, "-m", f"_gpu_suite.{module}", *common(name, call), *options]

    return Part(name, title, share, needs, command)


# step.py draws at the end of a run; this also draws what is left of one that was cut short.
DRAW_STEP = (
    "import json, sys; from pathlib import Path; from _step.plot import draw; "
    "draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
)


def benchmark(name: str, title: str, share: float, *draw: str) -> Part:
    """A part that is a script beside `gpu_suite.py`; Python's arguments `draw` before JSON and PNG draw its plot."""
    script = BENCHMARKS / f"{name}.py"

    def command(call: Call) -> list[str]:
        return [sys.executable, str(script), *common(name, call)]

    def plot(out: Path) -> list[str]:
        return [sys.executable, *draw, str(out / f"{name}.json"), str(out / f"{name}.png")]

    return Part(name, title, share, script, command, plot if draw else None)


def main_job(call: Call) -> list[str]:
    """The main job, which has options of its own; it draws its plot itself and does not resume."""
    size = ["--shape", "tiny", "--n-mc", "1,2,4"] if call.dry_run else ["--shape", "llada-8b"]
    command = [sys.executable, str(BENCHMARKS / "memory_vs_mc.py"), "--device", call.device, *size]
    for option, name in {"--json": "main.json", "--csv": "main.csv", "--plot": "main.png"}.items():
        command += [option, str(call.out / name)]
    return [*command, "--seconds", f"{call.seconds:.0f}"]


def parts(build: bool = False) -> list[Part]:
    """All parts; with `build`, the first one compiles."""
    first = helper("build", "build", "compiled engines", 12.0)
    if build:
        first = helper("build", "build", "compiled engines", BUILD_SECONDS, "--build")
    return [
        first,
        helper("tests", "gpu_tests", "GPU tests", 125.0),
        helper("sanitizer", "sanitizer", "compute-sanitizer", 90.0, needs=ROOT / "tests" / "gpu" / "sanitized.py"),
        benchmark("mask", "random_mask", 30.0),
        benchmark("head", "vocabulary head", 105.0, str(BENCHMARKS / "head.py"), "--plot"),
        benchmark("step", "policy update", 115.0, "-c", DRAW_STEP),
        Part("main", "memory against n_mc", 80.0, BENCHMARKS / "memory_vs_mc.py", main_job),
    ]
