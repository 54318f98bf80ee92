"""Sample ids from the tokens: the same for a sequence wherever it stands, different for different sequences."""

from __future__ import annotations

import torch

from bgpo_kernels.integrations._common import content_ids

IDS = torch.randint(0, 1000, (64, 12), generator=torch.Generator().manual_seed(0))


def test_ids_belong_to_the_sequence_and_not_to_its_batch() -> None:
    every = content_ids(IDS)
    assert torch.equal(content_ids(IDS[5:9]), every[5:9])
    assert torch.equal(content_ids(IDS.flip(0)), every.flip(0))


def test_padding_on_either_side_does_not_count() -> None:
    for left, right in ((3, 0), (0, 4), (2, 2)):
        padded = torch.nn.functional.pad(IDS, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(IDS), (left, right))
        assert torch.equal(content_ids(padded, mask), content_ids(IDS))
        assert not torch.equal(content_ids(padded), content_ids(IDS))


def test_other_tokens_or_another_order_give_another_id() -> None:
    """All edits of one token, all swaps of two, all rotations: no two of them share an id."""
    row = torch.arange(1, 13)
    edits = [row.clone().index_fill_(0, torch.tensor(i), v) for i in range(12) for v in range(100, 200)]
    swaps = [row.clone().index_copy_(0, torch.tensor([i, j]), row[[j, i]]) for i in range(12) for j in range(i)]
    rotations = [row.roll(k) for k in range(12)]  # the row itself is one of them
    ids = content_ids(torch.stack([*edits, *swaps, *rotations]))
    assert ids.unique().numel() == ids.numel()
    assert content_ids(torch.tensor([[1, 2]])) != content_ids(torch.tensor([[1, 2, 0]]))


def test_ids_fit_the_mask_stream() -> None:
    ids = content_ids(IDS * 2_000_000)
    assert ids.dtype == torch.int64 and bool((ids >= 0).all()) and bool((ids < 2**56).all())
