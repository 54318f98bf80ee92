"""Small things that every wrapper of compiled code needs: addresses of tensors, thread count, CUDA stream."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import why_not

HUGE_PAGE_MIN = 8 << 20  # bytes: below, page faults are no matter


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous and of ``dtype``; the tensor itself when it already is. Keep it alive while its address is used."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def threads() -> int:
    """As many threads as torch's own CPU kernels use."""
    return torch.get_num_threads()


def stream(tensor: Tensor) -> tuple[int, int]:
    """Device index and handle of the current CUDA stream on the tensor's device: where its kernels are launched."""
    device = tensor.device
    return device.index, torch.cuda.current_stream(device).cuda_stream


def with_huge_pages(buffer: Tensor) -> Tensor:
    """The same tensor, its memory hinted to be backed by 2 MiB pages when it is large and on the CPU.

    For fresh buffers that are about to be written whole; nothing happens for small ones or without the compiled engine.
    """
    size = buffer.numel() * buffer.element_size()
    if buffer.device.type == "cpu" and size >= HUGE_PAGE_MIN and why_not("cpu", buffer.device) is None:
        from . import _cpu

        _cpu.advise_huge_pages(buffer.data_ptr(), size)
    return buffer
