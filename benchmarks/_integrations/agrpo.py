"""AGRPO: the tokens of one decoding step over a support of 50 tokens each."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from bgpo_kernels.integrations import agrpo

from .case import Case, Size

TITLE = "AGRPO: one decoding step, top-k support"
TOP_K, PER_STEP, TEMPERATURE = 50, 2, 0.9


def case(size: Size) -> Case:
    """Half of the completion is decoded; the step decodes two more tokens of every sequence."""
    model = size.model()
    ids, _ = size.tokens()
    generator = torch.Generator().manual_seed(2)
    completion = ids[:, size.prompt :]
    order = torch.rand(completion.shape, generator=generator).argsort(-1)
    half = size.response // 2
    decoded = (order >= half) & (order < half + PER_STEP)
    seen = ids.clone()
    seen[:, size.prompt :] = torch.where(order >= half, model.config.mask_token_id, completion)
    support = torch.zeros(*completion.shape, model.config.vocab_size, dtype=torch.bool)
    support.scatter_(-1, torch.randint(model.config.vocab_size, (*completion.shape, TOP_K), generator=generator), True)
    support.scatter_(-1, completion[..., None], True)
    trainer = SimpleNamespace(temperature=TEMPERATURE)

    def plain() -> Tensor:
        logits = model(seen).logits[:, -size.response :][decoded].float() / TEMPERATURE
        logits = logits.masked_fill(~support[decoded], -torch.inf)
        return logits.log_softmax(-1).gather(-1, completion[decoded][:, None])[:, 0]

    def ours() -> Tensor:
        return agrpo.get_per_token_logps_and_entropies(
            trainer, model, seen, torch.ones_like(seen), support, decoded, completion
        )

    return Case(model, plain, ours, plain_rows=ids.numel(), our_rows=int(decoded.sum()))
