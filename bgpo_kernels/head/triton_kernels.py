"""Row kernels of the vocabulary head in Triton: statistics of a chunk of logits, and their gradient in place.

    z = transform(logits + bias),  m = max_k z_k,  s = sum_k exp(z_k - m)
    logprob = min(z_y - m, 0) - log s,   entropy = log s - sum_k exp(z_k - m) (z_k - m) / s
    d loss / d z_k = g (1[k = y] - p_k) - h p_k ((z_k - m) - log s + entropy),   then times d z / d logit

Accumulation is fp32 (fp64 for fp64 logits). Bytes per row: e V read by ``row_statistics``; e V read and o V written
by ``dlogits_``, with e, o the bytes of a logit and of a gradient; one exponential per element each; nothing of size V
is stored elsewhere. One program per row, so a row's bits ignore its companions; tiles follow from (V, dtype).

**One sweep, no synchronisation.** Each lane carries its own running (m, s, sum of e (z - m)) and lanes meet once, at
the end. Rescaling costs no second exponential: of exp(m - m') and exp(z - m') one is always 1, the other exp(-|z - m|).
The running maximum starts at the lowest finite number: -inf would make -inf - -inf out of a masked vocabulary entry.

**Writing narrow over wide.** With 2-byte gradients over fp32 logits, block k is stored over the bytes of block k // 2.
Its own program has loaded that block before, but *another warp* of it may lag: without a barrier between every block's
load and store, warps drift apart and one overwrites logits that a sibling has yet to read (block 0 over itself, but
also block 2 over block 1). Equal widths need none: a block only overwrites itself, and Triton orders that exchange.

**Options.** Which of scale, softcap and temperature there are is compiled in; their values are arguments, so annealing
one compiles nothing. They travel as bit patterns of doubles (``bits``), rounded once to the accumulation dtype.
Contraction to fused multiply-adds is off, so that the target's logit has the same bits alone as it has in the sweep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_math import bits, divide, narrow, number
from .options import LogitTransform
from .reference import alias_as

NUMBERS = ("scale", "softcap", "temperature", "chain")  # arguments that hold `bits`


@dataclass(frozen=True)
class RowTile:
    """Columns per block and warps of a row program: 16 elements a thread, four 16-byte loads in fp32."""

    block: int
    warps: int


TILES = {width: RowTile(block, warps) for width, block, warps in ((2, 4096, 8), (4, 4096, 8), (8, 2048, 8))}


def _tile(vocab: int, width: int) -> RowTile:
    """The tile for a row of ``vocab`` logits of ``width`` bytes, cut down for vocabularies below one block."""
    full = TILES[width]
    block = min(full.block, max(32, triton.next_power_of_2(vocab)))
    return RowTile(block, max(1, full.warps * block // full.block))


@triton.jit
def _tanh(u):
    """tanh within 2 ulp: 1 - 2t / (1 + t), t = exp(-2|u|); in fp32, near 0, where that cancels, a minimax polynomial.

    u + u v P(v) with v = u^2 and P of degree 4 fitted to (tanh(u) / u - 1) / v on |u| < 0.625, relative error 4.5e-9.
    """
    size = tl.abs(u)
    t = tl.exp(-2.0 * size)
    value = 1.0 - 2.0 * t / (1.0 + t)
    if u.dtype == tl.float32:
        v = u * u
        p = -0.333332831 + v * (0.133314662 + v * (-0.0537413543 + v * (0.0206436687 + v * -0.00570949976)))
        value = tl.where(size < 0.625, size + size * (v * p), value)
    return tl.where(u < 0, -value, value)


@triton.jit
def _transform(raw, scale, softcap, temperature):
    """z, and d z / d raw over the constant scale / temperature (a scalar 1 where that is all)."""
    a = raw
    slope = 1.0
    if scale is not None:
        a = a * number(scale, a.dtype)
    if softcap is not None:
        cap = number(softcap, a.dtype)
        t = _tanh(divide(a, tl.full(a.shape, cap, a.dtype)))
        a = t * cap
        slope = 1.0 - t * t
    if temperature is not None:
        a = divide(a, tl.full(a.shape, number(temperature, a.dtype), a.dtype))
    return a, slope


@triton.jit
def _raw_block(logits, bias, column, V: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):
    """Logits plus bias in the accumulation dtype. Only the last, ragged block pays for a mask."""
    inside = column < V
    raw = (tl.load(logits + column, mask=inside, other=0.0) if TAIL else tl.load(logits + column)).to(ACC)
    if bias is not None:
        raw += (tl.load(bias + column, mask=inside, other=0.0) if TAIL else tl.load(bias + column)).to(ACC)
    return raw


@triton.jit
def _absorb(z, top, total, moment, ENTROPY: tl.constexpr):
    """Fold one block into the lanes' running (max, sum of e, sum of e (z - max)), e = exp(z - max)."""
    gap = tl.abs(z - top)
    e = tl.exp(-gap)
    rises = z > top
    if ENTROPY:
        gap = tl.minimum(gap, 1.0e4)  # e is already 0 there; keeps 0 * inf out of the moment (NaN stays in e)
        moment = tl.where(rises, e * (moment - gap * total), moment - gap * e)
    total = tl.where(rises, total * e + 1.0, total + e)
    return tl.maximum(top, z), total, moment


