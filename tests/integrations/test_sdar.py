"""Block diffusion with the trainer's own layout: dLLM-RL's SDAR, DiRL, and the general function.

The models are small restatements of what those trainers run: masked attention over a layout of clean and noisy tokens;
DiRL's builds the layout, selects the masked rows and computes the policy loss inside its forward.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from completion_checks import LeavesRandomStateAlone, assert_flat, gradients_of, token_logp
from models_zoo import MASK, V, assert_same_gradients, seed, take_gradients, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from bgpo_kernels.integrations import sdar

B, L0, L1, BLOCK = 3, 4, 6, 3
L = L0 + L1
WIDTH = 8


class Attending(nn.Module):
    """One layer of attention under a given mask, with positions; the head is ``lm_head``."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with seed(5):
            self.embed, self.place = nn.Embedding(V, WIDTH), nn.Embedding(64, WIDTH)
            self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.lm_head = nn.Linear(WIDTH, V, bias=False)
        self.config = SimpleNamespace(mask_token_id=MASK, fuse_cross_entropy=False)
        self.to(dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def hidden(self, input_ids: Tensor, attention_mask: Any, position_ids: Tensor) -> Tensor:
        if isinstance(attention_mask, BlockMask):
            batch, _, size, _ = attention_mask.shape
            attention_mask = create_mask(attention_mask.mask_mod, batch, 1, size, size, device="cpu")
        x = self.embed(input_ids) + self.place(position_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = attention_mask.bool()
        y = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)
        return x + torch.tanh(self.mix(y[:, 0]))

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.hidden(input_ids, attention_mask, position_ids)))


