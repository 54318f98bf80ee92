"""Mask stream, version 1, in plain torch: the specification that every other backend matches bit for bit.

Philox4x32-10 with key = (seed low 32, seed high 32) and counter = (position, j, sample_id low 32,
(sample_id >> 32 & 0xFFFFFF) | purpose << 24). Position is the rank of a token inside its response, so masks depend on
logical coordinates alone: not on padding, batch shape, micro-batch, rank or device.

Unsigned 32-bit words live in int64 tensors; the only 64-bit product that needs care is the one inside Philox, done
in 16-bit halves. This is written to be read, not to be fast.
"""

from __future__ import annotations

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


def _counts(lengths: Tensor, sample_ids: Tensor, spec: DrawSpec) -> tuple[Tensor, Tensor]:
    """Mask counts l [B, m] (for coupled: the pair's l) and r_j, the count word of each sample."""
    j = torch.arange(spec.lo, spec.hi, device=lengths.device)
    zero = torch.zeros_like(j)
    r = words(zero[None], j[None], sample_ids[:, None], COUNTS, spec.seed)[0]
    length = lengths[:, None]
    if spec.scheme == "coupled":
        pair = j // 2
        r = words(zero[None], (2 * pair)[None], sample_ids[:, None], COUNTS, spec.seed)[0]
        if spec.schedule == "uniform":
            return (r * (length + 1)) >> 32, r
        return (((pair << 32) + r) * (length + 1)) // ((spec.n_mc // 2) << 32), r
    if spec.schedule == "uniform":
        return 1 + ((r * length) >> 32), r
    u = (j << 32) + r
    if spec.schedule == "stratified":
        return 1 + (u * length) // (spec.n_mc << 32), r
    assert spec.thresholds is not None and spec.table_start is not None
    count = torch.empty_like(u)
    for b, size in enumerate(lengths.tolist()):
        start = int(spec.table_start[b])
        count[b] = 1 + torch.searchsorted(spec.thresholds[start : start + size], u[b], right=True)
    return count, r


def _select_smallest(key_hi: Tensor, key_lo: Tensor, count: Tensor) -> Tensor:
    """Boolean [m, L]: the ``count`` smallest by (64-bit key, position). Two stable sorts order unsigned 64-bit keys."""
    by_low = torch.sort(key_lo, dim=-1, stable=True).indices
    by_high = torch.sort(key_hi.gather(-1, by_low), dim=-1, stable=True).indices
    order = by_low.gather(-1, by_high)
    ranked = torch.arange(key_hi.shape[-1], device=key_hi.device)[None] < count[:, None]
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


def _masks_of_response(
    length: int, sample_id: Tensor, drawn: Tensor, r: Tensor, table_weights: Tensor | None, spec: DrawSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked positions [m, L], counts [m] and fp32 token weights [m] of one sequence; drawn, r [m] from _counts."""
    device = sample_id.device
    j = torch.arange(spec.lo, spec.hi, device=device)
    position = torch.arange(length, device=device)
    if spec.scheme == "full":
        masked = torch.ones(len(j), length, dtype=torch.bool, device=device)
        return masked, masked.sum(-1), torch.ones(len(j), device=device)
    # Sample 2i+1 of a coupled pair is the complement under the keys of sample 2i.
    key_sample = 2 * (j // 2) if spec.scheme == "coupled" else j
    w0, w1 = words(position[None], key_sample[:, None], sample_id, KEYS, spec.seed)
    if spec.scheme == "bernoulli":
        q = r + 1 if spec.schedule == "uniform" else torch.clamp(((j << 32) + r + 1) // spec.n_mc, min=1)
        masked = w0 < q[:, None]
        return masked, masked.sum(-1), (2.0**32 / q.double()).float()
    masked = _select_smallest(w0, w1, drawn)
    if spec.scheme == "coupled":
        masked = torch.where((j % 2).bool()[:, None], ~masked, masked)
        count = masked.sum(-1)
        return masked, count, torch.where(count > 0, (length + 1.0) / count.double(), 0.0).float()
    if table_weights is not None:
        return masked, drawn, table_weights[drawn - 1]
    return masked, drawn, (float(length) / drawn.double()).float()


def select(
    input_ids: Tensor,  # [B, T] int64
    response_mask: Tensor,  # [B, T] bool
    prompt_mask: Tensor | None,  # [B, T] bool
    sample_ids: Tensor,  # [B] int64
    spec: DrawSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy ids ``[B, m, T]``, masked counts ``[B, m] int32`` and token weights ``[B, m] fp32``."""
    batch, tokens = input_ids.shape
    noisy = input_ids[:, None, :].repeat(1, spec.samples, 1)
    count = torch.zeros(batch, spec.samples, dtype=torch.int32, device=input_ids.device)
    weight = torch.zeros(batch, spec.samples, dtype=torch.float32, device=input_ids.device)
    drawn, r = _counts(response_mask.sum(-1), sample_ids, spec)
    for b in range(batch):
        where = response_mask[b].nonzero().flatten()
        table = None
        if spec.schedule == "table":
            assert spec.table_weights is not None and spec.table_start is not None
            table = spec.table_weights[int(spec.table_start[b]) :].to(input_ids.device)
        masked, count[b], weight[b] = _masks_of_response(len(where), sample_ids[b], drawn[b], r[b], table, spec)
        noisy[b][:, where] = torch.where(masked, spec.mask_token_id, input_ids[b, where][None])
    if prompt_mask is not None and spec.prompt_threshold:
        j = torch.arange(spec.lo, spec.hi, device=input_ids.device)[None, :, None]
        index = torch.arange(tokens, device=input_ids.device)[None, None, :]
        w0, _ = words(index, j, sample_ids[:, None, None], PROMPT, spec.seed)
        noisy = torch.where(prompt_mask[:, None] & (w0 < spec.prompt_threshold), spec.mask_token_id, noisy)
    return noisy, count, weight


def emit_rows(
    noisy_ids: Tensor,  # [B, m, T]
    input_ids: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    segment_offsets: Tensor,  # [B*m + 1]
    mask_token_id: int,
    num_rows: int,
) -> tuple[Tensor, Tensor]:
    """Flat indices into B*m*T of the masked response tokens, ascending, and the tokens they hide."""
    masked = (noisy_ids == mask_token_id) & response_mask[:, None]
    rows = masked.flatten().nonzero().flatten()
    targets = input_ids[:, None].expand_as(noisy_ids).reshape(-1)[rows]
    assert len(rows) == num_rows
    return rows, targets
