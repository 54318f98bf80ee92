"""The policy update as public code for BGPO does it, in plain torch.

    for every sequence and sample           counts and permutations in Python, the mask id written sample by sample
    old policy, without gradient            a forward of every sample, though it is the same policy
    new policy                              a forward of every sample, and its backward at once: one graph alive
    log-probabilities of a sample           logits of all positions in fp32, cross-entropy of all positions, then the
                                            masked ones of them

Every sequence is run, one of zero advantage too. `old_pass=False` leaves the old policy's pass out, as an on-policy
update may: `d = ell - stop_gradient(ell)`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bgpo_kernels as bk

from .batch import Batch


@dataclass(frozen=True)
class Masked:
    """One masked copy of one sequence."""

    sequence: int
    noisy_ids: Tensor  # [T] int64
    masked: Tensor  # [T] bool
    weight: float  # of every masked token


def draw_masks(batch: Batch, n_mc: int, seed: int) -> Iterator[Masked]:
    """Stratified counts and uniform subsets, the distribution of `random_mask`'s default, drawn in Python."""
    chance = random.Random(seed)
    for b, (ids, response) in enumerate(zip(batch.input_ids, batch.response_mask, strict=True)):
        positions = response.nonzero()[:, 0]
        length = len(positions)
        for j in range(n_mc):
            count = 1 + int((j + chance.random()) / n_mc * length)
            chosen = positions[torch.randperm(length, device=ids.device)[:count]]
            masked = torch.zeros_like(response)
            masked[chosen] = True
            yield Masked(b, torch.where(masked, batch.mask_token_id, ids), masked, length / count)


def masks_of(draw: bk.MaskDraw, batch: Batch) -> Iterator[Masked]:
    """The masks of a draw, so that both implementations can be given the same."""
    for b in range(len(batch.input_ids)):
        for j in range(draw.n_mc):
            noisy = draw.noisy_ids[b, j]
            yield Masked(b, noisy, noisy != batch.input_ids[b], float(draw.segment_weight[b, j]))


def plain_update(
    model: nn.Module, batch: Batch, n_mc: int, seed: int, *, old_pass: bool = True, draw: bk.MaskDraw | None = None
) -> None:
    """Accumulate BGPO's gradient into .grad, the log-ratio divided by the length of the response."""
    samples = list(draw_masks(batch, n_mc, seed) if draw is None else masks_of(draw, batch))
    old: list[Tensor | None] = [None] * len(samples)
    if old_pass:
        with torch.no_grad():
            old = [_logprob(model, batch, sample) for sample in samples]
    for sample, before in zip(samples, old, strict=True):
        advantage, length = batch.advantages[sample.sequence], batch.response_mask[sample.sequence].sum()
        ell = _logprob(model, batch, sample)
        d = (ell - (ell.detach() if before is None else before)) / length
        term = advantage * (1 + d) if advantage >= 0 else advantage * torch.exp(d)
        (-term / (len(batch.advantages) * n_mc)).backward()


def _logprob(model: nn.Module, batch: Batch, sample: Masked) -> Tensor:
    """ELBO estimate of one sample."""
    logits = model(input_ids=sample.noisy_ids[None], use_cache=False).logits[0].float()
    loss = nn.functional.cross_entropy(logits, batch.input_ids[sample.sequence], reduction="none")
    return -sample.weight * torch.where(sample.masked, loss, 0.0).sum()
