"""ESPO: the ELBO of the current policy, every mask with its complement."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import espo
from bgpo_kernels.integrations._common import content_ids

from .case import Case, Size

TITLE = "ESPO: masks and complements, all graphs of the MC samples kept"


def case(size: Size) -> Case:
    """As many MC samples as the size says, two forwards each."""
    model = size.model()
    ids, response = size.tokens()
    mask_id = model.config.mask_token_id
    trainer = SimpleNamespace(processing_class=SimpleNamespace(mask_token_id=mask_id))
    seeds = torch.arange(size.samples)[None]
    draw = espo.draw_masks(ids, response, seeds[0].tolist(), mask_id, content_ids(ids))
    hit = torch.zeros(draw.noisy_ids.numel(), dtype=torch.bool).index_fill(0, draw.rows, True).view_as(draw.noisy_ids)
    kept = size.response
    targets = ids[:, -kept:]

    def plain() -> Tensor:
        total = []
        for j in range(draw.n_mc):
            logits = model(draw.noisy_ids[:, j]).logits[:, -kept:]
            chosen = hit[:, j, -kept:]
            loss = torch.zeros(targets.shape)
            nll = F.cross_entropy(logits[chosen], targets[chosen], reduction="none")
            loss[chosen] = nll * draw.segment_weight[:, j, None].expand_as(loss)[chosen]
            total.append(-loss.sum(-1))
        return torch.stack(total).mean(0)[:, None]

    def ours() -> Tensor:
        return espo.get_elbo_mc(trainer, model, ids[None], kept, seeds, True, size.samples)

    return Case(model, plain, ours, plain_rows=draw.noisy_ids.numel(), our_rows=draw.num_rows)
