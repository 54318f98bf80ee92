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
from .heads import Capture, HeadSpec, capture_head, find_head, forward_kwargs, register, unwrap, without_gradient
from .patched import Patched, patch
from .probe import assert_bidirectional, assume_bidirectional

__all__ = [
    "Capture",
    "HeadSpec",
    "Patched",
    "assert_bidirectional",
    "assume_bidirectional",
    "capture_head",
    "find_head",
    "forward_kwargs",
    "make_bidirectional",
    "patch",
    "register",
    "unwrap",
    "without_gradient",
]
