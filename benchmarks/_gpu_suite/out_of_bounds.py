"""A kernel that writes behind the end of a tensor: compute-sanitizer must say so (see `sanitizer`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write(target, beyond):
    """One write at each of the `beyond`-th elements: none of them is the tensor's."""
    tl.store(target + beyond + tl.arange(0, 32), tl.zeros((32,), tl.float32))


if __name__ == "__main__":
    tensor = torch.ones(32, device="cuda")
    write[(1,)](tensor, 32)
    torch.cuda.synchronize()
    print("the write itself went through")
