"""Mask stream, version 1, in Triton: Philox's published vectors, and bit equality with the reference everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from mask_model import MASK_ID, PHILOX_ANSWERS, draw_with, make_spec

from bgpo_kernels._triton_philox import philox4x32, seed_words
from bgpo_kernels.masks import reference, triton_kernels
from bgpo_kernels.masks.reference import Draw
from bgpo_kernels.masks.schedule import HARMONIC, CountSchedule, DrawSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = not isinstance(philox4x32, triton.JITFunction)

SEEDS = [0, 1, 16, 2**31, 2**32, 2**63 + 5, 2**64 - 1]


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _philox_kernel(counter, words, seed_low, seed_high):
    lane = tl.arange(0, 4)
    key_low = seed_low.to(tl.uint32, bitcast=True)
    key_high = seed_high.to(tl.uint32, bitcast=True)
    c0 = tl.load(counter + 0 + 0 * lane).to(tl.uint32)
    c1 = tl.load(counter + 1 + 0 * lane).to(tl.uint32)
    c2 = tl.load(counter + 2 + 0 * lane).to(tl.uint32)
    c3 = tl.load(counter + 3 + 0 * lane).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, key_low, key_high)
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(words + lane, word.to(tl.int64))


@pytest.mark.parametrize("counter, key, answer", PHILOX_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: int, answer: tuple[int | None, ...]) -> None:
    words = torch.empty(4, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](torch.tensor(counter, device=DEVICE), words, *seed_words(key))
    assert [got for got, want in zip(words.tolist(), answer, strict=True) if want is not None] == [
        want for want in answer if want is not None
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_words_are_the_bits_of_the_seed_as_int32(seed: int) -> None:
    low, high = seed_words(seed)
    assert -(2**31) <= low < 2**31 and -(2**31) <= high < 2**31
    assert (high & 0xFFFFFFFF) << 32 | (low & 0xFFFFFFFF) == seed


@triton.jit
def _look_back_kernel(state, segment, before):
    tl.store(before, triton_kernels._sum_before(state, tl.load(segment)))


@pytest.mark.parametrize("every", [None, 1, 2, 7, 31, 32, 33, 64, 70])
def test_a_segment_adds_up_all_before_it(every: int | None) -> None:
    """Predecessors that know their own count or, each ``every``-th, the sum up to themselves."""
    for segment in (0, 1, 2, 31, 32, 33, 63, 64, 65, 66, 97, 200):
        counts = torch.arange(segment) + 3
        sums = counts.cumsum(0)
        words = counts << 2 | 1
        if every is not None:
            words[::every] = (sums << 2 | 2)[::every]
        beyond = torch.full((2,), -1)  # the ticket before, this segment's own word behind: never to be read
        state = torch.cat((beyond[:1], words, beyond[1:])).to(DEVICE)
        before = torch.empty(1, dtype=torch.int64, device=DEVICE)
        _look_back_kernel[(1,)](state, torch.tensor([segment], device=DEVICE), before)
        assert before.item() == int(counts.sum())


def make_batch(lengths: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    """Random ids, and responses of the given lengths scattered over the row."""
    input_ids = torch.randint(0, MASK_ID, (len(lengths), tokens))
    response = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for b, length in enumerate(lengths):
        response[b, torch.randperm(tokens)[:length]] = True
    return input_ids.to(DEVICE), response.to(DEVICE)


def assert_same_draw(
    input_ids: Tensor, response: Tensor, spec: DrawSpec, ids: Tensor | None = None, prompt: Tensor | None = None
) -> Draw:
    """The kernel's outputs, equal to the reference's bit for bit; returns the reference's."""
    ids = torch.arange(len(input_ids), device=DEVICE) if ids is None else ids.to(DEVICE)
    on_cpu = (input_ids.cpu(), response.cpu(), None if prompt is None else prompt.cpu(), ids.cpu())
    want = draw_with(reference, *on_cpu, spec)
    got = draw_with(triton_kernels, input_ids, response, prompt, ids, spec)
    for name, w, g in zip(Draw._fields, want, got, strict=True):
        assert g.dtype == w.dtype and torch.equal(g.cpu(), w), f"{name} of {spec}"
    return want


LAWS = [
    ("exact", "uniform"),
    ("exact", "stratified"),
    ("exact", HARMONIC),
    ("bernoulli", "uniform"),
    ("bernoulli", "stratified"),
    ("coupled", "uniform"),
    ("coupled", "stratified"),
    ("full", "stratified"),
]


@pytest.mark.parametrize("scheme, schedule", LAWS, ids=lambda v: getattr(v, "name", v))
def test_every_law_matches_the_reference(scheme: str, schedule: str | CountSchedule) -> None:
    lengths = [1, 2, 31, 40]
    input_ids, response = make_batch(lengths, 47)
    assert_same_draw(input_ids, response, make_spec(scheme, schedule, 4, lengths))


