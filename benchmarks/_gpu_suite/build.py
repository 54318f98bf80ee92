"""Are the compiled engines there, do they import, and what serves this device: `python -m _gpu_suite.build`.

With --build it compiles first, by an editable install into the Python that runs it, and insists on CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from _measure import ROOT
from _script import FAILED, OK, Record, make_parser, parse

NOT_AVAILABLE = "not available"
HOW = "build it with `pip install .`, `make install`, or this suite's --build"
CALL_SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, after a build where one is asked for; 1 if an engine that this device needs is missing."""
    parser = make_parser(*(__doc__ or "").split("\n\n", 1))
    parser.add_argument("--build", action="store_true", help="compile first")
    options = parse(parser, arguments)
    record = Record("build", options)
    if options.build:
        show(record.measure({"check": "build"}, lambda: compile_engines(options)))
    info = record.measure({"check": "info"}, read_info)
    show(info)
    if info["status"] == OK:
        for check, judge in CHECKS.items():
            show(record.measure({"check": check}, partial(judge, info["info"], options.device.type)))
    return int(record.failed)


def show(row: dict[str, Any]) -> None:
    print(f"{row['check']}: {row['status']}  {row.get('message', '')}", flush=True)


def compile_engines(options: argparse.Namespace) -> dict[str, Any]:
    """An editable install; without build isolation where what a build needs is here, so that no network is needed."""
    local = all(importlib.util.find_spec(name) for name in ("setuptools", "pybind11", "ninja"))
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps", "--editable", str(ROOT)]
    command += ["--no-build-isolation"] if local else []
    environment = os.environ | ({"BGPO_KERNELS_CUDA": "1"} if options.device.type == "cuda" else {})
    done = subprocess.run(command, env=environment, check=False)  # says more in the log than could be kept here
    if done.returncode != 0:
        return {
            "status": FAILED,
            "message": f"pip ended with {done.returncode}; its output is above",
            "command": command,
        }
    return {"message": "installed", "command": command}


def read_info() -> dict[str, Any]:
    """What `python -m bgpo_kernels.info` reports, asked in a process of its own: an engine may crash as it loads."""
    command = [sys.executable, "-m", "bgpo_kernels.info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CALL_SECONDS)
    if done.returncode != 0:
        return {"status": FAILED, "message": f"bgpo_kernels.info fails ({HOW}): {done.stderr.strip()[-500:]}"}
    from bgpo_kernels.info import render  # it can be imported, as was just seen

    info = json.loads(done.stdout)
    print(render(info))
    return {"info": info, "message": f"bgpo_kernels {info['versions']['bgpo_kernels']}"}


def _engine(info: dict[str, Any], name: str, needed: bool) -> dict[str, Any]:
    engine = info["engines"][name]
    if engine["built"]:
        details = ", ".join(f"{key} {value}" for key, value in engine.items() if key != "built")
        return {"message": f"built: {details}"}
    return {"status": FAILED if needed else NOT_AVAILABLE, "message": f"{engine['reason']}; {HOW}"}


def _device(info: dict[str, Any], kind: str) -> dict[str, Any]:
    served = {name: row["auto"] for name, row in info["devices"].items() if name.startswith(kind)}
    missing = [name for name, backend in served.items() if backend is None]
    text = ", ".join(f"{name} by {backend}" for name, backend in served.items() if backend is not None)
    if missing or not served:
        return {"status": FAILED, "message": f"nothing serves {', '.join(missing) or kind}"}
    return {"message": text}


CHECKS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "CPU engine": lambda info, kind: _engine(info, "cpu", needed=True),
    "CUDA kernels": lambda info, kind: _engine(info, "cuda", needed=kind == "cuda"),
    "device served": _device,
}

if __name__ == "__main__":
    sys.exit(main())
