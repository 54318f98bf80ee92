"""Mask stream, version 1: known answers, and the same bits from every engine, instruction set and thread count."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mask_model import (
    COUNTS,
    KEYS,
    LAWS,
    MASK_ID,
    PHILOX_ANSWERS,
    PROMPT,
    assert_same_draw,
    bits_of,
    draw,
    draw_with,
    make_batch,
    make_spec,
    philox,
    sample,
    words,
)
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels import _cpu
from bgpo_kernels.backends import engine as engine_of
from bgpo_kernels.backends import why_not
from bgpo_kernels.masks import cpu, reference
from bgpo_kernels.masks.schedule import CountTables, DrawSpec

# Masked positions (bit p: position p) of samples 0..3 of 4 for each of three sample ids, responses of 12 tokens. These
# numbers are the version: code that changes one of them draws another stream, and stored seeds no longer replay.
GOLDEN_SEED, GOLDEN_IDS = 0x0123456789ABCDEF, [3, -2, 2**40 + 5]
GOLDEN = {
    "exact-uniform": ["725 ddb 9ce 098", "d3a 008 df5 bae", "232 eff 754 07d"],
    "exact-stratified": ["401 953 9cf aff", "402 41a df5 fbf", "002 6a9 77c 7ff"],
    "exact-harmonic": ["001 042 1c2 ab9", "002 008 591 fae", "002 208 704 67d"],
    "exact-custom": ["001 143 1c6 ab9", "002 00a d91 fae", "002 289 744 67d"],
    "bernoulli-uniform": ["401 ddb 1c2 088", "c32 000 df5 faf", "202 eff 704 47d"],
    "bernoulli-stratified": ["000 9d3 1c6 eff", "002 008 db5 fff", "002 289 754 fff"],
    "coupled-uniform": ["625 9da 1ce e31", "d3a 2c5 df5 20a", "222 ddd 754 8ab"],
    "coupled-stratified": ["401 bfe dcf 230", "c02 3fd dff 200", "002 ffd 77e 881"],
}
GOLDEN_PROMPT = ["3b0 946 4c0 0fc", "42f c92 44b 9e0", "ca8 bab d76 38b"]  # probability 3/8, indices 0..11 in T

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
IDS = [0, -1, 2**32 - 1, 2**32, 2**33 + 1, -(2**40) - 3, 2**55, 2**63 - 1, -(2**63)]
LENGTHS = (1, 2, 3, 7, 8, 255, 256, 257, 1023, 1024)
KERNELS = ["kernels_baseline", "kernels_avx2", "kernels_avx512"]


def from_hex(rows: list[str]) -> list[list[int]]:
    return [[int(bits, 16) for bits in row.split()] for row in rows]


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def engine(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """Every engine that this machine can run, on the device it is for."""
    on_gpu = request.param in ("triton", "cuda") and torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    if (reason := why_not(request.param, device)) is not None:
        pytest.skip(reason)
    return request.param, device


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the CPU engine that this machine has."""
    best = _cpu.isa()
    try:
        _cpu.use_kernels(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    assert _cpu.isa() == request.param
    yield request.param
    _cpu.use_kernels(best)


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: int, answer: tuple[int | None, ...]) -> None:
    torch_words = tuple(int(w) for w in reference.philox(tuple(torch.tensor(c) for c in counter), key))
    for got in (philox(counter, key), torch_words, _cpu.philox(*counter, key)):
        assert all(want is None or g == want for g, want in zip(got, answer, strict=True)), got


@pytest.mark.parametrize("law", GOLDEN)
def test_known_masks(law: str, engine: tuple[str, torch.device]) -> None:
    want = from_hex(GOLDEN[law])
    model = [[sample(law, 12, j, 4, i, GOLDEN_SEED) for j in range(4)] for i in GOLDEN_IDS]
    assert [[s.bits for s in row] for row in model] == want, "the model of the tests has changed"

    backend, device = engine
    ids, response = (t.to(device) for t in make_batch([12] * 3, 15))
    sample_ids = torch.tensor(GOLDEN_IDS, device=device)
    drawn = draw(law, ids, response, n_mc=4, seed=GOLDEN_SEED, sample_ids=sample_ids, backend=backend)
    assert bits_of(drawn, response) == want
    assert drawn.segment_weight.tolist() == [[s.weight for s in row] for row in model]


