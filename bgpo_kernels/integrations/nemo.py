"""NVIDIA NeMo: the masked diffusion loss of NeMo Automodel, and GDPO's quadrature of the ELBO (arXiv 2510.08554).

**Automodel**, ``nemo_automodel/components/loss/dllm_loss.py``, ``MDLMCrossEntropyLoss``: with noise mask m, supervised
mask s, masking probabilities p and the step's global number of supervised tokens N,

    loss = sum_{k: m_k and s_k} -log p_k / max(p_k, 1e-8)  /  max(N, 1)

``mdlm_loss`` has the signature of ``MDLMCrossEntropyLoss.forward`` and takes logits, or hidden states with ``head=``.
Its softmax is of the rows that count. ``mdlm_forward_loss`` also runs the model: it stands for the two statements
``out = model(**batch)`` and ``loss = loss_fn(logits=..., ...)`` of ``DiffusionLMSFTRecipe._forward_backward_step``, and
the head, too, runs on those rows only. There is exactly one forward, as FSDP wants it on every rank, and the fused op
runs inside the head's own forward, where the weight is whole.

**GDPO**: the ELBO is an integral over the noise level t, replaced by quadrature with nodes t_i and weights w_i,

    elbo = sum_i w_i/t_i sum_{k in M_i} log p_k,    M_i a random subset of max(1, floor(t_i L)) of the L response tokens

``gdpo_elbo`` is differentiable at memory that does not grow with the nodes; old policy, reference and current policy
share masks for the same seed. ``weight="realised"`` puts ``w_i L / |M_i|`` for ``w_i / t_i``, without the bias of the
floor in short responses.

What differs from Automodel's loss: log-probabilities are fp32 whatever the logits' dtype; hybrid models' autoregressive
term (``causal_logits``) is refused. Uniform-noise models (DiffusionGemma) have a flat loss over the canvas: give
``noise_mask=loss_mask`` and ``p_mask`` of ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation as check
from ..estimators import elbo_logprob
from ..head import masked_logprob
from ..masks import MaskDraw
from ..models import HeadSpec, assert_bidirectional, capture_head, find_head, forward_kwargs
from ._common import content_ids
from ._subsets import explicit_draw, rank_of, subsets


class DLLMLossOutput(NamedTuple):
    """As Automodel's class of this name; its recipe reads the first two."""

    total_loss: Tensor
    dllm_loss: Tensor
    draft_correct_per_pos: Tensor | None = None
    draft_count_per_pos: Tensor | None = None


