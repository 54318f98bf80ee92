"""Masks on a GPU: the bits of the golden values and of the CPU engine, for every law, up to the longest responses."""

from __future__ import annotations

import pytest
import torch
from machine import DEVICE, KERNELS, size
from mask_model import LAWS, assert_same_draw, bits_of, draw, make_batch
from test_mask_stream import GOLDEN, GOLDEN_IDS, GOLDEN_PROMPT, GOLDEN_SEED, from_hex

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
#: (response lengths, tokens per row, n_mc): ragged small ones; a block's border; the longest
BATCHES = {
    "small": ([1, 2, 31, 32, 33, 64], 70, 8),
    "border": size(([1023, 1024, 1025, 511], 1100, 8), ([40, 64], 70, 2)),
    "long": size(([32768, 4097, 20000], 32768, 4), ([300], 320, 2)),
}


@pytest.mark.parametrize("law", GOLDEN)
@pytest.mark.parametrize("backend", KERNELS)
def test_known_masks(law: str, backend: str) -> None:
    ids, response = (t.to(DEVICE) for t in make_batch([12] * 3, 15))
    options = {"n_mc": 4, "seed": GOLDEN_SEED, "sample_ids": torch.tensor(GOLDEN_IDS, device=DEVICE)}
    assert bits_of(draw(law, ids, response, backend=backend, **options), response) == from_hex(GOLDEN[law])


@pytest.mark.parametrize("backend", KERNELS)
def test_known_prompt_masks(backend: str) -> None:
    ids = torch.zeros(3, 16, dtype=torch.int64, device=DEVICE)
    prompt = (torch.arange(16, device=DEVICE) < 12).expand(3, -1)
    drawn = draw(
        "full", ids, ~prompt, n_mc=4, seed=GOLDEN_SEED, sample_ids=torch.tensor(GOLDEN_IDS, device=DEVICE),
        prompt_mask=prompt, prompt_mask_prob=0.375, backend=backend,
    )  # fmt: skip
    assert bits_of(drawn, prompt) == from_hex(GOLDEN_PROMPT)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("backend", KERNELS)
def test_bits_of_the_cpu_engine(law: str, batch: str, backend: str) -> None:
    """Every field, prompts included; ids and a seed beyond 32 bits."""
    lengths, tokens, samples = BATCHES[batch]
    ids, response = make_batch(lengths, tokens)
    sample_ids = torch.arange(len(lengths)) * (2**33 + 1) - 2
    options = {"n_mc": samples, "seed": 2**63 + 12345, "prompt_mask_prob": 0.3}
    want = draw(law, ids, response, sample_ids=sample_ids, prompt_mask=~response, backend="cpu", **options)
    ids, response, sample_ids = (t.to(DEVICE) for t in (ids, response, sample_ids))
    got = draw(law, ids, response, sample_ids=sample_ids, prompt_mask=~response, backend=backend, **options)
    assert got.noisy_ids.device == DEVICE
    assert_same_draw(got, want)


@pytest.mark.parametrize("law", ["exact-stratified", "coupled-uniform"])
@pytest.mark.parametrize("backend", KERNELS)
def test_many_segments(law: str, backend: str) -> None:
    """More segments than blocks run at once: their offsets are handed on from one to the next."""
    ids, response = make_batch([40] * size(1500, 3), 50)
    want = draw(law, ids, response, n_mc=size(16, 2), backend="cpu")
    assert_same_draw(draw(law, ids.to(DEVICE), response.to(DEVICE), n_mc=size(16, 2), backend=backend), want)


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs(backend: str) -> None:
    ids, response = make_batch([30, 50], 60)
    want = draw("exact-harmonic", ids, response, n_mc=4, backend="cpu")
    ids, response = (t.to(DEVICE).T.contiguous().T for t in (ids, response))
    sample_ids = torch.tensor([[0, 9], [1, 9]], device=DEVICE)[:, 0]
    assert_same_draw(draw("exact-harmonic", ids, response, n_mc=4, sample_ids=sample_ids, backend=backend), want)
