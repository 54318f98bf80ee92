"""DARE's BGPO: the policy update of one micro-batch, off-policy, with the backward inside, as update_policy does it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bgpo_kernels.integrations import dare

from .case import Case, Size

TITLE = "DARE BGPO: update of one micro-batch, backward per sample"


class _Config(dict):
    __getattr__ = dict.__getitem__


def case(size: Size) -> Case:
    """Explicit masks by DARE's law; old values a little off; the result is the loss."""
    model = size.model()
    ids, _ = size.tokens()
    noisy, masked, share = dare.bgpo_masks(
        ids, torch.ones_like(ids), size.response, mc_num=size.samples, seed=0, mask_token_id=model.config.mask_token_id
    )
    advantages = torch.linspace(-1.0, 1.5, len(ids))
    data: dict[str, Any] = {
        "input_ids": ids, "responses": ids[:, size.prompt :], "attention_mask": torch.ones_like(ids),
        "perturbed_seq": noisy, "mask_indices": masked, "p_mask": share,
        "advantages": advantages[:, None].expand(-1, size.response),
    }  # fmt: skip
    actor = SimpleNamespace(
        actor_module=model, gradient_accumulation=1, MASK_TOKEN_ID=model.config.mask_token_id, mc_num=size.samples,
        config=_Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, loss_agg_mode="token-mean",
                       use_dynamic_bsz=False, ppo_mini_batch_size=len(ids), entropy_coeff=0, use_kl_loss=False),
    )  # fmt: skip

    def elbo(i: int) -> Tensor:
        logits = model(noisy[:, i]).logits
        scores = []
        for b in range(len(ids)):
            mask = masked[b, i]
            scores.append(-(F.cross_entropy(logits[b][mask], ids[b][mask], reduction="none") / share[b, i, mask]).sum())
        return torch.stack(scores) / size.response

    with torch.no_grad():
        old = torch.stack([elbo(i) for i in range(size.samples)], 1) - 0.05
    data["old_loss_per_sample"] = old[..., None].expand(-1, -1, size.response)

    def plain() -> Tensor:
        total = torch.zeros(())
        for i in range(size.samples):
            d = elbo(i) - old[:, i]
            ratio = torch.where(advantages > 0, 1 + d, d.exp())
            clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
            loss = torch.where(advantages < 0, torch.minimum(-3.0 * advantages, clipped), clipped).mean() / size.samples
            loss.backward()
            total += loss.detach()
        return total

    def ours() -> Tensor:
        return torch.tensor(dare.bgpo_update(actor, data)["actor/pg_loss"])

    return Case(model, plain, ours, plain_rows=noisy.numel(), our_rows=int(masked.sum()))
