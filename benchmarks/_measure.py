"""What every benchmark measures with: peak memory, a real memory limit, interleaved timing, a record of the machine.

Memory is what one device holds. On CUDA the caching allocator counts it exactly. On the CPU it is the resident set of
the process: Linux keeps its high-water mark (VmHWM) and lets a process reset it. For that to follow live memory the C
allocator must give freed blocks back at once, which `ALLOCATOR_ENV` makes glibc do: set it before the process starts.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ROOT = Path(__file__).resolve().parent.parent

# Blocks of 64 KiB and more live in mappings of their own, which are returned when freed; a fixed threshold also stops
# glibc from raising it while it runs. One arena, trimmed, so that what is left over does not depend on which thread
# freed what. The price is page faults for fresh blocks, which every method pays for what it allocates.
ALLOCATOR_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(64 * KIB),
    "MALLOC_TRIM_THRESHOLD_": str(64 * KIB),
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",  # MKL otherwise keeps its packing buffers, per thread and for the largest shape yet
}


def _process_memory(field: str) -> int:
    """A field of this process's status ("VmRSS", "VmHWM", "VmData") in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * KIB


class PeakMemory:
    """Peak memory above the moment `start` was called, on one device.

    `how` names the instrument: "cuda allocator", "VmHWM", or "ru_maxrss" where the kernel does not let the mark be
    reset (then a peak below an earlier one is invisible: measure in a fresh process).
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.baseline = 0
        self.how = "cuda allocator" if self.device.type == "cuda" else "VmHWM"

    def start(self) -> None:
        """Take the memory held now as the baseline and forget earlier peaks."""
        self.restart()
        if self.device.type == "cuda":
            self.baseline = torch.cuda.memory_allocated(self.device)
        else:
            self.baseline = _process_memory("VmRSS") if self.how == "VmHWM" else _max_resident()

    def restart(self) -> None:
        """Forget earlier peaks and give free memory back, the baseline staying as it is."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
        except OSError:
            self.how = "ru_maxrss"

    def above(self) -> int:
        """Bytes by which the peak since the last start or restart exceeded the baseline."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.baseline
        return (_process_memory("VmHWM") if self.how == "VmHWM" else _max_resident()) - self.baseline


def _max_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIB)


def limit_memory(device: torch.device | str, budget: int) -> None:
    """From now on this process fails to allocate beyond `budget` bytes on `device`, what it already holds included.

    CUDA: a fraction of the device for the caching allocator. CPU: RLIMIT_DATA, which counts address space; the part
    of it that is reserved but not resident now is granted on top.
    """
    device = torch.device(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _process_memory("VmData") - _process_memory("VmRSS") + budget
    resource.setrlimit(resource.RLIMIT_DATA, (max(wanted, 0) if hard < 0 else min(wanted, hard), hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the GPU or (where torch raises a plain RuntimeError) on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    )


def readable(size: float) -> str:
    """A number of bytes for people: "1.5 GiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} B"


def synchronize(device: torch.device | str) -> None:
    """Wait for the device, so that a clock read next is true."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    variants: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", sample_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds a call of every variant in every round, all variants once per round, after one untimed round.

    Drift of the machine (clock, neighbours, temperature) then falls on all variants alike. The order alternates from
    round to round, so that no variant always runs in the wake of the same other one.

    A sample is one call, or as many as take about `sample_seconds`: where one variant is much shorter than another, a
    single call of it would tell how long threads take to wake and caches to fill after the longer one.
    """
    calls = {name: _calls_in(run, sample_seconds, device) for name, run in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls[name]):
                variants[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - begin) / calls[name])
    return seconds


def _calls_in(run: Callable[[], Any], seconds: float, device: str) -> int:
    """How many calls take about that long, at least one; by the second call, the first one warms up."""
    run()
    if seconds <= 0.0:
        return 1
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return max(1, round(seconds / (time.perf_counter() - begin)))


def median_ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """Median over rounds of (ours / theirs), each ratio within one round."""
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def peak_in_fresh_process(module: str, function: str, *arguments: Any) -> int:
    """Peak CPU bytes of one call of what `module.function(*arguments)` returns, above the moment before it.

    `function` (in a module next to this one) builds the inputs, warms libraries up on something small, and returns the
    call to measure. Arguments must survive JSON. Raises RuntimeError with the child's error.
    """
    command = [sys.executable, str(Path(__file__).resolve()), module, function, json.dumps(arguments)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module}.{function}{arguments} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _measure_here(module: str, function: str, arguments: str) -> None:
    call = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    memory = PeakMemory("cpu")
    memory.start()
    kept = call()  # what the call returns counts: it is alive when the call ends
    print(memory.above())
    del kept


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine, commit and command of this run, for the record."""
    device = torch.device(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **({"gpu": gpu_state(device)} if device.type == "cuda" else {}),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


_GPU_FIELDS = (
    "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "driver_version",
    "clocks_throttle_reasons.active",
)  # fmt: skip


def gpu_state(device: torch.device) -> dict[str, Any]:
    """What moves a GPU's speed by itself: clocks, power and heat now, as nvidia-smi says; and the device's size."""
    properties = torch.cuda.get_device_properties(device)
    state: dict[str, Any] = {
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_GPU_FIELDS)}",
        "--format=csv,noheader",
        f"--id=GPU-{properties.uuid}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return state
    return state | dict(zip(_GPU_FIELDS, (value.strip() for value in done.stdout.split(",")), strict=False))


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "numpy", "transformers", "tokenizers", "triton", "bgpo_kernels", "peft", "bitsandbytes",
                    "torchao", "liger_kernel", "cut_cross_entropy", "quack-kernels"):  # fmt: skip
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The repository's commit, with "+changes" where tracked sources differ from it; None outside git.

    Results and plots do not count: a run that records several would call itself changed by its own first one.
    """
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs/*.png"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def child_environment() -> dict[str, str]:
    """Environment for a fresh measuring process: the allocator settings, and the same import path as this process."""
    import_path = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, **ALLOCATOR_ENV, "PYTHONPATH": import_path, "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    _measure_here(*sys.argv[1:])
