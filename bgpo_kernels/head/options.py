"""The element-wise map from raw head outputs to the logits that are normalised.

``z = softcap(scale * (h . w + bias)) / temperature`` with ``softcap(a) = c * tanh(a / c)``: the order in which every
Hugging Face head with these options applies them (Cohere and LLaDA scale, Gemma caps), temperature last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """``scale`` multiplies the raw logits, ``softcap`` (None: off) bounds them, ``temperature`` divides the result."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply(self, raw: Tensor) -> Tensor:
        """z for raw logits that already hold the bias; differentiable, in raw's dtype."""
        a = raw * self.scale if self.scale != 1.0 else raw
        if self.softcap is not None:
            a = self.softcap * torch.tanh(a / self.softcap)
        return a / self.temperature if self.temperature != 1.0 else a

    @property
    def softcap_or_zero(self) -> float:
        """The cap as kernels take it: 0 means off."""
        return 0.0 if self.softcap is None else self.softcap
