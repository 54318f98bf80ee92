"""NeMo Automodel: forward and masked diffusion loss of one micro-batch of supervised fine-tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import nemo

from .case import Case, Size

TITLE = "NeMo Automodel: MDLM loss, one forward"


def case(size: Size) -> Case:
    """Each sequence has its own masking probability."""
    model = size.model()
    ids, response = size.tokens()
    generator = torch.Generator().manual_seed(2)
    p = (0.001 + 0.999 * torch.rand(len(ids), 1, generator=generator)).expand_as(ids)
    noise = (torch.rand(ids.shape, generator=generator) < p) & response
    noisy = torch.where(noise, model.config.mask_token_id, ids)
    count = int(response.sum())

    def plain() -> Tensor:
        logits = model(noisy).logits
        nll = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        return (nll * (noise & response) / p.clamp(min=1e-8)).sum() / count

    def ours() -> Tensor:
        return nemo.mdlm_forward_loss(model, {"input_ids": noisy}, ids, noise, p, response, count).total_loss

    return Case(model, plain, ours, plain_rows=ids.numel(), our_rows=int(noise.sum()))
