"""`random_mask` against a memcpy of what it writes and against a Python loop: `python benchmarks/mask.py --out FILE`.

Every row is one shape (B sequences x n Monte Carlo samples x T tokens, all of them response), scheme and backend:

    call    random_mask as users call it, its checks and its reads by the host included; wall clock
    memcpy  one copy on the device of a block as large as all that the call returns: noisy ids, rows, targets, offsets,
            weights, counts. Target: the call within 3 times it
    loop    the same job as trainers write it, a randperm per sequence and sample, on the same device; scheme exact only
    GPU     the time that the device itself is busy with a call, and with the memcpy, summed over the kernels and copies
            that torch.profiler saw: what is left of the ratio when the host does not count

Before anything is timed, the draw must be consistent with itself (counts, rows, targets, offsets, weights) and equal to
the reference backend's on CPU tensors, bit by bit; the loop's result passes the same test of consistency. A draw that
fails is a failed row without times.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from _measure import gpu_state, interleave, median_ratio, synchronize
from _script import OK, Record, make_parser, parse
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.backends import why_not

SHAPES = ((128, 16, 512), (16, 16, 4096), (1, 16, 1024), (2, 16, 32768))  # the third is a micro-batch
DRY_SHAPES = ((3, 4, 40), (1, 2, 65))
SCHEMES = ("exact", "coupled", "bernoulli")
MASK_TOKEN_ID, SEED = 126336, 3
FIELDS = ("noisy_ids", "rows", "targets", "segment_offsets", "segment_weight", "count")
SAMPLE_SECONDS = 0.004  # of many calls: one alone would tell how long a cold cache takes
LOOP_ROUNDS = 3  # of a second or so each; the ratio is in the hundreds
PROFILED_CALLS = 20
TARGET = 3.0  # times the memcpy
NOT_AVAILABLE = "not available"


class WrongDraw(AssertionError):
    """A draw that contradicts itself or the reference."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases; 1 if one failed."""
    options = parse(make_parser(__doc__.split("\n")[0], __doc__.split("\n", 2)[2]), arguments)
    record = Record("mask", options)
    backends = ("cuda", "triton") if options.device.type == "cuda" else ("cpu",)
    sample_seconds = 0.0 if options.dry_run else SAMPLE_SECONDS
    print("       B x n x T scheme     backend        call  / memcpy  GPU / memcpy   loop /")
    for scheme in SCHEMES:
        for shape in DRY_SHAPES if options.dry_run else SHAPES:
            for backend in backends:
                case = {**dict(zip(("B", "n_mc", "T"), shape, strict=True)), "scheme": scheme, "backend": backend}
                row = record.measure(
                    case, lambda case=case: measure(case, options.device, options.rounds, sample_seconds)
                )
                print(line(row), flush=True)
    return int(record.failed)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['B']:>4} x{row['n_mc']:>3} x {row['T']:>5} {row['scheme']:10} {row['backend']:8}"
    if row["status"] != OK:
        return f"{head} {row['status']}: {row.get('message', '')}"
    ratios, call = row["ratios"], statistics.median(row["seconds"]["call"])
    cells = (ratios["call / memcpy"], ratios["GPU of call / GPU of memcpy"], ratios["loop / call"])
    memcpy, gpu, loop = ("-" if value is None else f"{value:.2f}" for value in cells)
    return f"{head} {call * 1e6:>7.1f} us {memcpy:>9} {gpu:>13} {loop:>8}"


