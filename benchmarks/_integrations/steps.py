"""CJ-GRPO: all steps of a decoding trajectory, back-propagated together."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from bgpo_kernels.integrations import steps

from .case import Case, Size

TITLE = "CJ-GRPO: all steps of a trajectory in one loss"


def case(size: Size) -> Case:
    """As many steps as there are samples, each decoding its share of the completion in a random order."""
    model = size.model()
    ids, _ = size.tokens()
    completion, mask_id = ids[:, size.prompt :], model.config.mask_token_id
    order = torch.rand(completion.shape, generator=torch.Generator().manual_seed(2)).argsort(-1)
    step = order * size.samples // size.response
    states = [
        torch.cat([ids[:, : size.prompt], torch.where(step >= k, mask_id, completion)], 1)
        for k in range(size.samples + 1)
    ]
    decoded = [step == k for k in range(size.samples)]
    trainer = SimpleNamespace(args=SimpleNamespace(cfg_scale=0.0))

    def plain() -> Tensor:
        found = []
        for k in range(size.samples):
            logp = model(states[k]).logits[:, -size.response :].log_softmax(-1)
            targets = states[k + 1][:, -size.response :]
            found.append(logp.gather(-1, targets[..., None])[..., 0] * decoded[k])
        return torch.stack(found)

    def ours() -> Tensor:
        found = steps.cj_grpo_get_per_token_logps(trainer, model, ids, states, decoded, size.response)
        return torch.stack(found)

    return Case(model, plain, ours, plain_rows=size.samples * ids.numel(), our_rows=completion.numel())
