"""Philox4x32-10 in Triton: the one Triton home of mask stream version 1's generator.

Counter and key words are **uint32 tensors** throughout. A Python integer of 2^31 or more would reach Triton as int64,
select 64-bit arithmetic and give other words; and ``tl.rand``'s own use of Philox has changed meaning between Triton
releases, so nothing here leans on it. Cost: 10 rounds of two 32x32 -> 64 bit multiplications, about 60 integer
instructions for four words; no memory.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

# Purposes: the top byte of counter word 3.
KEYS = tl.constexpr(0)
COUNTS = tl.constexpr(1)
PROMPT = tl.constexpr(2)


def seed_words(seed: int) -> tuple[int, int]:
    """The low and high 32 bits of a seed as signed 32-bit integers, so that every seed has the same kernel signature.

    Kernels that take them must list both under ``do_not_specialize``; otherwise a seed that happens to be 1, or a
    multiple of 16, would compile the kernel anew.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds (Salmon et al., 2011). Six uint32 tensors that broadcast together -> four uint32 tensors."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def stream_words(position, sample, sample_id, seed_low, seed_high, PURPOSE: tl.constexpr):
    """Words 0 and 1 of the mask stream at (position, sample j, int64 logical id); seeds as from ``seed_words``."""
    id_low = (sample_id & 0xFFFFFFFF).to(tl.uint32)
    id_high = ((sample_id >> 32) & 0xFFFFFF).to(tl.uint32) | (PURPOSE << 24)
    w0, w1, _, _ = philox4x32(
        position.to(tl.uint32),
        sample.to(tl.uint32),
        id_low,
        id_high,
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )
    return w0, w1
