"""Draws of `random_mask`: what every one of them satisfies, what they do not depend on, and the methods of MaskDraw."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
import torch
from mask_model import COUNTS, LAWS, MASK_ID, assert_same_draw, draw, fp32, make_batch, make_spec, words
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.bound import ops as bound_ops
from bgpo_kernels.masks import ops as mask_ops
from bgpo_kernels.masks import reference as mask_reference
from bgpo_kernels.masks.schedule import HARMONIC

BACKENDS = ["reference", "cpu"]
COUPLED = [law for law in LAWS if law.startswith("coupled")]
EXACT = [law for law in LAWS if law.startswith("exact")]
LENGTHS = [1, 2, 5, 13, 30, 64]


def masked_of(drawn: bk.MaskDraw, response: Tensor) -> Tensor:
    """`[B, n, T]`: masked response tokens."""
    return (drawn.noisy_ids == MASK_ID) & response[:, None]


# ---------------------------------------------------------------------------------------------- every draw


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", LAWS)
def test_fields_agree_with_the_noisy_ids(law: str, backend: str) -> None:
    ids, response = make_batch(LENGTHS, 70)
    ids[0, ~response[0]] = MASK_ID  # a prompt may hold the mask token; it is no row
    drawn = draw(law, ids, response, n_mc=8, backend=backend)
    masked = masked_of(drawn, response)
    clean = ids[:, None].expand_as(masked)

    assert torch.equal(drawn.noisy_ids, torch.where(masked, MASK_ID, clean))
    assert drawn.count.dtype == torch.int32 and torch.equal(drawn.count, masked.sum(-1).int())
    assert torch.equal(drawn.rows, masked.flatten().nonzero().flatten())  # ascending, none twice
    assert torch.equal(drawn.targets, clean.reshape(-1)[drawn.rows])
    assert torch.equal(drawn.segment_offsets, torch.tensor([0, *drawn.count.flatten().cumsum(0).tolist()]))
    assert drawn.host_offsets == tuple(drawn.segment_offsets.tolist())
    assert (drawn.num_rows, drawn.n_mc) == (int(masked.sum()), 8)
    assert drawn.max_target == int(ids[response].max())
    assert drawn.segment_weight.dtype == torch.float32 and drawn.segment_weight.shape == (6, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", EXACT)
def test_exact_masks_the_drawn_count_with_its_weight(law: str, backend: str) -> None:
    _, schedule, exact_law = LAWS[law]
    lengths = [1, 2, 17, 64]
    ids, response = make_batch(lengths, 70)
    drawn = draw(law, ids, response, n_mc=16, backend=backend)
    for b, length in enumerate(lengths):
        probability = [1 / length] * length if exact_law is None else [float(q) for q in exact_law(length)]
        for j in range(16):
            count = int(drawn.count[b, j])
            assert 1 <= count <= length
            weight = length / count / length / probability[count - 1]  # (L/l) (1/L) / q(l)
            assert float(drawn.segment_weight[b, j]) == pytest.approx(weight, rel=2**-23)
            if schedule == "stratified":
                assert j * length // 16 + 1 <= count <= -(-(j + 1) * length // 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", COUPLED)
def test_coupled_pairs_are_complements(law: str, backend: str) -> None:
    ids, response = make_batch(LENGTHS, 70)
    drawn = draw(law, ids, response, n_mc=8, backend=backend)
    masked = masked_of(drawn, response)
    assert torch.equal(masked[:, 0::2] ^ masked[:, 1::2], response[:, None].expand(-1, 4, -1))
    weights = zip(response.sum(-1).tolist(), drawn.count.tolist(), drawn.segment_weight.tolist(), strict=True)
    for length, counts, row in weights:
        assert row == [fp32((length + 1) / count) if count else 0.0 for count in counts]
    assert 0 in drawn.count and 1 in drawn.count, "the draw reaches empty sides"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["uniform", "stratified"])
def test_bernoulli_threshold_and_weight(schedule: str, backend: str) -> None:
    ids, response = make_batch([50] * 5, 60)
    n = 8
    drawn = draw(f"bernoulli-{schedule}", ids, response, n_mc=n, backend=backend)
    for b in range(5):
        for j in range(n):
            r = words(0, j, b, COUNTS, 7)[0]
            q = r + 1 if schedule == "uniform" else max(1, ((j << 32) + r + 1) // n)
            assert 1 <= q <= 2**32
            assert float(drawn.segment_weight[b, j]) == fp32(2**32 / q)
            keys = [words(p, j, b, 0, 7)[0] for p in range(50)]
            assert masked_of(drawn, response)[b, j][response[b]].tolist() == [key < q for key in keys]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tokens_of_one_key_are_nested(backend: str) -> None:
    """The count decides how many, the keys which: whatever the law, the masks of one key are ordered by inclusion."""
    ids, response = make_batch([40, 64], 70)
    draws = [masked_of(draw(law, ids, response, n_mc=6, backend=backend), response) for law in EXACT]
    draws += [masked_of(draw("coupled-uniform", ids, response, n_mc=6, backend=backend), response)]
    ordered = 0
    for b in range(2):
        for j in (0, 2, 4):  # odd samples of a coupled pair use the keys of the even one
            chain = sorted((d[b, j] for d in draws), key=lambda masked: int(masked.sum()))
            for fewer, more in pairwise(chain):
                assert not bool((fewer & ~more).any())
                ordered += int(more.sum()) > int(fewer.sum())
    assert ordered > 10, "counts differ, so inclusion says something"


def test_prompt_masks_are_never_rows() -> None:
    ids, response = make_batch([8, 20, 33], 50)
    prompt = ~response & (torch.arange(50) < 40)
    for law in LAWS:
        plain = draw(law, ids, response, n_mc=4)
        for probability in (0.0, 1e-3, 0.5, 1.0, 1):
            drawn = draw(law, ids, response, n_mc=4, prompt_mask=prompt, prompt_mask_prob=probability)
            hidden = (drawn.noisy_ids == MASK_ID) & ~response[:, None]
            assert not bool((hidden & ~prompt[:, None]).any()), "neither response nor prompt: left alone"
            if probability in (0, 1):
                assert torch.equal(hidden, prompt[:, None].expand_as(hidden) & (probability == 1))
            assert torch.equal(drawn.noisy_ids[~hidden], plain.noisy_ids[~hidden])
            assert torch.equal(drawn.rows, plain.rows) and torch.equal(drawn.segment_weight, plain.segment_weight)
    drawn = draw("full", ids, response, n_mc=256, prompt_mask=prompt, prompt_mask_prob=0.25)
    tries = int(prompt.sum()) * 256
    share = int(((drawn.noisy_ids == MASK_ID) & prompt[:, None]).sum()) / tries
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / tries) ** 0.5


# ------------------------------------------------------------------------------------- what draws do not depend on


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", LAWS)
def test_padding_and_holes_do_not_matter(law: str, backend: str) -> None:
    length = 21
    runs = torch.arange(30)[None].repeat(3, 1)
    places = [torch.arange(length), torch.arange(9, 30), torch.randperm(30)[:length].sort().values]
    response = torch.stack([(runs[b, :, None] == place).any(-1) for b, place in enumerate(places)])
    drawn = draw(law, runs, response, n_mc=4, sample_ids=torch.tensor([5, 5, 5]), backend=backend)
    by_rank = torch.stack([masked_of(drawn, response)[b][:, response[b]] for b in range(3)])
    assert torch.equal(by_rank[0], by_rank[1]) and torch.equal(by_rank[0], by_rank[2])
    assert torch.equal(drawn.segment_weight, drawn.segment_weight[:1].expand(3, -1))
    other = draw(law, runs, response, n_mc=4, sample_ids=torch.tensor([5, 6, 2**32 + 5]), backend=backend)
    if law != "full":
        assert not torch.equal(masked_of(other, response)[1], masked_of(drawn, response)[1])
        assert not torch.equal(masked_of(other, response)[2], masked_of(drawn, response)[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", LAWS)
def test_batches_do_not_matter(law: str, backend: str) -> None:
    ids, response = make_batch(LENGTHS, 70)
    sample_ids = torch.tensor([3, -1, 2**35, 0, 8, 1])
    whole = draw(law, ids, response, n_mc=4, sample_ids=sample_ids, backend=backend)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = draw(law, ids[order], response[order], n_mc=4, sample_ids=sample_ids[order], backend=backend)
    for name in ("noisy_ids", "segment_weight", "count"):
        assert torch.equal(getattr(shuffled, name), getattr(whole, name)[order])
    for part in (slice(0, 1), slice(2, 5)):
        piece = draw(law, ids[part], response[part], n_mc=4, sample_ids=sample_ids[part], backend=backend)
        for name in ("noisy_ids", "segment_weight", "count"):
            assert torch.equal(getattr(piece, name), getattr(whole, name)[part])
    default = draw(law, ids, response, n_mc=4, backend=backend)
    assert_same_draw(default, draw(law, ids, response, n_mc=4, sample_ids=torch.arange(6), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", LAWS)
def test_a_range_of_samples_is_cut_from_the_full_draw(law: str, backend: str) -> None:
    ids, response = make_batch(LENGTHS, 70)
    whole = draw(law, ids, response, n_mc=8, backend=backend)
    for lo, hi in ((0, 8), (0, 1), (3, 4), (2, 7), (1, 3), (7, 8)):
        part = draw(law, ids, response, n_mc=8, mc_range=(lo, hi), backend=backend)
        assert part.n_mc == hi - lo
        for name in ("noisy_ids", "segment_weight", "count"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, lo:hi])
        assert torch.equal(part.rows, masked_of(part, response).flatten().nonzero().flatten())


def test_iid_samples_do_not_depend_on_their_number() -> None:
    ids, response = make_batch(LENGTHS, 70)
    for law in ("exact-uniform", "bernoulli-uniform", "coupled-uniform"):
        few, many = draw(law, ids, response, n_mc=2), draw(law, ids, response, n_mc=10)
        assert torch.equal(few.noisy_ids, many.noisy_ids[:, :2])
        assert torch.equal(few.segment_weight, many.segment_weight[:, :2])


def test_numpy_integers_are_integers() -> None:
    """``np.int8(4) << 32`` is 0: a count table built from it would send every draw to the last count."""
    ids, response = make_batch(LENGTHS, 70)
    for law in LAWS:
        got = draw(
            law, ids, response, n_mc=np.int8(4), seed=np.uint64(2**64 - 1), mask_token_id=np.int16(MASK_ID),
            mc_range=(np.int8(0), np.int8(3)),
        )  # fmt: skip
        assert_same_draw(got, draw(law, ids, response, n_mc=4, seed=2**64 - 1, mc_range=(0, 3)))


# ------------------------------------------------------------------------------------------- reduce and sequence


def segments(drawn: bk.MaskDraw) -> list[tuple[int, int]]:
    return list(pairwise(drawn.host_offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS)
def test_reduce_is_the_weighted_sum_of_each_segment(law: str, dtype: torch.dtype) -> None:
    ids, response = make_batch(LENGTHS, 70)
    drawn = draw(law, ids, response, n_mc=4)
    logp = -torch.rand(drawn.num_rows, dtype=dtype).mul(8)
    got = drawn.reduce(logp)
    assert got.shape == (6, 4) and got.dtype == dtype
    weights = drawn.segment_weight.flatten().tolist()
    values = logp.tolist()  # fp64: products and sums below are the documented ones, rounded once at the end
    sums = [reduce(add, values[lo:hi], 0.0) for lo, hi in segments(drawn)]  # sum() compensates from Python 3.12 on
    want = [weight * total for weight, total in zip(weights, sums, strict=True)]
    assert torch.equal(got.flatten(), torch.tensor(want, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_reduce_is_the_weight(dtype: torch.dtype) -> None:
    ids, response = make_batch(LENGTHS, 70)
    drawn = draw("coupled-uniform", ids, response, n_mc=4)
    logp = torch.randn(drawn.num_rows, dtype=dtype, requires_grad=True)
    upstream = torch.randn(6, 4, dtype=dtype)
    (grad,) = torch.autograd.grad(drawn.reduce(logp), logp, upstream)
    per_segment = (upstream * drawn.segment_weight.to(dtype)).flatten()
    want = torch.cat([per_segment[s].expand(hi - lo) for s, (lo, hi) in enumerate(segments(drawn))])
    assert torch.equal(grad, want)


def test_gradcheck_of_reduce() -> None:
    ids, response = make_batch([1, 3, 6], 8)
    drawn = draw("coupled-stratified", ids, response, n_mc=4)
    logp = torch.randn(drawn.num_rows, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(drawn.reduce, logp, eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=0.0)


@pytest.mark.parametrize("law", LAWS)
def test_sequence_is_a_draw_of_its_own(law: str) -> None:
    ids, response = make_batch(LENGTHS, 70)
    drawn = draw(law, ids, response, n_mc=6)
    logp = torch.randn(drawn.num_rows)
    for b, lo, hi in ((0, 0, 6), (3, 1, 2), (5, 2, 6), (2, 3, 5)):
        keep = (response[b] | (torch.arange(70) % 4 == 0)).nonzero().flatten()
        part = drawn.sequence(b, lo, hi, keep)
        clean, scored, own = ids[b : b + 1, keep], response[b : b + 1, keep], torch.tensor([b])
        alone = draw(law, clean, scored, n_mc=6, mc_range=(lo, hi), sample_ids=own)
        for name in ("noisy_ids", "rows", "targets", "segment_offsets", "segment_weight", "count"):
            assert torch.equal(getattr(part, name), getattr(alone, name)), name
        assert part.host_offsets == alone.host_offsets
        assert part.max_target >= (int(part.targets.max()) if part.num_rows else 0)
        first, last = drawn.host_offsets[b * 6 + lo], drawn.host_offsets[b * 6 + hi]
        assert torch.equal(part.reduce(logp[first:last]), drawn.reduce(logp)[b : b + 1, lo:hi])


def test_a_draw_built_by_hand_is_the_same_draw() -> None:
    ids, response = make_batch(LENGTHS, 70)
    for law in LAWS:
        drawn = draw(law, ids, response, n_mc=4)
        fields = (drawn.noisy_ids, drawn.rows, drawn.targets, drawn.segment_offsets, drawn.segment_weight, drawn.count)
        by_hand = bk.MaskDraw(*fields)
        assert by_hand.host_offsets == drawn.host_offsets
        assert by_hand.max_target == int(drawn.targets.max())
    empty = bk.MaskDraw(
        torch.zeros(1, 2, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int32),
    )  # fmt: skip
    assert torch.equal(empty.reduce(torch.zeros(0)), torch.zeros(1, 2))


# ---------------------------------------------------------------------------------------------------- registration


@pytest.mark.no_poison
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", ["exact-stratified", "exact-harmonic", "bernoulli-uniform", "coupled-uniform", "full"])
def test_opcheck_of_the_mask_op(law: str, backend: str) -> None:
    ids, response = make_batch([3, 7], 10)
    sample_ids = torch.tensor([0, 5])
    scheme, schedule, _ = LAWS[law]
    spec = make_spec(scheme, HARMONIC if schedule == "harmonic" else schedule, 4, [3, 7], (1, 3))
    counts = mask_reference.draw_counts(response.sum(-1), sample_ids, replace(spec, seed=2**64 - 5))
    host = (*(spec.tables or (None, None, None)), *counts, int(counts.offsets[-1]))
    prompt = None if law == "full" else ~response
    numbers = (spec.scheme, spec.schedule, 4, 1, 3, -5, MASK_ID, 2**31, backend)
    torch.library.opcheck(mask_ops.mask_draw, (ids, response, prompt, sample_ids, *host, *numbers))


@pytest.mark.no_poison
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_segment_sum(backend: str, dtype: torch.dtype) -> None:
    values = torch.randn(6, dtype=dtype, requires_grad=True)
    offsets, weight = torch.tensor([0, 2, 2, 6]), torch.tensor([0.5, 3.0, -1.0])
    torch.library.opcheck(bound_ops.segment_sum, (values, offsets, weight, backend))
    torch.library.opcheck(bound_ops.segment_sum, (values.detach(), offsets, weight, backend))
