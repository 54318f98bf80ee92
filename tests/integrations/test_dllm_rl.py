"""dLLM-RL (LLaDA, MMaDA, Dream): token log-probabilities and its loss, against its arithmetic on all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from completion_checks import (
    PAD,
    B,
    L,
    LeavesRandomStateAlone,
    P,
    T,
    assert_flat,
    gradients_of,
    logits_of,
    older,
    positional,
    sequences,
    shifted_model,
    token_logp,
    unshifted,
)
from models_zoo import MASK, assert_same_gradients, llada, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import dllm_rl

ADVANTAGES = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)


def trace(shrink: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A merged step of every sequence's trace: (noisy ids, labels, p_mask), as TraceRL builds them."""
    labels = sequences()
    order = torch.rand(B, L, generator=torch.Generator().manual_seed(8)).argsort(-1) // shrink
    p_mask, later = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    p_mask[:, P:], later[:, P:] = order == 1, order >= 1
    return labels.masked_fill(later, MASK), labels, p_mask


def plain(model: nn.Module, noisy: Tensor, labels: Tensor) -> Tensor:
    """rl_llada.py's arithmetic: log-softmax of all logits, gathered at all labels. ``[B, T]``."""
    return token_logp(logits_of(model, noisy), labels.clamp(min=0))


def policy_loss(logp: Tensor, old: Tensor, p_mask: Tensor, eps: float = 0.05, beta: float = 0.01) -> Tensor:
    """rl_llada.py's clipped ratio, a mean over each sequence's tokens, and the k3 penalty."""
    ratio = (logp - old).exp()
    gain = torch.min(ratio * ADVANTAGES[:, None], ratio.clamp(1 - eps, 1 + eps) * ADVANTAGES[:, None])
    per_sequence = (gain * p_mask).sum(1) / p_mask.sum(1).clamp(min=1)
    k3 = (old - logp).exp() - 1 + (logp - old)
    return -per_sequence.sum() / B + beta * (k3 * p_mask).sum() / B


@unshifted
def test_values_and_gradients_of_the_loss(build) -> None:
    noisy, labels, p_mask = trace()
    old = plain(older(build), noisy, labels).detach()
    old_ours = dllm_rl.token_logprob(older(build), noisy, labels, p_mask).detach()
    assert not bool(old_ours[~p_mask].any())
    values, gradients = gradients_of(
        lambda m: dllm_rl.token_logprob(m, noisy, labels, p_mask),
        build(torch.float64),
        lambda logp: policy_loss(logp, old_ours, p_mask),
    )
    expected, expected_gradients = gradients_of(
        lambda m: plain(m, noisy, labels), build(torch.float64), lambda logp: policy_loss(logp, old, p_mask)
    )
    assert values.shape == (B, T)
    torch.testing.assert_close(values[p_mask], expected[p_mask], rtol=1e-10, atol=1e-10)
    assert not bool(values[~p_mask].any())
    assert_same_gradients(gradients, expected_gradients)


def test_dream_gets_one_column_less() -> None:
    noisy, labels, p_mask = trace()
    noisy[:, 0], labels[:, 0] = PAD, PAD  # one token of padding in every prompt
    (first, head), (second, _) = shifted_model(), shifted_model()
    weight = torch.rand(B, T - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def shifted(model: nn.Module) -> Tensor:
        """rl_dream.py: logits of every row but the last against labels of every token but the first; no padding."""
        logp = token_logp(logits_of(model, noisy[:, 1:])[:, :-1], labels[:, 2:])
        return torch.cat([torch.zeros(B, 1), logp], 1) * p_mask[:, 1:]

    values, gradients = gradients_of(
        lambda m: dllm_rl.dream_token_logprob(m, noisy, labels, p_mask, P, PAD, head=head),
        first,
        lambda logp: (weight * logp).sum(),
    )
    expected, expected_gradients = gradients_of(shifted, second, lambda logp: (weight * logp).sum())
    assert values.shape == (B, T - 1)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, expected_gradients)


def test_padding_of_prompts_is_cut_but_not_padding_ids_of_the_response() -> None:
    noisy, labels, p_mask = trace()
    model = llada(torch.float64)
    alone = dllm_rl.token_logprob(model, noisy, labels, p_mask)
    wide = torch.cat([torch.full((B, 2), PAD), noisy], 1), torch.cat([torch.full((B, 2), PAD), labels], 1)
    wide_mask = torch.cat([torch.zeros(B, 2, dtype=torch.bool), p_mask], 1)
    cut = dllm_rl.token_logprob(model, *wide, wide_mask, start_pos=P + 2, pad_id=PAD)
    torch.testing.assert_close(cut[:, 2:], alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dllm_rl.token_logprob(model, *wide, wide_mask)[:, 2:], alone), "padding matters here"
    labels[:, -1], noisy[:, -1] = PAD, MASK  # after real tokens,
    p_mask[:, -1] = True
    noisy[0, :P] = labels[0, :P] = labels[0, P] = PAD  # and right after a prompt that is nothing but padding
    noisy[0, P], p_mask[0, P] = PAD, True
    expected = plain(model, noisy, labels)
    expected[0, P:] = plain(model, noisy[:1, P:], labels[:1, P:])[0]
    found = dllm_rl.token_logprob(model, noisy, labels, p_mask, start_pos=P, pad_id=PAD)
    torch.testing.assert_close(found[p_mask], expected[p_mask], rtol=1e-10, atol=1e-10)


