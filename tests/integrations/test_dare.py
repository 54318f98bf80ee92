"""DARE (verl): micro-batches and update of its BGPO actors, and its other actors, against their arithmetic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from completion_checks import (
    B,
    L,
    LeavesRandomStateAlone,
    P,
    T,
    assert_flat,
    gradients_of,
    logits_of,
    padded,
    positional,
    sequences,
    shifted_model,
    token_logp,
    unshifted,
)
from models_zoo import MASK, V, assert_same_gradients, llada, take_gradients, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import dare

MC = 4
IDS, ATTENDED = padded(sequences())


class Config(dict):
    """Attributes and ``get``, as verl's configs have them."""

    __getattr__ = dict.__getitem__


def actor(model: nn.Module, **config: Any) -> SimpleNamespace:
    defaults = {
        "clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "loss_agg_mode": "token-mean",
        "use_dynamic_bsz": False, "ppo_mini_batch_size": 6, "entropy_coeff": 0, "use_kl_loss": False,
    }  # fmt: skip
    return SimpleNamespace(
        actor_module=model, config=Config(defaults | config), gradient_accumulation=2, MASK_TOKEN_ID=MASK, mc_num=MC
    )


def micro_batch(ids: Tensor = IDS, attended: Tensor = ATTENDED, mc: int = MC, **extra: Tensor) -> dict[str, Tensor]:
    noisy, masked, share = dare.bgpo_masks(ids, attended, L, mc_num=mc, seed=3, mask_token_id=MASK)
    return {
        "input_ids": ids, "responses": ids[:, -L:], "attention_mask": attended, "perturbed_seq": noisy,
        "mask_indices": masked, "p_mask": share,
    } | extra  # fmt: skip


def plain_elbos(model: nn.Module, batch: dict[str, Tensor], shift: int = 0) -> tuple[Tensor, Tensor]:
    """llada_dp_actor_bgpo.py's loops: sample by sequence, all logits of its real tokens, cross-entropy over p.

    ``[B, MC]`` estimates, and ``[B, MC, T]`` entropies over p of the masked tokens.
    """
    mc = batch["perturbed_seq"].shape[1]
    elbos, entropies = [], torch.zeros(B, mc, T, dtype=torch.float64)
    for b in range(B):
        real = batch["attention_mask"][b] == 1
        for i in range(mc):
            logits = torch.zeros(T, V, dtype=next(model.parameters()).dtype)
            logits[real] = logits_of(model, batch["perturbed_seq"][b : b + 1, i, real])[0].roll(shift, 0)
            mask, p = batch["mask_indices"][b, i], batch["p_mask"][b, i]
            loss = F.cross_entropy(logits[mask], batch["input_ids"][b][mask], reduction="none") / p[mask]
            elbos.append(-loss.sum())
            q = logits[mask].log_softmax(-1)
            entropies[b, i, mask] = (-(q.exp() * q).sum(-1) / p[mask]).detach().double()
    return torch.stack(elbos).view(B, mc), entropies


def forward(
    model: nn.Module, batch: dict[str, Tensor], mc: int = MC, **options: Any
) -> tuple[Tensor | None, Tensor, Tensor]:
    calculate = options.pop("calculate_entropy", False)
    return dare.forward_micro_batch(actor(model), batch, 0.7, 1, mc, calculate, "test", **options)


def some_loss(both: Tensor) -> Tensor:
    return (both * torch.randn(both.shape, dtype=both.dtype, generator=torch.Generator().manual_seed(1))).sum()


# ---------------------------------------------------------------------------------------------------- micro-batches


@unshifted
def test_values_and_gradients_of_a_micro_batch(build) -> None:
    batch = micro_batch()

    def ours(model: nn.Module) -> Tensor:
        entropy, log_prob, per_sample = forward(model, batch)
        assert entropy is None and per_sample.is_contiguous()
        return torch.cat([log_prob[:, None], per_sample], 1)

    def plain(model: nn.Module) -> Tensor:
        elbos, _ = plain_elbos(model, batch)
        return torch.cat([elbos.mean(1, keepdim=True), elbos / L], 1)[..., None].expand(-1, -1, L)

    values, gradients = gradients_of(ours, build(torch.float64), some_loss)
    expected, expected_gradients = gradients_of(plain, build(torch.float64), some_loss)
    assert values.shape == (B, 1 + MC, L)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, expected_gradients)


