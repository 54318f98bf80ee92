"""LLaDA's likelihood evaluation: one prompt and answer, no gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import llada_eval
from bgpo_kernels.integrations._common import content_ids

from .case import Case, Size

TITLE = "LLaDA likelihood: a prompt and an answer, masks in batches"
BATCH = 8


def case(size: Size) -> Case:
    """16 masks in batches of 8."""
    model, count = size.model().eval(), 2 * BATCH
    ids, response = size.tokens()
    ids, response = ids[:1], response[:1]
    mask_id = model.config.mask_token_id
    draw = llada_eval.draw_masks(ids, response, count, 0, mask_id, content_ids(ids))
    weight = draw.segment_weight[0].repeat_interleave(draw.count[0].long())
    prompt, answer = ids[0, : size.prompt], ids[0, size.prompt :]

    @torch.no_grad()
    def plain() -> Tensor:
        losses, done = [], 0
        for noisy in draw.noisy_ids[0].split(BATCH):
            hit = (noisy == mask_id) & response
            logits = model(noisy).logits
            nll = F.cross_entropy(logits[hit], ids.expand(len(noisy), -1)[hit], reduction="none")
            losses.append((nll * weight[done : done + len(nll)]).sum() / len(noisy))
            done += len(nll)
        return -torch.stack(losses).mean()

    def ours() -> Tensor:
        return torch.tensor(llada_eval.get_log_likelihood(model, prompt, answer, count, BATCH, mask_id=mask_id))

    return Case(model, plain, ours, plain_rows=draw.noisy_ids.numel(), our_rows=draw.num_rows)
