"""Segment sums and BGPO's per-sample bound in Triton; formulas and letters as in ``reference``.

``segment_sum``: one program per segment, 8 N bytes at most; fp64 lanes accumulate every BLOCK-th value and are added by
one fixed tree, so a segment's bits depend on nothing but its own values. Rounded once, after the weight.

``bound``: element-wise over B*n samples, in the dtype of ``logprob``. Clips are applied with ``where``, not minimum and
maximum, which in Triton drop a NaN: a NaN log-probability must reach the loss. Their limits are arguments, so that a
trainer which anneals them compiles nothing, and travel as bit patterns: Triton would round floats to fp32 under an fp64
log-probability. A clip that is off is infinite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_math import bits, divide, number

# Values per pass and warps, also of the row kernel that adds up segments: the order of additions follows from both.
SEGMENT_BLOCK, SEGMENT_WARPS = 256, 8
BOUND_BLOCK = 256  # samples per program


@triton.jit
def weighted_sum(values, begin, end, weight, BLOCK: tl.constexpr):
    """weight * sum(values[begin:end]) in the dtype of values, for every kernel that needs one: the same bits in all."""
    total = tl.zeros([BLOCK], tl.float64)
    row = begin
    while row < end:
        index = row + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < end, other=0.0).to(tl.float64)
        row += BLOCK
    return (weight.to(tl.float64) * tl.sum(total, 0)).to(values.dtype.element_ty)


@triton.jit
def bound_terms(d, advantage, length, highest, floor, ceiling):
    """Term and slope of samples, all in the dtype of d."""
    linear = 1.0 + d
    ratio = tl.exp(d.to(tl.float64)).to(d.dtype)  # the fast fp32 exponential loses |d| ulp, and there are few samples
    clipped = tl.where(ratio < floor, floor, ratio)
    clipped = tl.where(clipped > ceiling, ceiling, clipped)
    gains = advantage >= 0.0
    term = advantage * tl.where(gains, tl.where(linear > highest, highest, linear), clipped)
    outside = tl.where(gains, linear > highest, (ratio < floor) | (ratio > ceiling))  # a NaN is not
    slope = tl.where(outside, 0.0, divide(advantage * tl.where(gains, 1.0, ratio), length))
    return term, slope


@triton.jit(do_not_specialize_on_alignment=("values", "offsets", "weight", "sums"))
def _segment_sum_kernel(
    values,  # [N] fp32 or fp64
    offsets,  # [S+1] int64
    weight,  # [S] fp32
    sums,  # [S] out
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    begin = tl.load(offsets + s)
    end = tl.load(offsets + s + 1)
    tl.store(sums + s, weighted_sum(values, begin, end, tl.load(weight + s), BLOCK))


@triton.jit(
    do_not_specialize=("size", "samples", "highest", "floor", "ceiling"),
    do_not_specialize_on_alignment=("logprob", "advantages", "old", "lengths", "terms", "slopes"),
)
def _bound_kernel(
    logprob,  # [B, n]
    advantages,  # [B]
    old,  # [B, n] or None
    lengths,  # [B] or None
    terms,  # [B, n] out
    slopes,  # [B, n] out
    size,
    samples,
    highest: tl.int64,  # bits of 1 + clip_high
    floor: tl.int64,  # bits of 1 - clip_low
    ceiling: tl.int64,  # bits of dual_clip
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = logprob.dtype.element_ty
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row = index // samples
    advantage = tl.load(advantages + row, mask=inside, other=0.0).to(DTYPE)
    length = tl.full([BLOCK], 1.0, DTYPE)
    if lengths is not None:
        length = tl.load(lengths + row, mask=inside, other=1.0).to(DTYPE)
    new = tl.load(logprob + index, mask=inside, other=0.0)
    base = new  # on-policy: d is 0, or NaN where the log-probability is not finite
    if old is not None:
        base = tl.load(old + index, mask=inside, other=0.0).to(DTYPE)
    d = divide(new - base, length)
    term, slope = bound_terms(
        d, advantage, length, number(highest, DTYPE), number(floor, DTYPE), number(ceiling, DTYPE)
    )
    tl.store(terms + index, term, mask=inside)
    tl.store(slopes + index, slope, mask=inside)


def clip_bits(clip_low: float, clip_high: float, dual_clip: float) -> dict[str, int]:
    """The clip limits as kernels' arguments."""
    return {"highest": bits(1.0 + clip_high), "floor": bits(1.0 - clip_low), "ceiling": bits(dual_clip)}


def segment_sum(
    values: Tensor,  # [N] fp32 or fp64
    offsets: Tensor,  # [S+1] int64
    weight: Tensor,  # [S] fp32
) -> Tensor:
    """``weight_s * sum(values[offsets_s : offsets_s+1])`` -> [S], accumulated in fp64, rounded once."""
    segments = offsets.numel() - 1
    sums = torch.empty(segments, dtype=values.dtype, device=values.device)
    if segments:
        with torch.cuda.device_of(values):
            _segment_sum_kernel[(segments,)](
                values.contiguous(), offsets.contiguous(), weight.contiguous(), sums,
                BLOCK=SEGMENT_BLOCK, num_warps=SEGMENT_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return sums


def bound(
    logprob: Tensor,  # [B, n]
    advantages: Tensor,  # [B]
    old: Tensor | None,  # [B, n]
    length: Tensor | None,  # [B]
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """Bound term of each sample and its derivative with respect to ``logprob``: two ``[B, n]``."""
    term = torch.empty(logprob.shape, dtype=logprob.dtype, device=logprob.device)
    slope = torch.empty_like(term)
    if logprob.numel():
        with torch.cuda.device_of(logprob):
            _bound_kernel[(triton.cdiv(logprob.numel(), BOUND_BLOCK),)](
                logprob.contiguous(), advantages.contiguous(), None if old is None else old.contiguous(),
                None if length is None else length.contiguous(), term, slope, logprob.numel(), logprob.shape[1],
                **clip_bits(clip_low, clip_high, dual_clip), BLOCK=BOUND_BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    return term, slope
