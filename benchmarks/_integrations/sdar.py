"""dLLM-RL's SDAR: one round of a trace over [prompt, response, noisy response] under a block mask."""

from __future__ import annotations

import torch
from torch import Tensor

from bgpo_kernels.integrations import sdar

from .case import Case, Size

TITLE = "SDAR in dLLM-RL: one token per block of 4"
BLOCK = 4


def case(size: Size) -> Case:
    """Every block is at its second step: one token decoded, one to score, the rest masked."""
    model = size.model()
    labels, _ = size.tokens()
    prompt, response = size.prompt, size.response
    within = torch.arange(response) % BLOCK
    noisy = labels[:, prompt:].masked_fill(within >= 1, model.config.mask_token_id)
    ids = torch.cat([labels, noisy], 1)
    p_mask = torch.zeros_like(labels, dtype=torch.bool)
    p_mask[:, prompt:] = within == 1
    places = torch.cat([torch.arange(prompt + response), torch.arange(prompt, prompt + response)]).expand(len(ids), -1)
    mask = _visible(prompt, response).expand(len(ids), 1, -1, -1)

    def plain() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        logits = torch.cat([logits[:, :prompt], logits[:, prompt + response :]], 1)
        return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * p_mask

    def ours() -> Tensor:
        return sdar.extended_logprob(model, ids, p_mask, places, labels, mask)

    return Case(model, plain, ours, plain_rows=ids.numel(), our_rows=int(p_mask.sum()))


def _visible(prompt: int, response: int) -> Tensor:
    """``[N, N]`` bool: clean blocks see clean ones up to themselves; a noisy block earlier clean ones and itself."""
    inside = torch.arange(response) // BLOCK + 1
    block = torch.cat([torch.zeros(prompt, dtype=torch.int64), inside, inside])
    noisy = torch.arange(len(block)) >= prompt + response
    clean = ~noisy & torch.where(noisy[:, None], block[:, None] > block, block[:, None] >= block)
    return clean | (noisy[:, None] & noisy & (block[:, None] == block))
