"""Mask stream, version 1, in Triton: one integer kernel, one launch, bit-equal to ``reference``.

One program per sample. Only the count knows of schemes and schedules; given it, **every mask is one comparison**: a
token is masked iff ``(key, position) < (bound, end)`` in lexicographic order, key being its 64-bit selection word (for
the second sample of a coupled pair: iff not). ``bound`` is a value that exactly l keys do not exceed, and position
decides only among equal keys.

**Keys are recomputed, never stored.** Keys are uniform, so interpolating for the bound and stopping as soon as the
count is exactly l takes about 3.5 passes at L = 64 and 5.5 at L = 32768 (simulated; bisecting all bits takes 64). So
few make recomputation, at some 60 integer instructions a key, the simple choice: one code path serves every L without
shared memory, where holding 64-bit keys would fill a whole register file (256 KiB) at L = 32768. Every fourth pass
halves the interval, so the search ends even where keys tie; a tie at the bound is then filled in position order, and
exactly l tokens are always masked. Then the program walks its row left to right once more, so that rows come out
ascending.

**Where a sample's rows go** is the sum of the counts before it, by a single-pass scan (Merrill and Garland 2016): a
program publishes its count before it selects, and afterwards adds up its predecessors' back to one that has published
the sum up to itself. Programs number themselves by a ticket, so whoever waits waits only for programs that run already
and publish before they wait for anyone.

Bytes per token and sample: 10 read (11 with a prompt mask), of which n samples share all from cache, and 8 written; 16
per masked row; 32 per sample. Everything is integer arithmetic except the weights, formed in fp64 and rounded once to
fp32. Nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_philox import COUNTS, KEYS, PROMPT, seed_words, stream_words
from .reference import Counts, Draw, input_facts, new_draw
from .schedule import DrawSpec

__all__ = ["draw", "input_facts"]

MAX_BLOCK = 512  # tokens per program and pass: 4 keys in flight per thread of 4 warps
MAX_REGISTERS = 96  # five programs on a multiprocessor; left to itself ptxas aims at 64 in one variant, and spills
LOOK_BACK = tl.constexpr(32)  # predecessors looked at together
COUNT, SUM = tl.constexpr(1), tl.constexpr(2)  # low bits of a scan word: what the number above them is; 0: unknown yet


@triton.jit
def _selection_key(position, sample, sample_id, seed_low, seed_high):
    w0, w1 = stream_words(position, sample, sample_id, seed_low, seed_high, KEYS)
    return (w0.to(tl.uint64) << 32) | w1.to(tl.uint64)


@triton.jit
def _largest_key():
    return tl.full([], -1, tl.int64).to(tl.uint64, bitcast=True)  # older interpreters cannot invert a uint64


@triton.jit
def _count_not_above(key_bound, length, sample, sample_id, seed_low, seed_high, BLOCK: tl.constexpr):
    """Number of the response's keys that are <= key_bound."""
    found = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < length:
        position = start + tl.arange(0, BLOCK)
        key = _selection_key(position, sample, sample_id, seed_low, seed_high)
        found += ((key <= key_bound) & (position < length)).to(tl.int32)
        start += BLOCK
    return tl.sum(found, 0).to(tl.int64)


@triton.jit
def _end_of_ties(tied_key, wanted, length, sample, sample_id, seed_low, seed_high, BLOCK: tl.constexpr):
    """1 + the position of the ``wanted``-th key (in position order) that equals tied_key; 0 if none is wanted."""
    end = length * 0
    before = length * 0
    start = 0
    while start < length:
        position = start + tl.arange(0, BLOCK)
        key = _selection_key(position, sample, sample_id, seed_low, seed_high)
        tied = ((key == tied_key) & (position < length)).to(tl.int32)
        rank = before + tl.cumsum(tied, 0)
        end = tl.maximum(end, tl.max(tl.where((tied == 1) & (rank == wanted), position + 1, 0), 0))
        before += tl.sum(tied, 0)
        start += BLOCK
    return end


