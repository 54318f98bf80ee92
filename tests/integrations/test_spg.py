"""SPG: ``get_per_seq_logps`` against a restatement from all logits, on the masks that it drew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models_zoo as zoo
import pytest
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.integrations import spg
from bgpo_kernels.models import HeadSpec

P, L, B = 4, 8, 3  # prompt, completion, sequences
END = torch.tensor([8, 5, 2])  # completion lengths, with the end of sequence
POSITIVE = torch.tensor([True, False, False])


def trainer(**changes: Any) -> SimpleNamespace:
    fields = {
        "forward_type": "random", "num_t": 3, "min_t": 0.0, "max_t": 1.0, "block_length": 4, "use_mask_prompt": True,
        "p_mask_prompt": 0.3, "mask_id": zoo.MASK, "cfg_scale": 0.0, "logp_estimation": "mix", "eubo_beta": 1.5,
        "mix_weight": 0.5,
    }  # fmt: skip
    return SimpleNamespace(args=SimpleNamespace(**fields | changes))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, zoo.MASK, (B, P + L), generator=generator)
    prompt_mask = torch.ones(B, P, dtype=torch.int64)
    prompt_mask[1, :2] = 0
    completion_mask = (torch.arange(L) < END[:, None]).int()
    return {"ids": ids, "prompt_mask": prompt_mask, "completion_mask": completion_mask}


def call(self: Any, model: torch.nn.Module, seeds: Any = (11,), **options: Any) -> Tensor:
    data = batch() | {k: options.pop(k) for k in ("ids", "prompt_mask", "completion_mask") if k in options}
    ids = data["ids"].expand(len(seeds), -1, -1)
    return spg.get_per_seq_logps(
        self, model, ids, L, seeds, data["prompt_mask"], data["completion_mask"], POSITIVE, **options
    )


def masks(self: Any, seed: int = 11, **options: Any) -> spg.Masks:
    data = batch()
    attended = torch.cat([data["prompt_mask"].bool(), torch.ones(B, L, dtype=torch.bool)], 1)
    return spg.draw_masks(self.args, data["ids"], seed, data["completion_mask"], attended, **options)


def plain(args: Any, model: torch.nn.Module, drawn: spg.Masks, shift: int = 0) -> Tensor:
    """SPG's estimate ``[B]`` from all logits of every mask; padding is left out by hand."""
    data, found = batch(), []
    for b in range(B):
        real = torch.cat([data["prompt_mask"][b].bool(), torch.ones(L, dtype=torch.bool)])
        clean, noisy, rows = data["ids"][b, real], drawn.noisy_ids[b][:, real], drawn.rows[b][:, real]
        output = model(input_ids=noisy)
        logp = getattr(output, "logits", output).log_softmax(-1).roll(shift, 1)
        token = logp.gather(-1, clean[None, :, None].expand(len(noisy), -1, 1))[..., 0]
        count = rows.sum(-1)
        elbo = ((token * rows).sum(-1) / count).mean()
        share = count[:, None].to(logp.dtype) / END[b]
        mean = (token.exp().pow(args.eubo_beta) * rows / share).mean(0)
        ever = rows.any(0)
        eubo = mean[ever].log().sum() / ever.sum() / args.eubo_beta
        negative = {
            "elbo": elbo, "eubo": eubo, "zero": 0.0 * elbo,
            "mix": args.mix_weight * eubo + (1 - args.mix_weight) * elbo,
        }[args.logp_estimation]  # fmt: skip
        found.append(elbo if POSITIVE[b] else negative)
    return torch.stack(found)


def gradients(model: torch.nn.Module, values: Tensor) -> dict[str, Tensor]:
    (values * torch.tensor([1.0, -0.5, 0.25])).sum().backward()
    return zoo.take_gradients(model)


@pytest.mark.parametrize("mode", spg.MODES)
@pytest.mark.parametrize("estimation", spg.ESTIMATES)
def test_values_and_gradients_are_those_of_all_logits(mode, estimation):
    model = zoo.llada(torch.float64)
    self = trainer(
        forward_type=mode, num_t=1 if mode == "all" else 2, logp_estimation=estimation, mix_weight=0.3, max_t=0.9
    )
    ours = call(self, model)
    expected = plain(self.args, model, masks(self))
    assert ours.shape == (1, B)
    torch.testing.assert_close(ours[0], expected, rtol=1e-10, atol=1e-12)
    zoo.assert_same_gradients(gradients(model, ours[0]), gradients(model, expected), rtol=1e-8)


@pytest.mark.parametrize(("build", "shift"), [(zoo.llada, 1), (zoo.bert, 0)], ids=["shift", "biased head"])
def test_heads_that_shift_or_have_a_bias(build, shift):
    model, self = build(torch.float64), trainer()
    ours = call(self, model, head=HeadSpec(model.get_output_embeddings(), shift=shift))
    expected = plain(self.args, model, masks(self), shift)
    torch.testing.assert_close(ours[0], expected, rtol=1e-10, atol=1e-12)
    zoo.assert_same_gradients(gradients(model, ours[0]), gradients(model, expected), rtol=1e-8)


