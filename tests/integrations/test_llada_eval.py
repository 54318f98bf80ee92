"""LLaDA's likelihood evaluation against a restatement from all logits, on the masks that it drew."""

from __future__ import annotations

from typing import Any

import models_zoo as zoo
import pytest
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.integrations import llada_eval
from bgpo_kernels.integrations._common import content_ids
from bgpo_kernels.models import HeadSpec

P, L, N = 4, 5, 12


def tokens(seed: int = 3, length: int = L) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, zoo.MASK, (P + length,), generator=torch.Generator().manual_seed(seed))
    return ids[:P], ids[P:]


def call(model: torch.nn.Module, **options: Any) -> float:
    prompt, answer = options.pop("tokens", tokens())
    return llada_eval.get_log_likelihood(
        model, prompt, answer, options.pop("mc_num", N), options.pop("batch_size", 4), mask_id=zoo.MASK, **options
    )


def draw(prompt: Tensor, answer: Tensor, n: int = N, seed: int = 0) -> bk.MaskDraw:
    sequence = torch.cat([prompt, answer])[None]
    response = torch.arange(len(sequence[0]))[None] >= len(prompt)
    return llada_eval.draw_masks(sequence, response, n, seed, zoo.MASK, content_ids(sequence))


def guided(model: torch.nn.Module, noisy: Tensor, length: int, scale: float, shift: int = 0) -> Tensor:
    """Logits ``[n, T, V]`` of LLaDA's classifier-free guidance: two forward passes, mixed."""
    free = noisy.clone()
    free[:, :length] = zoo.MASK
    logits, without = (model(input_ids=x) for x in (noisy, free))
    logits, without = (getattr(x, "logits", x).roll(shift, 1) for x in (logits, without))
    return without + (scale + 1) * (logits - without)


@torch.no_grad()
def plain(model: torch.nn.Module, scale: float = 0.0, shift: int = 0, pair: Any = None, n: int = N) -> float:
    """Cross-entropy of the masked tokens, each divided by its probability l/L, from all logits."""
    prompt, answer = tokens() if pair is None else pair
    drawn = draw(prompt, answer, n)
    logp = guided(model, drawn.noisy_ids[0], len(prompt), scale, shift).log_softmax(-1)
    clean = torch.cat([prompt, answer]).expand(n, -1)
    token = logp.gather(-1, clean[..., None])[..., 0].flatten()[drawn.rows]
    weight = (len(answer) / drawn.count[0].double()).float().repeat_interleave(drawn.count[0].long())
    return float((token * weight.to(token.dtype)).sum() / n)


@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize(("build", "shift"), [(zoo.llada, 0), (zoo.llada, 1), (zoo.bert, 0)])
def test_the_likelihood_is_that_of_all_logits(build, shift, scale):
    model = build(torch.float64)
    head = HeadSpec(model.get_output_embeddings(), shift=shift)
    ours = call(model, cfg_scale=scale, head=head)
    assert isinstance(ours, float)
    assert ours == pytest.approx(plain(model, scale, shift), rel=1e-10)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_fp32_is_as_good_as_torch(scale):
    pairs = [tokens(seed) for seed in range(40)]
    ours = torch.tensor([call(zoo.llada(), tokens=pair, cfg_scale=scale) for pair in pairs])
    single = torch.tensor([plain(zoo.llada(), scale, pair=pair) for pair in pairs])
    double = torch.tensor([plain(zoo.llada(torch.float64), scale, pair=pair) for pair in pairs], dtype=torch.float64)
    assert_as_good_as_torch(ours, single, double)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_number_is_the_same_in_any_order_and_batch_and_leaves_the_global_state(scale):
    model, state = zoo.llada(torch.float64), torch.get_rng_state()
    first = call(model, cfg_scale=scale)
    call(model, tokens=tokens(8), cfg_scale=scale)
    assert call(model, cfg_scale=scale) == first
    assert call(model, cfg_scale=scale, batch_size=5) == pytest.approx(first, rel=1e-12)
    assert call(model, cfg_scale=scale, seed=1) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_counts_are_spread_evenly_over_the_answer():
    drawn = draw(*tokens(), n=2 * L)
    assert torch.bincount(drawn.count[0].long()).tolist() == [0, *[2] * L]


def test_an_answer_of_one_token_is_exact_and_takes_one_forward(monkeypatch):
    model = zoo.llada(torch.float64)
    prompt, answer = tokens(length=1)
    call(model)  # the probe of the model runs forwards of its own
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    ours = call(model, tokens=(prompt, answer), mc_num=128, batch_size=16)
    assert seen == [1]
    logits = model(input_ids=torch.cat([prompt, torch.tensor([zoo.MASK])])[None]).logits
    assert ours == pytest.approx(float(logits.log_softmax(-1)[0, -1, answer[0]].detach()), rel=1e-10)


