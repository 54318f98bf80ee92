"""`random_mask` against a Python loop with randperm: `pytest benchmarks/bench_mask.py [--record]`.

128 sequences x 16 Monte Carlo samples x 512 tokens, all of them response. The loop does the same job row by row, as
trainers write it: the response's positions, a count, a permutation of them, an indexed write, and the row's part of the
lists of masked rows and targets. Before the timing: every sample of ours masks exactly as many tokens as it says, its
rows and targets are those of its noisy ids, and the reference backend gives the same bits; the loop's result passes
the same test.
"""

from __future__ import annotations

from typing import Any

import torch
from _measure import interleave
from torch import Tensor

import bgpo_kernels as bk

B, N_MC, T = 128, 16, 512
MASK_TOKEN_ID = 126336
ROUNDS = 9
SAMPLE_SECONDS = 0.05  # one call of the loop, many of random_mask


def loop(input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, ...]:
    """noisy ids [B, n, T], rows, targets [N], weights, counts [B, n] by a randperm per sequence and sample."""
    noisy = input_ids[:, None].repeat(1, N_MC, 1)
    weight, counts = torch.empty(B, N_MC), torch.empty(B, N_MC, dtype=torch.int32)
    rows, targets = [], []
    for b in range(B):
        positions = response_mask[b].nonzero()[:, 0]
        for j in range(N_MC):
            count = int(torch.randint(1, len(positions) + 1, ()))
            masked = positions[torch.randperm(len(positions))[:count]].sort().values
            noisy[b, j, masked] = MASK_TOKEN_ID
            weight[b, j], counts[b, j] = len(positions) / count, count
            rows.append(masked + (b * N_MC + j) * T)
            targets.append(input_ids[b, masked])
    return noisy, torch.cat(rows), torch.cat(targets), weight, counts


def assert_consistent(
    input_ids: Tensor, noisy: Tensor, rows: Tensor, targets: Tensor, weight: Tensor, count: Tensor
) -> None:
    """Every sample masks as many tokens as it says; rows, targets and weights are those of its noisy ids."""
    masked = noisy == MASK_TOKEN_ID
    assert torch.equal(masked.sum(dim=-1), count.long())
    assert torch.equal(masked.flatten().nonzero()[:, 0], rows)
    assert torch.equal(input_ids[:, None].expand_as(masked)[masked], targets)
    assert torch.equal(weight, T / count.float())


def draw(input_ids: Tensor, response_mask: Tensor, backend: str = "auto") -> bk.MaskDraw:
    """Ours."""
    return bk.random_mask(input_ids, response_mask, mask_token_id=MASK_TOKEN_ID, n_mc=N_MC, seed=3, backend=backend)


def test_random_mask_against_a_python_loop(judge: Any, benchmark: Any) -> None:
    """At least 50 times faster than the loop."""
    input_ids = torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(0))
    response_mask = torch.ones(B, T, dtype=torch.bool)
    ours, reference = draw(input_ids, response_mask), draw(input_ids, response_mask, "reference")
    assert_consistent(input_ids, ours.noisy_ids, ours.rows, ours.targets, ours.segment_weight, ours.count)
    assert_consistent(input_ids, *loop(input_ids, response_mask))
    for name in ("noisy_ids", "rows", "targets", "segment_offsets", "segment_weight", "count"):
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name
    variants = {
        "random_mask": lambda: draw(input_ids, response_mask),
        "loop": lambda: loop(input_ids, response_mask),
    }
    pair = ("loop", "random_mask")
    seconds = interleave(variants, ROUNDS, sample_seconds=SAMPLE_SECONDS)
    judge.ratio("loop with randperm / random_mask", seconds, pair, ">=", 50.0)
    judge.ratio("the same, single calls in the loop's wake", interleave(variants, ROUNDS), pair)
    benchmark.pedantic(draw, (input_ids, response_mask), rounds=10)
