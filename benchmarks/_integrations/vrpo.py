"""VRPO: the ELBOs of preference pairs under policy and reference, on the same masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.integrations import vrpo
from bgpo_kernels.integrations._common import content_ids

from .case import Case, Size

TITLE = "VRPO: ELBOs of pairs, policy and reference"


def case(size: Size) -> Case:
    """Half of the sequences are chosen, half rejected; the model is its own reference, scored without gradient."""
    model = size.model()
    ids, response = size.tokens()
    draw = bk.random_mask(
        ids, response, mask_token_id=model.config.mask_token_id, n_mc=size.samples, seed=0, sample_ids=content_ids(ids)
    )
    weight = draw.segment_weight

    def plain_elbos(policy: nn.Module) -> Tensor:
        found = []
        for j in range(draw.n_mc):
            hit = (draw.noisy_ids[:, j] != ids) & response
            logits = policy(draw.noisy_ids[:, j]).logits
            nll = F.cross_entropy(logits[hit], ids[hit], reduction="none")
            loss = torch.zeros(ids.shape)
            loss[hit] = nll
            found.append(-weight[:, j] * loss.sum(-1))
        return torch.stack(found).mean(0)

    def plain() -> Tensor:
        with torch.no_grad():
            reference = plain_elbos(model)
        return torch.cat([plain_elbos(model), reference])

    def ours() -> Tensor:
        options = {"n_mc": size.samples, "seed": 0}
        with torch.no_grad():
            reference = vrpo.sequence_elbos(model, ids, response, **options)
        return torch.cat([vrpo.sequence_elbos(model, ids, response, **options), reference])

    return Case(model, plain, ours, plain_rows=2 * draw.noisy_ids.numel(), our_rows=2 * draw.num_rows)
