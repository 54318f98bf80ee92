"""Not one byte beyond an input or output: every tensor ends where an unreadable page begins.

A load past the end whose value is then discarded changes no result, so only the hardware can report it. Each case runs
in a child process, where such a load is a segmentation fault. (On a GPU this is compute-sanitizer's task.)
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mask_model import MASK_ID, draw_with, make_spec
from torch import Tensor

pytest.importorskip("triton")

from bgpo_kernels.bound import triton_kernels as bound
from bgpo_kernels.head import triton_kernels as head
from bgpo_kernels.head.options import LogitTransform
from bgpo_kernels.masks import triton_kernels as masks
from bgpo_kernels.masks.schedule import HARMONIC, CountTables

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux", reason="needs the interpreter on the CPU, and mprotect"
)


def at_the_edge(data: Tensor) -> Tensor:
    """A copy of ``data`` whose last byte is the last readable one. Pages are never given back."""
    page = mmap.PAGESIZE
    size = data.numel() * data.element_size()
    pages = -(-max(size, 1) // page)
    storage = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(storage))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    flat = torch.frombuffer(storage, dtype=data.dtype, count=data.numel(), offset=pages * page - size)
    return flat.view(data.shape).copy_(data)


def edge_empty(*shape: object, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
    return at_the_edge(torch.zeros(*shape, dtype=dtype))


def survives(case: Callable[[], None]) -> bool:
    """Whether ``case`` runs to its end in a child process whose ``torch.empty`` ends at unreadable pages."""

    def child() -> None:
        torch.empty = edge_empty
        torch.empty_like = lambda x: edge_empty(x.shape, dtype=x.dtype)
        case()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=60)
    return process.exitcode == 0


def test_the_net_catches_an_element_too_many() -> None:
    edge = at_the_edge(torch.zeros(10))

    def read_one_more() -> None:
        faulthandler.disable()  # this one is expected
        ctypes.string_at(edge.data_ptr(), 41)

    assert survives(edge.clone)
    assert not survives(read_one_more)


@pytest.mark.parametrize("vocab", [5, 32, 4097])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_row_kernels(vocab: int, out_dtype: torch.dtype) -> None:
    def case() -> None:
        rows = 2
        logits, bias = at_the_edge(torch.randn(rows, vocab)), at_the_edge(torch.randn(vocab))
        targets = at_the_edge(torch.tensor([0, vocab - 1]))
        stats, g = at_the_edge(torch.zeros(4, rows)), at_the_edge(torch.tensor([1.0, 0.0]))
        head.row_statistics(logits, targets, bias, LogitTransform(), stats, True)
        head.dlogits_(logits, targets, bias, LogitTransform(), stats, g, g, out_dtype)

    assert survives(case)


@pytest.mark.parametrize("scheme, schedule", [("exact", "table"), ("coupled", "uniform"), ("bernoulli", "stratified")])
def test_masks(scheme: str, schedule: str) -> None:
    def case() -> None:
        input_ids = at_the_edge(torch.randint(0, MASK_ID, (2, 37)))
        response = at_the_edge(torch.arange(37).expand(2, 37) > torch.tensor([[5], [16]]))
        prompt = at_the_edge(~response)
        law = HARMONIC if schedule == "table" else schedule
        spec = make_spec(scheme, law, 2, response.sum(-1).tolist(), seed=9, prompt_threshold=1 << 31)
        if spec.device_tables is not None:
            spec = replace(spec, device_tables=CountTables(*map(at_the_edge, spec.device_tables)))
        draw_with(masks, input_ids, response, prompt, at_the_edge(torch.arange(2)), spec)

    assert survives(case)


def test_bound() -> None:
    def case() -> None:
        samples, sequences = at_the_edge(torch.randn(3, 7)), at_the_edge(torch.ones(3))
        bound.bound(samples, sequences, samples, sequences, 0.2, 0.2, 3.0)
        values, offsets = at_the_edge(torch.randn(300)), at_the_edge(torch.tensor([0, 0, 299, 300]))
        bound.segment_sum(values, offsets, sequences)

    assert survives(case)
