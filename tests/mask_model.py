"""Mask stream, version 1, a second time: from its specification, with Python integers and fractions alone.

Slow and independent of the package on purpose: no torch arithmetic, no sharing of code. `sample` says which response
tokens one Monte Carlo sample masks; `make_batch`, `make_spec` and `draw_with` are what mask tests have in common.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.masks import reference
from bgpo_kernels.masks.reference import Draw
from bgpo_kernels.masks.schedule import DrawSpec, count_tables

M32 = 2**32 - 1
KEYS, COUNTS, PROMPT = 0, 1, 2
MASK_ID = 1000  # `make_batch` draws its ids below

# (counter, key) -> words: Random123's known-answer tests; the last one's word 3 is the 10,000th output of C++26's
# std::philox4x32, whose counter is then (2499, 0, 0, 0).
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    ((2499, 0, 0, 0), 20111115, (None, None, None, 1955073260)),
]


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al. 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & M32, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & M32, a >> 32 ^ c3 ^ k1, a & M32
        k0, k1 = k0 + 0x9E3779B9 & M32, k1 + 0xBB67AE85 & M32
    return c0, c1, c2, c3


def words(position: int, j: int, sample_id: int, purpose: int, seed: int) -> tuple[int, int]:
    """Words 0 and 1 at logical coordinates; the sample id counts modulo 2^56."""
    counter = (position, j, sample_id & M32, (sample_id >> 32 & 0xFFFFFF) | purpose << 24)
    return philox(counter, seed)[:2]


def fp32(value: Fraction | float) -> float:
    """Rounded to fp64, then to fp32: what a weight formed in fp64 and stored in fp32 holds."""
    return struct.unpack("f", struct.pack("f", float(value)))[0]


def harmonic(length: int) -> list[Fraction]:
    """q(l) = 1 / (l H_L)."""
    total = sum(Fraction(1, count) for count in range(1, length + 1))
    return [1 / (count * total) for count in range(1, length + 1)]


def falling(length: int) -> list[Fraction]:
    """A law unlike the built-in ones, q(l) ~ L + 1 - l."""
    return [Fraction(2 * (length + 1 - count), length * (length + 1)) for count in range(1, length + 1)]


FALLING = bk.CountSchedule(lambda length: [float(q) for q in falling(length)], name="falling")
# Every law of the contract: (scheme, schedule of random_mask, exact law of the table laws).
LAWS = {
    "exact-uniform": ("exact", "uniform", None),
    "exact-stratified": ("exact", "stratified", None),
    "exact-harmonic": ("exact", "harmonic", harmonic),
    "exact-custom": ("exact", FALLING, falling),
    "bernoulli-uniform": ("bernoulli", "uniform", None),
    "bernoulli-stratified": ("bernoulli", "stratified", None),
    "coupled-uniform": ("coupled", "uniform", None),
    "coupled-stratified": ("coupled", "stratified", None),
    "full": ("full", "stratified", None),
}


class Sample(NamedTuple):
    masked: list[bool]  # by position within the response
    weight: float

    @property
    def bits(self) -> int:
        """Bit p tells whether position p is masked."""
        return sum(1 << p for p, masked in enumerate(self.masked) if masked)


def count_of(law: str, length: int, j: int, n: int, sample_id: int, seed: int) -> int:
    """l of sample j: how many of the smallest keys are chosen (coupled: by the even sample of the pair)."""
    scheme, schedule, exact_law = LAWS[law]
    if scheme == "coupled":
        r = words(0, j - j % 2, sample_id, COUNTS, seed)[0]
        if schedule == "uniform":
            return r * (length + 1) >> 32
        return ((j // 2 << 32) + r) * (length + 1) // (n // 2 << 32)
    r = words(0, j, sample_id, COUNTS, seed)[0]
    if schedule == "uniform":
        return 1 + (r * length >> 32)
    if schedule == "stratified":
        return 1 + ((j << 32) + r) * length // (n << 32)
    assert exact_law is not None
    point, cumulative = Fraction((j << 32) + r, n << 32), Fraction(0)
    for count, q in enumerate(exact_law(length), 1):
        cumulative += q
        if cumulative > point:
            return count
    raise AssertionError("the law does not sum to 1")


def sample(law: str, length: int, j: int, n: int, sample_id: int, seed: int) -> Sample:
    """What sample j of n of a response of `length` tokens masks, and the weight of each masked token."""
    scheme, schedule, exact_law = LAWS[law]
    if scheme == "full":
        return Sample([True] * length, 1.0)
    key_sample = j - j % 2 if scheme == "coupled" else j
    keys = [words(p, key_sample, sample_id, KEYS, seed) for p in range(length)]
    if scheme == "bernoulli":
        r = words(0, j, sample_id, COUNTS, seed)[0]
        q = r + 1 if schedule == "uniform" else max(1, ((j << 32) + r + 1) // n)
        return Sample([w0 < q for w0, _ in keys], fp32(Fraction(2**32, q)))
    count = count_of(law, length, j, n, sample_id, seed)
    chosen = set(sorted(range(length), key=lambda p: (keys[p], p))[:count])
    if scheme == "coupled":
        masked = [(p in chosen) != bool(j % 2) for p in range(length)]
        return Sample(masked, fp32(Fraction(length + 1, sum(masked))) if any(masked) else 0.0)
    if exact_law is None:
        return Sample([p in chosen for p in range(length)], fp32(Fraction(length, count)))
    return Sample([p in chosen for p in range(length)], fp32(1 / (count * exact_law(length)[count - 1])))


def make_batch(lengths: list[int], tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]` below MASK_ID, and response masks `[B, T]` with holes whose rows have the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, MASK_ID, (len(lengths), tokens), generator=generator)
    response_mask = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for b, length in enumerate(lengths):
        response_mask[b, torch.randperm(tokens, generator=generator)[:length]] = True
    return input_ids, response_mask


def draw(law: str, input_ids: Tensor, response_mask: Tensor, **options: object) -> bk.MaskDraw:
    """`random_mask` under one of LAWS, with seed 7 unless told."""
    scheme, schedule, _ = LAWS[law]
    options = {"mask_token_id": MASK_ID, "seed": 7, **options}
    return bk.random_mask(input_ids, response_mask, scheme=scheme, schedule=schedule, **options)  # type: ignore[arg-type]


def bits_of(drawn: bk.MaskDraw, response_mask: Tensor) -> list[list[int]]:
    """`Sample.bits` of every sequence and sample of a draw."""
    found = []
    for b, where in enumerate(response_mask):
        masked = (drawn.noisy_ids[b][:, where] == MASK_ID).tolist()
        found.append([sum(1 << p for p, bit in enumerate(row) if bit) for row in masked])
    return found


def draw_with(
    engine: Any,
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor,
    spec: DrawSpec,
) -> Draw:
    """A draw by one backend's module, without the checks of `random_mask`; counts by its own law where it has one."""
    law = getattr(engine, "draw_counts", reference.draw_counts)
    counts = law(response_mask.sum(-1).cpu(), sample_ids.cpu(), spec)
    return engine.draw(input_ids, response_mask, prompt_mask, sample_ids, spec, counts)


def make_spec(
    scheme: str,
    schedule: str | bk.CountSchedule,
    n_mc: int,
    lengths: list[int] | None = None,
    mc_range: tuple[int, int] | None = None,
    seed: int = 17,
    prompt_threshold: int = 0,
) -> DrawSpec:
    """What `draw_with` takes; a CountSchedule needs the response lengths."""
    lo, hi = mc_range or (0, n_mc)
    tables = None
    if isinstance(schedule, bk.CountSchedule):
        tables, schedule = count_tables(schedule, lengths or [], n_mc), "table"
    return DrawSpec(scheme, schedule, n_mc, lo, hi, seed, MASK_ID, prompt_threshold, tables, tables)


def assert_same_draw(got: bk.MaskDraw, want: bk.MaskDraw, what: str = "") -> None:
    """Equality of every tensor, bit for bit."""
    for name in ("noisy_ids", "rows", "targets", "segment_offsets", "segment_weight", "count"):
        g, w = getattr(got, name).cpu(), getattr(want, name).cpu()
        assert g.dtype == w.dtype and torch.equal(g, w), f"{name} differs {what}"
    assert got.host_offsets == want.host_offsets and got.max_target == want.max_target
