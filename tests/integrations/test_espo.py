"""ESPO: ``get_elbo_mc`` against a restatement from all logits of masks and complements, on the masks that it drew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.integrations import espo
from bgpo_kernels.integrations._common import content_ids
from bgpo_kernels.models import HeadSpec

P, L, B = 3, 6, 3
SELF = SimpleNamespace(processing_class=SimpleNamespace(mask_token_id=zoo.MASK))
SEEDS = torch.tensor([[5, 77]])  # one iteration of two MC samples


def tokens() -> Tensor:
    return torch.randint(5, zoo.MASK, (B, P + L), generator=torch.Generator().manual_seed(3))


def response() -> Tensor:
    return (torch.arange(P + L) >= P).expand(B, -1)


def call(model: torch.nn.Module, seeds: Any = SEEDS, reduce_var: bool = True, **options: Any) -> Tensor:
    ids = options.pop("ids", tokens())
    num_mc = options.pop("num_mc", 2)
    return espo.get_elbo_mc(SELF, model, ids.expand(len(seeds), -1, -1), L, seeds, reduce_var, num_mc, **options)


def draw(seeds: Any = (5, 77), ids: Tensor | None = None, **options: Any) -> bk.MaskDraw:
    ids = tokens() if ids is None else ids
    return espo.draw_masks(ids, response()[: len(ids)], list(seeds), zoo.MASK, content_ids(ids), **options)


def masked(drawn: bk.MaskDraw) -> Tensor:
    """``[B, n, L]`` bool."""
    flat = torch.zeros(drawn.noisy_ids.shape, dtype=torch.bool).flatten()
    flat[drawn.rows] = True
    return flat.view(drawn.noisy_ids.shape)[..., P:]


def plain(model: torch.nn.Module, seeds: Any = (5, 77), reduce_var: bool = True, shift: int = 0) -> Tensor:
    """ESPO's estimate ``[B]``: a mask and then its complement, all logits of both, a division per token by its
    probability ``l / (L + 1)`` or ``L / (L + 1) - l / (L + 1)``."""
    ids, total = tokens(), torch.zeros(B, dtype=torch.float64)
    for seed in seeds:
        first = masked(draw([seed], reduce_var=False))[:, 0]  # [B, L]
        loss = torch.zeros(B, L, dtype=torch.float64)
        p = (first.sum(-1, keepdim=True).double() / (L + 1)).expand(-1, L)
        for side, probability in ((first, p), (~first, L / (L + 1) - p))[: 2 if reduce_var else 1]:
            noisy = ids.clone()
            noisy[:, P:] = torch.where(side, zoo.MASK, ids[:, P:])
            output = model(input_ids=noisy)
            logp = getattr(output, "logits", output).log_softmax(-1).roll(shift, 1)[:, P:]
            token = logp.gather(-1, ids[:, P:, None])[..., 0]
            loss = loss.clone()
            loss[side] = token[side].double() * (1 / probability[side]).float()  # weights are fp32
        total = total + loss.sum(-1) / (2 if reduce_var else 1)
    return total / len(seeds)


def gradients(model: torch.nn.Module, values: Tensor) -> dict[str, Tensor]:
    (values.flatten() * torch.tensor([1.0, -0.5, 0.25])).sum().backward()
    return zoo.take_gradients(model)


@pytest.mark.parametrize("reduce_var", [True, False])
@pytest.mark.parametrize(("build", "shift"), [(zoo.llada, 0), (zoo.llada, 1), (zoo.bert, 0)])
def test_values_and_gradients_are_those_of_all_logits(build, shift, reduce_var):
    model = build(torch.float64)
    head = HeadSpec(model.get_output_embeddings(), shift=shift)
    ours, expected = call(model, reduce_var=reduce_var, head=head), plain(model, reduce_var=reduce_var, shift=shift)
    assert ours.shape == (B, 1)
    torch.testing.assert_close(ours[:, 0], expected, rtol=1e-10, atol=1e-12)
    zoo.assert_same_gradients(gradients(model, ours), gradients(model, expected), rtol=1e-8)


def test_fp32_is_as_good_as_torch():
    seeds = range(30)
    ours = torch.cat([call(zoo.llada(), [[s]], num_mc=1).detach()[:, 0] for s in seeds])
    assert ours.dtype == torch.float32
    single, double = (
        torch.cat([plain(m, [s]).detach() for s in seeds]) for m in (zoo.llada(), zoo.llada(torch.float64))
    )
    assert_as_good_as_torch(ours, single.float(), double)


def test_iterations_are_columns_and_mc_samples_a_mean():
    model = zoo.llada()
    both = call(model, [[5, 77], [8, 9]])
    assert both.shape == (B, 2)
    torch.testing.assert_close(both[:, 1:], call(model, torch.tensor([[8, 9]])))
    each = [espo.get_elbo(SELF, model, tokens()[None], L, seeds) for seeds in ([5], torch.tensor([77]))]
    torch.testing.assert_close(both[:, :1], torch.stack(each).mean(0))


def test_an_empty_side_counts_zero_without_nan():
    """Counts 0 and L do come up, and then one side has no row."""
    model, ids = zoo.llada(), tokens()
    for empty in (0, L):
        seed = next(s for s in range(200) if int(draw([s]).count[0, 0]) == empty)
        drawn = draw([seed])
        value = call(model, [[seed]], num_mc=1)
        assert bool(value.isfinite().all())
        both = bk.elbo_logprob(model, ids, response(), draw=drawn, per_sample=True)
        assert float(both[0, 0 if empty == 0 else 1].detach()) == 0.0
        assert all(bool(g.isfinite().all()) for g in gradients(model, value).values())
    alone = call(model, [[next(s for s in range(200) if int(draw([s]).count[1, 0]) == 0)]], num_mc=1, reduce_var=False)
    assert float(alone[1, 0].detach()) == 0.0


def test_a_pair_covers_every_token_once_and_weights_follow_the_counts():
    drawn = draw([5, 77])
    hit = masked(drawn).view(B, 2, 2, L)
    assert torch.equal(hit.sum(2), torch.ones(B, 2, L, dtype=torch.int64))
    count = drawn.count.double()
    expected = torch.where(count > 0, (L + 1) / count, 0.0).float()
    assert torch.equal(drawn.segment_weight, expected)


def test_each_count_is_uniform_from_none_to_all():
    ids = tokens()[:1]
    counts = torch.cat([draw([seed], ids, reduce_var=False).count.flatten() for seed in range(700)])
    found = torch.bincount(counts.long(), minlength=L + 1).double()
    assert float(((found - 100) ** 2 / 100).sum()) < 40, found.tolist()  # chi2 with 6 degrees of freedom, p < 1e-6


def test_masks_do_not_depend_on_the_batch_its_order_or_the_global_state():
    state, ids, whole = torch.get_rng_state(), tokens(), draw()
    for order in ([2, 0, 1], [1]):
        assert torch.equal(draw(ids=ids[order]).noisy_ids, whole.noisy_ids[order])
    assert torch.equal(torch.get_rng_state(), state)
    law = bk.random_mask(
        ids, response(), mask_token_id=zoo.MASK, n_mc=2, seed=5, sample_ids=content_ids(ids), scheme="coupled"
    )
    assert torch.equal(law.noisy_ids, whole.noisy_ids[:, :2])


def test_micro_batches_change_nothing_and_the_graph_holds_numbers_only():
    model = zoo.llada(torch.float64)
    whole, cut = call(model), call(model, micro_batch_tokens=P + L)
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)
    zoo.assert_same_gradients(gradients(model, cut), gradients(model, whole), rtol=1e-8)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        call(model)
    assert max(kept, default=0) <= B, "only numbers per sequence may be kept"


def test_no_logits_are_made():
    model = zoo.llada()
    gradients(model, call(model, head=zoo.untouchable(model.get_output_embeddings())))


def test_padding_is_attended_as_in_the_original_unless_a_mask_is_given():
    model = zoo.llada()
    ids = torch.cat([torch.full((B, 2), 2), tokens()], 1)
    attended = (torch.arange(P + L + 2) >= 2).long().expand(B, -1)
    without = espo.get_elbo_mc(SELF, model, ids[None], L, SEEDS, True, 2, attention_mask=attended)
    torch.testing.assert_close(without, call(model))
    ours = espo.get_elbo_mc(SELF, model, ids[None], L, SEEDS, True, 2, sample_ids=content_ids(tokens()))
    assert not torch.allclose(ours, without)


def test_explicit_masks_are_used_as_they_are():
    model = zoo.llada()
    drawn = draw([123])
    for given in (drawn, [drawn]):
        ours = espo.get_elbo_mc(SELF, model, tokens()[None], L, None, draw=given)
        torch.testing.assert_close(ours, call(model, [[123]], num_mc=1))


def test_a_completion_that_holds_the_mask_token_is_masked_like_any_other():
    ids = tokens()
    ids[0, P + 1] = zoo.MASK
    hit = masked(draw([5, 77], ids)).view(B, 2, 2, L)
    assert torch.equal(hit.sum(2), torch.ones(B, 2, L, dtype=torch.int64)), "rows go by the mask, not by the token"
    assert torch.equal(masked(draw([5], ids))[1:], masked(draw([5]))[1:])
    drawn = draw([5, 77], ids)
    hidden = F.pad(masked(drawn), (P, 0))
    assert torch.equal(drawn.noisy_ids, torch.where(hidden, zoo.MASK, ids[:, None])), "the rest is as it was"
    assert bool(call(zoo.llada(), ids=ids).isfinite().all())


def test_mistakes():
    model, ids = zoo.llada(), tokens()
    with pytest.raises(ValueError, match=r"mask_seeds must be \[I, num_mc\] = \[1, 3\], got \[1, 2\]"):
        call(model, num_mc=3)
    with pytest.raises(ValueError, match=r"mask_seeds must be \[I, num_mc\] = \[1, 2\], got \[2\]"):
        espo.get_elbo_mc(SELF, model, ids[None], L, torch.tensor([1, 2]), True, 2)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[I, B, T\], got \[3, 9\]"):
        espo.get_elbo_mc(SELF, model, ids, L, SEEDS, True, 2)
    with pytest.raises(ValueError, match=r"logits_to_keep must be in \[1, 9\], got 10"):
        espo.get_elbo_mc(SELF, model, ids[None], P + L + 1, SEEDS, True, 2)
    with pytest.raises(ValueError, match=r"draw must hold one MaskDraw per iteration, 2; got 1"):
        espo.get_elbo_mc(SELF, model, ids.expand(2, -1, -1), L, None, draw=draw())
