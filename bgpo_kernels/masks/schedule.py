"""How many tokens a Monte Carlo sample masks: laws over the mask count l, and the plain data a backend needs.

A count law q(l) > 0 on l = 1..L gives every masked token the weight ``(L/l) * (1/L) / q(l) = 1 / (l q(l))``, which
keeps the ELBO estimate unbiased: ``E[w * sum_M log p] = sum_l q(l) * 1/(l q(l)) * l * mean_l`` does not depend on q.
The uniform law has weight L/l; the harmonic law ``q(l) = 1/(l H_L)`` has the same weight H_L for every token.

Draws of a law given by a table use integers only (mask stream, version 1): with the stratified word
``u_j = (j << 32) + r_j`` of sample j, l is the smallest count whose cumulative probability exceeds ``u_j / (n << 32)``,
that is ``1 + #{k : ceil(cum_k * (n << 32)) <= u_j}``. The thresholds are made once, on the host, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SCHEMES = ("exact", "bernoulli", "coupled", "full")
SCHEDULES = ("uniform", "stratified", "harmonic")
SCHEDULE_CODES = ("uniform", "stratified", "table")  # what backends are told, in the order of stream.h


@dataclass(frozen=True)
class CountSchedule:
    """Any law over mask counts, for ``random_mask(..., schedule=CountSchedule(law))``.

    Args:
        law: probabilities q(1), ..., q(L), either as a sequence (then it serves responses of exactly that length) or
            as a function of L that returns such a sequence. Every probability must be positive and finite and they
            must sum to 1 within 1e-6 (they are then normalised exactly).
        name: shown in error messages.

    Raises:
        TypeError: a law that is neither (a function's result is looked at when it is drawn from).
        ValueError: at draw time, when the law does not fit a response length or is not a positive distribution.
    """

    law: Sequence[float] | Callable[[int], Sequence[float] | Tensor]
    name: str = "custom"

    def __post_init__(self) -> None:
        if callable(self.law):
            return
        try:
            object.__setattr__(self, "law", tuple(float(q) for q in self.law))
        except (TypeError, ValueError):
            raise TypeError(f"law must hold probabilities q(1..L) or be a function of L, got {self.law!r}") from None

    def probabilities(self, length: int) -> Tensor:
        """q(1..L) as fp64 ``[L]``, normalised."""
        values = self.law(length) if callable(self.law) else self.law
        try:
            q = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"schedule {self.name!r}: law({length}) must return probabilities, got {values!r}"
            ) from None
        if q.numel() != length:
            raise ValueError(
                f"schedule {self.name!r} gives {q.numel()} probabilities for a response of {length} tokens; "
                "pass a function of the length to serve several lengths"
            )
        bad = (~(torch.isfinite(q) & (q > 0))).nonzero().flatten()[:4]
        if bad.numel():
            raise ValueError(
                f"schedule {self.name!r}: every probability must be positive and finite (L={length}); "
                f"got {q[bad].tolist()} at counts {(bad + 1).tolist()}"
            )
        total = math.fsum(q.tolist())  # rounded once: tables must not depend on how a machine vectorises a sum
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"schedule {self.name!r}: probabilities sum to {total:.9g}, not 1 (L={length})")
        return q / total

    def table(self, length: int, n_mc: int) -> tuple[Tensor, Tensor]:
        """Integer thresholds ``[L] int64`` over the ``n_mc << 32`` grid and token weights ``[L] fp32`` for l = 1..L."""
        q = self.probabilities(length)
        thresholds = torch.ceil(torch.cumsum(q, 0) * float(n_mc << 32)).to(torch.int64)
        thresholds[-1] = n_mc << 32  # the last count always takes what rounding left over
        counts = torch.arange(1, length + 1, dtype=torch.float64)
        return thresholds, (1.0 / (counts * q)).to(torch.float32)


def _harmonic_law(length: int) -> Tensor:
    inverse = 1.0 / torch.arange(1, length + 1, dtype=torch.float64)
    return inverse / math.fsum(inverse.tolist())


HARMONIC = CountSchedule(_harmonic_law, name="harmonic")


@lru_cache(maxsize=4096)
def _cached_table(schedule: CountSchedule, length: int, n_mc: int) -> tuple[Tensor, Tensor]:
    return schedule.table(length, n_mc)


class CountTables(NamedTuple):
    """A law given by a table: sequence b of length L owns the entries ``start[b] : start[b] + L``."""

    thresholds: Tensor  # [K] int64
    weights: Tensor  # [K] fp32
    start: Tensor  # [B] int64

    def to(self, device: torch.device) -> CountTables:
        """The same on a device."""
        return CountTables(*(t.to(device) for t in self))


@dataclass(frozen=True)
class DrawSpec:
    """Everything but the tokens of a draw, as plain numbers: samples lo..hi-1 of n_mc under a seed.

    ``schedule`` is "uniform", "stratified" or "table"; the last one's tables are kept on the host, which draws the
    counts, and on the device, whose kernel draws them again rather than wait for them.
    """

    scheme: str
    schedule: str
    n_mc: int
    lo: int
    hi: int
    seed: int
    mask_token_id: int
    prompt_threshold: int = 0  # a prompt token is masked where its 32-bit word is below this (up to 2^32)
    tables: CountTables | None = None
    device_tables: CountTables | None = None

    @property
    def samples(self) -> int:
        """Number of samples drawn, hi - lo."""
        return self.hi - self.lo

    @property
    def coupled(self) -> bool:
        """Whether sample 2i + 1 masks what sample 2i leaves."""
        return self.scheme == "coupled"

    def part(self, b: int, lo: int, hi: int) -> DrawSpec:
        """Samples lo..hi-1 of sequence b alone."""
        tables, device_tables = (
            None if t is None else t._replace(start=t.start[b : b + 1]) for t in (self.tables, self.device_tables)
        )
        return replace(self, lo=lo, hi=hi, tables=tables, device_tables=device_tables)


def count_tables(schedule: CountSchedule, lengths: Sequence[int], n_mc: int) -> CountTables:
    """Tables of the distinct lengths, end to end, and where each sequence's is."""
    start_of: dict[int, int] = {}
    thresholds: list[Tensor] = []
    weights: list[Tensor] = []
    end = 0
    for length in sorted(set(lengths)):
        t, w = _cached_table(schedule, length, n_mc) if _hashable(schedule) else schedule.table(length, n_mc)
        start_of[length] = end
        end += length
        thresholds.append(t)
        weights.append(w)
    start = torch.tensor([start_of[length] for length in lengths], dtype=torch.int64)
    return CountTables(torch.cat(thresholds), torch.cat(weights), start)


def _hashable(schedule: CountSchedule) -> bool:
    try:
        hash(schedule)
    except TypeError:
        return False
    return True


def prompt_threshold(probability: float) -> int:
    """floor(probability * 2^32): exact in fp64, and 1.0 masks every prompt token."""
    return math.floor(probability * 2**32)
