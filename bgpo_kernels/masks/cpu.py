"""Random masking on the compiled CPU engine: csrc/cpu/masks.inl has the cost, csrc/bgpo/stream.h the bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu
from ..native import address, dense, threads, with_huge_pages
from .schedule import SCHEMES, DrawSpec

_SCHEDULES = ("uniform", "stratified", "table")


def select(
    input_ids: Tensor, response_mask: Tensor, prompt_mask: Tensor | None, sample_ids: Tensor, spec: DrawSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.select``."""
    batch, tokens = input_ids.shape
    noisy = with_huge_pages(torch.empty(batch, spec.samples, tokens, dtype=torch.int64))
    count = torch.empty(batch, spec.samples, dtype=torch.int32)
    weight = torch.empty(batch, spec.samples, dtype=torch.float32)
    draw, _keep = _draw(input_ids, response_mask, prompt_mask, sample_ids, spec)
    _cpu.select(draw, address(noisy), address(count), address(weight), threads())
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
    rows = torch.empty(num_rows, dtype=torch.int64)
    targets = torch.empty(num_rows, dtype=torch.int64)
    spec = DrawSpec("exact", "uniform", noisy_ids.shape[1], 0, noisy_ids.shape[1], 0, mask_token_id)
    draw, _keep = _draw(input_ids, response_mask, None, None, spec)
    noisy_ids, segment_offsets = noisy_ids.contiguous(), segment_offsets.contiguous()
    _cpu.emit_rows(draw, address(noisy_ids), address(segment_offsets), address(rows), address(targets), threads())
    return rows, targets


def _draw(
    input_ids: Tensor, response_mask: Tensor, prompt_mask: Tensor | None, sample_ids: Tensor | None, spec: DrawSpec
) -> tuple[_cpu.Draw, list[Tensor | None]]:
    """The engine's arguments, and the tensors whose memory they point into."""
    keep = [
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        dense(prompt_mask, torch.bool),
        dense(sample_ids, torch.int64),
        dense(spec.thresholds, torch.int64),
        dense(spec.table_weights, torch.float32),
        dense(spec.table_start, torch.int64),
    ]
    ids, response, prompt, samples, thresholds, table_weights, table_start = map(address, keep)
    batch, tokens = input_ids.shape
    draw = _cpu.Draw(
        ids, response, prompt, samples, batch, tokens, spec.n_mc, spec.lo, spec.hi, spec.seed, spec.mask_token_id,
        SCHEMES.index(spec.scheme), _SCHEDULES.index(spec.schedule), spec.prompt_threshold,
        thresholds, table_weights, table_start,
    )  # fmt: skip
    return draw, keep
