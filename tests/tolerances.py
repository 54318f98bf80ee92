"""The one rule for float comparisons, and where it comes from.

E(x) = max |x - r| against an fp64 reference r. A kernel passes when ``E(kernel) <= 2 E(torch) + floor``: at most twice
the error torch itself makes in the same dtype. The floor is what any correctly rounded result may differ by,
``2 max |((r + 0.3) - 0.3) - r|`` in the dtype of the result. The mean signed error is bounded too, because a wrong
scale can hide under a maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as_torch(kernel: Tensor, plain: Tensor, reference: Tensor, what: str = "") -> None:
    """``kernel`` and ``plain`` (torch, same dtype) against ``reference`` (fp64)."""
    reference = reference.double()
    assert kernel.shape == reference.shape, f"{what}: shape {list(kernel.shape)} for {list(reference.shape)}"
    assert bool(torch.isfinite(kernel).all()) == bool(torch.isfinite(reference).all()), f"{what}: finiteness differs"
    if reference.numel() == 0:
        return
    rounded = reference.to(kernel.dtype)
    floor = 2 * float((((rounded + 0.3) - 0.3) - rounded).abs().max())
    error = float((kernel.double() - reference).abs().max())
    plain_error = float((plain.double() - reference).abs().max())
    assert error <= 2 * plain_error + floor, f"{what}: error {error:.3e}, torch {plain_error:.3e}, floor {floor:.3e}"
    bias = float((kernel.double() - reference).mean().abs())
    plain_bias = float((plain.double() - reference).abs().mean())
    assert bias <= 2 * plain_bias + floor, f"{what}: mean error {bias:.3e}, torch {plain_bias:.3e}, floor {floor:.3e}"