def test_known_prompt_masks(engine: tuple[str, torch.device]) -> None:
    want = from_hex(GOLDEN_PROMPT)
    threshold = 2**32 * 3 // 8
    for row, sample_id in zip(want, GOLDEN_IDS, strict=True):
        for j, bits in enumerate(row):
            assert bits == sum(1 << t for t in range(12) if words(t, j, sample_id, PROMPT, GOLDEN_SEED)[0] < threshold)

    backend, device = engine
    ids = torch.arange(39, device=device).view(3, 13)
    response = ids % 13 == 12
    drawn = draw(
        "exact-stratified", ids, response, n_mc=4, seed=GOLDEN_SEED, prompt_mask=~response, prompt_mask_prob=0.375,
        sample_ids=torch.tensor(GOLDEN_IDS, device=device), backend=backend,
    )  # fmt: skip
    assert bits_of(drawn, ~response) == want


@pytest.mark.parametrize("seed", SEEDS)
def test_all_seeds_and_sample_ids_follow_the_specification(seed: int) -> None:
    ids, response = make_batch([5] * len(IDS), 8)
    for law in ("exact-uniform", "bernoulli-stratified"):
        want = [[sample(law, 5, j, 2, i, seed).bits for j in range(2)] for i in IDS]
        for backend in ("reference", "cpu"):
            drawn = draw(law, ids, response, n_mc=2, seed=seed, sample_ids=torch.tensor(IDS), backend=backend)
            assert bits_of(drawn, response) == want, backend


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_short_responses_follow_the_specification(law: str, length: int) -> None:
    ids, response = make_batch([length] * 6, 9, seed=length)
    model = [[sample(law, length, j, 6, b, 7) for j in range(6)] for b in range(6)]
    for backend in ("reference", "cpu"):
        drawn = draw(law, ids, response, n_mc=6, backend=backend)
        assert bits_of(drawn, response) == [[s.bits for s in row] for row in model]
        assert drawn.segment_weight.tolist() == [[s.weight for s in row] for row in model]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_thresholds_belong_to_the_upper_side(backend: str) -> None:
    """A count needs a cumulative probability *above* its word, a prompt token a word *below* its threshold."""
    engine = engine_of("masks", backend)
    ids, response, sample_ids = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None] < 2, torch.tensor([9])
    word = (1 << 32) + words(0, 1, 9, COUNTS, 7)[0]
    for threshold, count in ((word, 2), (word + 1, 1)):
        tables = torch.tensor([threshold, 2 << 32]), torch.ones(2), torch.tensor([0])
        spec = DrawSpec("exact", "table", 2, 1, 2, 7, MASK_ID, tables=CountTables(*tables))
        assert engine.draw_counts(torch.tensor([2]), sample_ids, spec).masked.item() == count
    word = words(3, 1, 9, PROMPT, 7)[0]
    for threshold, masked in ((word, False), (word + 1, True)):
        spec = make_spec("exact", "uniform", 2, mc_range=(1, 2), seed=7, prompt_threshold=threshold)
        noisy = draw_with(engine, ids, response, ~response, sample_ids, spec).noisy_ids
        assert (noisy[0, 0, 3] == MASK_ID).item() == masked


