"""What a trainer's entry provides: one update's worth of log-probabilities, as the trainer computes them and as we do.

An entry, `_integrations/<trainer>.py`, holds ``TITLE`` (what one call is, one line) and ``case(size) -> Case``. Both
functions of a case get the same masks, made beforehand, so that their values and gradients can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bgpo_kernels.models import HeadSpec
from bgpo_kernels.models.llada import build_llada, llada_config


@dataclass(frozen=True)
class Case:
    """One update's worth of work for one trainer."""

    model: nn.Module
    plain: Callable[[], Tensor]  # as the trainer does: forward passes, all logits, log-softmax, gather; graph attached
    ours: Callable[[], Tensor]  # our function; the same shape and values. A result without graph: it ran the backward
    plain_rows: int  # rows of the head that one forward pass of everything computes, the trainer's way
    our_rows: int  # and ours


@dataclass(frozen=True)
class Size:
    """A batch of clean sequences: ``sequences`` of ``prompt`` + ``response`` tokens, and the model's shape."""

    shape: str  # of bgpo_kernels.models.llada
    sequences: int
    prompt: int
    response: int
    samples: int  # Monte Carlo samples, where the trainer takes any number

    def model(self) -> nn.Module:
        """LLaDA's architecture and vocabulary at this size, in training mode."""
        return build_llada(llada_config(self.shape)).train()

    def shifted(self, model: nn.Module) -> HeadSpec:
        """The model read as Dream is: row i-1 predicts token i."""
        return HeadSpec(model.get_output_embeddings(), shift=1)  # type: ignore[operator]

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Clean ids ``[B, T]`` and the mask of the response ``[B, T]``."""
        length = self.prompt + self.response
        ids = torch.randint(1000, 100_000, (self.sequences, length), generator=torch.Generator().manual_seed(0))
        response = (torch.arange(length) >= self.prompt).expand(self.sequences, length).clone()
        return ids, response


SIZES = {
    "tiny": Size("tiny", sequences=2, prompt=3, response=5, samples=2),  # to run every line
    "small": Size("small", sequences=4, prompt=64, response=128, samples=4),  # two CPU cores
}
