"""DiffuCoder's coupled-GRPO: the current policy's log-probabilities, three versions of every completion."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from bgpo_kernels.integrations import diffucoder

from .case import Case, Size

TITLE = "DiffuCoder: three versions of a completion, shifted head"
RATIO = 0.4


def case(size: Size) -> Case:
    """Version 1 masks each token with probability 0.4."""
    model = size.model()
    ids, response = size.tokens()
    mask_id = model.config.mask_token_id
    masks = response & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < RATIO)
    versions = torch.stack([response, masks, response & ~masks])
    noisy = torch.where(versions, mask_id, ids).flatten(0, 1)
    trainer = SimpleNamespace(processing_class=SimpleNamespace(mask_token_id=mask_id))
    head = size.shifted(model)

    def plain() -> Tensor:
        logits = model(noisy).logits[:, :-1][:, -size.response :]
        logits = logits.view(3, len(ids), size.response, -1)
        parts = []
        for b in range(len(ids)):  # a sequence at a time, as the trainer
            target = ids[b, -size.response :].expand(3, -1)[..., None]
            full, first, second = logits[:, b].log_softmax(-1).gather(-1, target)[..., 0]
            mixed = torch.where(masks[b, -size.response :], first / RATIO, second / (1 - RATIO))
            parts.append((full + mixed) / 2)
        return torch.stack(parts)[:, None]

    def ours() -> Tensor:
        return diffucoder.get_per_token_logps(
            trainer, model, ids[None], size.response, [0], masks=masks[None], mask_ratios=[RATIO], head=head
        )

    return Case(model, plain, ours, plain_rows=noisy.numel(), our_rows=int(versions.sum()))