@triton.jit
def _boundary_of(wanted, length, sample, sample_id, seed_low, seed_high, BLOCK: tl.constexpr):
    """The pair (key, position) below which exactly ``wanted`` of the response's (key, position) lie.

    The wanted-th smallest key is in [low, high]; ``below`` keys are < low and ``reached`` are <= high. 2k+1 parts of
    2m+2 aim at the middle of the gap after the k-th of m uniform keys.
    """
    low = tl.full([], 0, tl.uint64)
    high = _largest_key()
    bound = high
    below = wanted * 0
    reached = length
    count = length
    step = 0
    while (count != wanted) & (low < high):
        width = high - low
        part = width // (2 * (reached - below) + 2).to(tl.uint64)
        jump = part * (2 * (wanted - below) + 1).to(tl.uint64)
        bound = low + tl.where(step % 4 == 3, width // 2, jump)
        count = _count_not_above(bound, length, sample, sample_id, seed_low, seed_high, BLOCK)
        over = count > wanted
        high = tl.where(over, bound, high)
        reached = tl.where(over, count, reached)
        low = tl.where(over, low, bound + 1)
        below = tl.where(over, below, count)
        step += 1
    end = length
    if count != wanted:  # low == high: the boundary runs through equal keys
        bound = low
        end = _end_of_ties(low, wanted - below, length, sample, sample_id, seed_low, seed_high, BLOCK)
    return bound, end


@triton.jit
def _table_count(thresholds, word, length, BLOCK: tl.constexpr):
    """1 + the number of this length's thresholds that do not exceed the stratified word."""
    found = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < length:
        entry = start + tl.arange(0, BLOCK)
        threshold = tl.load(thresholds + entry, mask=entry < length, other=0)
        found += ((threshold <= word) & (entry < length)).to(tl.int32)
        start += BLOCK
    return 1 + tl.sum(found, 0).to(tl.int64)


@triton.jit
def _drawn_count(j, r, length, n_mc, thresholds, SCHEME: tl.constexpr, SCHEDULE: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens that sample j masks; coupled: that the even sample of j's pair masks.

    With u = (j << 32) + r, floor(u L / (n << 32)) = floor((j L + floor(r L / 2^32)) / n): no product reaches 2^63.
    """
    if SCHEME == "coupled":
        scaled = (r * (length + 1)) >> 32
        drawn = scaled if SCHEDULE == "uniform" else (j // 2 * (length + 1) + scaled) // (n_mc // 2)
    elif SCHEDULE == "uniform":
        drawn = 1 + ((r * length) >> 32)
    elif SCHEDULE == "stratified":
        drawn = 1 + (j * length + ((r * length) >> 32)) // n_mc
    else:
        drawn = _table_count(thresholds, (j << 32) + r, length, BLOCK)
    return drawn


@triton.jit
def _token_weight(count, length, table_weights, SCHEME: tl.constexpr, SCHEDULE: tl.constexpr):
    """Weight of each masked token, rounded once from fp64; the empty side of a coupled pair weighs 0."""
    size = length.to(tl.float64)
    if SCHEME == "coupled":
        weight = tl.where(count > 0, (size + 1.0) / tl.maximum(count, 1).to(tl.float64), 0.0)
    elif SCHEDULE == "table":
        weight = tl.load(table_weights + count - 1)
    else:
        weight = size / count.to(tl.float64)
    return weight.to(tl.float32)


@triton.jit
def _response_length(response_mask, tokens, BLOCK: tl.constexpr):
    """Number of response tokens of one row."""
    found = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < tokens:
        column = start + tl.arange(0, BLOCK)
        found += tl.load(response_mask + column, mask=column < tokens, other=0).to(tl.int32)
        start += BLOCK
    return tl.sum(found, 0).to(tl.int64)


@triton.jit
def _count_and_weight(
    j, sample_id, length, n_mc, seed_low, seed_high, thresholds, table_weights,
    SCHEME: tl.constexpr, SCHEDULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Masked tokens of sample j, the weight of each, and, for Bernoulli, the largest key that is masked."""
    # Both samples of a coupled pair share the count word of the even one.
    word, _ = stream_words(
        j * 0, j - j % 2 if SCHEME == "coupled" else j, sample_id, seed_low, seed_high, COUNTS
    )  # fmt: skip
    r = word.to(tl.int64)
    bound = _largest_key()
    if SCHEME == "full":
        count = length
        weight = 1.0
    elif SCHEME == "bernoulli":
        q = r + 1 if SCHEDULE == "uniform" else tl.maximum(((j << 32) + r + 1) // n_mc, 1)
        # w0 < q  <=>  key <= (q << 32) - 1, and q = 2^32 wraps to the largest key
        bound = (q.to(tl.uint64) << 32) - 1
        count = _count_not_above(bound, length, j, sample_id, seed_low, seed_high, BLOCK)
        weight = (4294967296.0 / q.to(tl.float64)).to(tl.float32)
    else:
        count = _drawn_count(j, r, length, n_mc, thresholds, SCHEME, SCHEDULE, BLOCK)
        if SCHEME == "coupled":
            count = tl.where(j % 2 == 1, length - count, count)
        weight = _token_weight(count, length, table_weights, SCHEME, SCHEDULE)
    return count, weight, bound


@triton.jit
def _sum_before(state, segment):
    """Sum of the counts of all segments before this one; word 1 + s of ``state`` is segment s's."""
    before = segment * 0
    word_of = segment  # the nearest predecessor's
    lane = tl.arange(0, LOOK_BACK)
    while word_of > 0:
        at = word_of - lane
        word = tl.load(state + at, mask=at > 0, other=SUM, volatile=True)  # before the first segment: 0
        while tl.min(word & 3, 0) == 0:
            word = tl.load(state + at, mask=at > 0, other=SUM, volatile=True)
        nearest = tl.min(tl.where((word & 3) == SUM, lane, LOOK_BACK), 0)
        before += tl.sum(tl.where(lane <= nearest, word >> 2, 0), 0)
        word_of = tl.where(nearest < LOOK_BACK, 0, word_of - LOOK_BACK)
    return before


@triton.jit(
    do_not_specialize=("seed_low", "seed_high", "first_sample", "samples", "n_mc", "mask_token_id", "prompt_threshold"),
    do_not_specialize_on_alignment=("sample_ids", "table_start"),
)
def _draw_kernel(
    input_ids,  # [B, T] int64
    response_mask,  # [B, T] bool
    prompt_mask,  # [B, T] bool or None
    sample_ids,  # [B] int64
    thresholds,  # [K] int64 or None
    table_weights,  # [K] fp32 or None
    table_start,  # [B] int64 or None
    noisy_ids,  # [B, m, T] int64 out
    rows,  # [N] int64 out
    targets,  # [N] int64 out
    counts,  # [B, m] int32 out
    weights,  # [B, m] fp32 out
    offsets,  # [B*m + 1] int64 out
    state,  # [1 + B*m] int64, zeros: the ticket and the scan's words
    tokens,
    mask_token_id,
    prompt_threshold: tl.int64,
    seed_low,
    seed_high,
    first_sample,
    samples,
    n_mc,
    SCHEME: tl.constexpr,
    SCHEDULE: tl.constexpr,
    PROMPT_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.atomic_add(state, 1).to(tl.int64)
    row = segment // samples
    j = first_sample + segment % samples
    sample_id = tl.load(sample_ids + row)
    input_ids += row * tokens
    response_mask += row * tokens
    noisy_ids += segment * tokens
    length = _response_length(response_mask, tokens, BLOCK)
    if SCHEDULE == "table":
        table = tl.load(table_start + row)
        thresholds += table
        table_weights += table
    count, weight, bound = _count_and_weight(
        j, sample_id, length, n_mc, seed_low, seed_high, thresholds, table_weights, SCHEME, SCHEDULE, BLOCK
    )
    tl.atomic_xchg(state + 1 + segment, count << 2 | COUNT)
    tl.store(counts + segment, count.to(tl.int32))
    tl.store(weights + segment, weight)

    key_sample = j
    end = length  # among equal keys, masked before this position
    if SCHEME == "exact" or SCHEME == "coupled":
        wanted = count
        if SCHEME == "coupled":  # the second sample of a pair masks what the first one leaves
            key_sample = j - j % 2
            wanted = tl.where(j % 2 == 1, length - count, count)
        bound, end = _boundary_of(wanted, length, key_sample, sample_id, seed_low, seed_high, BLOCK)

    place = _sum_before(state, segment)
    tl.atomic_xchg(state + 1 + segment, (place + count) << 2 | SUM)
    tl.store(offsets + segment + 1, place + count)
    tl.store(offsets, segment * 0, mask=segment == 0)

    position = length * 0 - 1
    start = 0
    while start < tokens:
        column = start + tl.arange(0, BLOCK)
        inside = column < tokens
        ids = tl.load(input_ids + column, mask=inside)
        response = tl.load(response_mask + column, mask=inside, other=0).to(tl.int32)
        positions = position + tl.cumsum(response, 0)
        masked = response == 1
        if SCHEME != "full":
            key = _selection_key(positions, key_sample, sample_id, seed_low, seed_high)
            chosen = (key < bound) | ((key == bound) & (positions < end))
            if SCHEME == "coupled":
                chosen = chosen != (j % 2 == 1)
            masked = masked & chosen
        slot = place + tl.cumsum(masked.to(tl.int32), 0) - 1
        tl.store(rows + slot, segment * tokens + column, mask=masked)
        tl.store(targets + slot, ids, mask=masked)
        place += tl.sum(masked.to(tl.int32), 0)
        position += tl.sum(response, 0)
        if PROMPT_NOISE:
            word, _ = stream_words(column, j, sample_id, seed_low, seed_high, PROMPT)
            prompt = tl.load(prompt_mask + row * tokens + column, mask=inside, other=0) != 0
            masked = masked | (prompt & (word.to(tl.int64) < prompt_threshold))
        tl.store(noisy_ids + column, tl.where(masked, mask_token_id, ids), mask=inside)
        start += BLOCK


def _tile(tokens: int) -> tuple[int, int]:
    """Block and warps for rows of T tokens: a power of two, at least one warp wide, 4 tokens per thread at most.

    Eight would keep more keys in flight, but 64-bit keys then leave no registers: Triton 3.6 spills.
    """
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(tokens)))
    return block, max(1, block // 128)


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous from a multiple of 16 bytes on, as fresh tensors are: where a slice lies must not compile a kernel."""
    return rows.clone() if rows.is_contiguous() and rows.data_ptr() % 16 else rows.contiguous()


def draw(
    input_ids: Tensor,  # [B, T] int64
    response_mask: Tensor,  # [B, T] bool
    prompt_mask: Tensor | None,  # [B, T] bool
    sample_ids: Tensor,  # [B] int64
    spec: DrawSpec,
    counts: Counts,  # on the host: the number of rows
) -> Draw:
    """The whole draw in one launch (after one that clears the scan's state)."""
    tokens = input_ids.shape[1]
    result, state = new_draw(input_ids, spec, counts)
    prompt_noise = prompt_mask is not None and spec.prompt_threshold > 0
    block, warps = _tile(tokens)
    with torch.cuda.device_of(input_ids):
        _draw_kernel[(result.masked.numel(),)](
            _aligned(input_ids), _aligned(response_mask), _aligned(prompt_mask) if prompt_noise else None,
            sample_ids.contiguous(), *(spec.device_tables or (None, None, None)), *result, state.zero_(),
            tokens, spec.mask_token_id, spec.prompt_threshold, *seed_words(spec.seed), spec.lo, spec.samples, spec.n_mc,
            SCHEME=spec.scheme, SCHEDULE=spec.schedule, PROMPT_NOISE=prompt_noise,
            BLOCK=block, num_warps=warps, maxnreg=MAX_REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip
    return result
