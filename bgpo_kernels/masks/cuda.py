"""Random masking on the CUDA kernels: see csrc/cuda/mask.cu for the cost and csrc/bgpo/stream.h for the bits.

Nothing here waits for the device: ``emit_rows`` is told the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda
from ..native import address, dense, stream
from .schedule import SCHEMES, DrawSpec

_SCHEDULES = ("uniform", "stratified", "table")


def select(
    input_ids: Tensor, response_mask: Tensor, prompt_mask: Tensor | None, sample_ids: Tensor, spec: DrawSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.select``."""
    batch, tokens = input_ids.shape
    device = input_ids.device
    noisy = torch.empty(batch, spec.samples, tokens, dtype=torch.int64, device=device)
    count = torch.empty(batch, spec.samples, dtype=torch.int32, device=device)
    weight = torch.empty(batch, spec.samples, dtype=torch.float32, device=device)
    keep = [
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        response_mask.cumsum(-1, dtype=torch.int32).contiguous(),
        dense(prompt_mask, torch.bool),
        dense(sample_ids, torch.int64),
    ]
    tables = [_moved(spec.thresholds, device), _moved(spec.table_weights, device), _moved(spec.table_start, device)]
    draw = _cuda.Draw(
        *map(address, keep), batch, tokens, spec.n_mc, spec.lo, spec.hi, spec.seed, spec.mask_token_id,
        SCHEMES.index(spec.scheme), _SCHEDULES.index(spec.schedule), spec.prompt_threshold, *map(address, tables),
    )  # fmt: skip
    _cuda.select(_cuda.Queue(*stream(noisy)), draw, address(noisy), address(count), address(weight))
    return noisy, count, weight


def emit_rows(
    noisy_ids: Tensor,
    input_ids: Tensor,
    response_mask: Tensor,
    segment_offsets: Tensor,
    mask_token_id: int,
    num_rows: int,
) -> tuple[Tensor, Tensor]:
    """As ``reference.emit_rows``."""
    rows = torch.empty(num_rows, dtype=torch.int64, device=noisy_ids.device)
    targets = torch.empty(num_rows, dtype=torch.int64, device=noisy_ids.device)
    keep = [
        noisy_ids.contiguous(),
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        segment_offsets.contiguous(),
    ]
    batch, samples, tokens = noisy_ids.shape
    emit = _cuda.Emit(*map(address, keep), batch, samples, tokens, mask_token_id)
    _cuda.emit_rows(_cuda.Queue(*stream(rows)), emit, address(rows), address(targets))
    return rows, targets


def _moved(table: Tensor | None, device: torch.device) -> Tensor | None:
    """On the device. From pageable memory the copy is staged before ``to`` returns, so it need not be waited for."""
    return None if table is None else table.to(device, non_blocking=True).contiguous()