def test_dream() -> None:
    """Row i - 1 predicts token i, of the same sequence."""
    batch = micro_batch()
    (first, head), (second, _) = shifted_model(), shifted_model()
    expected, _ = plain_elbos(second, batch, shift=1)
    torch.testing.assert_close(forward(first, batch, head=head)[2][..., 0] * L, expected, rtol=1e-10, atol=1e-10)


def test_entropy_is_that_of_the_predictions() -> None:
    batch = micro_batch()
    model = llada(torch.float64)
    entropy, log_prob, _ = forward(model, batch, calculate_entropy=True)
    assert entropy is not None and entropy.shape == log_prob.shape == (B, L)
    expected = plain_elbos(model, batch)[1].mean(1)[:, -L:]
    torch.testing.assert_close(entropy, expected, rtol=1e-10, atol=1e-10)


def test_fewer_samples_than_stored_and_one_at_a_time() -> None:
    batch = micro_batch()
    model = llada(torch.float64)
    whole = forward(model, batch)[2]
    torch.testing.assert_close(forward(model, batch, mc=2)[2], whole[:, :2], rtol=1e-12, atol=1e-12)
    cut = {k: v[:, 2:3] if v.dim() == 3 else v for k, v in batch.items()}
    torch.testing.assert_close(forward(model, cut, mc=1)[2], whole[:, 2:3], rtol=1e-12, atol=1e-12)


def test_in_fp32_as_good_as_torch() -> None:
    batch = micro_batch()
    found = [forward(llada(), batch)[2][..., 0].detach()]
    found += [plain_elbos(llada(d), batch)[0].detach() / L for d in (torch.float32, torch.float64)]
    assert_as_good_as_torch(*found)


def test_weights_may_differ_between_tokens_and_a_response_may_hold_the_mask_token() -> None:
    ids = IDS.clone()
    ids[0, P + 1] = MASK
    masked = torch.rand(B, MC, T, generator=torch.Generator().manual_seed(5)) < 0.4
    masked &= (ATTENDED.bool() & (torch.arange(T) >= P))[:, None]
    masked[0, :, P + 1] = True
    share = torch.rand(B, MC, T, generator=torch.Generator().manual_seed(6)) + 0.1
    batch = micro_batch() | {
        "input_ids": ids, "mask_indices": masked.long(), "p_mask": share,
        "perturbed_seq": ids[:, None].expand(-1, MC, -1).masked_fill(masked, MASK),
    }  # fmt: skip
    model = llada(torch.float64)
    expected, _ = plain_elbos(model, batch | {"mask_indices": masked})
    torch.testing.assert_close(forward(model, batch)[2][..., 0] * L, expected, rtol=1e-10, atol=1e-10)


def test_no_logits_and_no_graphs() -> None:
    batch = micro_batch()
    model = llada()
    forward(model, batch, head=untouchable(model.get_output_embeddings()))

    def call(count: int, tokens: int | None) -> Any:
        ids = sequences(1)
        return forward(llada(), micro_batch(ids, torch.ones_like(ids), count), count, micro_batch_tokens=tokens)

    assert_flat(call, lambda count: 3 * count * T)  # the result itself is [B, MC, R]


# ------------------------------------------------------------------------------------------------------------ masks


def test_drawn_masks_replay_in_any_batch_and_leave_the_random_state_alone() -> None:
    with LeavesRandomStateAlone():
        stored = micro_batch()
        drawn = {k: v for k, v in stored.items() if v.dim() == 2}
        model = llada(torch.float64)
        expected = forward(model, stored)[2]
        torch.testing.assert_close(forward(model, drawn, seed=3)[2], expected, rtol=1e-12, atol=1e-12)
        order = torch.tensor([2, 0, 1])
        turned = forward(model, {k: v[order] for k, v in drawn.items()}, seed=3)[2]
        torch.testing.assert_close(turned, expected[order], rtol=1e-12, atol=1e-12)
        alone = forward(model, {k: v[1:2] for k, v in drawn.items()}, seed=3)[2]
        torch.testing.assert_close(alone, expected[1:2], rtol=1e-12, atol=1e-12)
    wide = [F.pad(x, (2, 0), value=v) for x, v in ((IDS, 1), (ATTENDED, 0))]
    again = dare.bgpo_masks(*wide, L, mc_num=MC, seed=3, mask_token_id=MASK)
    assert torch.equal(again[1][..., 2:], stored["mask_indices"]), "padding moves no mask"


