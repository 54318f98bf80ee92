"""BGPO's lower bound: per-sample terms, their gradients, and statistics."""

from .functional import BoundStats, bgpo_loss

__all__ = ["BoundStats", "bgpo_loss"]
