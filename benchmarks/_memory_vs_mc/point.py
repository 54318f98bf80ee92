"""One point of the sweep, in a process of its own.

    python -m _memory_vs_mc.point SPEC.json     one point
    python -m _memory_vs_mc.point --wait        one point, whose spec's path it reads from stdin once it has imported
                                                the libraries
    python -m _memory_vs_mc.point               a server: for each line on stdin, the path of a spec, it forks a process
                                                that runs the point, and answers with its exit status

The server has only imported the libraries, so a forked process is as fresh as a new one without the seconds that these
imports take. It is not used with CUDA, whose driver does not survive a fork.

A point limits its memory, builds the model, runs one update at n_mc = 1 so that library code, threads and allocators
are in place for every method, drops the gradients, and takes the memory then held as the baseline. Peak memory is
that above the baseline and the gradients, which the update creates anew. Running out of memory is a result like any
other.

LLaDA-8B needs no adapters for this on a card of 80 GB: 8.0e9 parameters are 15 GiB in bf16, their gradients as much,
the fp32 sums of the head's gradient 2 GiB and the workspace at most 1 GiB; one sample of 230 tokens adds about 2 GiB.
Only the graphs of many samples kept together do not fit.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import PeakMemory, is_out_of_memory, limit_memory, synchronize
from torch import nn

import bgpo_kernels as bk
from _memory_vs_mc.methods import METHODS, Batch
from bgpo_kernels.models import make_bidirectional
from bgpo_kernels.models.llada import build_llada, llada_config

REPEAT_SECONDS, MOST_UPDATES = 2.0, 5  # short updates are timed again until this much time or this many updates
COMPARED_ENTRIES = 1 << 25  # gradients with more entries than this are compared on an even sample of them


def main(spec_path: str) -> None:
    """Run the point described by the JSON file `spec_path` and write its result where the spec says."""
    spec = json.loads(Path(spec_path).read_text())
    result: dict[str, Any] = {}
    try:
        if spec["memory_budget"] is not None:
            limit_memory(spec["device"], spec["memory_budget"])
        measure(spec, result)
        result["status"] = "ok"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        result |= {"status": "out of memory", "message": str(error).split("\n")[0]}
    Path(spec["result"]).write_text(json.dumps(result))


def measure(spec: dict[str, Any], result: dict[str, Any]) -> None:
    """Fill `result`: baseline and peak bytes, seconds of every update; save the gradient of the first one."""
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    model = _model(spec, dtype, device)
    update, batch = METHODS[spec["method"]].update, _batch(spec, device)
    update(model, replace(batch, n_mc=1))
    gradient_bytes = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    _forget(model, spec)
    memory = PeakMemory(device)
    memory.start()
    result |= {"baseline_bytes": memory.baseline, "instrument": memory.how, "gradient_bytes": gradient_bytes}
    result |= {"seconds": [], "peak_bytes": []}
    keep = keeps_workspace(device)
    if keep:
        update(model, replace(batch, n_mc=1, scheme="full"))
    while not result["seconds"] or (sum(result["seconds"]) < REPEAT_SECONDS and len(result["seconds"]) < MOST_UPDATES):
        _forget(model, spec, keep)
        memory.restart()
        synchronize(device)
        begin = time.perf_counter()
        update(model, batch)
        synchronize(device)
        result["seconds"].append(time.perf_counter() - begin)
        result["peak_bytes"].append(memory.above() - gradient_bytes)
        if len(result["seconds"]) == 1:
            result |= _save_gradient(model, Path(spec["gradient"]))


def keeps_workspace(device: torch.device) -> bool:
    """Whether updates find the workspace as large as a fully masked response needs it, and leave it there.

    On a GPU, where it is large enough for that: grown by each update to its own longest sample, which among many
    samples is longer than in one, it would make the peak follow the draw. It is above the baseline either way. On a CPU
    it is so small that nearly every draw fills it.
    """
    return device.type == "cuda"


def _forget(model: nn.Module, spec: dict[str, Any], keep_workspace: bool = False) -> None:
    """Drop what an update left behind: the gradients and, unless it is kept, the package's workspace."""
    model.zero_grad(set_to_none=True)
    if not keep_workspace:
        bk.set_workspace_bytes(spec["workspace"])


def _model(spec: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    if spec["model"] is None:
        return build_llada(llada_config(spec["shape"]), dtype, device, spec["seed"])
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    where = {"trust_remote_code": spec["trust_remote_code"], "local_files_only": True, "dtype": dtype}
    try:
        model = AutoModelForMaskedLM.from_pretrained(spec["model"], **where)
    except ValueError:  # the architecture has no masked-LM class: diffusion LMs are registered as causal ones
        model = AutoModelForCausalLM.from_pretrained(spec["model"], **where)
    if getattr(model.config, "is_causal", True) is False:
        make_bidirectional(model)
    return model.to(device).eval()


def _batch(spec: dict[str, Any], device: torch.device) -> Batch:
    arrays = {name: torch.from_numpy(array).to(device) for name, array in np.load(spec["tokens"]).items()}
    return Batch(**arrays, mask_token_id=spec["mask_token_id"], n_mc=spec["n_mc"], seed=spec["seed"])


def _save_gradient(model: nn.Module, path: Path) -> dict[str, Any]:
    """Save the gradient, or every k-th entry of it, as one fp32 vector; returns how many entries there were and are."""
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    total = sum(gradient.numel() for gradient in gradients)
    stride = -(-total // COMPARED_ENTRIES)
    with path.open("wb") as file:
        for gradient in gradients:
            gradient[::stride].float().cpu().numpy().tofile(file)
    return {"gradient_entries": total, "gradient_compared": path.stat().st_size // 4}


def wait() -> None:
    """Run the point named on stdin; none when it closes."""
    spec_path = sys.stdin.readline().strip()
    if spec_path:
        main(spec_path)


def serve() -> None:
    """Fork a process for every spec named on stdin and print how it ended."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_forked(line.strip()))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _forked(spec_path: str) -> int:
    """The exit status of one point; what it prints on stderr goes to a file beside its spec."""
    with open(f"{spec_path}.stderr", "w") as errors:
        os.dup2(errors.fileno(), 2)
    try:
        main(spec_path)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--wait"]:
        wait()
    elif sys.argv[1:]:
        main(sys.argv[1])
    else:
        serve()
