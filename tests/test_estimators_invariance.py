"""What must not matter does not: micro-batches, padding, order, the cut of a batch, sequences without advantage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_zoo import (
    MASK,
    Batch,
    V,
    assert_bitwise,
    assert_same_gradients,
    bert,
    every_architecture,
    llada,
    make_batch,
    perturbed,
    take_gradients,
)
from torch import Tensor, nn

import bgpo_kernels as bk

N, SEED, TOKENS = 6, 41, 10


def step(model: nn.Module, batch: Batch, **options: Any) -> tuple[bk.BgpoStep, dict[str, Tensor]]:
    found = bk.bgpo_backward(model, batch.ids, batch.response, batch.advantages, **{"n_mc": N, "seed": SEED} | options)
    return found, take_gradients(model)


def estimates(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    with torch.no_grad():
        return bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **{"n_mc": N, "seed": SEED} | options)


# ------------------------------------------------------------------------------------------------ one set of numbers


@every_architecture
@pytest.mark.parametrize("micro_batch_tokens", [1, 2 * TOKENS, 4 * TOKENS, None])
def test_every_call_computes_the_same_numbers(build: Callable[..., nn.Module], micro_batch_tokens: int | None) -> None:
    """With and without gradient, in one pass or two: the same bits, or on-policy ratios would not be 1."""
    model, batch = build(), make_batch()
    scores = estimates(model, batch, micro_batch_tokens=micro_batch_tokens)
    with_graph = bk.elbo_logprob(
        model, batch.ids, batch.response, per_sample=True, n_mc=N, seed=SEED, micro_batch_tokens=micro_batch_tokens
    )
    assert torch.equal(with_graph, scores)
    on_policy, _ = step(model, batch, micro_batch_tokens=micro_batch_tokens)
    assert torch.equal(on_policy.logprob, scores)
    replayed = bk.replay_backward(
        model, batch.ids, batch.response, Tensor.sum, n_mc=N, seed=SEED, micro_batch_tokens=micro_batch_tokens
    )
    assert torch.equal(replayed.logprob, scores)


@every_architecture
@pytest.mark.parametrize("micro_batch_tokens", [1, 2 * TOKENS, 4 * TOKENS, None])
@pytest.mark.parametrize("chunk_rows", [2, None], ids=["many chunks", "one chunk"])
def test_on_policy_ratio_is_exactly_one(
    build: Callable[..., nn.Module], micro_batch_tokens: int | None, chunk_rows: int | None
) -> None:
    model, batch = build(vocab_size=8192) if chunk_rows else build(), make_batch()
    if chunk_rows:
        bk.set_workspace_bytes(chunk_rows * 8192 * 4)
    old = estimates(model, batch, micro_batch_tokens=micro_batch_tokens)
    plain, expected = step(model, batch, micro_batch_tokens=micro_batch_tokens)
    explicit, found = step(model, batch, old_logprob=old, micro_batch_tokens=micro_batch_tokens)
    assert explicit.stats.max_abs_log_ratio == 0 and explicit.stats.mean_ratio == 1
    assert torch.equal(explicit.loss, plain.loss)
    assert_bitwise(found, expected)


@pytest.mark.parametrize("micro_batch_tokens", range(TOKENS, (N + 1) * TOKENS, TOKENS))
def test_micro_batch_size_is_rounding_only(micro_batch_tokens: int) -> None:
    model, batch = llada(torch.float64), make_batch()
    old = estimates(model, batch)
    perturbed(model)
    whole, expected = step(model, batch, old_logprob=old)
    cut, found = step(model, batch, old_logprob=old, micro_batch_tokens=micro_batch_tokens)
    torch.testing.assert_close(cut.logprob, whole.logprob, rtol=1e-13, atol=0)
    assert_same_gradients(found, expected)


def test_micro_batches_see_the_masks_of_the_whole_draw() -> None:
    model, batch = bert(), make_batch()
    draw = bk.random_mask(batch.ids, batch.response, mask_token_id=MASK, n_mc=N, seed=SEED)
    seen: list[Tensor] = []
    bk.models.assume_bidirectional(model)  # the probe's own inputs would be recorded too
    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    for micro_batch_tokens in (1, 25, 2 * TOKENS, 5 * TOKENS, None):
        seen.clear()
        step(model, batch, micro_batch_tokens=micro_batch_tokens)
        assert torch.equal(torch.cat(seen), draw.noisy_ids.flatten(0, 1))


def test_two_runs_are_equal_to_the_bit() -> None:
    model, batch = llada(), make_batch(5)
    old = estimates(perturbed(model), batch)
    (first, expected), (second, found) = (step(model, batch, old_logprob=old) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert_bitwise(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Loaders of 16-bit checkpoints leave it changed; a length of 257 would not survive bf16."""
    model, batch = llada(), make_batch(3, tokens=260)
    assert batch.length[0] == 257
    old = estimates(model, batch)
    perturbed(model, 0.002)
    plain, expected = step(model, batch, old_logprob=old)
    torch.set_default_dtype(dtype)
    try:
        other, found = step(model, batch, old_logprob=old)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other.loss, plain.loss) and torch.equal(other.logprob, plain.logprob)
    assert_bitwise(found, expected)