class DirlModel(Attending):
    """DiRL's forward in training mode: layout [noisy, clean], rows of masked tokens, policy loss over some of them."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, labels: Any = None,
        masked_indices: Any = None, return_logits: bool = False, compute_rl_loss: bool = False, p_mask: Any = None,
        adv: Any = None, logp_old_tok: Any = None, logp_ref_tok: Any = None, is_real: Any = None,
        ppo_eps: float = 0.2, kl_beta: float = 0.0, use_kl_estimator_k3: bool = True, return_entropy: bool = False,
        loss_mean: bool = True, **_: Any,
    ) -> SimpleNamespace:  # fmt: skip
        assert self.training and attention_mask is None
        size = input_ids.shape[1]
        noisy = torch.where(masked_indices, self.config.mask_token_id, input_ids)
        ids, places = torch.cat([noisy, input_ids], 1), torch.cat([position_ids, position_ids], 1)
        hidden = self.hidden(ids, both_halves(size)[None, None], places)[:, :size][masked_indices]
        logits = self.lm_head(hidden)
        if return_logits:
            return SimpleNamespace(logits=logits, loss=None)
        assert compute_rl_loss
        kept = p_mask & is_real[:, None]
        chosen = kept[masked_indices]
        log_probs = logits[chosen].log_softmax(-1)
        logp = log_probs.gather(-1, labels[masked_indices][chosen][:, None])[:, 0]
        a = adv[:, None].expand_as(kept)[kept]
        old = logp.detach() if logp_old_tok is None else logp_old_tok[kept]
        ratio = (logp - old).clamp(-10.0, 10.0).exp()
        gain = torch.minimum(ratio * a, ratio.clamp(1 - ppo_eps, 1 + ppo_eps + 0.08) * a)
        loss = -gain.mean() if loss_mean else -gain.sum()
        kl = torch.zeros(())
        if kl_beta > 0 and logp_ref_tok is not None:
            u = logp - logp_ref_tok[kept]
            u = (-u).clamp(-10.0, 10.0).exp() - 1 + u if use_kl_estimator_k3 else u
            kl = kl_beta * (u.mean() if loss_mean else u.sum())
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        return SimpleNamespace(loss=loss + kl, kl_loss=kl.detach(), entropy=entropy.detach(), logits=None)


def both_halves(size: int) -> Tensor:
    """Block-diffusion mask ``[2 size, 2 size]`` of [noisy, clean]."""
    block, clean = torch.arange(2 * size) % size // BLOCK, torch.arange(2 * size) >= size
    same = (block[:, None] == block) & (clean[:, None] == clean)
    earlier = (block[:, None] > block) & clean & ~clean[:, None]
    return same | earlier | ((block[:, None] >= block) & clean & clean[:, None])


def extended() -> dict[str, Tensor]:
    """dLLM-RL's tensors for one round of a trace: [prompt, response, noisy response], the mask as numbers 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, MASK, (B, L), generator=generator)
    step = torch.rand(B, L1, generator=generator).argsort(-1)
    p_mask, later = torch.zeros(B, L, dtype=torch.bool), step >= 2
    p_mask[:, L0:] = (step == 2) | (step == 4)
    ids = torch.cat([labels, labels[:, L0:].masked_fill(later, MASK)], 1)
    block = torch.cat([torch.zeros(L0), 1 + torch.arange(L1) // BLOCK, 1 + torch.arange(L1) // BLOCK])
    noisy = torch.arange(L + L1) >= L
    sees = torch.where(noisy[:, None], torch.where(noisy, block[:, None] == block, block[:, None] > block),
                       ~noisy & (block[:, None] >= block))  # fmt: skip
    mask = sees.long().expand(B, 1, -1, -1).clone()
    mask[1, :, :, 0] = 0  # a padded prompt token, as process_pad leaves it
    mask[1, :, 0, 0] = 1
    places = torch.cat([torch.arange(L), torch.arange(L0, L)]).expand(B, -1).contiguous()
    return {
        "extended_input_ids": ids, "p_mask": p_mask, "tok_idx_ext": places, "labels": labels, "attention_mask": mask,
    }  # fmt: skip


def plain_extended(model: nn.Module, e: dict[str, Tensor]) -> Tensor:
    """rl_sdar.py: all logits, the prompt's and the noisy response's, log-softmax, gather. ``[B, L]``."""
    logits = model(e["extended_input_ids"], attention_mask=e["attention_mask"], position_ids=e["tok_idx_ext"]).logits
    return token_logp(torch.cat([logits[:, :L0], logits[:, L:]], 1), e["labels"])


def sdar_loss(logp: Tensor, old: Tensor, p_mask: Tensor) -> Tensor:
    """rl_sdar.py's loss: log-ratios clamped, divided by L1."""
    advantage = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)[:, None]
    ratio = torch.where(p_mask, logp - old, 0.0).clamp(-10.0, 10.0).exp()
    gain = torch.min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage) * p_mask
    return -(gain.sum(1) / L1).sum() / B


def test_extended_values_and_gradients_are_those_of_dllm_rl() -> None:
    e = extended()
    with torch.no_grad():
        old = plain_extended(Attending(), e) + torch.linspace(-0.2, 0.2, L)
    values, gradients = gradients_of(
        lambda m: sdar.extended_logprob(m, **e), Attending(), lambda x: sdar_loss(x, old, e["p_mask"])
    )
    expected, expected_gradients = gradients_of(
        lambda m: plain_extended(m, e), Attending(), lambda x: sdar_loss(x, old, e["p_mask"])
    )
    torch.testing.assert_close(values, expected * e["p_mask"], rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, expected_gradients)


def test_masks_of_the_sequences_stay_with_them() -> None:
    """One sequence a micro-batch, in another order: the mask and positions are cut along."""
    e = extended()
    model = Attending()
    expected = sdar.extended_logprob(model, **e)
    cut = sdar.extended_logprob(model, **e, micro_batch_tokens=1)
    torch.testing.assert_close(cut, expected, rtol=1e-12, atol=1e-12)
    turned = sdar.extended_logprob(model, **{k: v.flip(0) for k, v in e.items()})
    torch.testing.assert_close(turned.flip(0), expected, rtol=1e-12, atol=1e-12)