def mdlm_loss(
    self: Any,
    logits: Tensor,
    target_ids: Tensor,
    noise_mask: Tensor,
    p_mask: Tensor,
    loss_mask: Tensor,
    loss_mask_ar: Tensor | None = None,
    num_diffusion_tokens: int | None = None,
    num_ar_tokens: int | None = None,
    causal_logits: Tensor | None = None,
    *,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> DLLMLossOutput:
    """As ``MDLMCrossEntropyLoss.forward``.

    Args:
        self: not read. logits: ``[B, T, V]``, or hidden states ``[B, T, H]`` when ``head`` is given; a DTensor is
            gathered.
        target_ids: ``[B, T]`` clean ids. noise_mask: ``[B, T]`` bool, masked tokens. p_mask: ``[B, T]`` probabilities.
        loss_mask: ``[B, T]``, supervised tokens. num_diffusion_tokens: supervised tokens of the whole step, over all
            micro-batches; None leaves the sum as it is.
        loss_mask_ar, num_ar_tokens, causal_logits: of hybrid models; not read, respectively refused.
        head: the module (or :class:`HeadSpec`) that would make the logits; its weight must be whole here.
    """
    del self, loss_mask_ar, num_ar_tokens
    _refuse_hybrid(causal_logits)
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    check.shape("logits", check.tensor("logits", logits), ("B", "T", "H" if head is not None else "V"))
    rows, targets, weight = _rows(tuple(logits.shape[:2]), target_ids, noise_mask, p_mask, loss_mask)
    if head is None:
        logp = _of_logits(logits, rows, targets)
    else:
        logp = _of_hidden(logits, head if isinstance(head, HeadSpec) else HeadSpec(head), rows, targets, backend)
    return _output(logp, weight, num_diffusion_tokens)


def mdlm_forward_loss(
    model: nn.Module,
    batch: dict[str, Any],
    target_ids: Tensor,
    noise_mask: Tensor,
    p_mask: Tensor,
    loss_mask: Tensor,
    num_diffusion_tokens: int | None = None,
    *,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> DLLMLossOutput:
    """``model(**batch)`` and its MDLM loss, without logits.

    Args:
        batch: arguments of the model's forward, ``input_ids`` the noisy ones (what ``prepare_batch`` returned).
        head: as :func:`bgpo_kernels.row_logprob`. Others: as :func:`mdlm_loss`.

    Raises:
        ValueError, TypeError: shapes that disagree, ids out of range, a causal model, a head that is not known.
    """
    if "input_ids" not in batch:
        raise ValueError(f"batch must hold input_ids, the noisy ones; got {', '.join(map(str, batch)) or 'nothing'}")
    ids = check.tensor("batch['input_ids']", batch["input_ids"])
    rows, targets, weight = _rows(tuple(ids.shape), target_ids, noise_mask, p_mask, loss_mask)
    spec = find_head(model, head)
    if "attention_mask" not in batch:  # whoever makes the mask decides on the attention
        assert_bidirectional(model, spec)
    with capture_head(model, spec, lambda hidden: _of_hidden(hidden, spec, rows, targets, backend)) as capture:
        model(**forward_kwargs(model) | batch)
    return _output(capture.value, weight, num_diffusion_tokens)


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes t in (0, 1), ascending, and weights of Gauss-Legendre quadrature over [0, 1], ``[nodes]`` fp64 each."""
    count = check.integer("nodes", nodes, 1)
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()  # Golub and Welsch: eigenvalues of the recurrence's Jacobi matrix
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (values + 1) / 2, vectors[0] ** 2


def gdpo_elbo(
    model: nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    nodes: int | Sequence[float] | Tensor = 3,
    weights: Sequence[float] | Tensor | None = None,
    weight: str = "nominal",
    masks_per_node: int = 1,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    mask_token_id: int | None = None,
    draw: MaskDraw | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """GDPO's sequence log-likelihood ``[B]`` fp32, differentiable by any later loss.

    Args:
        input_ids: ``[B, T]`` clean. response_mask: ``[B, T]`` bool.
        nodes: how many Gauss-Legendre nodes; or the nodes t in (0, 1] themselves, with as many ``weights``.
        weight: "nominal", ``w / t``, or "realised", ``w L / |M|``.
        masks_per_node: random masks at every node, whose mean is taken.
        seed, sample_ids: of the masks; ids default to the tokens themselves. draw: explicit masks, weights included.
        Others: as :func:`bgpo_kernels.elbo_logprob`.
    """
    if draw is None:
        t, w = _quadrature(nodes, weights)
        ids = content_ids(input_ids, attention_mask) if sample_ids is None else sample_ids
        mask_id = _mask_token_id(model, mask_token_id)
        draw = draw_masks(
            input_ids, response_mask, t, w, mask_id, seed, ids, weight=weight, masks_per_node=masks_per_node
        )
    per_sample = elbo_logprob(
        model, input_ids, response_mask, draw=draw, per_sample=True, attention_mask=attention_mask,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    return per_sample.sum(-1)


def draw_masks(
    input_ids: Tensor,
    response_mask: Tensor,
    t: Tensor,
    w: Tensor,
    mask_token_id: int,
    seed: int,
    sample_ids: Tensor,
    *,
    weight: str = "nominal",
    masks_per_node: int = 1,
) -> MaskDraw:
    """GDPO's masks: samples ``i * masks_per_node ...`` belong to node i; weights add up to the quadrature."""
    if weight not in ("nominal", "realised"):
        raise ValueError(f"weight must be 'nominal' (w/t) or 'realised' (w L/|M|), got {weight!r}")
    each = check.integer("masks_per_node", masks_per_node, 1)
    check.dtype("response_mask", check.tensor("response_mask", response_mask), torch.bool)
    check.shape("response_mask", response_mask, tuple(input_ids.shape), " (as input_ids)")
    t, w = (x.to(input_ids.device).repeat_interleave(each)[None] for x in (t, w / each))
    length = response_mask.sum(-1, keepdim=True)
    count = torch.minimum((t * length).floor().long().clamp(min=1), length)
    allowed = response_mask[:, None].expand(-1, t.shape[1], -1)
    scored = subsets(rank_of(response_mask), allowed, count, sample_ids, seed)
    token_weight = w / t if weight == "nominal" else w * length / count.clamp(min=1)
    noisy = torch.where(scored, mask_token_id, input_ids[:, None])
    return explicit_draw(input_ids, noisy, scored, token_weight.expand(count.shape))


def _rows(
    size: tuple[int, ...], target_ids: Tensor, noise_mask: Tensor, p_mask: Tensor, loss_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat indices ``[N]`` of the rows that count, their targets and their weights 1/p."""
    named = {"target_ids": target_ids, "noise_mask": noise_mask, "p_mask": p_mask, "loss_mask": loss_mask}
    for name, value in named.items():
        check.shape(name, check.tensor(name, value), size, " (B, T)")
    rows = (noise_mask.bool() & loss_mask.bool()).flatten().nonzero()[:, 0]
    return rows, target_ids.flatten()[rows], 1 / p_mask.flatten()[rows].float().clamp(min=1e-8)


def _of_logits(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    check.ids_in_range("target_ids", targets, 0, logits.shape[-1], "classes of the logits")
    chosen = logits.flatten(0, 1)[rows]
    return -F.cross_entropy(chosen if chosen.dtype == torch.float64 else chosen.float(), targets, reduction="none")


def _of_hidden(hidden: Tensor, spec: HeadSpec, rows: Tensor, targets: Tensor, backend: str) -> Tensor:
    module: Any = spec.module
    if spec.shift and bool((rows % hidden.shape[1] < spec.shift).any()):
        raise ValueError(f"row i-{spec.shift} predicts token i in this model, so the first token cannot be masked")
    logp = masked_logprob(
        hidden, module.weight, targets, rows=rows - spec.shift, bias=getattr(module, "bias", None),
        softcap=spec.softcap, logit_scale=spec.logit_scale, backend=backend,
    )  # fmt: skip
    assert isinstance(logp, Tensor)
    return logp


def _output(logp: Tensor, weight: Tensor, num_diffusion_tokens: int | None) -> DLLMLossOutput:
    loss = -(logp * weight.to(logp.dtype)).sum()
    if num_diffusion_tokens is not None:
        loss = loss / max(num_diffusion_tokens, 1)
    return DLLMLossOutput(loss, loss.detach().clone())


def _refuse_hybrid(causal_logits: Tensor | None) -> None:
    if causal_logits is not None:
        raise ValueError("causal_logits, the autoregressive term of a hybrid model, are not served here")


def _quadrature(nodes: Any, weights: Any) -> tuple[Tensor, Tensor]:
    if isinstance(nodes, int):
        if weights is not None:
            raise ValueError("weights need the nodes they belong to, not their number")
        return gauss_legendre(nodes)
    if weights is None:
        raise ValueError("weights are missing: one for every node")
    t, w = (torch.as_tensor(x, dtype=torch.float64).flatten().cpu() for x in (nodes, weights))
    if t.shape != w.shape or not t.numel():
        raise ValueError(f"nodes and weights must be as many, got {t.numel()} and {w.numel()}")
    if not bool(((t > 0) & (t <= 1)).all()) or not all(map(math.isfinite, w.tolist())):
        raise ValueError(f"nodes must be in (0, 1] and weights finite, got {t.tolist()} and {w.tolist()}")
    return t, w


def _mask_token_id(model: nn.Module, given: int | None) -> int:
    found = getattr(getattr(model, "config", None), "mask_token_id", None) if given is None else given
    if found is None:
        raise ValueError("mask_token_id is missing: the model's config has none, so pass the tokenizer's mask_token_id")
    return int(found)
