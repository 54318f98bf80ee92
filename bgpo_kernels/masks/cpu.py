"""Random masking on the compiled CPU engine: csrc/cpu/masks.inl has the cost, csrc/bgpo/stream.h the bits.

``draw_counts`` also serves the CUDA and Triton engines: counts need nothing of the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu
from ..native import address, dense, threads, with_huge_pages
from .reference import Counts, Draw, Facts
from .schedule import SCHEDULE_CODES, SCHEMES, DrawSpec


def input_facts(
    input_ids: Tensor, response_mask: Tensor, prompt_mask: Tensor | None, sample_ids: Tensor | None, mask_token_id: int
) -> Facts:
    """As ``reference.input_facts``."""
    keep = [
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        dense(prompt_mask, torch.bool),
        dense(sample_ids, torch.int64),
    ]
    return Facts(*_cpu.input_facts(*map(address, keep), *input_ids.shape, mask_token_id))


def draw_counts(lengths: Tensor, sample_ids: Tensor, spec: DrawSpec) -> Counts:
    """As ``reference.draw_counts``."""
    shape = (lengths.shape[0], spec.samples)
    count = torch.empty(shape, dtype=torch.int32)
    weight = torch.empty(shape, dtype=torch.float32)
    offsets = torch.empty(count.numel() + 1, dtype=torch.int64)
    keep = [dense(lengths, torch.int64), dense(sample_ids, torch.int64), *(spec.tables or (None, None, None))]
    counts = _cpu.Counts(
        address(keep[0]), address(keep[1]), shape[0], spec.n_mc, spec.lo, spec.hi, spec.seed,
        SCHEMES.index(spec.scheme), SCHEDULE_CODES.index(spec.schedule), *map(address, keep[2:]),
    )  # fmt: skip
    _cpu.draw_counts(counts, address(count), address(weight), address(offsets), threads())
    return Counts(count, weight, offsets)


def draw(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor,
    spec: DrawSpec,
    counts: Counts,
) -> Draw:
    """As ``reference.draw``."""
    batch, tokens = input_ids.shape
    num_rows = int(counts.offsets[-1])
    noisy = with_huge_pages(torch.empty(batch, spec.samples, tokens, dtype=torch.int64))
    rows = with_huge_pages(torch.empty(num_rows, dtype=torch.int64))
    targets = with_huge_pages(torch.empty(num_rows, dtype=torch.int64))
    keep = [
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        dense(prompt_mask, torch.bool),
        dense(sample_ids, torch.int64),
        counts.offsets,
    ]
    arguments = _cpu.Draw(
        *map(address, keep), batch, tokens, spec.lo, spec.hi, spec.seed, spec.mask_token_id, spec.coupled,
        spec.prompt_threshold,
    )  # fmt: skip
    _cpu.draw_masks(arguments, address(noisy), address(rows), address(targets), threads())
    return Draw(noisy, rows, targets, *(t.clone() for t in counts))