def test_fp32_is_as_good_as_torch():
    self = trainer(num_t=4)
    ours = call(self, zoo.llada()).detach()[0]
    assert ours.dtype == torch.float32
    expected = [plain(self.args, zoo.llada(dtype), masks(self)).detach() for dtype in (torch.float32, torch.float64)]
    assert_as_good_as_torch(ours, *expected)


def test_iterations_have_their_own_seeds_as_list_or_tensor():
    model, self = zoo.llada(), trainer()
    both = call(self, model, seeds=[3, 4])
    assert both.shape == (2, B)
    torch.testing.assert_close(both[1], call(self, model, seeds=torch.tensor([4]))[0])
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("mode", ["random", "block_all", "block_random"])
def test_memory_of_the_graph_does_not_grow_with_the_masks(mode):
    """Several micro-batches give the values and gradients of one, and the graph holds the replay alone."""
    model, self = zoo.llada(torch.float64), trainer(forward_type=mode, num_t=2)
    whole = call(self, model)
    cut = call(self, model, micro_batch_tokens=P + L)
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)
    zoo.assert_same_gradients(gradients(model, cut[0]), gradients(model, whole[0]), rtol=1e-8)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        call(self, model, micro_batch_tokens=P + L)
    assert max(kept, default=0) <= 4 * B * 2 * L, "only numbers per token may be kept"


def test_no_logits_are_made():
    model = zoo.llada()
    head = zoo.untouchable(model.get_output_embeddings())
    gradients(model, call(trainer(), model, head=head)[0])


# Masks


@pytest.mark.parametrize("mode", spg.MODES)
def test_masks_are_inside_the_completion_and_the_end_is_masked(mode):
    self = trainer(forward_type=mode, num_t=1 if mode == "all" else 2)
    drawn, data = masks(self), batch()
    completion = torch.cat([torch.zeros(B, P, dtype=torch.bool), data["completion_mask"].bool()], 1)[:, None]
    assert not bool((drawn.rows & ~completion).any())
    assert bool((drawn.rows.sum(-1) > 0).all())
    after = torch.arange(P + L) >= P + END[:, None]
    hidden = drawn.noisy_ids == zoo.MASK
    assert bool((hidden | ~after[:, None]).all())
    assert torch.equal(hidden & completion, drawn.rows)
    padding = data["prompt_mask"] == 0
    assert not bool((hidden[..., :P] & padding[:, None]).any()), "padding is not the model's to see"


def test_random_masks_over_the_whole_range_are_those_of_random_mask():
    self = trainer(use_mask_prompt=True, num_t=5)
    data = batch()
    full = torch.ones(B, L, dtype=torch.int64)
    drawn = spg.draw_masks(self.args, data["ids"], 11, full, sample_ids=torch.arange(B))
    response = torch.arange(P + L).expand(B, -1) >= P
    law = bk.random_mask(
        data["ids"], response, mask_token_id=zoo.MASK, n_mc=5, seed=11, schedule="uniform", prompt_mask=~response,
        prompt_mask_prob=0.3,
    )  # fmt: skip
    assert torch.equal(drawn.noisy_ids, law.noisy_ids)
    assert torch.equal(drawn.rows.flatten().nonzero()[:, 0], law.rows)


def test_counts_keep_to_min_t_and_max_t():
    self = trainer(min_t=0.25, max_t=0.75, num_t=200, use_mask_prompt=False)
    count = masks(self).rows.sum(-1)
    for b, end in enumerate(END.tolist()):
        low = max(int(end * 0.25), 1)
        high = max(int(end * 0.75), low)
        assert set(count[b].tolist()) == set(range(low, high + 1))


