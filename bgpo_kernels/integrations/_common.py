"""What the integrations share: sample ids for signatures that carry none."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER = 6364136223846793005  # Knuth's, of MMIX; any odd number with well mixed bits
_ID_BITS = 55  # the mask stream takes ids of 56


def content_ids(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Sample ids ``[B]`` from the clean tokens ``[B, T]`` themselves, for trainers whose functions are told no ids.

    A sequence then gets the same masks whatever batch, micro-batch, rank or order it comes in, and equal sequences get
    equal masks (pass ``sample_ids`` where that is not wanted). Tokens where ``attention_mask`` is 0 do not count.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    place = real.cumsum(-1)  # 1 for the first real token: padding on the left moves nothing
    mixed = (input_ids + 1) * _MULTIPLIER + place * (_MULTIPLIER >> 7 | 1)  # wraps around, as int64 does everywhere
    mixed = (mixed ^ (mixed >> 29)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> 32)) * real
    total = mixed.sum(-1) + real.sum(-1)
    return (total ^ (total >> 31)) & (2**_ID_BITS - 1)
