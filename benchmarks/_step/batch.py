"""The sequences of the measured policy updates, and our update of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bgpo_kernels as bk


@dataclass(frozen=True)
class Batch:
    """Random prompts and responses, without padding; advantages +1 and -1 in turn, none of them zero."""

    input_ids: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B] fp32
    mask_token_id: int

    @property
    def tokens(self) -> int:
        """Of a sequence."""
        return self.input_ids.shape[1]


def make_batch(sequences: int, prompt: int, response: int, mask_token_id: int, device: torch.device) -> Batch:
    """`sequences` of `prompt` + `response` tokens; ids below the mask token's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(mask_token_id, 100_000), (sequences, prompt + response), generator=generator)
    scored = (torch.arange(prompt + response) >= prompt).expand(ids.shape).contiguous()
    advantages = torch.where(torch.arange(sequences) % 2 == 0, 1.0, -1.0)
    return Batch(ids.to(device), scored.to(device), advantages.to(device), mask_token_id)


def our_update(
    model: nn.Module,
    batch: Batch,
    n_mc: int,
    seed: int,
    *,
    micro_batch_tokens: int | None = None,
    scheme: str = "exact",
    draw: bk.MaskDraw | None = None,
) -> None:
    """The same gradient through this package."""
    bk.bgpo_backward(
        model, batch.input_ids, batch.response_mask, batch.advantages, n_mc=n_mc, seed=seed, scheme=scheme,
        mask_token_id=batch.mask_token_id, micro_batch_tokens=micro_batch_tokens, draw=draw,
    )  # fmt: skip


def masked_rows(batch: Batch, n_mc: int, seed: int) -> int:
    """How many rows the head of `our_update` sees in all."""
    draw = bk.random_mask(batch.input_ids, batch.response_mask, mask_token_id=batch.mask_token_id, n_mc=n_mc, seed=seed)
    return len(draw.rows)
