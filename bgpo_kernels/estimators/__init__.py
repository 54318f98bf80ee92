"""ELBO estimates of a whole model, and gradients of any objective of them, at memory independent of n_mc."""

from .bgpo import BgpoStep, bgpo_backward
from .elbo import elbo_logprob
from .replay import ReplayStep, replay_backward

__all__ = ["BgpoStep", "ReplayStep", "bgpo_backward", "elbo_logprob", "replay_backward"]
