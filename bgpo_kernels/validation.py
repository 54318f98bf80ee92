"""Checks of what users pass. A wrong value raises ValueError, a wrong type TypeError, before any kernel runs; every
message names the argument and shows the shapes, dtypes or ids at fault.

Checks of *values* (ids, finiteness) make the host wait for a GPU. So a public call makes them all in one read
(``values``), the loops inside the estimators make none, and ``check_values(False)`` leaves them out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

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


class _Checking(threading.local):
    enabled = True


_checking = _Checking()


class check_values:
    """Whether calls look at the values of their tensors, for this thread; usable as ``with bk.check_values(False):``.

    On (the default), ids out of range and non-finite advantages raise ``ValueError``; on a GPU the host then waits once
    per call for the work queued so far. Off, calls of ``masked_logprob``, ``bgpo_loss`` and ``bgpo_head_loss`` only
    queue work, and it is the caller who vouches for ids, as kernels index memory with them. While a CUDA graph is being
    captured they are off by themselves. ``random_mask`` and the model-level calls always make their one read, which
    tells them the lengths.
    """

    def __init__(self, enabled: bool) -> None:
        self._before = _checking.enabled
        _checking.enabled = bool(enabled)

    def __enter__(self) -> None:
        """The setting is already in force."""

    def __exit__(self, *_: object) -> None:
        _checking.enabled = self._before


def _reads(device: torch.device) -> bool:
    return _checking.enabled and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


class Suspect(NamedTuple):
    """Something to look for in a tensor's values."""

    value: Tensor
    bad: Callable[[Tensor], Tensor]  # which entries are
    message: Callable[[Tensor], str]  # from those flags


def values(*suspects: Suspect) -> None:
    """ValueError for the first suspect that holds a bad entry; one read for all of them."""
    found = [(s, s.bad(s.value)) for s in suspects if s.value.numel() and _reads(s.value.device)]
    if not found:
        return
    for (suspect, bad), any_bad in zip(found, torch.stack([bad.any() for _, bad in found]).tolist(), strict=True):
        if any_bad:
            raise ValueError(suspect.message(bad))


def non_finite(name: str, value: Tensor) -> Suspect:
    """Entries that are not finite; the message shows the first of them."""

    def message(bad: Tensor) -> str:
        where, held = bad.nonzero()[:4].tolist(), value[bad][:4].tolist()
        return f"{name} holds non-finite values, first at {where}: {held}"

    return Suspect(value, lambda x: ~torch.isfinite(x), message)


def outside(name: str, value: Tensor, low: int, high: int, what: str) -> Suspect:
    """Ids outside [low, high); the message shows the first of them."""

    def message(bad: Tensor) -> str:
        where, held = bad.nonzero()[:4].tolist(), value[bad][:4].tolist()
        return f"{name} must be in [{low}, {high}) ({what}); got {held} at {where}"

    return Suspect(value, lambda x: (x < low) | (x >= high), message)


def not_positive(name: str, value: Tensor) -> Suspect:
    """Entries that are zero, negative or NaN."""
    return Suspect(value, lambda x: ~(x > 0), lambda _: f"{name} must be positive, got {value.tolist()}")


def finite(name: str, value: Tensor) -> None:
    """ValueError that shows the first offending positions unless all entries are finite."""
    values(non_finite(name, value))


def ids_in_range(name: str, value: Tensor, low: int, high: int, what: str) -> None:
    """ValueError that shows the offending ids unless all are in [low, high)."""
    values(outside(name, value, low, high, what))