def test_masks_follow_dares_law() -> None:
    """Counts in strata of 1..L, p = l / L, attended response tokens only."""
    ids = sequences(64)
    attended = torch.ones_like(ids)
    attended[:, -1] = 0
    noisy, masked, share = dare.bgpo_masks(
        ids, attended, L, mc_num=L - 1, seed=0, mask_token_id=MASK, sample_ids=torch.arange(64)
    )
    assert not bool(masked[..., :P].any()) and not bool(masked[..., -1].any())
    count = masked.sum(-1)
    assert torch.equal(count.sort(-1).values, torch.arange(1, L).expand(64, -1)), "n = L: every count once"
    torch.testing.assert_close(share[..., 0], count / (L - 1))
    assert torch.equal(noisy == MASK, masked)
    places = masked.float().mean((0, 1))[P:-1]
    assert float((places - (L / 2) / (L - 1)).abs().max()) < 0.1


# ----------------------------------------------------------------------------------------------------------- update


def plain_policy_loss(
    l_old: Tensor, l_new: Tensor, a: Tensor, mask: Tensor, low: float, high: float, c: float, mode: str
) -> Tensor:
    """compute_policy_loss_bgpo with 1 + d used as it is: (loss, clip fraction, KL, lower clip fraction)."""
    d = l_new - l_old
    ratio = torch.where(a > 0, 1 + d, d.exp())
    first, second = -a * ratio, -a * ratio.clamp(1 - low, 1 + high)
    clipped = torch.maximum(first, second)
    losses = torch.where(a < 0, torch.minimum(-a * c, clipped), clipped)

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / mask.sum()

    sums, tokens = (losses * mask).sum(-1), mask.sum(-1)
    loss = {
        "token-mean": sums.sum() / tokens.sum(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-mean": (sums / tokens).mean(),
        "seq-mean-token-sum-norm": sums.sum() / mask.shape[-1],
    }[mode]
    lower = mean(((clipped > -a * c) & (a < 0)).double())
    return torch.stack([loss, mean((second > first).double()), mean(-d), lower])


def plain_update(self: Any, data: dict[str, Tensor], mask: Tensor) -> dict[str, float]:
    """update_policy's loop over samples, with a backward in each; the sequence count where upstream counts keys."""
    c = self.config
    low, high = (c.clip_ratio if x is None else x for x in (c.clip_ratio_low, c.clip_ratio_high))
    elbos, _ = plain_elbos(self.actor_module, data)
    scale = B / c.ppo_mini_batch_size if c.use_dynamic_bsz else 1 / self.gradient_accumulation
    total = 0.0
    for i in range(MC):
        new = (elbos[:, i] / L)[:, None].expand(-1, L)
        parts = plain_policy_loss(
            data["old_loss_per_sample"][:, i], new, data["advantages"], mask, low, high, c.get("clip_ratio_c", 3.0),
            c.loss_agg_mode,
        )  # fmt: skip
        (parts[0] * scale / MC).backward(retain_graph=True)
        total = total + parts.detach() / MC
    names = ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, total.tolist(), strict=True))


def update_batch(spread: float, advantages: tuple[float, ...] = (1.5, -0.75, 0.5)) -> dict[str, Tensor]:
    """With old values off those of the model by up to ``spread`` in d."""
    batch = micro_batch()
    elbos, _ = plain_elbos(llada(torch.float64), batch)
    noise = spread * torch.linspace(-1, 0.7, B * MC, dtype=torch.float64).view(B, MC).roll(1, 1)
    mask = ATTENDED[:, -L:]
    return batch | {
        "old_loss_per_sample": (elbos.detach() / L - noise)[..., None].expand(-1, -1, L),
        "advantages": torch.tensor(advantages, dtype=torch.float64)[:, None] * mask,
    }


