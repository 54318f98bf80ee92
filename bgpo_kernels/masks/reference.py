"""Mask stream, version 1, in plain torch: the specification that every other backend matches bit for bit.

Philox4x32-10 with key = (seed low 32, seed high 32) and counter = (position, j, sample_id low 32,
(sample_id >> 32 & 0xFFFFFF) | purpose << 24). Position is the rank of a token inside its response, so masks depend on
logical coordinates alone: not on padding, batch shape, micro-batch, rank or device.

Unsigned 32-bit words live in int64 tensors; the only 64-bit product that needs care is the one inside Philox, done
in 16-bit halves. This is written to be read, not to be fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import DrawSpec

M32 = 0xFFFFFFFF
KEYS, COUNTS, PROMPT = 0, 1, 2  # purposes


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of a 32-bit constant with 32-bit words held in int64."""
    a_hi, a_lo = a >> 16, a & 0xFFFF
    b_hi, b_lo = b >> 16, b & 0xFFFF
    low = a_lo * b_lo
    mid = a_hi * b_lo + (low >> 16)
    cross = a_lo * b_hi + (mid & 0xFFFF)
    return a_hi * b_hi + (mid >> 16) + (cross >> 16), ((cross & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011); words are int64 tensors holding 0..2^32-1, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & M32, seed >> 32
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def words(position: Tensor, j: Tensor, sample_id: Tensor, purpose: int, seed: int) -> tuple[Tensor, Tensor]:
    """Words 0 and 1 of the stream at these logical coordinates (broadcast int64 tensors)."""
    position, j, sample_id = torch.broadcast_tensors(position, j, sample_id)
    high = ((sample_id >> 32) & 0xFFFFFF) | (purpose << 24)
    w0, w1, _, _ = philox((position, j, sample_id & M32, high), seed)
    return w0, w1


class Facts(NamedTuple):
    """What a draw must know of its inputs on the host."""

    lengths: list[int]  # response tokens of every sequence
    sample_ids: list[int]
    lowest: int  # of all ids
    highest: int
    largest_response: int  # of the response's ids
    held: bool  # the response holds the mask token
    overlap: bool  # response_mask and prompt_mask share a token


def input_facts(
    input_ids: Tensor,  # [B, T] int64
    response_mask: Tensor,  # [B, T] bool
    prompt_mask: Tensor | None,  # [B, T] bool
    sample_ids: Tensor | None,  # [B] int64; None: 0..B-1
    mask_token_id: int,
) -> Facts:
    """The facts of a batch, by one read from the device."""
    batch = input_ids.shape[0]
    held = (response_mask & (input_ids == mask_token_id)).any()
    overlap = torch.zeros_like(held) if prompt_mask is None else (prompt_mask & response_mask).any()
    largest = torch.where(response_mask, input_ids, 0).amax()
    numbers = torch.stack((*input_ids.aminmax(), largest, held.long(), overlap.long()))
    given = () if sample_ids is None else (sample_ids,)
    lowest, highest, most, any_held, any_overlap, *rest = torch.cat((numbers, response_mask.sum(-1), *given)).tolist()
    ids = rest[batch:] if given else list(range(batch))
    return Facts(rest[:batch], ids, lowest, highest, most, bool(any_held), bool(any_overlap))


class Counts(NamedTuple):
    """How many tokens every segment masks, and the weight of each of them."""

    masked: Tensor  # [B, m] int32
    weight: Tensor  # [B, m] fp32
    offsets: Tensor  # [B*m + 1] int64, running sum of the counts


class Draw(NamedTuple):
    """A draw of B sequences, m samples each, as tensors on one device."""

    noisy_ids: Tensor  # [B, m, T] int64
    rows: Tensor  # [N] int64, flat indices into B*m*T of the masked response tokens, ascending
    targets: Tensor  # [N] int64, the tokens they hide
    masked: Tensor  # as Counts
    weight: Tensor
    offsets: Tensor


def new_draw(input_ids: Tensor, spec: DrawSpec, counts: Counts) -> tuple[Draw, Tensor]:
    """A draw yet to be written, for the engines of a GPU, and the state of their scan over segments."""
    batch, tokens = input_ids.shape
    num_rows, shape, device = int(counts.offsets[-1]), (batch, spec.samples), input_ids.device
    noisy, rows, targets = (
        torch.empty(size, dtype=torch.int64, device=device) for size in ((*shape, tokens), (num_rows,), (num_rows,))
    )
    count = torch.empty(shape, dtype=torch.int32, device=device)
    weight = torch.empty(shape, dtype=torch.float32, device=device)
    offsets, state = (torch.empty(batch * spec.samples + 1, dtype=torch.int64, device=device) for _ in range(2))
    if not count.numel():  # no kernel runs
        offsets.zero_()
    return Draw(noisy, rows, targets, count, weight, offsets), state


def _drawn(lengths: Tensor, sample_ids: Tensor, spec: DrawSpec) -> Tensor:
    """Masked tokens [B, m] of every scheme but Bernoulli."""
    j = torch.arange(spec.lo, spec.hi, device=lengths.device)
    length = lengths[:, None]
    if spec.scheme == "full":
        return length.expand(-1, spec.samples)
    if spec.scheme == "coupled":
        pair = j // 2
        r = _count_words(2 * pair, sample_ids, spec.seed)
        if spec.schedule == "uniform":
            l_pair = (r * (length + 1)) >> 32
        else:
            l_pair = (((pair << 32) + r) * (length + 1)) // ((spec.n_mc // 2) << 32)
        return torch.where(j % 2 == 1, length - l_pair, l_pair)
    r = _count_words(j, sample_ids, spec.seed)
    if spec.schedule == "uniform":
        return 1 + ((r * length) >> 32)
    u = (j << 32) + r
    if spec.schedule == "stratified":
        return 1 + (u * length) // (spec.n_mc << 32)
    assert spec.tables is not None
    count = torch.empty_like(u)
    for b, size in enumerate(lengths.tolist()):
        start = int(spec.tables.start[b])
        count[b] = 1 + torch.searchsorted(spec.tables.thresholds[start : start + size], u[b], right=True)
    return count


def _count_words(j: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
    """r_j [B, m], the word that decides a count."""
    return words(torch.zeros_like(j)[None], j[None], sample_ids[:, None], COUNTS, seed)[0]


def _weights(count: Tensor, lengths: Tensor, spec: DrawSpec) -> Tensor:
    """Token weights [B, m] of every scheme but Bernoulli, divided in fp64 and rounded once."""
    length = lengths[:, None].double()
    if spec.scheme == "full":
        return torch.ones(count.shape, device=count.device)
    if spec.scheme == "coupled":
        return torch.where(count > 0, (length + 1.0) / count.double(), 0.0).float()
    if spec.schedule == "table":
        assert spec.tables is not None
        return spec.tables.weights[spec.tables.start[:, None] + count - 1]
    return (length / count.double()).float()


def _bernoulli(lengths: Tensor, sample_ids: Tensor, spec: DrawSpec) -> tuple[Tensor, Tensor]:
    """Counts and weights [B, m]: how many of a response's words 0 are below q, and 1/t = 2^32 / q."""
    j = torch.arange(spec.lo, spec.hi, device=lengths.device)
    r = _count_words(j, sample_ids, spec.seed)
    q = r + 1 if spec.schedule == "uniform" else torch.clamp(((j << 32) + r + 1) // spec.n_mc, min=1)
    count = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        position = torch.arange(length, device=lengths.device)
        w0, _ = words(position[None], j[:, None], sample_ids[b], KEYS, spec.seed)
        count[b] = (w0 < q[b, :, None]).sum(-1)
    return count, (2.0**32 / q.double()).float()


def draw_counts(
    lengths: Tensor,  # [B] int64, on the host
    sample_ids: Tensor,  # [B] int64, on the host
    spec: DrawSpec,
) -> Counts:
    """The law over counts: a function of lengths, ids and seed alone, so the host needs nothing of the device."""
    if spec.scheme == "bernoulli":
        count, weight = _bernoulli(lengths, sample_ids, spec)
    else:
        count = _drawn(lengths, sample_ids, spec)
        weight = _weights(count, lengths, spec)
    offsets = torch.cat((count.new_zeros(1), count.flatten().cumsum(0)))
    return Counts(count.to(torch.int32), weight, offsets)


def _smallest(key_hi: Tensor, key_lo: Tensor, count: Tensor) -> Tensor:
    """Boolean [m, L]: the ``count`` smallest by (64-bit key, position). Two stable sorts order unsigned 64-bit keys."""
    by_low = torch.sort(key_lo, dim=-1, stable=True).indices
    by_high = torch.sort(key_hi.gather(-1, by_low), dim=-1, stable=True).indices
    order = by_low.gather(-1, by_high)
    ranked = torch.arange(key_hi.shape[-1], device=key_hi.device)[None] < count[:, None]
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


def _masked(length: int, sample_id: Tensor, count: Tensor, spec: DrawSpec) -> Tensor:
    """Which positions of one response are masked [m, L], by samples that mask ``count`` [m] tokens."""
    j = torch.arange(spec.lo, spec.hi, device=count.device)
    position = torch.arange(length, device=count.device)
    # Sample 2i+1 of a coupled pair is the complement under the keys of sample 2i.
    complement = (j % 2 == 1) & spec.coupled
    w0, w1 = words(position[None], (j - complement.long())[:, None], sample_id, KEYS, spec.seed)
    return _smallest(w0, w1, torch.where(complement, length - count, count)) != complement[:, None]


def draw(
    input_ids: Tensor,  # [B, T] int64
    response_mask: Tensor,  # [B, T] bool
    prompt_mask: Tensor | None,  # [B, T] bool
    sample_ids: Tensor,  # [B] int64
    spec: DrawSpec,
    counts: Counts,  # as drawn on the host
) -> Draw:
    """The whole draw, on the device of ``input_ids``."""
    batch, tokens = input_ids.shape
    device = input_ids.device
    counts = Counts(*(t.to(device, copy=True) for t in counts))
    masked = torch.zeros(batch, spec.samples, tokens, dtype=torch.bool, device=device)
    for b in range(batch):
        where = response_mask[b].nonzero().flatten()
        masked[b][:, where] = _masked(len(where), sample_ids[b], counts.masked[b].long(), spec)
    clean = input_ids[:, None].expand(-1, spec.samples, -1)
    rows = masked.flatten().nonzero().flatten()
    noisy = torch.where(masked, spec.mask_token_id, clean)
    if prompt_mask is not None and spec.prompt_threshold:
        j = torch.arange(spec.lo, spec.hi, device=device)[None, :, None]
        index = torch.arange(tokens, device=device)[None, None, :]
        w0, _ = words(index, j, sample_ids[:, None, None], PROMPT, spec.seed)
        noisy = torch.where(prompt_mask[:, None] & (w0 < spec.prompt_threshold), spec.mask_token_id, noisy)
    return Draw(noisy, rows, clean.reshape(-1)[rows], *counts)
