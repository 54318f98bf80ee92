"""Roundings that Triton does not give by default, and numbers as arguments that it does not round."""

# mypy: allow-untyped-defs
from __future__ import annotations

import struct

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b rounded to nearest; Triton's own fp32 ``/`` is fast and off by up to 2 ulp: 2e-3 at logits of 1e4."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


# In the interpreter a cast to bf16 truncates; on a device it rounds to nearest even.
CAST_TRUNCATES = tl.constexpr(not isinstance(divide, triton.JITFunction))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to dtype, to nearest even, in the interpreter too."""
    if CAST_TRUNCATES and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), float("nan"))
    return x.to(dtype)


def bits(x: float) -> int:
    """The double x as an integer argument of a kernel, for ``number``: Triton would round a float argument to fp32.

    Name the argument in ``do_not_specialize``, so that no value compiles anew. Where x may be 0, annotate it
    ``tl.int64`` too: the pattern 0 alone fits 32 bits, and Triton takes an integer's type from its value.
    """
    return struct.unpack("<q", struct.pack("<d", x))[0]


@triton.jit
def number(pattern, dtype: tl.constexpr):
    """The double whose ``bits`` a kernel was given, rounded once to dtype."""
    return pattern.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)