def test_any_subset_of_tokens_and_a_clean_mask_token() -> None:
    """Rows are those of p_mask: unmasked tokens, prompt tokens and labels that are the mask token included."""
    noisy, labels, _ = trace()
    labels[0, P + 1] = noisy[0, P + 1] = MASK
    p_mask = torch.rand(B, T, generator=torch.Generator().manual_seed(9)) < 0.5
    p_mask[0, P + 1] = True
    labels = labels.masked_fill(~p_mask, -100)
    model = llada(torch.float64)
    expected = plain(model, noisy, labels) * p_mask
    torch.testing.assert_close(dllm_rl.token_logprob(model, noisy, labels, p_mask), expected, rtol=1e-10, atol=1e-10)


def test_infinities_outside_the_rows_do_not_reach_the_loss() -> None:
    noisy, labels, p_mask = trace()
    model = llada(torch.float64)
    with torch.no_grad():
        model.get_output_embeddings().weight[labels[0, 0]] = -1e200  # one prompt token: impossible
    old = dllm_rl.token_logprob(model, noisy, labels, p_mask).detach()
    policy_loss(dllm_rl.token_logprob(model, noisy, labels, p_mask), old, p_mask).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_nothing_to_score_gives_zeros_with_a_graph() -> None:
    noisy, labels, p_mask = trace()
    model = llada()
    logp = dllm_rl.token_logprob(model, noisy, labels, torch.zeros_like(p_mask))
    logp.sum().backward()
    assert not bool(logp.any())
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_in_fp32_as_good_as_torch() -> None:
    noisy, labels, p_mask = trace()
    found = [
        dllm_rl.token_logprob(llada(), noisy, labels, p_mask)[p_mask].detach(),
        plain(llada(), noisy, labels)[p_mask].detach(),
        plain(llada(torch.float64), noisy, labels)[p_mask].detach(),
    ]
    assert_as_good_as_torch(*found)


def test_no_logits_and_no_graphs() -> None:
    noisy, labels, p_mask = trace()
    model = llada()
    dllm_rl.token_logprob(model, noisy, labels, p_mask, head=untouchable(model.get_output_embeddings()))

    def call(count: int, tokens: int | None) -> Tensor:
        many = (x[:1].repeat(count, 1) for x in (noisy, labels, p_mask))
        return dllm_rl.token_logprob(llada(), *many, micro_batch_tokens=tokens)

    assert_flat(call, lambda count: count * T)


def test_no_grad_and_random_state() -> None:
    noisy, labels, p_mask = trace()
    with LeavesRandomStateAlone(), torch.no_grad():
        assert not dllm_rl.token_logprob(llada(), noisy, labels, p_mask).requires_grad


def test_the_names_are_those_of_the_trainer() -> None:
    assert positional(dllm_rl.token_logprob) == ["model", "input_ids", "labels", "p_mask"]
    assert positional(dllm_rl.dream_token_logprob)[4:] == ["start_pos", "pad_id"]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({0: torch.zeros(B, T)}, {}, TypeError, "input_ids must be int64"),
        ({1: torch.zeros(B, T - 1, dtype=torch.int64)}, {}, ValueError, "labels must have shape"),
        ({2: torch.zeros(B, T)}, {}, TypeError, "p_mask must be bool"),
        ({1: torch.full((B, T), -100)}, {}, ValueError, r"labels hold \[-100"),
        ({}, {"start_pos": P}, ValueError, "start_pos and pad_id belong together"),
        ({}, {"start_pos": T + 1, "pad_id": 1}, ValueError, "start_pos must be"),
        ({}, {"start_pos": P, "pad_id": -1}, ValueError, "pad_id must be"),
    ],
)
def test_errors(change: dict[int, Tensor], options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = [change.get(i, x) for i, x in enumerate(trace())]
    with pytest.raises(error, match=message):
        dllm_rl.token_logprob(llada(), *arguments, **options)


def test_dreams_first_token_is_refused() -> None:
    noisy, labels, p_mask = trace()
    p_mask[1, 0] = True
    with pytest.raises(ValueError, match=r"p_mask marks the first token of row\(s\) \[1\]"):
        dllm_rl.dream_token_logprob(llada(), noisy, labels, p_mask, P, PAD)
