"""``elbo_logprob``: the drop-in. Differentiable ELBO estimates whose graph holds numbers, not activations.

See ``two_pass.py`` for how, and at what price; ``bgpo_backward`` and ``replay_backward`` need no second set of
gradients.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..masks.draw import MaskDraw
from ..masks.schedule import CountSchedule
from ..models import HeadSpec
from .micro_batch import MicroBatches
from .problem import prepare
from .samples import Samples
from .two_pass import differentiable_scores


def elbo_logprob(
    model: nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    n_mc: int = 16,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    scheme: str = "exact",
    schedule: str | CountSchedule = "stratified",
    mask_token_id: int | None = None,
    temperature: float = 1.0,
    per_sample: bool = False,
    micro_batch_tokens: int | None = None,
    draw: MaskDraw | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """Monte Carlo estimates of the evidence lower bound on log p(response | prompt), the stand-in for a log-likelihood.

    ``ell_bj = w_bj * sum_{i masked in sample j} log p(y_i | masked y, x)`` (see :func:`random_mask` for w), and the
    estimate is their mean over j. Under grad mode the result is differentiable by any later loss at memory that does
    not depend on n_mc; under ``torch.no_grad()`` it costs one forward per sample and no logits.

    Args:
        per_sample: return ``ell [B, n_mc]`` instead of the mean ``[B]``.
        Others: as :func:`bgpo_backward`.

    Returns:
        ``[B]`` or ``[B, n_mc]`` fp32 (fp64 for a model in fp64).

    Raises:
        As :func:`bgpo_backward`. In backward, before anything reaches .grad: FloatingPointError for a non-finite
        gradient; RuntimeError when parameters were changed since, under create_graph=True, and (from torch) for
        checkpointing with use_reentrant=True.
    """
    problem = prepare(
        model, input_ids, response_mask, n_mc=n_mc, seed=seed, attention_mask=attention_mask, sample_ids=sample_ids,
        scheme=scheme, schedule=schedule, mask_token_id=mask_token_id, temperature=temperature, draw=draw, head=head,
        backend=backend,
    )  # fmt: skip
    samples = differentiable_scores(Samples(problem), MicroBatches(problem, micro_batch_tokens))
    return samples if per_sample else samples.mean(-1)
