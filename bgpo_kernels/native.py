"""Small things that every wrapper of compiled code needs: addresses of tensors, thread count."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous and of ``dtype``; the same tensor when it already is. Keep the result alive while its address is used."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def threads() -> int:
    """As many threads as torch's own CPU kernels use."""
    return torch.get_num_threads()