def assert_same_but_for_the_weights(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Gradients of fp64 models whose weights 1/(pR) are fp32 on our side: 2^-24 of an ELBO of some 10 nats a token is
    6e-7 in d, and as much in every coefficient; what small entries lose by cancellation is measured by the largest."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        error = float((ours[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
        assert error < 2e-6, f"{name}: {error:.1e}"


UPDATES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clipped": {"spread": 0.5, "clip_ratio": 0.1},
    "two-sided clip": {"spread": 0.5, "clip_ratio_low": 0.3, "clip_ratio_high": 0.05},
    "dual clip": {"spread": 0.8, "clip_ratio_c": 1.3, "clip_ratio": 0.1, "advantages": (-0.5, 1.5, -0.75)},
    "far away": {"spread": 4.0},
    "dynamic batch": {"use_dynamic_bsz": True},
    "sums": {"loss_agg_mode": "seq-mean-token-sum"},
    "means of means": {"loss_agg_mode": "seq-mean-token-mean"},
    "sums over R": {"loss_agg_mode": "seq-mean-token-sum-norm"},
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=list(UPDATES))
def test_the_update_is_dares(options: dict[str, Any]) -> None:
    options = dict(options)
    data = update_batch(options.pop("spread", 0.1), options.pop("advantages", (1.5, -0.75, 0.5)))
    mask = ATTENDED[:, -L:].double()
    first, second = llada(torch.float64), llada(torch.float64)
    ours = dare.bgpo_update(actor(first, **options), data)
    plain = plain_update(actor(second, **options), data, mask)
    for name, value in plain.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert_same_but_for_the_weights(take_gradients(first), take_gradients(second))
    if "clip" in "".join(options):
        assert 0 < plain["actor/pg_clipfrac"] < 1
    if "clip_ratio_c" in options:
        assert 0 < plain["actor/pg_clipfrac_lower"] < 1


def test_the_update_counts_the_tokens_of_an_explicit_mask() -> None:
    data = update_batch(0.1)
    mask = (torch.arange(L) < torch.tensor([7, 2, 4])[:, None]).long() * ATTENDED[:, -L:]
    first, second = llada(torch.float64), llada(torch.float64)
    dare.bgpo_update(actor(first), data, mask)
    plain_update(actor(second), data, mask.double())
    assert_same_but_for_the_weights(take_gradients(first), take_gradients(second))


def test_the_update_with_drawn_masks_and_replayed_old_values() -> None:
    """The old policy's pass and the update draw the same masks: at equal weights every ratio is 1."""
    model = llada()
    short = {k: v for k, v in update_batch(0.0).items() if v.dim() == 2}
    with torch.no_grad():
        old = forward(model, short, seed=3)[2]
    metrics = dare.bgpo_update(actor(model), short | {"old_loss_per_sample": old}, seed=3)
    assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    on_policy, stored = take_gradients(model), llada()
    dare.bgpo_update(actor(stored), update_batch(0.0) | {"old_loss_per_sample": old})
    assert_same_gradients(take_gradients(stored), on_policy, rtol=1e-4)
    dare.bgpo_update(actor(model), short, seed=3)  # no old values: on-policy
    assert_same_gradients(take_gradients(model), on_policy, rtol=1e-4)


def test_sequences_without_advantage_cost_nothing() -> None:
    calls: list[int] = []
    data = update_batch(0.1, (0.0, -0.75, 0.0))
    first, second = llada(torch.float64), llada(torch.float64)
    plain = plain_update(actor(second), data, ATTENDED[:, -L:].double())
    dare.bgpo_update(actor(first), data)  # the probe's forwards are over
    first.zero_grad(set_to_none=True)
    handle = first.register_forward_pre_hook(lambda _m, _a, k: calls.append(len(k["input_ids"])), with_kwargs=True)
    ours = dare.bgpo_update(actor(first), data)
    handle.remove()
    assert sum(calls) == MC
    assert ours["actor/pg_loss"] == pytest.approx(plain["actor/pg_loss"], rel=1e-5)
    assert_same_but_for_the_weights(take_gradients(first), take_gradients(second))
    quiet = dare.bgpo_update(actor(llada()), update_batch(0.1, (0.0, 0.0, 0.0)))
    assert quiet == {name: 0.0 for name in quiet}


def test_d_below_minus_one_is_finite() -> None:
    data = update_batch(0.0, (1.0, 1.0, 1.0))
    data["old_loss_per_sample"] = data["old_loss_per_sample"] + 5.0
    model = llada(torch.float64)
    metrics = dare.bgpo_update(actor(model), data)
    assert metrics["actor/pg_loss"] == pytest.approx(4.0, rel=1e-5)
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- other actors


