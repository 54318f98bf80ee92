"""The head's GPU path at real sizes, without a GPU: every torch call of it on meta tensors, row kernels left out.

What a device computes is not seen here, but shapes, dtypes, strides, `out_dtype` overloads, chunk plans and FLOPs are,
at vocabularies that no CPU test could afford.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels import workspace
from bgpo_kernels.bound import segments as bound_segments
from bgpo_kernels.bound.segments import SegmentBound
from bgpo_kernels.head import engine, reference
from bgpo_kernels.head.options import LogitTransform

META = torch.device("meta")
HEADS = {"llada": (4096, 126464), "dream": (3584, 152064)}
SEGMENT = 250  # rows

pytestmark = pytest.mark.skipif(not engine._mm_has_out_dtype(), reason="this torch has no GEMM with out_dtype")


class Recorder:
    """Stand-ins for the row kernels, and what was asked of them and of the GEMMs."""

    def __init__(self) -> None:
        self.chunks: list[int] = []  # rows, as the statistics met them
        self.flops = 0
        self.launches: list[str] = []

    def row_statistics(self, logits, targets, bias, transform, stats, entropy) -> None:
        assert logits.dtype == stats.dtype == torch.float32 and logits.stride(0) * 4 % 16 == 0
        assert targets.shape == (len(logits),) and stats.shape == (4, len(logits))
        self.chunks.append(len(logits))
        self.launches.append("statistics")

    def dlogits_(self, logits, targets, bias, transform, stats, grad, grad_entropy, out_dtype) -> Tensor:
        assert grad.shape == (len(logits),)
        self.launches.append("dlogits")
        return reference.alias_as(logits, out_dtype)

    def bound_dlogits_(self, logits, targets, bias, transform, stats, segments, sums, out_dtype):
        assert segments.offsets.shape[0] == segments.weight.shape[0] + 1 == len(sums) + 1
        self.launches.append("dlogits")
        return reference.alias_as(logits, out_dtype), torch.empty(len(logits), device=META)

    def segment_sum(self, values, offsets, weight) -> Tensor:
        return torch.empty(len(weight), device=META)

    def bound(self, logprob, advantages, old, length, *clip) -> tuple[Tensor, Tensor]:
        return torch.empty_like(logprob), torch.empty_like(logprob)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    for module in (engine, bound_segments):
        monkeypatch.setattr(module, "engine", lambda package, backend: found)
    monkeypatch.setattr(engine, "runs_in_panels", lambda device: True)
    monkeypatch.setattr(engine.Head, "wide_output", True)
    monkeypatch.setattr(workspace, "row_stride", lambda columns, dtype, device: -(-columns // 4) * 4)
    monkeypatch.setattr(workspace, "_buffer", lambda size, device: torch.empty(size, dtype=torch.uint8, device=device))
    mm, addmm = torch.mm, torch.addmm

    def counted_mm(a: Tensor, b: Tensor, **options: object) -> Tensor:
        if a.stride(0) == 1 and a.dtype == torch.bfloat16:  # dlogits^T: a part of dW
            assert options.get("out_dtype") == torch.float32, "never rounded to 16 bits before it is added"
        found.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return mm(a, b, **options)

    def counted_addmm(total: Tensor, a: Tensor, b: Tensor, **options: object) -> Tensor:
        assert options["out"] is total and total.dtype == torch.float32, "accumulates in fp32, in place"
        flops = found.flops + 2 * a.shape[0] * a.shape[1] * b.shape[1]
        result = addmm(total, a, b, **options)
        found.flops = flops  # on meta tensors it is made of a product and a sum
        return result

    monkeypatch.setattr(torch, "mm", counted_mm)
    monkeypatch.setattr(torch, "addmm", counted_addmm)
    return found


def one_pass(shape: tuple[int, int], rows: int, old: bool, trained: bool) -> engine.Gradients:
    width, vocab = shape
    bf16 = {"dtype": torch.bfloat16, "device": META}
    offsets = list(range(0, rows + 1, SEGMENT))
    number = len(offsets) - 1
    head = engine.Head(
        torch.empty(4 * rows, width, **bf16), torch.empty(vocab, width, **bf16), None,
        torch.empty(rows, dtype=torch.int64, device=META), torch.empty(rows, dtype=torch.int64, device=META),
        LogitTransform(), "cuda",
    )  # fmt: skip
    segments = engine.Segments(torch.empty(number + 1, dtype=torch.int64, device=META), offsets,
                               torch.empty(number, device=META))  # fmt: skip
    bound = SegmentBound(
        torch.empty(number, device=META), torch.empty(number, 1, device=META) if old else None, None,
        (math.inf,) * 3, 1.0, (number, 1), "cuda",
    )  # fmt: skip
    into = engine.Gradients(head, True, trained, False)
    assert engine.one_pass(head, segments, bound, into).shape == (number,)
    return into


@pytest.mark.parametrize("addmm_accumulates", [True, False], ids=["torch 2.10", "torch 2.8"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_one_pass_at_real_heads(
    shape: tuple[int, int], old: bool, trained: bool, addmm_accumulates: bool, recorder: Recorder, monkeypatch
) -> None:
    """6NHV or 4NHV and at most half a panel a chunk beyond; two launches a chunk; dW in fp32, dX in bf16."""
    monkeypatch.setattr(engine, "_addmm_accumulates_wide", lambda: addmm_accumulates)
    bk.set_workspace_bytes(1 << 30)
    rows, (width, vocab) = 8000, shape
    into = one_pass(shape, rows, old, trained)
    assert into.hidden.shape == (rows, width) and into.hidden.dtype == torch.bfloat16
    if trained:
        assert into.weight.shape == (vocab, width) and into.weight.dtype == torch.float32
    else:
        assert into.weight is None
    capacity = (1 << 30) // (4 * vocab) // 512 * 512
    assert sum(recorder.chunks) == rows and max(recorder.chunks) <= capacity
    assert len(recorder.chunks) == math.ceil(rows / (capacity // SEGMENT * SEGMENT if old else capacity))
    assert recorder.launches == ["statistics", "dlogits"] * len(recorder.chunks)
    product = 2 * width * vocab
    padding = sum(-chunk % 512 for chunk in recorder.chunks)
    assert recorder.flops == product * ((3 if trained else 2) * rows + padding)


def test_smallest_workspace(recorder: Recorder) -> None:
    """64 MiB hold 132 rows of LLaDA's logits: panels and chunks of 128."""
    bk.set_workspace_bytes(64 << 20)
    one_pass(HEADS["llada"], 1000, False, True)
    assert recorder.chunks == [128] * 7 + [104]
