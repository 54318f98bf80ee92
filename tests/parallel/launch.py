"""Runs named checks in two gloo processes, once, and collects what each process says of each check.

    python launch.py RANK FOLDER MODULE[:CHECK] ...      one process; every `check` of the modules, or the one named
    run(folder, modules) -> {name: [message of rank 0, of rank 1]}      both; "" for a check that passed

A check is a function of no arguments that runs inside a process group of its own, so that one that fails takes no other
along. One that hangs is ended with all stacks printed, and with it the run.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

WORLD = 2
PATIENCE = 60  # seconds for one check
HERE = Path(__file__).parent

Check = Callable[[], Any]
checks: dict[str, Check] = {}  # of the modules imported so far, in order


class Skipped(Exception):
    """Raised by a check, on both ranks, for what is not installed."""


def check(function: Check) -> Check:
    """Register a check by its name."""
    checks[function.__name__] = function
    return function


def variants(*arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a check per tuple of arguments; an argument's name is its `__name__` or itself."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for one in arguments:
            given = one if isinstance(one, tuple) else (one,)
            label = "-".join(getattr(a, "__name__", str(a)) for a in given)
            checks[f"{function.__name__}[{label}]"] = lambda given=given: function(*given)
        return function

    return register


def names(module: str) -> list[str]:
    """The checks of a module."""
    known = set(checks)
    importlib.import_module(module)
    return [name for name in checks if name not in known]


def run(folder: Path, modules: list[str]) -> dict[str, list[str]]:
    """Every check in both processes."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    processes = []
    for rank in range(WORLD):
        command = [sys.executable, str(HERE / "launch.py"), str(rank), str(folder), *modules]
        log = open(folder / f"log{rank}", "w")  # noqa: SIM115 - the process holds it
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    while all(process.poll() is None for process in processes):
        time.sleep(0.05)
    if any(process.poll() for process in processes):  # the other one would wait for it at every further check
        time.sleep(1)
        for process in processes:
            process.kill()
    for process in processes:
        process.wait()
    said = []
    for rank in range(WORLD):
        lines = (folder / f"said{rank}").read_text().splitlines() if (folder / f"said{rank}").exists() else []
        said.append(dict(json.loads(line) for line in lines))
    missing = "was not run, or did not end:\n" + "\n".join((folder / f"log{r}").read_text()[-6000:] for r in range(2))
    found = list(dict.fromkeys([*said[0], *said[1]]))
    return {name: [part.get(name, missing) for part in said] for name in found} | {"": [missing] * WORLD}


def _work(rank: int, folder: Path, wanted: list[str]) -> None:
    import torch.distributed as dist

    for module in dict.fromkeys(name.split(":")[0] for name in wanted):
        importlib.import_module(module)
    import launch  # this file under its other name, where the checks registered themselves

    faulthandler.enable()
    chosen = [name.split(":", 1)[1] for name in wanted if ":" in name] or list(launch.checks)
    with open(folder / f"said{rank}", "w") as said:
        for number, name in enumerate(chosen):
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            store = dist.PrefixStore(str(number), dist.FileStore(str(folder / "store"), WORLD))
            message = ""
            try:
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE / 2)
                )
                launch.checks[name]()
            except launch.Skipped as reason:
                message = f"skipped: {reason}"
            except Exception:
                message = traceback.format_exc()
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            said.write(json.dumps([name, message]) + "\n")
            said.flush()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    _work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