# ------------------------------------------------------------------------------------------------ padding and order


def padded(batch: Batch, left: list[int], right: list[int], filler: int) -> tuple[Batch, Tensor]:
    """The sequences with padding on both sides, and the attention mask."""
    size = max(a + b for a, b in zip(left, right, strict=True)) + TOKENS
    shape = (len(batch.ids), size)
    ids, response = torch.full(shape, filler), torch.zeros(shape, dtype=torch.bool)
    attended = torch.zeros(shape, dtype=torch.int64)
    for b, begin in enumerate(left):
        place = slice(begin, begin + TOKENS)
        ids[b, place], response[b, place], attended[b, place] = batch.ids[b], batch.response[b], 1
    return Batch(ids, response, batch.advantages), attended


@every_architecture
@pytest.mark.parametrize("filler", [7, MASK, V + 1000], ids=["a word", "the mask token", "an id outside V"])
@pytest.mark.parametrize(
    ("left", "right"), [([3, 0, 5], [0, 0, 0]), ([0, 0, 0], [0, 4, 1]), ([2, 1, 0], [0, 3, 4])], ids=["l", "r", "both"]
)
def test_padding_changes_no_bit(
    build: Callable[..., nn.Module], left: list[int], right: list[int], filler: int
) -> None:
    model, batch = build(), make_batch()
    old = estimates(model, batch)
    perturbed(model)
    plain, expected = step(model, batch, old_logprob=old)
    wide, attention_mask = padded(batch, left, right, filler)
    for mask in (attention_mask, attention_mask.bool()):
        assert torch.equal(estimates(model, wide, attention_mask=mask), plain.logprob)
        other, found = step(model, wide, old_logprob=old, attention_mask=mask)
        assert torch.equal(other.loss, plain.loss) and torch.equal(other.logprob, plain.logprob)
        assert_bitwise(found, expected)


def test_padding_of_an_explicit_draw() -> None:
    model, batch = bert(), make_batch()
    wide, attention_mask = padded(batch, [2, 1, 0], [0, 3, 4], filler=7)
    drawn = [bk.random_mask(b.ids, b.response, mask_token_id=MASK, n_mc=N, seed=SEED) for b in (batch, wide)]
    plain, expected = step(model, batch, draw=drawn[0])
    other, found = step(model, wide, draw=drawn[1], attention_mask=attention_mask)
    assert torch.equal(other.logprob, plain.logprob)
    assert_bitwise(found, expected)


def test_order_of_sequences() -> None:
    """Log-probabilities follow their sequences to the bit when the ids go with them; sums differ by rounding."""
    model, batch = llada(torch.float64), make_batch(5)
    plain, expected = step(model, batch)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = Batch(*(t[order] for t in batch))
    other, found = step(model, shuffled, sample_ids=order)
    assert torch.equal(other.logprob, plain.logprob[order])
    assert_same_gradients(found, expected)
    without_ids, _ = step(model, shuffled)
    assert not torch.equal(without_ids.logprob, plain.logprob[order]), "masks must follow the ids, not the tokens"


