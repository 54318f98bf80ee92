"""Random masking on the CUDA kernel: see csrc/cuda/mask.cu for the cost and csrc/bgpo/stream.h for the bits.

One launch, and nothing waits for the device: the host knows the number of rows, since it can draw the counts as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda
from ..native import address, dense, stream
from .reference import Counts, Draw, input_facts, new_draw
from .schedule import SCHEDULE_CODES, SCHEMES, DrawSpec

__all__ = ["draw", "input_facts"]


def draw(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor,
    spec: DrawSpec,
    counts: Counts,
) -> Draw:
    """As ``reference.draw``."""
    result, state = new_draw(input_ids, spec, counts)
    keep = [
        dense(input_ids, torch.int64),
        dense(response_mask, torch.bool),
        dense(prompt_mask, torch.bool),
        dense(sample_ids, torch.int64),
    ]
    arguments = _cuda.Draw(
        *map(address, keep), *input_ids.shape, spec.n_mc, spec.lo, spec.hi, spec.seed, SCHEMES.index(spec.scheme),
        SCHEDULE_CODES.index(spec.schedule), *map(address, spec.device_tables or (None, None, None)),
        spec.mask_token_id, spec.prompt_threshold,
    )  # fmt: skip
    _cuda.draw_masks(_cuda.Queue(*stream(result.noisy_ids)), arguments, *map(address, result), address(state))
    return result