class BlockModel(nn.Module):
    """What DARE's patched SDAR and LLaDA2 do with a layout: mixing, the head on selected rows, cross-entropy over p."""

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.inner = llada(torch.float64)
        self.config = SimpleNamespace(model_type=model_type)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: str, position_ids: Tensor, use_cache: bool, return_dict: bool, **k
    ):
        assert attention_mask == "a block mask" and not use_cache and return_dict
        hidden = self.inner.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
        if self.config.model_type == "sdar":
            assert k["ulysses_sp_training"] and k["ulysses_sp_return_token_loss"]
            keep, targets, p = k["logits_to_keep"], k["ulysses_sp_targets"], k["ulysses_sp_p_mask"]
        else:
            assert k["return_block_diffusion_token_loss"]
            keep = k["block_diffusion_targets"].ne(-100)
            targets, p = k["block_diffusion_targets"][keep], k["block_diffusion_p_mask"][keep]
        logits = self.get_output_embeddings()(hidden[keep]).float()
        full = hidden.sum(-1).float() * 0 + logits.sum() * 0
        if targets.numel():
            full[keep] = F.cross_entropy(logits, targets, reduction="none") / p
        return SimpleNamespace(block_diffusion_token_loss=full)


def artifacts(nothing: bool = False) -> SimpleNamespace:
    clean, generator = sequences(), torch.Generator().manual_seed(3)
    target = (torch.rand(B, T, generator=generator) < 0.3) & (torch.arange(T) >= P) & (not nothing)
    return SimpleNamespace(
        noisy_input_ids=clean.masked_fill(target, MASK), clean_input_ids=clean, target_mask=target, sequence_length=T,
        p_mask=torch.rand(B, T, generator=generator) + 0.2, position_ids=torch.arange(T).expand(B, -1),
        response_lengths=torch.full((B,), L),
    )  # fmt: skip


@pytest.mark.parametrize("model_type", ["sdar", "llada2_moe"])
def test_block_diffusion_token_losses(model_type: str) -> None:
    a = artifacts()

    def plain(model: BlockModel) -> Tensor:
        ids = torch.cat([a.noisy_input_ids, a.clean_input_ids], 1)
        hidden = model.inner.model(input_ids=ids, position_ids=torch.cat([a.position_ids] * 2, 1)).last_hidden_state
        loss = -token_logp(model.get_output_embeddings()(hidden[:, :T]), a.clean_input_ids) / a.p_mask
        return loss * a.target_mask

    def ours(model: BlockModel) -> Tensor:
        return dare.block_diffusion_token_losses(actor(model), a, "a block mask")

    values, gradients = gradients_of(ours, BlockModel(model_type), some_loss)
    expected, expected_gradients = gradients_of(plain, BlockModel(model_type), some_loss)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, expected_gradients)
    model = BlockModel(model_type)
    empty = dare.block_diffusion_token_losses(actor(model), artifacts(nothing=True), "a block mask")
    empty.sum().backward()
    assert empty.shape == (B, T) and not bool(empty.any()) and not bool(model.get_output_embeddings().weight.grad.any())


def test_mdpo() -> None:
    model = llada(torch.float64)
    noisy = IDS.masked_fill((torch.arange(T) >= P + 2) & ATTENDED.bool(), MASK)
    counted = (torch.arange(L) != 4).expand(B, -1).long()  # padding included
    batch = {"input_ids": noisy, "target_ids": IDS, "attention_mask": ATTENDED, "completion_mask": counted}
    found = dare.forward_micro_batch_mdpo(actor(model), batch)
    for b in range(B):
        real = ATTENDED[b].bool()
        expected = torch.zeros(T, dtype=torch.float64)
        expected[real] = token_logp(logits_of(model, noisy[b : b + 1, real]), IDS[b : b + 1, real])[0].detach()
        torch.testing.assert_close(found[b].detach(), expected[-L:] * counted[b], rtol=1e-10, atol=1e-10)