def test_two_calls_are_one() -> None:
    """Cut by sequences, with the normalizer of the whole step."""
    model, batch = llada(torch.float64), make_batch(5)
    old = estimates(model, batch)
    perturbed(model)
    whole, expected = step(model, batch, old_logprob=old)
    loss = 0.0
    for part in (slice(0, 2), slice(2, 5)):
        piece = bk.bgpo_backward(
            model, batch.ids[part], batch.response[part], batch.advantages[part], old_logprob=old[part],
            sample_ids=torch.arange(5)[part], normalizer=5, n_mc=N, seed=SEED,
        )  # fmt: skip
        assert torch.equal(piece.logprob, whole.logprob[part])
        loss += float(piece.loss)
    assert_same_gradients(take_gradients(model), expected)
    assert loss == pytest.approx(float(whole.loss), rel=1e-6)


def test_samples_cut_into_two_calls() -> None:
    """n_mc split by explicit draws: halves of one draw, with the normalizer doubled."""
    model, batch = llada(torch.float64), make_batch()
    whole, expected = step(model, batch)
    for part in ((0, 2), (2, N)):
        half = bk.random_mask(batch.ids, batch.response, mask_token_id=MASK, n_mc=N, seed=SEED, mc_range=part)
        normalizer = len(batch.ids) * N / (part[1] - part[0])
        piece = bk.bgpo_backward(model, batch.ids, batch.response, batch.advantages, draw=half, normalizer=normalizer)
        torch.testing.assert_close(piece.logprob, whole.logprob[:, slice(*part)], rtol=1e-13, atol=0)
    assert_same_gradients(take_gradients(model), expected)


# ------------------------------------------------------------------------------------- sequences without advantage


def count_forwards(model: nn.Module) -> list[int]:
    """Filled with the number of sequences of every forward from now on."""
    sizes: list[int] = []
    bk.models.assume_bidirectional(model)
    model.register_forward_pre_hook(lambda _m, _a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("off_policy", [False, True])
def test_sequences_without_advantage_cost_nothing(off_policy: bool) -> None:
    model, batch = llada(torch.float64), make_batch(5)
    batch = batch._replace(advantages=torch.tensor([0.0, -1.5, 0.0, -0.0, 0.5]))
    active = [1, 4]
    old = estimates(model, batch) if off_policy else None
    perturbed(model)
    sizes = count_forwards(model)
    if old is not None:
        old[0] = torch.nan  # never looked at
    found, gradients = step(model, batch, old_logprob=old)
    assert sum(sizes) == len(active) * N
    assert found.logprob[[0, 2, 3]].isnan().all() and found.logprob[active].isfinite().all()
    assert all(torch.isfinite(value) for value in found.stats)
    alone = Batch(*(t[active] for t in batch))
    expected, without = step(
        model, alone, old_logprob=None if old is None else old[active], sample_ids=torch.tensor(active), normalizer=5
    )
    assert_bitwise(gradients, without)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("existing", [False, True])
def test_no_advantage_at_all(existing: bool) -> None:
    """A group whose rewards are equal: .grad stays what it was, None included, and the loss is 0."""
    model, batch = bert(), make_batch()
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()} if existing else {}
    for name, p in model.named_parameters():
        p.grad = before[name].clone() if existing else None
    sizes = count_forwards(model)
    found = bk.bgpo_backward(model, batch.ids, batch.response, torch.zeros(3), n_mc=N)
    assert found.loss == 0 and found.logprob.isnan().all() and sizes == []
    assert_bitwise(take_gradients(model), before)


def test_samples_without_slope_are_not_run_again() -> None:
    model, batch = llada(torch.float64), make_batch()
    sizes = count_forwards(model)
    bk.replay_backward(model, batch.ids, batch.response, lambda s: s[1, 2:4].sum(), n_mc=N, micro_batch_tokens=TOKENS)
    assert sum(sizes) == 3 * N + 2
    sizes.clear()
    estimates = bk.elbo_logprob(model, batch.ids, batch.response, n_mc=N, micro_batch_tokens=TOKENS)
    estimates[2].backward()
    assert sum(sizes) == 3 * N + N
