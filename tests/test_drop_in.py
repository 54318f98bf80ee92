"""docs/drop_in.md: what it prints before and after is code, and both compute the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from models_zoo import MASK, llada, make_batch

import bgpo_kernels as bk

PAGE = (Path(__file__).parent.parent / "docs" / "drop_in.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def gradients_after(block: str, **names: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = llada(torch.float64)
    namespace: dict[str, Any] = {"torch": torch, "bk": bk, "model": model, "mask_id": MASK, "seed": 3} | names
    exec(compile(block, "docs/drop_in.md", "exec"), namespace)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, namespace


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The pages' plain code computes its softmax in fp32 whatever the model's dtype: 32 roundings of the largest."""
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 32 * 2**-24 * gradient.abs().max(), name


def test_log_likelihood_before_and_after() -> None:
    batch = make_batch()
    names = {"ids": batch.ids, "response": batch.response, "advantages": batch.advantages, "old": torch.zeros(3)}
    names["old"] = bk.elbo_logprob(
        llada(torch.float64), batch.ids, batch.response, scheme="full", n_mc=1, seed=3
    ).detach() + torch.tensor([0.1, -0.4, 0.05])  # one ratio beyond the clip
    before, plain = gradients_after(BLOCKS[0], **names)
    after, ours = gradients_after(BLOCKS[1], **names)
    torch.testing.assert_close(ours["loss"], plain["loss"], rtol=1e-5, atol=0)
    assert_same(after, before)
    assert len(BLOCKS[1].strip().splitlines()) <= 10


def test_bound_before_and_after() -> None:
    batch, n_mc = make_batch(), 4
    draw = bk.random_mask(batch.ids, batch.response, mask_token_id=MASK, n_mc=n_mc, seed=3)
    masked = (
        torch.zeros(draw.noisy_ids.numel(), dtype=torch.bool).index_fill(0, draw.rows, True).view_as(draw.noisy_ids)
    )
    old = bk.elbo_logprob(llada(torch.float64), batch.ids, batch.response, n_mc=n_mc, seed=3, per_sample=True).detach()
    old = old + torch.linspace(-1, 1, old.numel()).view_as(old)
    names: dict[str, Any] = {
        "ids": batch.ids, "response": batch.response, "advantages": batch.advantages, "n_mc": n_mc,
        "maskings": [(draw.noisy_ids[:, j], masked[:, j], draw.segment_weight[:, j]) for j in range(n_mc)],
    }  # fmt: skip
    before, _ = gradients_after(BLOCKS[2], old=old / batch.length[:, None], **names)
    after, ours = gradients_after(BLOCKS[3], old_logprob=old, **names)
    assert_same(after, before)
    assert torch.isfinite(ours["step"].loss)
    assert len(BLOCKS) == 4
