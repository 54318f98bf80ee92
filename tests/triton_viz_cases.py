"""What ``triton_viz_run.py`` runs: the functions that launch Triton kernels, on ragged shapes, and faulty kernels.

Every case is a name and a call. Tensors are on the CPU, kernels in the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from mask_model import MASK_ID, draw_with, make_batch, make_spec
from torch import Tensor

from bgpo_kernels.bound import triton_kernels as bound
from bgpo_kernels.bound.segments import RowSegments, SegmentBound
from bgpo_kernels.head import triton_kernels as head
from bgpo_kernels.head.options import LogitTransform
from bgpo_kernels.masks import triton_kernels as masks
from bgpo_kernels.masks.schedule import HARMONIC

Cases = Iterator[tuple[str, Callable[[], object]]]


def head_cases() -> Cases:
    every_option = LogitTransform(scale=0.5, softcap=30.0, temperature=0.7)

    def chunk(vocab: int, dtype: torch.dtype, padding: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        logits = torch.randn(5, vocab + padding).to(dtype)[:, :vocab]
        targets = torch.tensor([0, vocab - 1, 1, vocab // 2, 0])
        return logits, targets, torch.randn(vocab, dtype=acc), torch.zeros(4, 5, dtype=acc)

    def rows(vocab: int, dtype: torch.dtype, out: torch.dtype, padding: int, extras: bool) -> None:
        logits, targets, bias, stats = chunk(vocab, dtype, padding)
        transform = every_option if extras else LogitTransform()
        g = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0], dtype=stats.dtype)  # the third row has no gradient
        bias, h = (bias, g) if extras else (None, None)
        head.row_statistics(logits, targets, bias, transform, stats, extras)
        head.dlogits_(logits, targets, bias, transform, stats, g, h, out)

    def fused(vocab: int, dtype: torch.dtype, out: torch.dtype, padding: int, extras: bool) -> None:
        logits, targets, bias, stats = chunk(vocab, dtype, padding)
        head.row_statistics(logits, targets, bias, every_option, stats, False)
        # Segments 4 to 8 of 3 sequences with 3 samples each; two hold no row; rows 11 to 15 of 20.
        offsets, weight = torch.tensor([11, 11, 13, 14, 14, 16]), torch.rand(5)
        old, length = (torch.randn(3, 3), torch.ones(3)) if extras else (None, None)
        whole = SegmentBound(torch.tensor([1.0, -1.0, 0.0]), old, length, (0.2, 0.2, 3.0), 9.0, (3, 3), "triton")
        segments = RowSegments(offsets, weight, 11, 16, 4, 9, whole)
        head.bound_dlogits_(
            logits, targets, bias, every_option, stats, segments, torch.zeros(5, dtype=stats.dtype), out
        )

    f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
    shapes = {
        "5 fp32": (5, f32, f32, 0),
        "32 fp32 to bf16": (32, f32, bf16, 0),
        "37 bf16, strided": (37, bf16, bf16, 3),
        "4133 fp32 to bf16, strided": (4133, f32, bf16, 3),
        "2055 fp64": (2055, f64, f64, 0),
    }
    for name, shape in shapes.items():
        for extras in (False, True):
            label = f"{name}{', every option' if extras else ''}"
            yield f"rows {label}", lambda shape=shape, extras=extras: rows(*shape, extras)
            yield f"fused {label}", lambda shape=shape, extras=extras: fused(*shape, extras)


def mask_cases() -> Cases:
    laws = {
        "exact": ("exact", "stratified"),
        "table": ("exact", HARMONIC),
        "bernoulli": ("bernoulli", "uniform"),
        "coupled": ("coupled", "stratified"),
        "full": ("full", "stratified"),
    }

    def draw(law: tuple, tokens: int, lengths: list[int], n_mc: int, mc_range: tuple[int, int]) -> None:
        ids, response = make_batch(lengths, tokens)
        spec = make_spec(*law, n_mc, lengths, mc_range, prompt_threshold=1 << 31)
        draw_with(masks, ids % MASK_ID, response, ~response, torch.arange(len(lengths)), spec)

    for name, law in laws.items():
        # 3 sequences and 14 samples are more segments than a program looks back over at once.
        yield f"{name}, 37 tokens", lambda law=law: draw(law, 37, [37, 1, 20], 14, (0, 14))
        yield f"{name}, 1061 tokens", lambda law=law: draw(law, 1061, [1061, 300], 4, (2, 4))


def bound_cases() -> Cases:
    def both(dtype: torch.dtype, sequences: int, n: int, off_policy: bool) -> None:
        samples, each = torch.randn(sequences, n, dtype=dtype), torch.ones(sequences)
        clip = (0.2, 0.2, 3.0) if off_policy else (math.inf,) * 3
        bound.bound(samples, each, *((samples, each) if off_policy else (None, None)), *clip)
        bound.segment_sum(torch.randn(601, dtype=dtype), torch.tensor([0, 0, 300, 300, 600, 601]), torch.ones(5))

    yield "21 samples fp32", lambda: both(torch.float32, 3, 7, True)
    yield "301 samples fp64", lambda: both(torch.float64, 43, 7, False)


# Kernels with a fault, which must be found


@triton.jit
def _load_kernel(values, out, size, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(values + lane), mask=lane < size)


@triton.jit
def _store_kernel(values, out, size, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(values + lane, mask=lane < size))


@triton.jit
def _loop_kernel(values, out, size, BLOCK: tl.constexpr):
    start = size * 0
    while start < size:
        lane = start + tl.arange(0, BLOCK)
        tl.store(out + lane, tl.load(values + lane, mask=lane < size), mask=lane <= size)
        start += BLOCK


@triton.jit
def _row_kernel(values, out, stride, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(values + tl.program_id(0) * stride + lane))


def faulty_cases() -> Cases:
    values, out = torch.zeros(37), torch.zeros(64)
    matrix = torch.zeros(3, 35)[:, :32]
    halves = torch.zeros(128)
    yield "load without a mask", lambda: _load_kernel[(1,)](values, out, 37, BLOCK=64)
    yield "store without a mask", lambda: _store_kernel[(1,)](out, values, 37, BLOCK=64)
    yield "store one too many in a while loop", lambda: _loop_kernel[(1,)](out, values, 37, BLOCK=32)
    yield "load beyond the last row", lambda: _row_kernel[(4,)](matrix, out, 35, BLOCK=32)
    yield "load between two rows", lambda: _row_kernel[(3,)](torch.zeros(3, 35)[:, :31], out, 35, BLOCK=32)
    yield "load of a neighbour", lambda: _load_kernel[(1,)](halves[:37], halves[37:], 37, BLOCK=64)


def all_cases() -> Cases:
    """Every kernel of the package."""
    yield from head_cases()
    yield from mask_cases()
    yield from bound_cases()
