"""Row kernels of the vocabulary head in Triton: statistics of a chunk of logits, and their gradient in place.

    z = transform(logits + bias),  m = max_k z_k,  s = sum_k exp(z_k - m)
    logprob = min(z_y - m, 0) - log s,   entropy = log s - sum_k exp(z_k - m) (z_k - m) / s
    d loss / d z_k = g (1[k = y] - p_k) - h p_k ((z_k - m) - log s + entropy),   then times d z / d logit

Accumulation is fp32 (fp64 for fp64 logits). Bytes per row: e V read by ``row_statistics``; e V read and o V written by
``dlogits_`` and ``bound_dlogits_``, with e, o the bytes of a logit and of a gradient; one exponential per element each;
nothing of size V is stored elsewhere. One program per row, so a row's bits ignore its companions; blocks follow from
(V, dtype).

**One sweep, no synchronisation.** Each lane carries its own running (m, s, sum of e (z - m)) and lanes meet once, at
the end. Rescaling costs no second exponential: of exp(m - m') and exp(z - m') one is always 1, the other exp(-|z - m|).
The running maximum starts at the lowest finite number: -inf would make -inf - -inf out of a masked vocabulary entry.

**Writing narrow over wide.** With 2-byte gradients over fp32 logits, block k is stored over the bytes of block k // 2.
Its own program has loaded that block before, but *another warp* of it may lag: without a barrier between every block's
load and store, warps drift apart and one overwrites logits that a sibling has yet to read (block 0 over itself, but
also block 2 over block 1). Equal widths need none: a block only overwrites itself, and Triton orders that exchange.

**The bound in the same launch.** ``bound_dlogits_`` is what runs between the statistics and the GEMMs of BGPO's loss: a
program finds its row's segment, adds up the segment's log-probabilities and takes the bound's coefficient, then goes on
as ``dlogits_``. Every row of a segment repeats its sum: 4 bytes from L2 per row of it, against 6 V of the row itself.

**Options.** Which of scale, softcap and temperature there are is compiled in; their values are arguments, so annealing
one compiles nothing. They travel as bit patterns of doubles (``bits``), rounded once to the accumulation dtype.
Contraction to fused multiply-adds is off, so that the target's logit has the same bits alone as it has in the sweep.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_math import bits, divide, narrow, number
from ..bound.segments import RowSegments
from ..bound.triton_kernels import SEGMENT_BLOCK, SEGMENT_WARPS, bound_terms, clip_bits, weighted_sum
from .options import LogitTransform
from .reference import alias_as

NUMBERS = ("scale", "softcap", "temperature", "chain", "stats_stride")  # those that hold `bits`, and a row count
CHANGING = (
    "segments",
    "begin",
    "first",
    "samples",
    "highest",
    "floor",
    "ceiling",
    "divisor",
)  # with every chunk or step
# Slices that begin anywhere: whether one happens to be aligned must not compile a second kernel.
PER_ROW = ("targets", "stats", "grad_logprob", "grad_entropy")
PER_SEGMENT = ("offsets", "weights", "advantages", "old", "lengths", "sums")


# Columns per block by bytes of a logit, for 8 warps: 16 elements a thread, four 16-byte loads in fp32.
BLOCKS = {2: 4096, 4: 4096, 8: 2048}
WARPS = SEGMENT_WARPS


def _block(vocab: int, width: int) -> int:
    """Columns per block, fewer for vocabularies below one block."""
    return min(BLOCKS[width], max(32, triton.next_power_of_2(vocab)))


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


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PER_ROW)
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


@triton.jit
def _gradient_row(
    logits, stride, targets, bias, stats, stats_stride, g, h, out, out_stride, scale, softcap, temperature, chain, row,
    V: tl.constexpr, ENTROPY: tl.constexpr, ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's logits become their gradient, for upstream gradients g of its log-probability and h of its entropy."""
    FULL: tl.constexpr = V // BLOCK * BLOCK
    logits += tl.multiple_of(row * stride, ALIGN)
    out += tl.multiple_of(row * out_stride, OUT_ALIGN)
    lane = tl.arange(0, BLOCK)
    entropy = g
    live = g != 0.0
    if ENTROPY:
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


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PER_ROW)
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
    OUT_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(grad_logprob + row)
    h = g
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row)
    _gradient_row(
        logits, stride, targets, bias, stats, stats_stride, g, h, out, out_stride, scale, softcap, temperature, chain,
        row, V, grad_entropy is not None, ALIGN, OUT_ALIGN, BLOCK,
    )  # fmt: skip


@triton.jit
def _segment_of(row, offsets, segments):
    """The last segment that begins at or before a row."""
    low = segments * 0
    high = segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(offsets + middle) <= row
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low