def test_kept_rows_with_a_block_mask() -> None:
    e = extended()
    seen = e["attention_mask"].bool()
    mask = create_block_mask(lambda b, h, q, k: seen[b, 0, q, k], B, None, L + L1, L + L1, device="cpu", BLOCK_SIZE=16)
    keep = torch.rand(B, L + L1, generator=torch.Generator().manual_seed(3)) < 0.4
    keep[2] = False
    targets = torch.randint(5, V, keep.shape, generator=torch.Generator().manual_seed(4))

    def ours(model: nn.Module) -> Tensor:
        return sdar.kept_logprob(model, e["extended_input_ids"], mask, e["tok_idx_ext"], keep, targets[keep])

    def plain(model: nn.Module) -> Tensor:
        return token_logp(model(e["extended_input_ids"], seen, e["tok_idx_ext"]).logits, targets)[keep]

    weight = torch.linspace(-1, 1, int(keep.sum()), dtype=torch.float64)
    values, gradients = gradients_of(ours, Attending(), lambda x: (weight * x).sum())
    expected, expected_gradients = gradients_of(plain, Attending(), lambda x: (weight * x).sum())
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, expected_gradients)


def test_in_fp32_as_good_as_torch() -> None:
    e = extended()
    rows = e["p_mask"]
    found = [
        sdar.extended_logprob(Attending(torch.float32), **e)[rows].detach(),
        plain_extended(Attending(torch.float32), e)[rows].detach(),
        plain_extended(Attending(), e)[rows].detach(),
    ]
    assert_as_good_as_torch(*found)


def test_no_logits_and_no_graphs() -> None:
    e = extended()
    model = Attending()
    with LeavesRandomStateAlone():
        sdar.extended_logprob(model, **e, head=untouchable(model.lm_head))

    def call(count: int, tokens: int | None) -> Tensor:
        many = {k: v[:1].repeat(count, *[1] * (v.dim() - 1)) for k, v in e.items()}
        return sdar.extended_logprob(Attending(), **many, micro_batch_tokens=tokens)

    assert_flat(call, lambda count: count * L)


# ----------------------------------------------------------------------------------------------------------- DiRL


