"""The same dropout in the first and the second forward of a sample, and no trace in the global random state.

A two-pass estimator differentiates the number that its first pass returned, so both passes must draw the same dropout
masks. One number is taken from the global generator per call; every micro-batch then runs under a seed derived from it
and its logical place, whatever was skipped or split before. Models in evaluation mode are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class DropoutSeeds:
    """Derives a seed per (sequence, first sample); inert when the model is in evaluation mode."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._base = int(torch.randint(2**31, ())) if model.training else None
        self._devices = [device] if device.type == "cuda" else []

    @contextmanager
    def at(self, b: int, lo: int) -> Iterator[None]:
        """Run a micro-batch under its own seed."""
        if self._base is None:
            yield
            return
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed(self._base + 1_000_003 * b + lo)
            yield