def measure(case: dict[str, Any], device: torch.device, rounds: int, sample_seconds: float) -> dict[str, Any]:
    """Prove one case right, then time it."""
    if (reason := why_not(case["backend"], device)) is not None:
        return {"status": NOT_AVAILABLE, "message": reason}
    shape, scheme = (case["B"], case["n_mc"], case["T"]), case["scheme"]
    ids, response = (tensor.to(device) for tensor in inputs(shape))
    call = lambda: draw(ids, response, shape[1], scheme, case["backend"])  # noqa: E731
    ours = call()
    checks = {"consistent": consistent(ids, ours, scheme), "equals_reference": equal(ours, expected(shape, scheme))}
    size = sum(getattr(ours, name).nbytes for name in FIELDS)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    variants: dict[str, Callable[[], Any]] = {"call": call, "memcpy": lambda: target.copy_(source)}
    seconds = interleave(variants, rounds, str(device), sample_seconds)
    busy = {name: busy_seconds(run, device) for name, run in variants.items()}
    ratios = {
        "call / memcpy": median_ratio(seconds, "call", "memcpy"),
        "GPU of call / GPU of memcpy": busy["call"] / busy["memcpy"] if busy["call"] and busy["memcpy"] else None,
        "loop / call": None,
    }
    against_loop = None
    if scheme == "exact":
        checks["loop_consistent"] = consistent(ids, loop(ids, response, shape[1]), scheme)
        variants = {"call": call, "loop": lambda: loop(ids, response, shape[1])}
        against_loop = interleave(variants, min(rounds, LOOP_ROUNDS), str(device))
        ratios["loop / call"] = median_ratio(against_loop, "loop", "call")
    return {
        "checks": checks,
        "masked": len(ours.rows),
        "output_bytes": size,
        "seconds": seconds,  # wall clock of a call
        "seconds_against_loop": against_loop,  # the same, every call in the wake of a loop
        "gpu_busy_seconds": busy,  # device time alone, mean over many calls
        "ratios": ratios,
        "target": {"call / memcpy": TARGET, "met": ratios["call / memcpy"] <= TARGET},
        **({"gpu": gpu_state(device)} if device.type == "cuda" else {}),
    }


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Clean ids and the response mask [B, T], on the CPU."""
    batch, _, tokens = shape
    ids = torch.randint(0, MASK_TOKEN_ID, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones(batch, tokens, dtype=torch.bool)


def draw(ids: Tensor, response: Tensor, n_mc: int, scheme: str, backend: str) -> bk.MaskDraw:
    """Ours."""
    return bk.random_mask(
        ids, response, mask_token_id=MASK_TOKEN_ID, n_mc=n_mc, seed=SEED, scheme=scheme, backend=backend
    )


@lru_cache(maxsize=1)
def expected(shape: tuple[int, int, int], scheme: str) -> bk.MaskDraw:
    """What the specification draws, on the CPU."""
    return draw(*inputs(shape), shape[1], scheme, "reference")


def equal(ours: bk.MaskDraw, reference: bk.MaskDraw) -> bool:
    """True; WrongDraw unless every field has the same bits."""
    for name in FIELDS:
        _require(torch.equal(getattr(ours, name).cpu(), getattr(reference, name)), f"{name} differs from the reference")
    return True


def consistent(ids: Tensor, result: bk.MaskDraw, scheme: str) -> bool:
    """True; WrongDraw unless counts, rows, targets, offsets and weights are those of the noisy ids."""
    noisy, count, weight = result.noisy_ids, result.count, result.segment_weight
    clean = ids[:, None].expand_as(noisy)
    masked = noisy == MASK_TOKEN_ID
    _require(torch.equal(torch.where(masked, clean, noisy), clean), "a token that is not masked was changed")
    _require(torch.equal(masked.sum(dim=-1), count.long()), "count is not the number of masked tokens")
    _require(torch.equal(masked.flatten().nonzero()[:, 0], result.rows), "rows are not the masked positions")
    _require(torch.equal(clean[masked], result.targets), "targets are not the tokens under the masks")
    ends = torch.cat([count.new_zeros(1, dtype=torch.int64), count.flatten().cumsum(0)])
    _require(torch.equal(ends, result.segment_offsets), "offsets are not the running counts")
    _require(_weights_fit(weight, count.float(), ids.shape[1], scheme), f"weights are not those of scheme {scheme}")
    if scheme == "coupled":
        _require(bool((masked[:, 0::2] ^ masked[:, 1::2]).all()), "the samples of a pair are not complements")
    return True


def _weights_fit(weight: Tensor, count: Tensor, tokens: int, scheme: str) -> bool:
    # Tensor by tensor: torch turns number / tensor into number * (1 / tensor), which rounds twice.
    if scheme == "exact":
        return torch.equal(weight, torch.full_like(count, tokens) / count)
    if scheme == "coupled":
        return torch.equal(weight, torch.where(count > 0, torch.full_like(count, tokens + 1) / count, 0.0))
    # bernoulli: 1 / t with t in the sample's own stratum, up to a rounding
    samples = weight.shape[1]
    place = samples / weight.double() - torch.arange(samples, device=weight.device)
    return bool(((place >= -1e-5) & (place <= 1 + 1e-5)).all())


def loop(ids: Tensor, response: Tensor, n_mc: int) -> bk.MaskDraw:
    """The same job with a randperm, an indexed write and a sort per sequence and sample, where `ids` lives."""
    batch, tokens = ids.shape
    noisy = ids[:, None].repeat(1, n_mc, 1)
    weight = torch.empty(batch, n_mc, device=ids.device)
    counts = torch.empty(batch, n_mc, dtype=torch.int32, device=ids.device)
    rows, targets = [], []
    for b in range(batch):
        positions = response[b].nonzero()[:, 0]
        for j in range(n_mc):
            count = int(torch.randint(1, len(positions) + 1, ()))
            masked = positions[torch.randperm(len(positions), device=ids.device)[:count]].sort().values
            noisy[b, j, masked] = MASK_TOKEN_ID
            weight[b, j], counts[b, j] = len(positions) / count, count
            rows.append(masked + (b * n_mc + j) * tokens)
            targets.append(ids[b, masked])
    offsets = torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)])
    return bk.MaskDraw(noisy, torch.cat(rows), torch.cat(targets), offsets, weight, counts)


def busy_seconds(run: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds a call that the GPU is at work, whatever the host does between; None without a GPU or its profiler."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_CALLS):
            run()
        synchronize(device)
    spans = [event.time_range.elapsed_us() for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(spans) * 1e-6 / PROFILED_CALLS if spans else None


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise WrongDraw(otherwise)


if __name__ == "__main__":
    sys.exit(main())
