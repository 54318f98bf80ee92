"""ELBO estimates and row log-probabilities of a whole model, and gradients of any objective, at flat memory."""

from .bgpo import BgpoStep, bgpo_backward
from .elbo import elbo_logprob
from .replay import ReplayStep, replay_backward
from .rows import row_logprob

__all__ = ["BgpoStep", "ReplayStep", "bgpo_backward", "elbo_logprob", "replay_backward", "row_logprob"]