@triton.jit(do_not_specialize=NUMBERS)
def _statistics_kernel(
    logits,  # [C, V]
    stride,
    targets,  # [C] int64
    bias,  # [V] or None
    stats,  # [4, C] out
    stats_stride,
    scale,  # bits or None, as softcap and temperature
    softcap,
    temperature,
    V: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOWEST: tl.constexpr,  # lowest finite number of the statistics' dtype
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = stats.dtype.element_ty
    FULL: tl.constexpr = V // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    logits += tl.multiple_of(row * stride, ALIGN)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, ACC)
    total = tl.zeros([BLOCK], ACC)
    moment = tl.zeros([BLOCK], ACC)
    for start in range(0, FULL, BLOCK):
        z, _ = _transform(_raw_block(logits, bias, start + lane, V, False, ACC), scale, softcap, temperature)
        top, total, moment = _absorb(z, top, total, moment, ENTROPY)
    if FULL < V:
        z, _ = _transform(_raw_block(logits, bias, FULL + lane, V, True, ACC), scale, softcap, temperature)
        z = tl.where(FULL + lane < V, z, float("-inf"))
        top, total, moment = _absorb(z, top, total, moment, ENTROPY)

    best = tl.max(top, 0)
    e = tl.exp(top - best)
    sum_e = tl.sum(total * e, 0)
    log_sum = tl.log(sum_e)
    target, _ = _transform(
        _raw_block(logits, bias, tl.load(targets + row) + tl.arange(0, 1), V, False, ACC), scale, softcap, temperature
    )
    stats += row
    tl.store(stats, best)
    tl.store(stats + stats_stride, sum_e)
    tl.store(stats + 2 * stats_stride, tl.minimum(tl.max(target, 0) - best, 0.0) - log_sum)
    if ENTROPY:
        gap = tl.minimum(best - top, 1.0e4)
        tl.store(stats + 3 * stats_stride, log_sum - tl.sum(e * (moment - gap * total), 0) / sum_e)


@triton.jit
def _gradient_block(
    logits, bias, out, column, target, best, log_sum, inverse_sum, entropy, g, h, scale, softcap, temperature, chain,
    V: tl.constexpr, ENTROPY: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Load one block of logits, store its gradient."""
    ACC: tl.constexpr = best.dtype
    OUT: tl.constexpr = out.dtype.element_ty
    NARROWS: tl.constexpr = out.dtype.element_ty.primitive_bitwidth < logits.dtype.element_ty.primitive_bitwidth
    z, slope = _transform(_raw_block(logits, bias, column, V, TAIL, ACC), scale, softcap, temperature)
    shifted = z - best
    p = tl.exp(shifted) * inverse_sum
    grad = g * tl.where(column == target, 1.0 - p, -p)
    if ENTROPY:
        grad -= h * tl.where(p == 0.0, 0.0, p * (shifted - log_sum + entropy))
    grad = grad * slope
    if chain is not None:
        grad = grad * number(chain, ACC)
    if NARROWS:
        tl.debug_barrier()  # every warp has read this block before any warp stores over an earlier one
    if TAIL:
        tl.store(out + column, narrow(grad, OUT), mask=column < V)
    else:
        tl.store(out + column, narrow(grad, OUT))


@triton.jit(do_not_specialize=NUMBERS)
def _gradient_kernel(
    logits,  # [C, V]
    stride,
    targets,  # [C] int64
    bias,  # [V] or None
    stats,  # [4, C]
    stats_stride,
    grad_logprob,  # [C]
    grad_entropy,  # [C] or None
    out,  # [C, V], the storage of logits
    out_stride,
    scale,  # bits or None, as softcap, temperature and chain
    softcap,
    temperature,
    chain,  # scale / temperature
    V: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ENTROPY: tl.constexpr = grad_entropy is not None
    FULL: tl.constexpr = V // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    logits += tl.multiple_of(row * stride, ALIGN)
    out += tl.multiple_of(row * out_stride, ALIGN)
    lane = tl.arange(0, BLOCK)
    g = tl.load(grad_logprob + row)
    h = g
    entropy = g
    live = g != 0.0
    if ENTROPY:
        h = tl.load(grad_entropy + row)
        entropy = tl.load(stats + 3 * stats_stride + row)
        live = live | (h != 0.0)
    if live:
        best = tl.load(stats + row)
        sum_e = tl.load(stats + stats_stride + row)
        target = tl.load(targets + row).to(tl.int32)
        log_sum = tl.log(sum_e)
        inverse_sum = 1.0 / sum_e
        for start in range(0, FULL, BLOCK):
            _gradient_block(
                logits, bias, out, start + lane, target, best, log_sum, inverse_sum, entropy, g, h,
                scale, softcap, temperature, chain, V, ENTROPY, False,
            )  # fmt: skip
        if FULL < V:
            _gradient_block(
                logits, bias, out, FULL + lane, target, best, log_sum, inverse_sum, entropy, g, h,
                scale, softcap, temperature, chain, V, ENTROPY, True,
            )  # fmt: skip
    else:  # exact zeros whatever the logits hold, and without reading them
        zero = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(0, FULL, BLOCK):
            tl.store(out + start + lane, zero)
        if FULL < V:
            tl.store(out + FULL + lane, zero, mask=FULL + lane < V)


def _launch_options(logits: Tensor) -> dict[str, object]:
    tile = _tile(logits.shape[1], logits.element_size())
    return dict(
        V=logits.shape[1],
        # Triton infers alignment only from strides that are multiples of 16 elements; 16 bytes take 2 to 8.
        ALIGN=math.gcd(logits.stride(0), 16),
        BLOCK=tile.block,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )


def _numbers(transform: LogitTransform) -> dict[str, int | None]:
    """The transform as the kernels' arguments: bits, None where a number would change nothing."""
    given = dict(
        scale=None if transform.scale == 1.0 else transform.scale,
        softcap=transform.softcap_or_zero or None,
        temperature=None if transform.temperature == 1.0 else transform.temperature,
    )
    return {name: None if x is None else bits(x) for name, x in given.items()}


def _chain(transform: LogitTransform) -> int | None:
    """d a / d raw / temperature in double, rounded once on its way to the kernel; None without either option."""
    plain = transform.scale == transform.temperature == 1.0
    return None if plain else bits(transform.scale / transform.temperature)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def row_statistics(
    logits: Tensor,  # [C, V], unit column stride
    targets: Tensor,  # [C] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    stats: Tensor,  # [4, C] out: max, sum of exp, log-probability, entropy
    entropy: bool,
) -> None:
    """One sweep over the chunk; fills ``stats`` (row 3 only when ``entropy``)."""
    assert logits.stride(1) == 1 and stats.stride(1) == 1
    if logits.shape[0] == 0:
        return
    with torch.cuda.device_of(logits):
        _statistics_kernel[(logits.shape[0],)](
            logits, logits.stride(0), targets.contiguous(), _dense(bias), stats, stats.stride(0),
            **_numbers(transform), ENTROPY=entropy, LOWEST=torch.finfo(stats.dtype).min, **_launch_options(logits),
        )  # fmt: skip


def dlogits_(
    logits: Tensor,  # [C, V], unit column stride, overwritten
    targets: Tensor,  # [C] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    stats: Tensor,  # [4, C] as row_statistics left it
    grad_logprob: Tensor,  # [C]
    grad_entropy: Tensor | None,  # [C]
    out_dtype: torch.dtype,
) -> Tensor:
    """Gradient of the raw logits ``[C, V]`` in ``out_dtype``, over the storage of ``logits``."""
    assert logits.stride(1) == 1 and stats.stride(1) == 1
    out = alias_as(logits, out_dtype)
    if logits.shape[0] == 0:
        return out
    with torch.cuda.device_of(logits):
        _gradient_kernel[(logits.shape[0],)](
            logits, logits.stride(0), targets.contiguous(), _dense(bias), stats, stats.stride(0),
            grad_logprob.contiguous(), _dense(grad_entropy),
            out, out.stride(0), **_numbers(transform), chain=_chain(transform), **_launch_options(logits),
        )  # fmt: skip
    return out