@pytest.mark.parametrize(("sample_id", "position", "masked"), [(163556585, 13, False), (32204527, 14, True)])
def test_a_bernoulli_token_is_masked_below_its_threshold(
    sample_id: int, position: int, masked: bool, engine: tuple[str, torch.device]
) -> None:
    """Found by search: sample ids for which the word of one token equals the threshold, and is one less."""
    threshold = words(0, 0, sample_id, COUNTS, 7)[0] + 1
    assert words(position, 0, sample_id, KEYS, 7)[0] == threshold - masked
    backend, device = engine
    ids = torch.zeros(1, 16, dtype=torch.int64, device=device)
    sample_ids = torch.tensor([sample_id], device=device)
    drawn = draw("bernoulli-uniform", ids, ids == 0, n_mc=1, sample_ids=sample_ids, backend=backend)
    assert (drawn.noisy_ids[0, 0, position] == MASK_ID).item() == masked


@pytest.mark.parametrize(
    ("sample_id", "count", "first", "second"), [(22, 3092, 13797, 6727), (263, 1733, 12679, 14972)]
)
def test_word_1_decides_between_equal_words_0(
    sample_id: int, count: int, first: int, second: int, engine: tuple[str, torch.device]
) -> None:
    """Found by search: two positions share word 0, and a law that draws the count which takes but one of them."""
    length = 16384
    a, b = words(first, 0, sample_id, KEYS, 7), words(second, 0, sample_id, KEYS, 7)
    assert a[0] == b[0] and a[1] < b[1]
    law = torch.full((length,), 1e-12, dtype=torch.float64)
    law[count - 1] = 1 - 1e-12 * (length - 1)
    backend, device = engine
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    sample_ids = torch.tensor([sample_id], device=device)
    drawn = bk.random_mask(
        ids, ids == 0, mask_token_id=MASK_ID, n_mc=1, seed=7, sample_ids=sample_ids, backend=backend,
        schedule=bk.CountSchedule(law.tolist()),
    )  # fmt: skip
    assert int(drawn.count) == count == int((drawn.noisy_ids == MASK_ID).sum())
    assert drawn.noisy_ids[0, 0, first] == MASK_ID and drawn.noisy_ids[0, 0, second] == 0


def one_run(response: Tensor) -> Tensor:
    """The same lengths without holes, starting wherever there is room."""
    lengths, tokens = response.sum(-1, keepdim=True), response.shape[1]
    first = (tokens - lengths) // 2
    place = torch.arange(tokens)
    return (place >= first) & (place < first + lengths)


@functools.cache
def reference_case(law: str, lengths: tuple[int, ...], holes: bool = True) -> tuple[Callable, bk.MaskDraw]:
    """``(redraw(backend), the reference's draw)``, with prompt masks, unusual ids and a seed of 64 bits."""
    tokens = max(lengths) + 80
    ids, response = make_batch(list(lengths), tokens)
    response = response if holes else one_run(response)
    prompt = ~response & (torch.arange(tokens) % 3 != 0)
    sample_ids = torch.tensor((IDS * len(lengths))[: len(lengths)])
    redraw = functools.partial(
        draw, law, ids, response, n_mc=6 if tokens < 2000 else 2, seed=2**64 - 3, sample_ids=sample_ids,
        prompt_mask=prompt, prompt_mask_prob=0.3,
    )  # fmt: skip
    return redraw, redraw(backend="reference")


@pytest.mark.parametrize("holes", [True, False], ids=["holes", "run"])
@pytest.mark.parametrize("law", LAWS)
def test_every_instruction_set_gives_the_reference_bits(law: str, holes: bool, kernels: str) -> None:
    redraw, want = reference_case(law, LENGTHS, holes)
    assert_same_draw(redraw(backend="cpu"), want, f"({kernels})")


@pytest.mark.parametrize("law", ["exact-stratified", "exact-harmonic", "coupled-uniform", "bernoulli-uniform"])
def test_long_responses_give_the_reference_bits(law: str, kernels: str) -> None:
    redraw, want = reference_case(law, (4096, 32768))
    assert_same_draw(redraw(backend="cpu"), want, f"({kernels})")
    if "bernoulli" not in law:
        masked = (want.noisy_ids == MASK_ID) & redraw.args[2][:, None]
        assert torch.equal(masked.sum(-1), want.count)


