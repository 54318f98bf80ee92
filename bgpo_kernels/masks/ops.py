"""The registered op of the masks: integers in, integers out, so no backward.

The seed crosses the schema as a signed 64-bit integer (``signed``); the spec holds it unsigned. ``host_*`` are the
counts as the host drew them, on the CPU: they give the number of rows, and engines of the CPU need no others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import engine
from .reference import Counts
from .schedule import CountTables, DrawSpec


def signed(seed: int) -> int:
    """The 64 bits of a seed as the schema's int."""
    return seed - 2**64 if seed >= 2**63 else seed


@torch.library.custom_op("bgpo_kernels::mask_draw", mutates_args=())
def mask_draw(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor,
    thresholds: Tensor | None,
    table_weights: Tensor | None,
    table_start: Tensor | None,
    host_count: Tensor,
    host_weight: Tensor,
    host_offsets: Tensor,
    num_rows: int,
    scheme: str,
    schedule: str,
    n_mc: int,
    lo: int,
    hi: int,
    seed: int,
    mask_token_id: int,
    prompt_threshold: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Noisy ids ``[B, m, T]``, rows and targets ``[N]``, count and weight ``[B, m]``, offsets ``[B*m + 1]``."""
    tables = None
    if thresholds is not None and table_weights is not None and table_start is not None:
        tables = CountTables(thresholds, table_weights, table_start)
    spec = DrawSpec(
        scheme, schedule, n_mc, lo, hi, seed & (2**64 - 1), mask_token_id, prompt_threshold, device_tables=tables
    )
    counts = Counts(host_count, host_weight, host_offsets)
    return tuple(engine("masks", backend).draw(input_ids, response_mask, prompt_mask, sample_ids, spec, counts))


@mask_draw.register_fake
def _(input_ids, response_mask, prompt_mask, sample_ids, thresholds, table_weights, table_start, host_count,
      host_weight, host_offsets, num_rows, scheme, schedule, n_mc, lo, hi, seed, mask_token_id, prompt_threshold,
      backend):  # fmt: skip
    batch, tokens = input_ids.shape
    shape = (batch, hi - lo)
    return (
        input_ids.new_empty(*shape, tokens),
        input_ids.new_empty(num_rows),
        input_ids.new_empty(num_rows),
        input_ids.new_empty(shape, dtype=torch.int32),
        input_ids.new_empty(shape, dtype=torch.float32),
        input_ids.new_empty(batch * (hi - lo) + 1),
    )
