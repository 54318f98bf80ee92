"""dllm's diffu-GRPO on TRL: the current policy's log-probabilities, in chunks of two sequences."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import dllm

from .case import Case, Size

TITLE = "dllm: completion masked whole, chunks of 2, EOS tails"
CHUNK = 2


def case(size: Size) -> Case:
    """Every second completion ends after three quarters of its length."""
    model = size.model()
    ids, response = size.tokens()
    mask_id = model.config.mask_token_id
    tokens = ids.shape[1]
    end = torch.where(torch.arange(len(ids)) % 2 == 1, tokens - size.response // 4, tokens)
    attended = (torch.arange(tokens) < end[:, None]).long()
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    noisy = ids.masked_fill(response | chance, mask_id)
    trainer = SimpleNamespace(sampler_config=SimpleNamespace(cfg_scale=0.0))

    def plain() -> Tensor:
        parts = []
        for i in range(0, len(ids), CHUNK):
            part = slice(i, i + CHUNK)
            logits = model(noisy[part], attention_mask=attended[part]).logits[:, -size.response :]
            targets = ids[part, -size.response :]
            loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
            parts.append(-loss.view(targets.shape))
        return torch.cat(parts) * attended[:, -size.response :]

    def ours() -> Tensor:
        return dllm.get_per_token_logps(trainer, model, ids, attended, size.response, CHUNK, noisy_ids=noisy)

    return Case(model, plain, ours, plain_rows=ids.numel(), our_rows=int((response & (attended != 0)).sum()))