def dirl_batch() -> dict[str, Any]:
    """Two rounds of a sample and a filler sample without any masked token."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, MASK, (B, L), generator=generator)
    labels = ids.masked_fill(torch.arange(L) < L0, -100)
    step = torch.rand(B, L, generator=generator)
    masked, p_mask = (step > 0.3) & (labels >= 0), (step > 0.3) & (step < 0.7) & (labels >= 0)
    masked[2] = p_mask[2] = False
    labels[2] = -100
    return {
        "input_ids": ids, "labels": labels, "masked_indices": masked, "p_mask": p_mask,
        "position_ids": torch.arange(L).expand(B, -1).contiguous(), "attention_mask": None, "step_ids": step,
        "adv": torch.tensor([1.5, -0.75, 0.0], dtype=torch.float64), "is_real": torch.tensor([True, True, False]),
    }  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "on-policy": {},
    "off-policy": {"old": True, "ppo_eps": 0.1},
    "KL": {"old": True, "ref": True, "kl_beta": 0.3},
    "KL, k1, sums": {"old": True, "ref": True, "kl_beta": 0.3, "use_kl_estimator_k3": False, "loss_mean": False},
    "entropy": {"return_entropy": True},
    "large ratios": {"old": True, "far": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_dirl_gives_the_loss_and_gradient_of_its_own_forward(options: dict[str, Any]) -> None:
    options, batch = dict(options), dirl_batch()
    noise = torch.randn(B, L, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    noise = 0.2 * noise
    if options.pop("far", False):  # ratios up to e^14 where the advantage is negative and nothing else bounds them
        noise[1] = torch.linspace(0, -14, L)
    model = DirlModel().train()
    scored = {k: batch[k] for k in ("input_ids", "labels", "masked_indices", "position_ids")}
    with torch.no_grad():
        logp = sdar.dirl_logprob(model, **scored)
    options["logp_old_tok"] = logp + noise if options.pop("old", False) else None
    options["logp_ref_tok"] = logp - noise if options.pop("ref", False) else torch.empty(0)
    given = {k: v for k, v in options.items() if not torch.is_tensor(v) or v.numel()}
    plain = model(**batch, compute_rl_loss=True, **given)
    plain.loss.backward()
    expected = take_gradients(model)
    ours = sdar.dirl_forward(model, **batch, compute_rl_loss=True, **options)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss.detach(), plain.loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.kl_loss.double(), plain.kl_loss.double(), rtol=1e-10, atol=1e-12)
    if options.get("return_entropy"):
        torch.testing.assert_close(ours.entropy, plain.entropy, rtol=1e-10, atol=1e-12)
    assert_same_gradients(take_gradients(model), expected)


def test_dirl_logprob_is_that_of_compute_model_logprobs() -> None:
    batch = dirl_batch()
    model = DirlModel().train()
    scored = {k: batch[k] for k in ("input_ids", "labels", "masked_indices", "position_ids", "step_ids")}
    masked = batch["masked_indices"]
    logits = model(**scored, return_logits=True).logits
    expected = torch.zeros(B, L, dtype=torch.float64)
    expected[masked] = token_logp(logits, batch["labels"][masked]).detach()
    torch.testing.assert_close(sdar.dirl_logprob(model, **scored).detach(), expected, rtol=1e-10, atol=1e-10)
    sdar.dirl_logprob(model, **scored, head=untouchable(model.lm_head))


def test_dirl_filler_alone_has_loss_zero_and_gradients_of_zero() -> None:
    batch = dirl_batch()
    model = DirlModel().train()
    declared = batch | {"is_real": torch.zeros(B, dtype=torch.bool)}
    empty = {k: v[2:] if torch.is_tensor(v) else v for k, v in batch.items()}
    for filler in (declared, empty):
        ours = sdar.dirl_forward(model, **filler)
        assert ours.loss.item() == 0.0
        ours.loss.backward()
        gradients = take_gradients(model)
        assert gradients and not any(bool(g.any()) for g in gradients.values())


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extended_input_ids": torch.zeros(B, L + L1)}, TypeError, "extended_input_ids must be int64"),
        ({"p_mask": torch.zeros(B, L)}, TypeError, "p_mask must be bool"),
        ({"labels": torch.zeros(B, L - 1, dtype=torch.int64)}, ValueError, "labels must have shape"),
        (
            {"p_mask": torch.zeros(B, 7, dtype=torch.bool), "labels": torch.zeros(B, 7, dtype=torch.int64)},
            ValueError,
            "must hold L0",
        ),
        ({"tok_idx_ext": torch.zeros(B, L, dtype=torch.int64)}, ValueError, "position_ids must have shape"),
    ],
)  # fmt: skip
def test_errors_of_extended(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sdar.extended_logprob(Attending(), **extended() | change)


def test_a_fused_loss_is_refused_in_training() -> None:
    model = Attending().train()
    model.config.fuse_cross_entropy = True
    with pytest.raises(ValueError, match="fuse_cross_entropy is True"):
        sdar.extended_logprob(model, **extended())
    sdar.extended_logprob(model.eval(), **extended())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(B, L - 1, dtype=torch.int64)}, ValueError, "labels must have shape"),
        ({"masked_indices": torch.zeros(B, L, dtype=torch.bool)}, ValueError, "leaves in the clear"),
        ({"labels": torch.full((B, L), -100)}, ValueError, r"labels are \[-100"),
        ({"is_real": [True]}, ValueError, "is_real must have shape"),
        ({"adv": [1.0, 2.0]}, ValueError, "adv must have shape"),
        ({"logp_old_tok": torch.zeros(B, L - 1)}, ValueError, "logp_old_tok must have shape"),
        ({"logp_ref_tok": torch.zeros(B, L - 1)}, ValueError, "logp_ref_tok must have shape"),
    ],
)
def test_errors_of_dirl(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sdar.dirl_forward(DirlModel().train(), **dirl_batch() | change)


def test_dirl_needs_training_mode() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        sdar.dirl_forward(DirlModel().eval(), **dirl_batch())
