"""Registered ops of the masks: integers in, integers out, so no backward.

The seed crosses the schema as a signed 64-bit integer; ``DrawSpec`` holds it unsigned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import engine
from .schedule import DrawSpec


@torch.library.custom_op("bgpo_kernels::mask_select", mutates_args=())
def mask_select(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
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
    mask_token_id: int,
    prompt_threshold: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy ids ``[B, m, T]``, counts ``[B, m] int32``, token weights ``[B, m] fp32`` (see ``reference.select``)."""
    spec = DrawSpec(scheme, schedule, n_mc, lo, hi, seed & (2**64 - 1), mask_token_id, prompt_threshold, thresholds,
                    table_weights, table_start)  # fmt: skip
    return engine("masks", backend).select(input_ids, response_mask, prompt_mask, sample_ids, spec)


@mask_select.register_fake
def _(input_ids, response_mask, prompt_mask, sample_ids, thresholds, table_weights, table_start, scheme, schedule,
      n_mc, lo, hi, seed, mask_token_id, prompt_threshold, backend):  # fmt: skip
    batch, tokens = input_ids.shape
    return (
        input_ids.new_empty(batch, hi - lo, tokens),
        input_ids.new_empty(batch, hi - lo, dtype=torch.int32),
        input_ids.new_empty(batch, hi - lo, dtype=torch.float32),
    )


@torch.library.custom_op("bgpo_kernels::mask_rows", mutates_args=())
def mask_rows(
    noisy_ids: Tensor,
    input_ids: Tensor,
    response_mask: Tensor,
    segment_offsets: Tensor,
    mask_token_id: int,
    num_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Ascending flat indices of the masked response tokens and the ids they hide, ``[N]`` each."""
    return engine("masks", backend).emit_rows(
        noisy_ids, input_ids, response_mask, segment_offsets, mask_token_id, num_rows
    )


@mask_rows.register_fake
def _(noisy_ids, input_ids, response_mask, segment_offsets, mask_token_id, num_rows, backend):
    return noisy_ids.new_empty(num_rows), noisy_ids.new_empty(num_rows)