def test_blocks_start_where_a_block_starts_and_can_be_limited_to_it():
    self = trainer(forward_type="block_random", num_t=2, use_mask_prompt=False, block_length=4)
    later, own = masks(self).rows[..., P:], masks(self, later_blocks=False).rows[..., P:]
    assert bool((own & ~later).logical_not().all())
    first = own.int().argmax(-1) // 4
    inside = torch.arange(L) // 4 == first[..., None]
    assert torch.equal(own, later & inside)
    everything = (torch.arange(L) < END[:, None])[:, None] & (torch.arange(L) // 4 > first[..., None])
    assert torch.equal(later & ~inside, everything)
    assert set(first[0].tolist()) == {0, 1}, "two of two blocks, without repetition"
    assert set(first[2].tolist()) == {0}, "a completion of two tokens has one block"


def test_masking_the_prompt_reaches_clean_tokens_before_the_block_and_they_count():
    seen = []
    for seed in range(20):
        self = trainer(forward_type="block_all", num_t=2, p_mask_prompt=0.5)
        with_noise = masks(self, seed).rows[0, :, P:]
        without = masks(trainer(forward_type="block_all", num_t=2, use_mask_prompt=False), seed).rows[0, :, P:]
        assert bool((with_noise | ~without).all())
        seen.append(bool((with_noise & ~without).any()))
    assert any(seen)


def test_masks_do_not_depend_on_the_batch_its_order_or_the_global_state():
    self, data = trainer(forward_type="block_random", num_t=2), batch()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = masks(self)
    assert torch.equal(torch.get_rng_state(), state)
    attended = torch.cat([data["prompt_mask"].bool(), torch.ones(B, L, dtype=torch.bool)], 1)
    for order in ([2, 0, 1], [1]):
        part = spg.draw_masks(self.args, data["ids"][order], 11, data["completion_mask"][order], attended[order])
        assert torch.equal(part.noisy_ids, drawn.noisy_ids[order])
    assert not torch.equal(masks(self, seed=12).noisy_ids, drawn.noisy_ids)


def test_masks_do_not_depend_on_left_padding():
    self, data = trainer(), batch()
    ids = torch.cat([torch.zeros(B, 3, dtype=torch.int64), data["ids"]], 1)
    real = torch.cat([torch.zeros(B, 3, dtype=torch.int64), data["prompt_mask"], torch.ones(B, L)], 1).bool()
    padded = spg.draw_masks(self.args, ids, 11, data["completion_mask"], real)
    assert torch.equal(padded.rows[..., 3:], masks(self).rows)
    assert torch.equal(padded.noisy_ids[..., 3:] == zoo.MASK, masks(self).noisy_ids == zoo.MASK)


# Explicit masks, and traps


def test_explicit_masks_are_used_as_they_are():
    model, self = zoo.llada(torch.float64), trainer()
    drawn = masks(self, seed=99)
    ours = call(self, model, noisy_ids=drawn.noisy_ids[None], rows=drawn.rows[None])
    torch.testing.assert_close(ours[0], plain(self.args, model, drawn), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours, call(self, model, seeds=[99]))


def test_a_completion_that_holds_the_mask_token_is_scored_by_explicit_rows():
    ids = batch()["ids"].clone()
    ids[:, P + 1] = zoo.MASK
    self = trainer(use_mask_prompt=False)
    drawn = spg.draw_masks(self.args, ids, 11, batch()["completion_mask"])
    assert bool((drawn.rows.sum(-1) <= END[:, None]).all())
    assert not bool(drawn.rows[..., P + 1].all()), "a clean token that equals the mask token is not a masked one"
    assert bool(call(self, zoo.llada(), ids=ids).isfinite().all())


def test_a_probability_whose_power_underflows_still_counts():
    logp = torch.tensor([[[[-80.0, -1.0]]]], requires_grad=True)
    scored = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    value = spg.estimates(logp, scored, torch.full((1, 1, 1), 2), torch.tensor([False]), "eubo", 1.5, 0.5)
    torch.testing.assert_close(value, torch.tensor([[-40.5]]))
    value.sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, torch.full_like(logp, 0.5))


def test_a_sequence_without_completion_counts_zero_and_has_no_nan():
    none = batch()["completion_mask"].clone()
    none[2] = 0
    model = zoo.llada()
    value = call(trainer(), model, completion_mask=none)
    assert float(value[0, 2].detach()) == 0.0
    assert all(bool(g.isfinite().all()) for g in gradients(model, value[0]).values())


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg_scale": 1.5}, r"args\.cfg_scale is 1\.5"),
        ({"logp_estimation": "no"}, r"logp_estimation must be one of elbo, eubo, mix, zero; got 'no'"),
        ({"forward_type": "no"}, r"forward_type must be one of all, random, block_all, block_random; got 'no'"),
        ({"forward_type": "all", "num_t": 2}, r"num_t must be 1; got 2"),
        ({"forward_type": "block_all", "block_length": 3}, r"block_length=3 must divide logits_to_keep=8"),
        ({"forward_type": "block_all", "num_t": 3}, r"into at least args\.num_t=3 blocks"),
        ({"min_t": 0.8, "max_t": 0.2}, r"min_t <= args\.max_t <= 1 must hold, got 0\.8 and 0\.2"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(trainer(**changes), zoo.llada())


def test_shapes_that_are_refused():
    model, self, data = zoo.llada(), trainer(), batch()
    drawn = masks(self)
    with pytest.raises(ValueError, match=r"completion_mask must have shape \[3, 8\]"):
        call(self, model, completion_mask=data["completion_mask"][:, 1:])
    with pytest.raises(ValueError, match=r"prompt_mask must have shape \[3, 4\]"):
        call(self, model, prompt_mask=data["prompt_mask"][:, 1:])
    with pytest.raises(ValueError, match=r"mask_seeds must hold one seed per iteration, 1; got 2"):
        spg.get_per_seq_logps(self, model, data["ids"][None], L, [1, 2], None, data["completion_mask"], POSITIVE)
    with pytest.raises(TypeError, match=r"reward_mask must be a torch\.Tensor"):
        spg.get_per_seq_logps(self, model, data["ids"][None], L, [1], None, data["completion_mask"])
    with pytest.raises(ValueError, match=r"rows must have shape"):
        call(self, model, noisy_ids=drawn.noisy_ids[None], rows=drawn.rows)
    with pytest.raises(ValueError, match=r"rows marks tokens outside the completion"):
        call(self, model, noisy_ids=drawn.noisy_ids[None], rows=torch.ones_like(drawn.rows)[None])
