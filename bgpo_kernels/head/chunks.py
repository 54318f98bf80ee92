"""How masked rows are cut into chunks of logits that fit the workspace.

Rows of one segment (sequence, MC sample) stay in one chunk whenever they fit: the chunk then knows its segment sums,
hence the bound's coefficients, before its logits are overwritten by their gradient, and the whole loss costs one pass
over the head. A segment larger than the workspace becomes a *piecewise* group: all its pieces are scored first and,
when the coefficient depends on the sum, computed a second time for the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Rows ``begin:end`` of the segments ``first:last``, cut into ``pieces`` of at most the capacity."""

    begin: int
    end: int
    first: int
    last: int
    pieces: tuple[tuple[int, int], ...]


def cut(begin: int, end: int, capacity: int) -> tuple[tuple[int, int], ...]:
    """Consecutive pieces of ``begin:end``, each full but the last: a row's place depends on its index only."""
    return tuple((lo, min(lo + capacity, end)) for lo in range(begin, end, capacity))


def plan(offsets: Sequence[int], capacity: int) -> list[Group]:
    """Groups that cover all rows in order; ``offsets`` [S+1] on the host. Empty segments ride along."""
    groups: list[Group] = []
    segments = len(offsets) - 1
    first = 0
    while first < segments:
        last = first + 1
        while last < segments and offsets[last + 1] - offsets[first] <= capacity:
            last += 1
        begin, end = offsets[first], offsets[last]
        groups.append(Group(begin, end, first, last, cut(begin, end, capacity)))
        first = last
    return groups