@pytest.mark.parametrize("length", [1, 2, 3, 32, 33, 1023, 1024, 1025])
def test_lengths_around_a_block(length: int) -> None:
    input_ids, response = make_batch([length], length + 3)
    spec = make_spec("exact", "stratified", 2)
    drawn = assert_same_draw(input_ids, response, spec)
    assert torch.equal((drawn.noisy_ids == MASK_ID).sum(-1), drawn.masked)


def test_longest_response() -> None:
    length = 32768
    input_ids, response = make_batch([length], length)
    drawn = assert_same_draw(input_ids, response, make_spec("exact", "stratified", 4, mc_range=(1, 2)))
    assert int((drawn.noisy_ids == MASK_ID).sum()) == int(drawn.masked)
    assert length // 4 <= int(drawn.masked) <= length // 2 + 1


def test_long_table_spans_blocks() -> None:
    lengths = [1500, 1200]
    input_ids, response = make_batch(lengths, 1600)
    assert_same_draw(input_ids, response, make_spec("exact", HARMONIC, 2, lengths))


@pytest.mark.parametrize("scheme", ["exact", "bernoulli", "coupled"])
@pytest.mark.parametrize("mc_range", [(0, 1), (1, 2), (3, 6)])
def test_a_range_of_samples_is_a_slice_of_the_full_draw(scheme: str, mc_range: tuple[int, int]) -> None:
    input_ids, response = make_batch([20, 9], 24)
    ids = torch.arange(2, device=DEVICE)
    inputs = (triton_kernels, input_ids, response, None, ids)
    whole = draw_with(*inputs, make_spec(scheme, "stratified", 6))
    part = draw_with(*inputs, make_spec(scheme, "stratified", 6, mc_range=mc_range))
    for name in ("noisy_ids", "masked", "weight"):
        assert torch.equal(getattr(whole, name)[:, slice(*mc_range)], getattr(part, name)), name


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_of_64_bits(seed: int) -> None:
    input_ids, response = make_batch([20, 9], 24)
    assert_same_draw(input_ids, response, make_spec("exact", "stratified", 2, seed=seed))


def test_sample_ids_of_every_size_and_sign() -> None:
    ids = torch.tensor([0, -1, 2**31, 2**32, 2**56 - 1, 2**56, -(2**63), 2**63 - 1])
    input_ids, response = make_batch([12] * len(ids), 16)
    input_ids[:], response[:] = input_ids[0].clone(), response[0].clone()
    drawn = assert_same_draw(input_ids, response, make_spec("exact", "uniform", 2), ids)
    noisy = drawn.noisy_ids
    # Bits 0..55 name a sequence: 0, 2^56 and -2^63 are one, as are -1 and 2^63 - 1 and 2^56 - 1.
    assert torch.equal(noisy[0], noisy[5]) and torch.equal(noisy[0], noisy[6])
    assert torch.equal(noisy[1], noisy[4]) and torch.equal(noisy[1], noisy[7])
    assert not torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[2], noisy[3])


@pytest.mark.parametrize("threshold", [0, 1, 2**31, 2**32 - 1, 2**32])
@pytest.mark.parametrize("scheme", ["exact", "coupled"])
def test_prompt_noise(threshold: int, scheme: str) -> None:
    input_ids, response = make_batch([20, 9], 40)
    prompt = ~response
    prompt[:, :3] = False  # padding: neither prompt nor response
    spec = make_spec(scheme, "stratified", 2, prompt_threshold=threshold)
    drawn = assert_same_draw(input_ids, response, spec, prompt=prompt)
    masked = drawn.noisy_ids.to(DEVICE) == MASK_ID
    assert not (masked & (~response & ~prompt)[:, None]).any()
    if threshold in (0, 2**32):
        assert bool((masked | ~prompt[:, None]).all()) == (threshold == 2**32)


def test_masks_follow_the_response_not_the_padding() -> None:
    response_ids = torch.randint(0, MASK_ID, (1, 20))
    draws = []
    for left, right in ((0, 0), (7, 0), (3, 40)):
        input_ids = torch.nn.functional.pad(response_ids, (left, right)).to(DEVICE)
        response = torch.nn.functional.pad(torch.ones(1, 20, dtype=torch.bool), (left, right)).to(DEVICE)
        ids = torch.tensor([5], device=DEVICE)
        drawn = draw_with(triton_kernels, input_ids, response, None, ids, make_spec("exact", "stratified", 4))
        draws.append(drawn.noisy_ids[..., left : left + 20])
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_row_alone_equals_row_in_a_batch() -> None:
    input_ids, response = make_batch([30, 11, 25], 32)
    spec = make_spec("coupled", "stratified", 4)
    ids = torch.tensor([9, 4, 2**40], device=DEVICE)
    together = draw_with(triton_kernels, input_ids, response, None, ids, spec)
    for b in range(3):
        row = slice(b, b + 1)
        alone = draw_with(triton_kernels, input_ids[row], response[row], None, ids[row], spec)
        for name in ("noisy_ids", "masked", "weight"):
            assert torch.equal(getattr(together, name)[row], getattr(alone, name)), name


