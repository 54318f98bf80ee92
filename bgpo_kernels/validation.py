"""Checks of what users pass. A wrong value raises ValueError, a wrong type TypeError, before any kernel runs; every
message names the argument and shows the shapes, dtypes or ids at fault.

Checks of *values* (ids, finiteness) read the tensor; on a GPU that is one synchronisation, so each public call makes at
most one such check, and the internal paths that reuse a validated draw make none.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

MAX_SEED = 2**64 - 1


def tensor(name: str, value: Any) -> Tensor:
    """``value`` as a tensor argument, or TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor ({tuple(value.shape)}): call this inside the module that owns it, where FSDP has "
            "gathered it, or pass value.full_tensor()"
        )
    return value


def dtype(name: str, value: Tensor, *allowed: torch.dtype) -> None:
    """TypeError unless the tensor has one of the dtypes."""
    if value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def shape(name: str, value: Tensor, expected: tuple[int | str | None, ...], because: str = "") -> None:
    """ValueError unless the shape matches; strings and None in ``expected`` match any size and are shown."""
    ok = value.dim() == len(expected) and all(
        not isinstance(e, int) or e == s for e, s in zip(expected, value.shape, strict=True)
    )
    if not ok:
        wanted = ", ".join("?" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{wanted}]{because}, got {list(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An int (bool refused) within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    value = int(value)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {limits}, got {value}")
    return value


def number(name: str, value: Any, low: float, *, exclusive: bool = False, high: float = math.inf) -> float:
    """A finite float within [low, high] (low excluded when ``exclusive``)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value) or value < low or value > high or (exclusive and value == low):
        above = f"above {low}" if exclusive else f"at least {low}"
        raise ValueError(f"{name} must be finite and {above}" + (f", at most {high}" if high < math.inf else "")
                         + f", got {value}")  # fmt: skip
    return value


def finite(name: str, value: Tensor) -> None:
    """ValueError that shows the first offending positions unless all entries are finite."""
    good = torch.isfinite(value)
    if not bool(good.all()):
        bad = (~good).nonzero()[:4].tolist()
        raise ValueError(f"{name} holds non-finite values, first at {bad}: {value[~good][:4].tolist()}")


def ids_in_range(name: str, value: Tensor, low: int, high: int, what: str) -> None:
    """ValueError that shows the offending ids unless all are in [low, high)."""
    if value.numel() == 0:
        return
    bad = (value < low) | (value >= high)
    if bool(bad.any()):
        where = bad.nonzero()[:4].tolist()
        raise ValueError(f"{name} must be in [{low}, {high}) ({what}); got {value[bad][:4].tolist()} at {where}")
