"""d1's diffu-GRPO: the current policy's log-probabilities of one inner iteration (wd1 and unturtle: the same call)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import d1

from .case import Case, Size

TITLE = "d1, wd1: completion masked whole, one forward"


def case(size: Size) -> Case:
    """Prompt tokens masked with probability 0.3, all completion tokens masked."""
    model = size.model()
    ids, response = size.tokens()
    mask_id = model.config.mask_token_id
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    noisy = ids.masked_fill(response | chance, mask_id)
    trainer = SimpleNamespace(args=SimpleNamespace(mask_id=mask_id, p_mask_prompt=0.3, cfg_scale=0.0))

    def plain() -> Tensor:
        logits = model(noisy).logits[:, -size.response :]
        targets = ids[:, -size.response :]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
        return -loss.view(1, *targets.shape)

    def ours() -> Tensor:
        return d1.get_per_token_logps(trainer, model, ids[None], size.response, [0], noisy_ids=noisy[None])

    return Case(model, plain, ours, plain_rows=ids.numel(), our_rows=int(response.sum()))
