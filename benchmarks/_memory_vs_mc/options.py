"""The command line of the main job, checked whole before any work begins; every mistake is named in plain words."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _measure import GIB, KIB, MIB, readable

from _memory_vs_mc.methods import METHODS
from bgpo_kernels.models.llada import SHAPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DESCRIPTION = """\
Peak memory and time of one policy update against the number of Monte Carlo samples of the ELBO, for four ways to
compute the same gradient. Every point runs in a fresh process. Without options: Countdown and Sudoku problems with
candidate answers, on a model of LLaDA's architecture and vocabulary scaled to two CPU cores.
"""
EPILOGUE = """\
examples:
  memory_vs_mc.py                                                       the whole comparison on this CPU
  memory_vs_mc.py --n-mc 1,4,16 --memory-budget 2GiB --json out.json    fewer points, less memory, raw results kept
  memory_vs_mc.py --device cuda --shape llada-8b --sequences 2          LLaDA-8B's shape with random weights
  memory_vs_mc.py --device cuda --model DIR --data FILE                 one's own checkpoint and rollouts
"""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the results go."""

    data: Path | None
    model: Path | None
    trust_remote_code: bool
    mask_token_id: int | None
    shape: str
    n_mc: list[int]
    methods: list[str]
    sequences: int
    response_tokens: int
    dtype: str
    device: str
    seed: int
    seconds: float | None
    memory_budget: int | None
    workspace: int | None
    plot: Path | None
    json: Path | None
    csv: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The checked options. Exits with a usage message, as argparse does, when one of them cannot work."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return _checked(given)
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOGUE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--n-mc", default="1,2,4,8,16,32", metavar="LIST", help="Monte Carlo samples [%(default)s]")
    what.add_argument("--methods", default=",".join(METHODS), metavar="LIST", help="which methods [%(default)s]")
    what.add_argument(
        "--memory-budget", metavar="SIZE", help="memory one process may hold, as 4GiB [CPU 4GiB; GPU all]"
    )
    what.add_argument("--workspace", metavar="SIZE", help="workspace of bgpo_kernels [CPU 16MiB; GPU its own default]")
    what.add_argument("--seconds", type=float, help="begin no point after this long [no limit]")
    what.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    what.add_argument("--dtype", choices=DTYPES, help="dtype of weights and activations [CPU float32; GPU bfloat16]")
    what.add_argument("--seed", type=int, default=0, help="seeds problems, candidates, weights, masks [%(default)s]")
    model = parser.add_argument_group("model")
    model.add_argument("--shape", choices=SHAPES, default="small", help="random weights of this shape [%(default)s]")
    model.add_argument("--model", type=Path, metavar="PATH", help="a local Hugging Face checkpoint instead")
    model.add_argument("--trust-remote-code", action="store_true", help="let --model run code of its checkpoint")
    model.add_argument("--mask-token-id", type=int, help="where the --model or its tokenizer does not say")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="FILE", help="JSON lines with prompt, response, reward [generated]")
    data.add_argument("--sequences", type=int, default=2, help="sequences per policy update [%(default)s]")
    data.add_argument(
        "--response-tokens", type=int, default=128, help="responses are filled with eos to this length [%(default)s]"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--plot", default="memory_vs_mc.png", metavar="FILE", help="PNG to write, or none [%(default)s]")
    out.add_argument("--json", type=Path, metavar="FILE", help="every raw sample, versions, device, commit, command")
    out.add_argument("--csv", type=Path, metavar="FILE", help="one line per point")
    return parser


def _checked(given: argparse.Namespace) -> Options:
    device = _device(given.device)
    budget = parse_size("--memory-budget", given.memory_budget)
    workspace = parse_size("--workspace", given.workspace)
    if workspace is None and device.type == "cpu":
        workspace = 16 * MIB
    if budget is None and device.type == "cpu" and Path("/proc/self/status").exists():
        budget = 4 * GIB
    if device.type == "cuda" and budget is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(f"--memory-budget: {given.memory_budget} exceeds the device's {readable(total)}")
    if given.sequences < 1 or given.response_tokens < 1:
        raise ValueError("--sequences and --response-tokens must be at least 1")
    if given.seconds is not None and not given.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {given.seconds}")
    if not 0 <= given.seed < 2**63:
        raise ValueError(f"--seed must lie in 0..2^63-1, got {given.seed}")
    if given.data is not None and not given.data.is_file():
        raise ValueError(f"--data: no such file: {given.data}")
    if given.model is not None and not (given.model / "config.json").is_file():
        raise ValueError(f"--model: {given.model} is not a directory with a config.json")
    if given.model is None and (given.mask_token_id is not None or given.trust_remote_code):
        raise ValueError("--mask-token-id and --trust-remote-code belong to --model")
    plot = None if given.plot == "none" else Path(given.plot)
    for option, path in (("--plot", plot), ("--json", given.json), ("--csv", given.csv)):
        if path is not None and (not path.absolute().parent.is_dir() or path.is_dir()):
            raise ValueError(f"{option}: cannot write {path}: its directory does not exist, or it is one itself")
    return Options(
        data=given.data,
        model=given.model,
        trust_remote_code=given.trust_remote_code,
        mask_token_id=given.mask_token_id,
        shape=given.shape,
        n_mc=_counts(given.n_mc),
        methods=_methods(given.methods),
        sequences=given.sequences,
        response_tokens=given.response_tokens,
        dtype=given.dtype or ("float32" if device.type == "cpu" else "bfloat16"),
        device=str(device),
        seed=given.seed,
        seconds=given.seconds,
        memory_budget=budget,
        workspace=workspace,
        plot=plot,
        json=given.json,
        csv=given.csv,
    )


def parse_size(option: str, text: str | None) -> int | None:
    """Bytes of "512MiB", "4GiB", "1.5 GB" (decimal) or a plain number; ValueError for anything else or for zero."""
    if text is None:
        return None
    units = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in units or float(found[1]) == 0:
        raise ValueError(f"{option}: {text!r} is not a size; write it as 512MiB, 4GiB or 80GB")
    return int(float(found[1]) * units[found[2]])


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"--n-mc: expected whole numbers of at least 1 with commas between, got {text!r}")
    return sorted({int(part) for part in parts})


def _methods(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",")]
    unknown = [key for key in chosen if key not in METHODS]
    if unknown:
        raise ValueError(f"--methods: {', '.join(map(repr, unknown))} is none of {', '.join(METHODS)}")
    return [key for key in METHODS if key in chosen]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"--device: {text!r} is not a device; write cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: only cpu and cuda are measured, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {text} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device