@pytest.mark.parametrize("law", LAWS)
def test_threads_do_not_matter(law: str) -> None:
    redraw, want = reference_case(law, LENGTHS)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_draw(redraw(backend="cpu"), want, f"({count} threads)")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("law", LAWS)
def test_strided_inputs(law: str, backend: str) -> None:
    ids, response = make_batch([5, 9, 14], 20)
    prompt, sample_ids = ~response, torch.tensor([4, -9, 2**40])

    def spread(tensor: Tensor) -> Tensor:
        """The same values, no two of them neighbours in memory, in column-major order."""
        wide = torch.zeros([2 * size for size in reversed(tensor.shape)], dtype=tensor.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
        view.copy_(tensor)
        assert not view.is_contiguous()
        return view

    options = {"n_mc": 4, "prompt_mask_prob": 0.5, "backend": backend}
    want = draw(law, ids, response, prompt_mask=prompt, sample_ids=sample_ids, **options)
    got = draw(law, spread(ids), spread(response), prompt_mask=spread(prompt), sample_ids=spread(sample_ids), **options)
    assert_same_draw(got, want)


@pytest.mark.parametrize("prompts", [False, True])
def test_the_compiled_inspection_of_inputs(prompts: bool, kernels: str) -> None:
    """Every fact that the checks rest on, each of them true and false, as the reference finds it."""
    ids, response = make_batch([1, 9, 33, 40], 41)
    response[:, 0] = False  # the prompt's
    prompt = ~response if prompts else None
    held, negative, overlapping = ids.clone(), ids.clone(), response.clone()
    held[2, int(response[2].nonzero()[-1])] = MASK_ID
    negative[3, 40], negative[0, 0] = -7, 2**40
    overlapping[1, 0] = True
    cases = [(ids, response), (held, response), (negative, response), (ids, overlapping), (ids.T.clone().T, response)]
    found = [cpu.input_facts(i, r, prompt, None, MASK_ID) for i, r in cases]
    assert found == [reference.input_facts(i, r, prompt, None, MASK_ID) for i, r in cases]
    assert [facts.held for facts in found] == [False, True, False, False, False]
    assert [facts.overlap for facts in found] == [False, False, False, prompts, False]
    assert found[2].lowest == -7 and found[2].highest == 2**40 and found[0].lengths == response.sum(-1).tolist()
    assert found[0].largest_response == int(ids[response].max())


# ----------------------------------------------------------------------------------------------------- equal keys

TIES = [0, 1, 2**8, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]  # every byte, and both signs

CHOOSE = """
#include <algorithm>
#include <cmath>
#include <cstring>
#include "cpu/engine.h"
#include "cpu/masks.inl"

struct GivenKeys {
    const uint64_t* keys;

    void words(int64_t length, uint32_t* out) const { for (int64_t p = 0; p < length; ++p) out[p] = keys[p] >> 32; }
    uint64_t key(int64_t p) const { return keys[p]; }
};

// The engine's own selection with keys from outside: noisy[p] becomes 1 for the `count` smallest, or for the others,
// and `rows` lists those; returns whether word 0 of the keys was enough to tell.
extern "C" bool choose(const uint64_t* keys, int64_t length, int64_t count, bool others, const int64_t* index,
                       const int64_t* zeros, int64_t* noisy, int64_t* rows, int64_t* targets) {
    using namespace bgpo::cpu;
    const Scratch scratch(length);
    const uint32_t last = select_words(GivenKeys{keys}, length, count, scratch);
    const int64_t masked = others ? length - count : count;
    write_segment({length, 0, index}, scratch.words, last, others, masked, 1, zeros, length, {noisy, rows, targets, 0});
    GivenKeys{keys}.words(length, scratch.words);
    return threshold_of(scratch, length, count).found;
}
"""


@pytest.fixture(scope="module", params=["", "-march=native"], ids=["baseline", "native"])
def choose(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., list[bool]]]:
    """The CPU engine's selection, compiled on its own: equal 64-bit keys cannot be drawn on purpose."""
    compiler, sources = shutil.which("c++"), Path(__file__).parents[1] / "csrc"
    if compiler is None or not sources.is_dir():
        pytest.skip("needs a C++ compiler and the sources")
    folder = tmp_path_factory.mktemp("choose")
    (folder / "choose.cpp").write_text(CHOOSE)
    flags = f"-O1 -std=c++17 -shared -fPIC -w {request.param} -I{sources}".split()
    subprocess.run([compiler, *flags, "choose.cpp", "-o", "choose.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "choose.so"))

    library.choose.restype = ctypes.c_bool

    def call(keys: list[int], count: int, others: bool = False, run: bool = True) -> list[bool]:
        size, row = ctypes.c_int64(len(keys)), ctypes.c_int64 * len(keys)
        index, noisy = None if run else row(*range(len(keys))), row(*[-1] * len(keys))
        rows, targets = row(*[-1] * len(keys)), row(*[-1] * len(keys))
        array = (ctypes.c_uint64 * len(keys))(*keys)
        by_words = library.choose(
            array, size, ctypes.c_int64(count), ctypes.c_bool(others), index, row(), noisy, rows, targets
        )  # fmt: skip
        seen.append(by_words)
        assert set(noisy) <= {0, 1}
        masked = [value == 1 for value in noisy]
        found = [p for p, here in enumerate(masked) if here]
        rest = [-1] * (len(keys) - len(found))  # nothing is written beyond the segment's own places
        assert list(rows) == found + rest and list(targets) == [0] * len(found) + rest
        return masked

    seen: list[bool] = []
    yield call
    assert set(seen) == {True, False}, "word 0 decides in some cases and not in others"


def tied_keys(case: int) -> list[int]:
    """5 to 60 keys of at most four values."""
    generator = torch.Generator().manual_seed(case)
    values = [TIES[i] for i in torch.randperm(len(TIES), generator=generator)[:4].tolist()]
    size = 5 + int(torch.randint(0, 56, (1,), generator=generator))
    return [values[i] for i in torch.randint(0, 4, (size,), generator=generator).tolist()]


def smallest(keys: list[int], count: int) -> list[bool]:
    chosen = set(sorted(range(len(keys)), key=lambda p: (keys[p], p))[:count])
    return [p in chosen for p in range(len(keys))]


def test_selection_of_equal_keys(choose: Callable[..., list[bool]]) -> None:
    for case in range(20):
        keys = tied_keys(case)
        for count in range(1, len(keys)):
            want = smallest(keys, count)
            assert choose(keys, count) == choose(keys, count, run=False) == want, (keys, count)
            assert choose(keys, count, others=True) == [not masked for masked in want], (keys, count)


def test_selection_of_keys_that_are_not_uniform(choose: Callable[..., list[bool]]) -> None:
    """Philox keys are uniform and engines may count on it for speed, but not for the result."""
    crowded = [2**63 + p * 7919 % 1000 for p in range(1000)]
    geometric = [2 ** (p * 5 % 64) + p % 3 for p in range(300)]
    two_heaps = [(2**64 - 1 - p if p % 2 else p) for p in range(200)]
    for keys in (crowded, geometric, two_heaps, [5] * 100, [0] * 99 + [2**64 - 1], [2**64 - 1] * 99 + [0]):
        for count in (1, 2, len(keys) // 3, len(keys) // 2, len(keys) - 2, len(keys) - 1):
            assert choose(keys, count) == smallest(keys, count), (keys[:4], count)


def test_selection_of_equal_keys_in_the_reference() -> None:
    for case in range(40):
        keys = tied_keys(case)
        high, low = torch.tensor([k >> 32 for k in keys]), torch.tensor([k & 0xFFFFFFFF for k in keys])
        counts = torch.arange(1, len(keys) + 1)
        got = reference._smallest(high.expand(len(keys), -1), low.expand(len(keys), -1), counts)
        assert got.tolist() == [smallest(keys, count) for count in counts.tolist()]
