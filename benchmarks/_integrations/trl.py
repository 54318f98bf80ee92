"""TRL's GRPOTrainer with a masked diffusion model: the current policy's log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from bgpo_kernels.integrations import trl

from .case import Case, Size

TITLE = "TRL: completion masked whole, one forward"


def case(size: Size) -> Case:
    """The plain way asks the model for the completion's logits only, as TRL does."""
    model = size.model()
    ids, response = size.tokens()
    mask_id = model.config.mask_token_id
    attended = torch.ones_like(ids)
    noisy = ids.masked_fill(response, mask_id)
    trainer = SimpleNamespace(
        temperature=0.9, args=SimpleNamespace(seed=0), processing_class=SimpleNamespace(mask_token_id=mask_id)
    )

    def plain() -> Tensor:
        output = model(noisy, attention_mask=attended, use_cache=False, logits_to_keep=size.response)
        log_softmax = (output.logits / trainer.temperature).log_softmax(-1)
        return log_softmax.gather(-1, ids[:, -size.response :, None])[..., 0]

    def ours() -> Tensor:
        return trl.get_per_token_logps_and_entropies(trainer, model, ids, attended, size.response)[0]

    return Case(model, plain, ours, plain_rows=int(response.sum()), our_rows=int(response.sum()))
