"""DMPO: one step of the weighted denoising cross-entropy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import dmpo

from .case import Case, Size

TITLE = "DMPO: loss of antithetic maskings"
OPTIONS: dict[str, Any] = {
    "loss": "wdce",
    "loss_antithetic": True,
    "loss_mask_prob_clamp": True,
    "loss_mask_non_eos": False,
    "advantage_centering": False,  # centred, the loss is a small difference of large sums
    "seed": 0,
}


def case(size: Size) -> Case:
    """``size.samples`` maskings of every completion."""
    model = size.model()
    ids, _ = size.tokens()
    batch, repeats = len(ids), size.samples
    args = SimpleNamespace(**OPTIONS, mask_id=model.config.mask_token_id, num_replicates=repeats)
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(global_step=0))
    masks = dmpo.draw_maskings(args, torch.ones(batch, size.response).bool(), repeats, 0, torch.arange(batch))
    advantages = torch.randn(batch, generator=torch.Generator().manual_seed(2)).softmax(-1)
    inputs = {
        "prompt_ids": ids[:, : size.prompt],
        "completion_ids": ids[:, size.prompt :],
        "advantages": advantages,
    }
    clean = ids.repeat(repeats, 1)
    full = F.pad(masks.transpose(0, 1).flatten(0, 1), (size.prompt, 0))

    def plain() -> Tensor:
        logits = model(clean.masked_fill(full, args.mask_id)).logits
        losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), clean.flatten(), reduction="none")
        mean = (losses.view(clean.shape) * full).sum(-1) / full.sum(-1).clamp(min=1)
        return (mean * advantages.repeat(repeats)).sum() / repeats

    def ours() -> Tensor:
        return dmpo.compute_loss(trainer, model, inputs, masks=masks)

    return Case(model, plain, ours, plain_rows=clean.numel(), our_rows=int(masks.sum()))
