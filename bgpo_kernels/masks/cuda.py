"""Random masking on the CUDA kernels: see csrc/cuda/mask.cu for the cost and csrc/bgpo/stream.h for the bits.

Nothing here waits for the device: ``draw_masks`` is told the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda
from ..native import address, dense, stream
from .reference import input_facts
from .schedule import SCHEMES, CountSpec, MaskSpec

__all__ = ["draw_counts", "draw_masks", "input_facts"]

_SCHEDULES = ("uniform", "stratified", "table")


def draw_counts(response_mask: Tensor, sample_ids: Tensor, spec: CountSpec) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.draw_counts``."""
    batch, tokens = response_mask.shape
    device = response_mask.device
    count = torch.empty(batch, spec.samples, dtype=torch.int32, device=device)
    weight = torch.empty(batch, spec.samples, dtype=torch.float32, device=device)
    offsets = torch.zeros(batch * spec.samples + 1, dtype=torch.int64, device=device)
    keep = [dense(response_mask, torch.bool), dense(sample_ids, torch.int64)]
    tables = [_moved(spec.thresholds, device), _moved(spec.table_weights, device), _moved(spec.table_start, device)]
    counts = _cuda.Counts(
        *map(address, keep), batch, tokens, spec.n_mc, spec.lo, spec.hi, spec.seed,
        SCHEMES.index(spec.scheme), _SCHEDULES.index(spec.schedule), *map(address, tables),
    )  # fmt: skip
    _cuda.draw_counts(_cuda.Queue(*stream(count)), counts, address(count), address(weight))
    torch.cumsum(count.flatten(), 0, out=offsets[1:])
    return count, weight, offsets


def draw_masks(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor,
    segment_offsets: Tensor,
    num_rows: int,
    spec: MaskSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.draw_masks``."""
    batch, tokens = input_ids.shape
    noisy = torch.empty(batch, spec.samples, tokens, dtype=torch.int64, device=input_ids.device)
    rows = torch.empty(num_rows, dtype=torch.int64, device=input_ids.device)
    targets = torch.empty(num_rows, dtype=torch.int64, device=input_ids.device)
    keep = [
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        dense(prompt_mask, torch.bool),
        dense(sample_ids, torch.int64),
        dense(segment_offsets, torch.int64),
    ]
    draw = _cuda.Draw(
        *map(address, keep), batch, tokens, spec.lo, spec.hi, spec.seed, spec.mask_token_id, spec.coupled,
        spec.prompt_threshold,
    )  # fmt: skip
    _cuda.draw_masks(_cuda.Queue(*stream(noisy)), draw, address(noisy), address(rows), address(targets))
    return noisy, rows, targets


def _moved(table: Tensor | None, device: torch.device) -> Tensor | None:
    """On the device. From pageable memory the copy is staged before ``to`` returns, so it need not be waited for."""
    return None if table is None else table.to(device, non_blocking=True).contiguous()
