"""bgpo_kernels: fused kernels for reinforcement learning of diffusion language models.

Letters used everywhere, in shapes, kernels, tests and documents:

    B sequences        n Monte Carlo samples (n_mc)    T tokens        L response length
    S = B*n segments   N masked rows                   H hidden size   V vocabulary       C rows per chunk of logits

Importing needs no GPU, driver, nvcc or Triton. ``python -m bgpo_kernels.info`` says which engines serve which devices.
"""

from . import models
from .bound import BoundStats, bgpo_loss
from .estimators import BgpoStep, ReplayStep, bgpo_backward, elbo_logprob, replay_backward, row_logprob
from .head import bgpo_head_loss, masked_logprob
from .masks import CountSchedule, MaskDraw, random_mask
from .models import block_row_logprob, patch
from .validation import check_values
from .workspace import set_workspace_bytes, workspace_bytes

__version__ = "0.1.0"

__all__ = [
    "BgpoStep",
    "BoundStats",
    "CountSchedule",
    "MaskDraw",
    "ReplayStep",
    "bgpo_backward",
    "bgpo_head_loss",
    "bgpo_loss",
    "block_row_logprob",
    "check_values",
    "elbo_logprob",
    "masked_logprob",
    "models",
    "patch",
    "random_mask",
    "replay_backward",
    "row_logprob",
    "set_workspace_bytes",
    "workspace_bytes",
]
