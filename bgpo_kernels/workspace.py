"""The one workspace: a buffer for a chunk of logits, reused by every call, never larger than its set size.

CPU buffers belong to a thread (the engine releases the GIL); CUDA buffers to a (device, stream), so that work queued on
one stream may reuse the buffer without synchronisation. A buffer grows to what a call needs and stays. A call that is
captured in a CUDA graph takes its buffer from the graph's own memory pool.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from . import validation as check
from .native import with_huge_pages

#: Logits of one chunk. On a GPU 1 GiB is 2118 rows of LLaDA's vocabulary in fp32: enough that re-reading the fp32 dW
#: accumulator for every chunk costs about a tenth of the GEMMs. On a CPU 256 MiB keep the same ratio far smaller.
DEFAULT_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
MIN_BYTES = 1 << 16

_limit: int | None = None
_cuda_buffers: dict[tuple[int | None, int], Tensor] = {}
_cpu = threading.local()


def set_workspace_bytes(size: int | None) -> None:
    """Bound the workspace of every device to ``size`` bytes (None: the defaults, 1 GiB on CUDA and 256 MiB on CPU).

    A larger workspace means fewer chunks, hence fewer passes over the fp32 weight gradient; results change by rounding
    only. A row of logits needs ``4 V`` bytes at most; if the size is below that, one row is used.

    Raises:
        TypeError: not an int. ValueError: below 64 KiB.
    """
    global _limit
    _limit = None if size is None else check.integer("size", size, MIN_BYTES)
    release()


def workspace_bytes(device: torch.device | str = "cpu") -> int:
    """The bound in force for a device, in bytes."""
    return _limit if _limit is not None else DEFAULT_BYTES.get(torch.device(device).type, DEFAULT_BYTES["cpu"])


def release() -> None:
    """Give the buffers back to the allocator (this thread's on the CPU)."""
    _cuda_buffers.clear()
    _cpu.buffer = None


def chunk_capacity(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of ``columns`` logits that fit, at least 1."""
    return max(1, workspace_bytes(device) // (row_stride(columns, dtype, device) * dtype.itemsize))


def row_stride(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements between rows: on a GPU a multiple of 16 bytes, so that ragged vocabularies keep aligned vector loads."""
    if device.type != "cuda":
        return columns
    step = max(1, 16 // dtype.itemsize)
    return -(-columns // step) * step


def logits_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, columns]`` over the workspace, uninitialised; valid until the next call on this thread or stream."""
    stride = row_stride(columns, dtype, device)
    raw = _buffer(rows * stride * dtype.itemsize, device)
    return raw.view(dtype).as_strided((rows, columns), (stride, 1))


def _buffer(size: int, device: torch.device) -> Tensor:
    size = -(-size // 256) * 256
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _new(size, device)  # the graph's own: one that is replayed on any stream must not share it with others
    if device.type == "cuda":
        key = (device.index, torch.cuda.current_stream(device).cuda_stream)
        buffer = _cuda_buffers.get(key)
        if buffer is None or buffer.numel() < size:
            _cuda_buffers.pop(key, None)
            buffer = None  # free the smaller one before asking for more
            buffer = _cuda_buffers[key] = _new(size, device)
        return buffer
    buffer = getattr(_cpu, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _cpu.buffer = None
        buffer = _cpu.buffer = _new(size, device)
    return buffer


@torch.inference_mode(False)
def _new(size: int, device: torch.device) -> Tensor:
    """Never an inference tensor: a buffer made while scoring under inference_mode is written to in training too."""
    return with_huge_pages(torch.empty(size, dtype=torch.uint8, device=device))
