"""Random masking: which tokens each Monte Carlo sample hides."""

from .draw import MaskDraw
from .functional import random_mask
from .schedule import CountSchedule

__all__ = ["CountSchedule", "MaskDraw", "random_mask"]
