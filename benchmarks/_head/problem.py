"""One case's inputs: a vocabulary head, and masked rows in segments as a policy update meets them.

Responses of `response` tokens stand behind prompts of the same length. Each is a segment with a random number of masked
tokens (1 to all, half on average), so N masked rows come with about 4N positions. Two Monte Carlo samples a sequence;
advantages have both signs. Hidden states are randn and the head's entries randn / sqrt(H): logits of unit variance.

On-policy and with the log-ratio per token, the bound's gradient is that of ``-sum_k c_k logp_k`` with known
coefficients ``c_k = A / (l B n)``, l the segment's rows. A variant that takes any upstream gradient gets these.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import bgpo_kernels as bk

IGNORED = -100  # the label of a position that is not scored
SAMPLES = 2
#: What has to be multiplied, in units of N H V FLOPs: with a trained head, a frozen head, log-probabilities alone.
NHV = {"trained": 6, "frozen": 4, "forward": 2}


@dataclass(frozen=True)
class Size:
    """A case: which head, how many masked rows, which gradients."""

    head: str
    H: int
    V: int
    N: int
    response: int  # tokens of a response
    mode: str  # a key of NHV

    @property
    def flops(self) -> int:
        """Of the products that the mode cannot avoid."""
        return NHV[self.mode] * self.N * self.H * self.V


@dataclass(frozen=True)
class Rows:
    """What a variant is given: the masked rows alone, or every position with labels that say which count."""

    hidden: Tensor  # [M, H] leaf
    labels: Tensor  # [M] int64, IGNORED where nothing is scored
    coefficient: Tensor  # [M] fp32 c_k, 0 where nothing is scored
    masked: Tensor  # [N] int64: where the masked rows are

    @property
    def ids(self) -> Tensor:
        """Labels for an API without an ignored one: token 0, which the coefficient 0 takes out again."""
        return self.labels.clamp(min=0)


@dataclass(frozen=True)
class Problem:
    """Everything of one case, on its device."""

    size: Size
    weight: Tensor  # [V, H] leaf
    draw: bk.MaskDraw
    advantages: Tensor  # [B]
    length: Tensor  # [B]
    full: Rows  # prompt and response
    packed: Rows  # the masked rows alone
    scratch: dict[str, Tensor] = field(default_factory=dict)  # what the bare GEMMs share

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.weight.device

    def wanted(self, rows: Rows) -> list[Tensor]:
        """The leaves that the mode wants gradients of."""
        return [leaf for leaf in (rows.hidden, self.weight) if leaf.requires_grad]


def make_problem(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Problem:
    """Random inputs; the same on every call with the same arguments."""
    chance = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    segments = max(SAMPLES * 2, round(2 * size.N / size.response) // SAMPLES * SAMPLES)
    counts = _counts(size.N, segments, size.response, chance)
    tokens = 2 * size.response
    rows = torch.tensor(
        [
            segment * tokens + size.response + position
            for segment, count in enumerate(counts)
            for position in sorted(chance.sample(range(size.response), count))
        ],
        device=device,
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    hidden = normal(segments * tokens, size.H)
    weight = normal(size.V, size.H).mul_(size.H**-0.5).requires_grad_(size.mode == "trained")
    batch = segments // SAMPLES
    sign = torch.where(torch.arange(batch, device=device) % 2 == 0, 1.0, -1.0)
    advantages = sign * (0.5 + torch.rand(batch, generator=generator, device=device))
    count = torch.tensor(counts, device=device).view(batch, SAMPLES)
    draw = bk.MaskDraw(
        noisy_ids=torch.zeros(batch, SAMPLES, tokens, dtype=torch.int64, device=device),
        rows=rows,
        targets=torch.randint(0, size.V, rows.shape, generator=generator, device=device),
        segment_offsets=torch.cat([count.new_zeros(1), count.flatten().cumsum(0)]),
        segment_weight=size.response / count.float(),
        count=count.int(),
    )
    each = advantages[:, None] / (count * batch * SAMPLES)
    coefficient = each.flatten().repeat_interleave(count.flatten())
    gradient = size.mode != "forward"
    return Problem(
        size,
        weight,
        draw,
        advantages,
        torch.full((batch,), float(size.response), device=device),
        _full_rows(hidden, draw, coefficient, gradient),
        Rows(hidden[rows].requires_grad_(gradient), draw.targets, coefficient, torch.arange(len(rows), device=device)),
    )


def _full_rows(hidden: Tensor, draw: bk.MaskDraw, coefficient: Tensor, gradient: bool) -> Rows:
    labels = torch.full((len(hidden),), IGNORED, device=hidden.device).index_copy_(0, draw.rows, draw.targets)
    spread = coefficient.new_zeros(len(hidden)).index_copy_(0, draw.rows, coefficient)
    return Rows(hidden.requires_grad_(gradient), labels, spread, draw.rows)


def _counts(total: int, segments: int, most: int, chance: random.Random) -> list[int]:
    """Random numbers in 1..most that add up to `total`."""
    if not segments <= total <= segments * most:
        raise ValueError(f"{total} rows do not fit {segments} segments of 1 to {most}")
    counts = [chance.randint(1, most) for _ in range(segments)]
    while (missing := total - sum(counts)) != 0:
        at, step = chance.randrange(segments), 1 if missing > 0 else -1
        if 1 <= counts[at] + step <= most:
            counts[at] += step
    return counts


def described(problem: Problem) -> dict[str, Any]:
    """What the record says of the inputs beyond their size."""
    return {
        "dtype": str(problem.weight.dtype).removeprefix("torch."),
        "segments": problem.draw.count.numel(),
        "largest_segment": int(problem.draw.count.max()),
        "positions": len(problem.full.hidden),
    }
