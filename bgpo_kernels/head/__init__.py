"""The vocabulary head: log-probabilities of masked tokens, and the one-pass loss."""

from .functional import bgpo_head_loss, masked_logprob

__all__ = ["bgpo_head_loss", "masked_logprob"]