def test_a_forward_holds_at_most_a_batch():
    model, seen = zoo.llada(), []
    call(model)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    for scale in (0.0, 1.0):
        seen.clear()
        call(model, batch_size=5, cfg_scale=scale)
        assert sorted(set(seen)) == [2, 5]


def test_explicit_masks_and_ids_are_used():
    model = zoo.llada(torch.float64)
    drawn = draw(*tokens(), seed=7)
    assert call(model, draw=drawn) == pytest.approx(call(model, seed=7), rel=1e-12)
    assert call(model, sample_ids=torch.tensor([5])) != call(model)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_no_logits_are_made_and_no_graph(scale):
    model = zoo.llada()
    call(model, head=zoo.untouchable(model.get_output_embeddings()), cfg_scale=scale)
    assert all(p.grad is None for p in model.parameters())


def test_a_prompt_or_answer_that_holds_the_mask_token_is_scored_by_the_mask():
    model = zoo.llada(torch.float64)
    prompt, answer = (t.clone() for t in tokens())
    prompt[1] = answer[2] = zoo.MASK
    assert call(model, tokens=(prompt, answer)) == pytest.approx(plain(model, pair=(prompt, answer)), rel=1e-10)


# Greedy decoding


@torch.no_grad()
def plain_greedy(model: torch.nn.Module, prompt: Tensor, length: int, scale: float = 0.0, shift: int = 0) -> Tensor:
    """LLaDA's greedy decoding: the most confident of all masks is filled, one forward a token."""
    sequence = torch.cat([prompt, torch.full((length,), zoo.MASK)])[None]
    open_ = torch.arange(len(sequence[0])) >= len(prompt)
    while bool(open_.any()):
        p = guided(model, sequence, len(prompt), scale, shift).softmax(-1)[0]
        p[~open_] = 0
        place = p.max(-1).values.argmax()
        sequence[0, place] = p[place].argmax()
        open_[place] = False
    return sequence[0, len(prompt) :]


@pytest.mark.parametrize("scale", [0.0, 2.0])
@pytest.mark.parametrize("shift", [0, 1])
def test_greedy_says_whether_decoding_gives_the_answer(scale, shift):
    model = zoo.llada(torch.float64)
    head = HeadSpec(model.get_output_embeddings(), shift=shift)
    for seed in range(4):
        prompt, _ = tokens(seed)
        decoded = plain_greedy(model, prompt, L, scale, shift)
        assert llada_eval.is_greedy(model, prompt, decoded, scale, zoo.MASK, head=head)
        for place in range(L):
            other = decoded.clone()
            other[place] = (other[place] + 1) % zoo.MASK
            assert not llada_eval.is_greedy(model, prompt, other, scale, zoo.MASK, head=head)


def test_greedy_stops_at_the_first_token_that_differs():
    model, (prompt, _) = zoo.llada(), tokens()
    wrong = (plain_greedy(model, prompt, L) + 1) % zoo.MASK
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    bk.models.assume_bidirectional(model)
    assert not llada_eval.is_greedy(model, prompt, wrong, mask_id=zoo.MASK)
    assert len(seen) == 1


def test_greedy_with_scaled_and_capped_logits():
    model = zoo.Plain(torch.float64, after=lambda x: 3.0 * torch.tanh(0.5 * x / 3.0))
    head = HeadSpec(model.out, logit_scale=0.5, softcap=3.0)
    prompt, _ = tokens()
    assert llada_eval.is_greedy(model, prompt, plain_greedy(model, prompt, L), mask_id=zoo.MASK, head=head)


# Mistakes


def test_mistakes():
    model, (prompt, answer) = zoo.llada(), tokens()
    with pytest.raises(ValueError, match=r"answer holds no token"):
        call(model, tokens=(prompt, answer[:0]))
    with pytest.raises(ValueError, match=r"prompt must have shape \[l1\], got \[1, 4\]"):
        call(model, tokens=(prompt[None], answer))
    with pytest.raises(TypeError, match=r"answer must be int64, got float32"):
        call(model, tokens=(prompt, answer.float()))
    with pytest.raises(ValueError, match=r"mc_num must be at least 1, got 0"):
        call(model, mc_num=0)
    with pytest.raises(ValueError, match=r"cfg_scale must be finite and at least 0.0, got -1.0"):
        call(model, cfg_scale=-1.0)
    capped = zoo.Plain(after=lambda x: 3.0 * torch.tanh(x / 3.0))
    with pytest.raises(ValueError, match=r"softcap"):
        call(capped, cfg_scale=1.0, head=HeadSpec(capped.out, softcap=3.0))
