"""The rate that the device's matrix products reach on the model's own shapes, the yardstick of every utilisation.

All projections of a layer, [tokens, in] x [in, out] in bf16 with fp32 sums as torch does them, on normal random
numbers (zeros draw less power and look faster), the shapes interleaved. The rate is that of a whole layer: FLOPs of its
projections over the sum of their median times, each shape as often as it occurs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from _measure import interleave

from .flops import Dimensions

ROUNDS = 5


def gemm_rate(model: Dimensions, tokens: int, device: torch.device, sample_seconds: float) -> dict[str, Any]:
    """FLOP/s of a layer's projections over `tokens` rows, and all that it follows from."""
    shapes = list(model.projections().values())
    variants = {f"{out} x {into}": _product(tokens, out, into, device) for out, into in dict.fromkeys(shapes)}
    seconds = interleave(variants, ROUNDS, str(device), sample_seconds)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    flops = sum(2 * tokens * out * into for out, into in shapes)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "flops_per_layer": flops,
        "flops_per_second": flops / sum(medians[f"{out} x {into}"] for out, into in shapes),
    }


def _product(tokens: int, out: int, into: int, device: torch.device) -> Callable[[], Any]:
    x, weight = (torch.randn(rows, into, dtype=torch.bfloat16, device=device) for rows in (tokens, out))
    result = torch.empty(tokens, out, dtype=torch.bfloat16, device=device)
    return lambda: torch.mm(x, weight.T, out=result)