def test_justgrpo_positions() -> None:
    model = llada(torch.float64)
    batch = {"input_ids": IDS, "responses": IDS[:, -L:], "attention_mask": ATTENDED}
    entropy, logp, again = dare.forward_ar_position_chunk(actor(model), batch, 0.8, 2, L, True)
    assert logp is again and logp.shape == entropy.shape == (B, L - 2)
    for b in range(B):
        for t in range(2, L):
            if not ATTENDED[b, P + t]:
                assert logp[b, t - 2] == 0 == entropy[b, t - 2]
                continue
            real = ATTENDED[b].bool()
            noisy = IDS[b].masked_fill(torch.arange(T) >= P + t, MASK)[real][None]
            q = (logits_of(model, noisy)[0, int(real[: P + t].sum())] / 0.8).log_softmax(-1)
            torch.testing.assert_close(logp[b, t - 2], q[IDS[b, P + t]], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(entropy[b, t - 2], -(q.exp() * q).sum(), rtol=1e-10, atol=1e-10)
    assert dare.forward_ar_position_chunk(actor(model), batch, 0.8, 2, 3)[0] is None


# ----------------------------------------------------------------------------------------------- errors, signatures


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(B, T)}, TypeError, "input_ids must be int64"),
        ({"attention_mask": torch.ones(B, L)}, ValueError, "attention_mask must have shape"),
        ({"perturbed_seq": IDS}, ValueError, "perturbed_seq must have shape"),
        ({"mask_indices": torch.zeros(B, MC - 1, T)}, ValueError, "mask_indices must have shape"),
        ({"p_mask": torch.zeros(B, MC, T)}, ValueError, "p_mask must be positive"),
        ({"mask_indices": torch.ones(B, MC, T), "p_mask": torch.ones(B, MC, T)}, ValueError, "are padding"),
    ],
)
def test_errors_of_a_micro_batch(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        forward(llada(), micro_batch() | change)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"entropy_coeff": 0.1}, {}, "serves the bound alone"),
        ({"use_kl_loss": True}, {}, "serves the bound alone"),
        ({"loss_agg_mode": "mean"}, {}, "loss_agg_mode must be one of"),
        ({}, {"advantages": torch.arange(L).expand(B, -1)}, "advantages vary within"),
        ({}, {"advantages": torch.ones(B)}, "advantages must have shape"),
        ({}, {"p_mask": torch.rand(B, MC, T) + 0.1}, "p_mask varies among"),
        ({}, {"old_loss_per_sample": torch.full((B, MC, L), torch.nan)}, "old_logprob holds non-finite"),
    ],
)
def test_errors_of_the_update(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    model = llada()
    with pytest.raises(ValueError, match=message):
        dare.bgpo_update(actor(model, **config), update_batch(0.1) | change)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="response_mask must have shape"):
        dare.bgpo_update(actor(model), update_batch(0.1), torch.ones(B, L + 1))


def test_errors_of_the_other_actors() -> None:
    parallel = actor(llada())
    parallel.use_ulysses_sp = True
    batch = micro_batch() | {"target_ids": IDS, "completion_mask": torch.ones(B + 1, L)}
    for call in (
        lambda: dare.forward_micro_batch(parallel, batch, 1.0, 1, MC),
        lambda: dare.bgpo_update(parallel, batch),
        lambda: dare.block_diffusion_token_losses(parallel, artifacts(), None),
        lambda: dare.forward_micro_batch_mdpo(parallel, batch),
        lambda: dare.forward_ar_position_chunk(parallel, batch, 1.0, 0, 1),
    ):
        with pytest.raises(ValueError, match="sequences cut over ranks are not served"):
            call()
    with pytest.raises(ValueError, match=r"config\.model_type must begin with 'sdar' or 'llada2'"):
        dare.block_diffusion_token_losses(actor(BlockModel("llada")), artifacts(), "a block mask")
    with pytest.raises(ValueError, match="completion_mask must have shape"):
        dare.forward_micro_batch_mdpo(actor(llada()), batch)
    with pytest.raises(ValueError, match=r"positions must be within 0\.\.7"):
        dare.forward_ar_position_chunk(actor(llada()), batch, 1.0, 3, L + 1)
    guided = actor(llada())
    guided.cfg_scale = 1.5
    with pytest.raises(ValueError, match=r"self\.cfg_scale is 1\.5"):
        dare.forward_ar_position_chunk(guided, batch, 1.0, 0, 1)


def test_the_signatures_are_dares() -> None:
    assert positional(dare.forward_micro_batch) == [
        "self", "micro_batch", "temperature", "n_l", "mc_num", "calculate_entropy", "call_fn_name",
    ]  # fmt: skip
    assert positional(dare.forward_micro_batch_mdpo) == ["self", "micro_batch", "temperature"]
    assert positional(dare.forward_ar_position_chunk) == [
        "self", "micro_batch", "temperature", "position_start", "position_end", "calculate_entropy",
    ]  # fmt: skip
    assert positional(dare.block_diffusion_token_losses)[:2] == ["self", "artifacts"]
