"""dLLM-RL's per-token log-probabilities for LLaDA, MMaDA and Dream (TraceRL, random and coupled masking).

Serves Gen-Verse/dLLM-RL, train/rl_llada.py, rl_mmada.py and rl_dream.py. Each builds noisy sequences once (merged steps
of a decoding trace, or random masks), scores them without gradient for the old policy in
``compute_logp_old_tok_parallel`` and again in ``forward_process``, by a log-softmax of all logits. Both places become
one call:

    lp[b, i] = log p(labels[b, i] | input_ids[b])     where p_mask[b, i], else 0

Saved: the head runs on the tokens of ``p_mask`` (a merged TraceRL step has some 8 of 1024), no [B, T, V] logits and no
[B, T, V] log-probabilities are made.

What differs from upstream:

* Tokens outside ``p_mask`` give 0, for the old policy too, so their ratio is 1; the loss multiplies them by 0. Upstream
  exponentiates the difference of their log-probabilities before it does so: an infinity there makes the loss NaN.
* Log-probabilities are computed in fp32, where upstream takes the log-softmax in the dtype of the logits.
* ``start_pos`` and ``pad_id`` cut the padding off the prompts. rl_dream.py masks it in the attention, the response's
  first token included when it is the padding id; here only the prompt's is. rl_llada.py and rl_mmada.py attend to it:
  leave the two out there to compute the same.

rl_sdar.py and rl_trado.py are served by ``sdar.py``. TraceRL's step map, masks and trees of a trainer's own are all
explicit here, so nothing is drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec
from ._completions import same_as_input, score_rows


def token_logprob(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    p_mask: Tensor,
    *,
    start_pos: int | None = None,
    pad_id: int | None = None,
    temperature: float = 1.0,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``logp_new_tok`` of rl_llada.py and rl_mmada.py, and what ``logp_old_tok`` is filled with; differentiable.

    Args:
        model: the policy, as accelerate has prepared it.
        input_ids: ``[B, T]`` int64, noisy. labels: ``[B, T]`` int64, clean; -100 is allowed outside ``p_mask``.
        p_mask: ``[B, T]`` bool, the tokens to score, any subset.
        start_pos, pad_id: length of the (left-padded) prompts, and the id they are padded with: that padding is cut
            away. Both or neither; neither: padding is attended, as rl_llada.py does.
        temperature: divides the logits.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        ``[B, T]`` fp32 (fp64 for a model in fp64), 0 outside ``p_mask``.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; shapes that disagree, -100 at a token to score.
    """
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("B", "T"))
    same_as_input("labels", labels, input_ids, torch.int64)
    same_as_input("p_mask", p_mask, input_ids, torch.bool)
    ignored = p_mask & (labels < 0)
    if bool(ignored.any()):
        at = ignored.nonzero()[:4].tolist()
        raise ValueError(f"labels hold {labels[ignored][:4].tolist()} at {at}, which p_mask marks as tokens to score")
    (logp,) = score_rows(
        model, input_ids, p_mask, labels, temperature=temperature,
        attention_mask=_without_padding(input_ids, start_pos, pad_id), micro_batch_tokens=micro_batch_tokens,
        head=head, backend=backend,
    )  # fmt: skip
    return logp


def dream_token_logprob(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    p_mask: Tensor,
    start_pos: int,
    pad_id: int,
    *,
    temperature: float = 1.0,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """The same for rl_dream.py: ``[B, T - 1]``, column i for token i + 1, as its ``shift_labels`` and ``shift_mask``.

    The first token is never scored: nothing predicts it. A model that is not known as Dream (by the name of its class)
    needs ``head=HeadSpec(module, shift=1)``.
    """
    if isinstance(p_mask, Tensor) and p_mask.dim() == 2 and bool(p_mask[:, :1].any()):
        first = p_mask[:, 0].nonzero()[:8, 0].tolist()
        raise ValueError(f"p_mask marks the first token of row(s) {first}: row i - 1 predicts token i, so nothing does")
    logp = token_logprob(
        model, input_ids, labels, p_mask, start_pos=start_pos, pad_id=pad_id, temperature=temperature,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    return logp[:, 1:]


def _without_padding(input_ids: Tensor, start_pos: Any, pad_id: Any) -> Tensor | None:
    """``[B, T]`` of 0 and 1 that leaves out the leading run of padding of the prompts."""
    if (start_pos is None) != (pad_id is None):
        raise ValueError(f"start_pos and pad_id belong together: both or neither; got {start_pos} and {pad_id}")
    if start_pos is None:
        return None
    start_pos = check.integer("start_pos", start_pos, 0, input_ids.shape[1])
    response = torch.arange(input_ids.shape[1], device=input_ids.device) >= start_pos
    real = (input_ids != check.integer("pad_id", pad_id, 0)) | response
    return (real.cumsum(-1) > 0).long()
