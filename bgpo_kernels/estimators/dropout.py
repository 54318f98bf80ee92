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
    """Derives a seed per (sequence, first sample); inert when every module is in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._active = any(training for _, training in self._modes)
        self._base = int(torch.randint(2**31, (), device="cpu")) if self._active else 0
        self._devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self.drawn = False  #: whether the model did use random numbers, so that micro-batches have to be repeated as is

    @contextmanager
    def at(self, b: int, lo: int) -> Iterator[None]:
        """Run a micro-batch under its own seed."""
        if not self._active:
            yield
            return
        with torch.random.fork_rng(devices=self._devices):
            # Each generator by itself: torch.manual_seed would also reach devices that are not restored.
            generators = [torch.default_generator, *(torch.cuda.default_generators[d] for d in self._devices)]
            for generator in generators:
                generator.manual_seed(self._base + 1_000_003 * b + lo)
            before = [generator.get_state() for generator in generators]
            yield
            self.drawn |= any(not torch.equal(g.get_state(), s) for g, s in zip(generators, before, strict=True))

    @contextmanager
    def modes(self) -> Iterator[None]:
        """The training flags of the first pass, for a second one that runs after model.train() or model.eval()."""
        changed = [(module, training) for module, training in self._modes if module.training != training]
        try:
            for module, training in changed:
                module.training = training
            yield
        finally:
            for module, training in changed:
                module.training = not training
