"""How a model is read: where its vocabulary head is, what it does to the logits, whether it looks both ways.

Every Hugging Face masked LM (BERT, ModernBERT, ...), LLaDA, Dream and DiffuCoder are found by themselves. Any other
`torch.nn.Module` whose last step is a `torch.nn.Linear` can be given with ``head=``, or be made known once::

    import torch
    import bgpo_kernels as bk
    from bgpo_kernels.models import HeadSpec

    class MyDiffusionLM(torch.nn.Module):
        ...                                   # forward(input_ids, ...) ends in 0.5 * self.decoder.out(hidden)

    bk.models.register("MyDiffusionLM", lambda model: HeadSpec(
        model.decoder.out,                    # has .weight [V, H], perhaps .bias [V]
        logit_scale=0.5,                      # what the model multiplies its logits with
        softcap=None,                         # or c where the logits become c * tanh(logits / c)
        shift=0,                              # 1 where row i-1 predicts token i
    ))

Importing this package imports neither transformers nor peft.
"""

from __future__ import annotations

from .bidirectional import make_bidirectional
from .block_diffusion import block_row_logprob
from .block_masks import block_diffusion_inputs, block_layout, block_mask, block_visible
from .block_probe import assert_block_semantics
from .checkpoint import load_native
from .heads import (
    Capture,
    HeadSpec,
    capture_head,
    default_block_length,
    default_mask_token_id,
    find_head,
    forward_kwargs,
    model_spec,
    register,
    unwrap,
    without_gradient,
)
from .known_models import ModelSpec
from .patched import Patched, patch
from .probe import assert_bidirectional, assume_bidirectional
from .remote import load_remote, padding_problem

__all__ = [
    "Capture",
    "HeadSpec",
    "ModelSpec",
    "Patched",
    "assert_bidirectional",
    "assert_block_semantics",
    "assume_bidirectional",
    "block_diffusion_inputs",
    "block_layout",
    "block_mask",
    "block_row_logprob",
    "block_visible",
    "capture_head",
    "default_block_length",
    "default_mask_token_id",
    "find_head",
    "forward_kwargs",
    "load_native",
    "load_remote",
    "make_bidirectional",
    "model_spec",
    "padding_problem",
    "patch",
    "register",
    "unwrap",
    "without_gradient",
]
