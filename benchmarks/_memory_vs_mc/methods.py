"""Four ways to take one on-policy policy-gradient step over the ELBO's Monte Carlo samples; all have the same gradient.

With d_j = (ell_j - stop(ell_j)) / L for sample j of a sequence of L response tokens, and A its advantage, the loss of
one sequence (averaged over sequences) is

    exact    -A exp(mean_j d_j)                                         the objective of VRPO-OL
    BGPO     -mean_j A (1 + d_j) if A >= 0 else -mean_j A exp(d_j)      its bound, linear in the samples

Memory that depends on n, per sequence (T tokens, V vocabulary): exact with all graphs kept n * T * V, the others none.
Each method works through one sequence after another, and one Monte Carlo sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bgpo_kernels as bk


@dataclass(frozen=True)
class Batch:
    """The sequences of one policy update, left-padded to a common length, and how their masks are drawn."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 0 at padding
    response_mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B] fp32
    mask_token_id: int
    n_mc: int
    seed: int
    scheme: str = "exact"

    @property
    def drawing(self) -> dict[str, Any]:
        """The options that every method draws its masks with."""
        return {"n_mc": self.n_mc, "seed": self.seed, "scheme": self.scheme, "mask_token_id": self.mask_token_id}


def _sample_logprobs(model: nn.Module, batch: Batch) -> list[list[Callable[[], Tensor]]]:
    """For each sequence and Monte Carlo sample, a function that runs the model and gives ell_j, in plain torch.

    As trainers do it: logits of all positions, log-softmax in fp32, gather, then pick the masked positions.
    """
    draw = bk.random_mask(batch.input_ids, batch.response_mask, **batch.drawing)

    def logprob(b: int, j: int) -> Tensor:
        real = batch.attention_mask[b].bool()
        noisy, clean = draw.noisy_ids[b, j, real], batch.input_ids[b, real]
        logits = model(input_ids=noisy[None]).logits[0]
        rows = torch.log_softmax(logits.float(), dim=-1).gather(-1, clean[:, None])[:, 0]
        return draw.segment_weight[b, j] * torch.where(noisy != clean, rows, 0.0).sum()

    sequences, samples = draw.noisy_ids.shape[:2]
    return [[lambda b=b, j=j: logprob(b, j) for j in range(samples)] for b in range(sequences)]


def _lengths(batch: Batch) -> Tensor:
    return batch.response_mask.sum(dim=1).float()


def exact_graphs_kept(model: nn.Module, batch: Batch) -> None:
    """The exact objective written down plainly: the graphs of a sequence's n samples all live until its backward."""
    for samples, advantage, length in zip(
        _sample_logprobs(model, batch), batch.advantages, _lengths(batch), strict=True
    ):
        ell = torch.stack([logprob() for logprob in samples])
        d = (ell - ell.detach()) / length
        (-advantage * torch.exp(d.mean()) / len(batch.advantages)).backward()


def bgpo_plain(model: nn.Module, batch: Batch) -> None:
    """BGPO in plain torch: backward per sample, so one graph alive, but with logits of all positions."""
    for samples, advantage, length in zip(
        _sample_logprobs(model, batch), batch.advantages, _lengths(batch), strict=True
    ):
        for logprob in samples:
            ell = logprob()
            d = (ell - ell.detach()) / length
            term = advantage * (1 + d if advantage >= 0 else torch.exp(d))
            (-term / (len(batch.advantages) * len(samples))).backward()


def _one_sample_at_a_time(batch: Batch) -> dict[str, Any]:
    longest = int(batch.attention_mask.sum(dim=1).max())
    return {"attention_mask": batch.attention_mask, "micro_batch_tokens": longest, **batch.drawing}


def bgpo_fused(model: nn.Module, batch: Batch) -> None:
    """BGPO through this package: head on the masked rows only, loss and gradients in one pass over it."""
    bk.bgpo_backward(
        model, batch.input_ids, batch.response_mask, batch.advantages, length_norm=True, **_one_sample_at_a_time(batch)
    )


def exact_replayed(model: nn.Module, batch: Batch) -> None:
    """The exact objective through this package: a first pass for the scalars, a second one for the gradients."""
    lengths = _lengths(batch)

    def objective(ell: Tensor) -> Tensor:
        d = (ell - ell.detach()) / lengths[:, None]
        return -(batch.advantages * torch.exp(d.mean(dim=1))).mean()

    bk.replay_backward(model, batch.input_ids, batch.response_mask, objective, **_one_sample_at_a_time(batch))


@dataclass(frozen=True)
class Method:
    """A method of the comparison: its name on the command line, its name in tables and plots, and its update."""

    key: str
    title: str
    update: Callable[[nn.Module, Batch], None]


METHODS = {
    method.key: method
    for method in (
        Method("exact", "exact, all graphs kept", exact_graphs_kept),
        Method("bgpo", "BGPO (bgpo_kernels)", bgpo_fused),
        Method("replay", "exact via replay", exact_replayed),
        Method("plain", "BGPO plain", bgpo_plain),
    )
}