@triton.jit(do_not_specialize=(*NUMBERS, *CHANGING), do_not_specialize_on_alignment=(*PER_ROW, *PER_SEGMENT))
def _bound_gradient_kernel(
    logits,  # [C, V]
    stride,
    targets,  # [C] int64
    bias,  # [V] or None
    stats,  # [4, C]
    stats_stride,
    offsets,  # [segments + 1] int64, counted over all rows
    weights,  # [segments] fp32
    advantages,  # [B]
    old,  # [B * n] or None
    lengths,  # [B] or None
    sums,  # [segments] out
    grad_logprob,  # [C] out
    out,  # [C, V], the storage of logits
    out_stride,
    segments: tl.int64,
    begin: tl.int64,  # the chunk's first row of all rows
    first: tl.int64,  # the chunk's first segment of all segments
    samples: tl.int64,  # n
    highest: tl.int64,  # bits of 1 + clip_high
    floor: tl.int64,  # bits of 1 - clip_low
    ceiling: tl.int64,  # bits of dual_clip
    divisor: tl.int64,  # bits
    scale,  # bits or None, as softcap, temperature and chain
    softcap,
    temperature,
    chain,  # scale / temperature
    V: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT_BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = stats.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    s = _segment_of(begin + row, offsets, segments)
    start = tl.load(offsets + s)
    weight = tl.load(weights + s)
    sequence = (first + s) // samples
    length = tl.full([], 1.0, DTYPE)
    if lengths is not None:
        length = tl.load(lengths + sequence).to(DTYPE)
    d = tl.full([], 0.0, DTYPE)
    opens = begin + row == start
    if old is not None or opens:  # on-policy the sum is for the loss alone
        logprob = stats + 2 * stats_stride
        total = weighted_sum(logprob, start - begin, tl.load(offsets + s + 1) - begin, weight, SEGMENT_BLOCK)
        tl.store(sums + s, total, mask=opens)
        if old is not None:
            d = divide(total - tl.load(old + first + s), length)
    advantage = tl.load(advantages + sequence)
    _, slope = bound_terms(d, advantage, length, number(highest, DTYPE), number(floor, DTYPE), number(ceiling, DTYPE))
    g = divide(slope, -number(divisor, DTYPE)) * weight.to(DTYPE)
    tl.store(grad_logprob + row, g)
    _gradient_row(
        logits, stride, targets, bias, stats, stats_stride, g, g, out, out_stride, scale, softcap, temperature, chain,
        row, V, False, ALIGN, OUT_ALIGN, BLOCK,
    )  # fmt: skip


def _alignment(rows: Tensor) -> int:
    """Elements that every row's place is a multiple of. Triton sees 16 or nothing in a stride; 16 bytes are 2 to 8."""
    return math.gcd(rows.stride(0), 16)


def _launch_options(logits: Tensor) -> dict[str, object]:
    return dict(
        V=logits.shape[1],
        ALIGN=_alignment(logits),
        BLOCK=_block(logits.shape[1], logits.element_size()),
        num_warps=WARPS,
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
            out, out.stride(0), **_numbers(transform), chain=_chain(transform), OUT_ALIGN=_alignment(out),
            **_launch_options(logits),
        )  # fmt: skip
    return out


def bound_dlogits_(
    logits: Tensor,  # [C, V], unit column stride, overwritten
    targets: Tensor,  # [C] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    stats: Tensor,  # [4, C] as row_statistics left it
    segments: RowSegments,  # the chunk's whole segments
    sums: Tensor,  # [segments] out
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradient of the raw logits for the bound's loss, and that of the log-probabilities ``[C]``, in one launch."""
    assert logits.stride(1) == 1 and stats.stride(1) == 1
    out, bound, dtype = alias_as(logits, out_dtype), segments.bound, stats.dtype
    grad = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    if logits.shape[0] == 0:
        return out, grad
    with torch.cuda.device_of(logits):
        _bound_gradient_kernel[(logits.shape[0],)](
            logits, logits.stride(0), targets.contiguous(), _dense(bias), stats, stats.stride(0),
            segments.offsets, segments.weight, _dense(bound.advantages.to(dtype)),
            None if bound.old is None else _dense(bound.old.to(dtype)), _dense(bound.length), sums, grad,
            out, out.stride(0), segments.weight.shape[0], segments.begin, segments.first, bound.shape[1],
            **clip_bits(*bound.clip), divisor=bits(bound.divisor),
            **_numbers(transform), chain=_chain(transform), OUT_ALIGN=_alignment(out), SEGMENT_BLOCK=SEGMENT_BLOCK,
            **_launch_options(logits),
        )  # fmt: skip
    return out, grad
