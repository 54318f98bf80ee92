"""Random masking on the compiled CPU engine: csrc/cpu/masks.inl has the cost, csrc/bgpo/stream.h the bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu
from ..native import address, dense, threads, with_huge_pages
from .reference import Facts
from .schedule import SCHEMES, CountSpec, MaskSpec

_SCHEDULES = ("uniform", "stratified", "table")


def input_facts(input_ids: Tensor, response_mask: Tensor, prompt_mask: Tensor | None, mask_token_id: int) -> Facts:
    """As ``reference.input_facts``."""
    keep = dense(input_ids, torch.int64), dense(response_mask, torch.bool), dense(prompt_mask, torch.bool)
    return Facts(*_cpu.input_facts(*map(address, keep), *input_ids.shape, mask_token_id))


def draw_counts(response_mask: Tensor, sample_ids: Tensor, spec: CountSpec) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.draw_counts``."""
    batch, tokens = response_mask.shape
    shape = (batch, spec.samples)
    count = torch.empty(shape, dtype=torch.int32)
    weight = torch.empty(shape, dtype=torch.float32)
    offsets = torch.empty(batch * spec.samples + 1, dtype=torch.int64)
    keep = [
        dense(response_mask, torch.bool),
        dense(sample_ids, torch.int64),
        dense(spec.thresholds, torch.int64),
        dense(spec.table_weights, torch.float32),
        dense(spec.table_start, torch.int64),
    ]
    response, samples, *tables = map(address, keep)
    counts = _cpu.Counts(
        response, samples, batch, tokens, spec.n_mc, spec.lo, spec.hi, spec.seed,
        SCHEMES.index(spec.scheme), _SCHEDULES.index(spec.schedule), *tables,
    )  # fmt: skip
    _cpu.draw_counts(counts, address(count), address(weight), address(offsets), threads())
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
    noisy = with_huge_pages(torch.empty(batch, spec.samples, tokens, dtype=torch.int64))
    rows = with_huge_pages(torch.empty(num_rows, dtype=torch.int64))
    targets = with_huge_pages(torch.empty(num_rows, dtype=torch.int64))
    keep = [
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        dense(prompt_mask, torch.bool),
        dense(sample_ids, torch.int64),
        dense(segment_offsets, torch.int64),
    ]
    draw = _cpu.Draw(
        *map(address, keep), batch, tokens, spec.lo, spec.hi, spec.seed, spec.mask_token_id, spec.coupled,
        spec.prompt_threshold,
    )  # fmt: skip
    _cpu.draw_masks(draw, address(noisy), address(rows), address(targets), threads())
    return noisy, rows, targets
