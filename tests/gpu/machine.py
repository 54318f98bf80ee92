"""What the tests of this folder run on: a GPU at real shapes, or a CPU at tiny ones (a rehearsal)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from head_cases import make_draw
from host_reads import forbid_host_reads
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.backends import why_not

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
GIB = 1 << 30
T = TypeVar("T")


def size(real: T, tiny: T) -> T:
    """The first on a GPU, the second in a rehearsal."""
    return real if CUDA else tiny


def _backend(name: str) -> Any:
    reason = why_not(name, DEVICE)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


KERNELS = [_backend("cuda" if CUDA else "cpu"), _backend("triton")]
BACKENDS = [*KERNELS, _backend("reference")]
#: (H, V) of the heads that matter; in a rehearsal an even and an odd vocabulary
HEADS = {"llada": size((4096, 126464), (24, 132)), "dream": size((3584, 152064), (20, 157))}
#: ragged segments: empty ones, single rows, whole responses
COUNTS = size([[60, 1, 0], [37, 64, 20], [5, 64, 49]], [[3, 1, 0], [2, 4, 1], [1, 4, 2]])
TOKENS = size(64, 6)


def needs(gib: float) -> pytest.MarkDecorator:
    """Skips on a GPU with less memory."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory / GIB if CUDA else float("inf")
    return pytest.mark.skipif(total < gib, reason=f"needs {gib:.0f} GiB, the GPU has {total:.0f}")


def only_rehearsed(what: str) -> None:
    """Ends a test whose code has run, but whose subject does not exist on a CPU."""
    if not CUDA:
        pytest.skip(f"rehearsed, not tested: {what}")


def new_draw(counts: list[list[int]] = COUNTS, tokens: int = TOKENS, vocab: int = 0) -> bk.MaskDraw:
    """A draw with these masked-token counts on the device."""
    return make_draw(counts, tokens, vocab or HEADS["llada"][1], DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers made on the device: a vocabulary head from the host's generator would take seconds."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def weight_of(head: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """``[V, H]`` for logits of unit variance."""
    width, vocab = head
    return randn(vocab, width, dtype=dtype, scale=width**-0.5)


@contextmanager
def no_host_wait() -> Iterator[None]:
    """Raises where the host waits for the GPU; in a rehearsal, where it would."""
    if not CUDA:
        with forbid_host_reads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(call: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """``call`` as a CUDA graph: (replay, its outputs, which every replay writes anew). Rehearsed without the graph."""
    if not CUDA:
        outputs = call()

        def again() -> None:
            for kept, new in zip(outputs, call(), strict=True):
                kept.copy_(new)

        return again, outputs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the workspace belongs to a stream, so warm up on the one that is captured
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, outputs


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak of the device's memory during ``call`` above the moment before; what it returns counts. 0 on a CPU."""
    if not CUDA:
        call()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    del kept
    return peak