@triton.jit
def _colliding_key(position, sample, sample_id, seed_low, seed_high):
    """Four distinct keys, the first and last of all, so that nearly every boundary falls among equal ones."""
    level = (position * 7 + sample.to(tl.int32)) % 4
    return tl.where(level == 3, tl.full([], -1, tl.int64), level.to(tl.int64)).to(tl.uint64, bitcast=True)


@pytest.mark.skipif(not INTERPRETED, reason="replaces a device function, which only the interpreter can")
@pytest.mark.parametrize("scheme", ["exact", "coupled"])
@pytest.mark.parametrize("length", [5, 40])
def test_ties_are_filled_in_position_order(monkeypatch: pytest.MonkeyPatch, scheme: str, length: int) -> None:
    monkeypatch.setattr(triton_kernels, "_selection_key", _colliding_key)
    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", 32)  # ties span blocks
    input_ids, response = make_batch([length], length)
    spec = make_spec(scheme, "stratified", 4)
    drawn = draw_with(triton_kernels, input_ids, response, None, torch.zeros(1, dtype=torch.int64), spec)
    for j in range(4):
        key_sample = j - j % 2 if scheme == "coupled" else j
        level = [(p * 7 + key_sample) % 4 for p in range(length)]
        order = sorted(range(length), key=lambda p: (2**64 - 1 if level[p] == 3 else level[p], p))
        total = int(drawn.masked[0, j])
        chosen = order[length - total :] if scheme == "coupled" and j % 2 else order[:total]
        assert (drawn.noisy_ids[0, j] == MASK_ID).nonzero().flatten().tolist() == sorted(chosen)


def test_counts_of_zero_and_all_in_coupled_pairs() -> None:
    """L = 1 with many pairs draws l = 0 and l = 1: empty sides weigh 0 and their complements hold the token."""
    input_ids, response = make_batch([1], 3)
    drawn = assert_same_draw(input_ids, response, make_spec("coupled", "stratified", 8))
    assert set(drawn.masked.flatten().tolist()) == {0, 1}
    assert torch.equal(drawn.weight, torch.where(drawn.masked > 0, 2.0, 0.0))


def guarded(data: Tensor, poison: float) -> tuple[Tensor, Tensor]:
    """A copy of ``data`` in the middle of poisoned storage, and that storage."""
    storage = torch.full((data.numel() + 256,), poison, dtype=data.dtype, device=data.device)
    view = storage[128 : 128 + data.numel()].view(data.shape)
    return view.copy_(data), storage


def test_reads_and_writes_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs amid poison and outputs amid sentinels: the draw is unchanged, and so are the sentinels."""
    input_ids, response = make_batch([20, 9], 45)
    prompt = ~response
    spec = make_spec("exact", HARMONIC, 2, [20, 9], prompt_threshold=2**31)
    ids = torch.arange(2, device=DEVICE)
    want = draw_with(reference, input_ids.cpu(), response.cpu(), prompt.cpu(), ids.cpu(), spec)
    outputs = []

    def guard(view: Tensor) -> Tensor:
        view, storage = guarded(view, 77)
        outputs.append(storage)
        return view

    zeros, like = torch.zeros, torch.zeros_like
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: guard(zeros(*shape, dtype=dtype, device=device)))
    monkeypatch.setattr(torch, "empty_like", lambda t: guard(like(t)))
    amid = [guarded(x, 1)[0] for x in (input_ids, response, prompt, ids)]
    got = draw_with(triton_kernels, *amid, spec)
    for name, w, g in zip(Draw._fields, want, got, strict=True):
        assert torch.equal(g.cpu(), w), name
    assert len(outputs) >= 7  # six outputs and the state of the scan
    for storage in outputs:
        assert (storage[:128] == 77).all() and (storage[-128:] == 77).all()


def test_empty_batch_and_no_rows() -> None:
    spec = make_spec("exact", "uniform", 2)
    none = torch.empty(0, 5, dtype=torch.int64, device=DEVICE)
    drawn = draw_with(triton_kernels, none, none.bool(), None, none[:, 0], spec)
    assert drawn.noisy_ids.shape == (0, 2, 5) and drawn.masked.shape == drawn.weight.shape == (0, 2)
    assert drawn.offsets.tolist() == [0] and drawn.rows.shape == drawn.targets.shape == (0,)
