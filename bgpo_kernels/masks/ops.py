"""Registered ops of the masks: integers in, integers out, so no backward. Counts first, then what they place.

The seed crosses the schema as a signed 64-bit integer (``signed``); the specs hold it unsigned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import engine
from .schedule import CountSpec, MaskSpec


def signed(seed: int) -> int:
    """The 64 bits of a seed as the schema's int."""
    return seed - 2**64 if seed >= 2**63 else seed


@torch.library.custom_op("bgpo_kernels::mask_counts", mutates_args=())
def mask_counts(
    response_mask: Tensor,
    sample_ids: Tensor,
    thresholds: Tensor | None,
    table_weights: Tensor | None,
    table_start: Tensor | None,
    scheme: str,
    schedule: str,
    n_mc: int,
    lo: int,
    hi: int,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts ``[B, m] int32``, weights ``[B, m] fp32``, offsets ``[B*m + 1] int64``; see ``reference.draw_counts``."""
    spec = CountSpec(scheme, schedule, n_mc, lo, hi, seed & (2**64 - 1), thresholds, table_weights, table_start)
    return engine("masks", backend).draw_counts(response_mask, sample_ids, spec)


@mask_counts.register_fake
def _(response_mask, sample_ids, thresholds, table_weights, table_start, scheme, schedule, n_mc, lo, hi, seed,
      backend):  # fmt: skip
    batch = response_mask.shape[0]
    return (
        response_mask.new_empty((batch, hi - lo), dtype=torch.int32),
        response_mask.new_empty((batch, hi - lo), dtype=torch.float32),
        response_mask.new_empty(batch * (hi - lo) + 1, dtype=torch.int64),
    )


@torch.library.custom_op("bgpo_kernels::mask_draw", mutates_args=())
def mask_draw(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor,
    segment_offsets: Tensor,
    num_rows: int,
    coupled: bool,
    lo: int,
    hi: int,
    seed: int,
    mask_token_id: int,
    prompt_threshold: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy ids ``[B, m, T]``, rows and targets ``[N]``; see ``reference.draw_masks``."""
    spec = MaskSpec(coupled, lo, hi, seed & (2**64 - 1), mask_token_id, prompt_threshold)
    return engine("masks", backend).draw_masks(
        input_ids, response_mask, prompt_mask, sample_ids, segment_offsets, num_rows, spec
    )


@mask_draw.register_fake
def _(input_ids, response_mask, prompt_mask, sample_ids, segment_offsets, num_rows, coupled, lo, hi, seed,
      mask_token_id, prompt_threshold, backend):  # fmt: skip
    batch, tokens = input_ids.shape
    return input_ids.new_empty(batch, hi - lo, tokens), input_ids.new_empty(num_rows), input_ids.new_empty(num_rows)
