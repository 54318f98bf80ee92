"""SPG: sequence estimates of one inner iteration, the ELBO and EUBO mix of the negative advantages."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import spg

from .case import Case, Size

TITLE = "SPG: block_random masks, ELBO and EUBO"


def case(size: Size) -> Case:
    """Two masks of a sequence, as in the published runs; half of the advantages are positive."""
    model = size.model()
    ids, _response = size.tokens()
    kept, count = size.response, 2 if size.response % 2 == 0 else 1
    args = SimpleNamespace(
        forward_type="block_random", num_t=count, min_t=0.0, max_t=1.0, block_length=kept // count,
        use_mask_prompt=True, p_mask_prompt=0.15, mask_id=model.config.mask_token_id, cfg_scale=0.0,
        logp_estimation="mix", eubo_beta=1.5, mix_weight=0.5,
    )  # fmt: skip
    completion = torch.ones(len(ids), kept, dtype=torch.int64)
    positive = torch.arange(len(ids)) % 2 == 0
    masks = spg.draw_masks(args, ids, 0, completion)

    def plain() -> Tensor:
        logits = model(masks.noisy_ids.flatten(0, 1)).logits[:, -kept:]
        targets = ids[:, None, -kept:].expand(-1, count, -1)
        flat = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(flat, targets.reshape(-1), reduction="none")
        p = F.softmax(flat, dim=-1).gather(-1, targets.reshape(-1, 1))
        hit = masks.rows[..., -kept:]
        hits = hit.sum(-1)
        elbo = (-loss.view(hit.shape) * hit).sum(-1) / hits
        mean = (p.view(hit.shape).pow(args.eubo_beta) * hit / (hits / kept)[..., None]).mean(1)
        ever = hit.any(1)
        eubo = torch.where(ever, mean, 1.0).log().sum(-1) / ever.sum(-1) / args.eubo_beta
        return torch.where(positive, elbo.mean(1), 0.5 * eubo + 0.5 * elbo.mean(1))[None]

    def ours() -> Tensor:
        return spg.get_per_seq_logps(
            SimpleNamespace(args=args), model, ids[None], kept, [0], None, completion, positive,
            noisy_ids=masks.noisy_ids[None], rows=masks.rows[None],
        )  # fmt: skip

    return Case(model, plain, ours, plain_rows=masks.noisy_ids.numel(), our_rows=int(masks.rows.sum()))
