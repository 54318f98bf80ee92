"""dLLM-RL (TraceRL): a batch of merged decoding steps, eight tokens each."""

from __future__ import annotations

import torch
from torch import Tensor

from bgpo_kernels.integrations import dllm_rl

from .case import Case, Size

TITLE = "dLLM-RL: TraceRL, steps merged by 8"
MERGED = 8


def case(size: Size) -> Case:
    """Half of the response is decoded; the merged step decodes the next tokens in a random order."""
    model = size.model()
    labels, response = size.tokens()
    order = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)).masked_fill(~response, -1).argsort(-1)
    place = order.argsort(-1) - size.prompt  # in the decoding order, negative for the prompt
    half = size.response // 2
    noisy = labels.masked_fill(place >= half, model.config.mask_token_id)
    p_mask = (place >= half) & (place < half + MERGED)

    def plain() -> Tensor:
        logp = model(noisy).logits.log_softmax(-1)
        return logp.gather(-1, labels[..., None])[..., 0] * p_mask

    def ours() -> Tensor:
        return dllm_rl.token_logprob(model, noisy, labels, p_mask)

    return Case(model, plain, ours, plain_rows=labels.numel(), our_rows=int(p_mask.sum()))
