"""``masked_logprob`` and ``bgpo_head_loss``: the public face of the head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import validation as check
from ..backends import resolve
from ..bound.functional import BoundStats, bound_stats, check_samples, make_clip
from ..bound.segments import SegmentBound
from ..masks.draw import MaskDraw
from . import ops, reference
from .engine import Head, main_grad_of
from .options import LogitTransform
from .parallel import VocabShard, local_parts
from .sharded import sharded_loss, sharded_statistics
from .support import restricted_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def masked_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Tensor | None = None,
    return_entropy: bool = False,
    tp_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-softmax at ``targets`` of the chosen hidden rows against the vocabulary, without N x V logits.

    ``z = softcap(logit_scale * (hidden[rows] @ weight.T + bias)) / temperature``, ``softcap(a) = c tanh(a / c)``,
    ``logp = z[target] - logsumexp(z) <= 0`` by construction. Gradients for hidden, weight and bias as each requires
    (none computed that is not required), for any upstream gradient per row: 2NHV forward, up to 6NHV backward.
    Memory beyond inputs and gradients: one workspace (:func:`set_workspace_bytes`), reused between calls.

    Args:
        hidden: ``[..., H]`` fp32, bf16, fp16 or fp64.
        weight: ``[V, H]`` of the same dtype (under autocast, hidden is cast and the weight may stay fp32).
        targets: ``[N]`` int64, ids in 0..V-1.
        rows: ``[N]`` int64 indices into ``hidden.reshape(-1, H)``, repeats allowed; None: all rows.
        bias: ``[V]``.
        temperature: divides the logits last; positive.
        softcap: positive, or None. logit_scale: multiplies logits after the bias; not zero.
        support: ``[N, K]`` int64; restricts each row's softmax to these distinct ids; -1 marks an unused slot.
        return_entropy: also return the entropy of each row's distribution ``[N]``, differentiable too.
        tp_group: the vocabulary is cut over the ranks of this group, alike: ``weight [V / ranks, H]`` and ``bias`` are
            this rank's rows, everything else is the same on every rank, targets are ids in 0..V-1. A DTensor ``weight``
            cut over its rows (``Shard(0)``, perhaps unevenly) is known for itself. See docs/tensor_parallel.md.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``[N]`` fp32 (fp64 for fp64 inputs), or the pair (logp, entropy).

    Raises:
        TypeError: wrong dtypes. ValueError: shapes or devices that disagree, ids or rows out of range, a target outside
            its support, options out of range, a sharded weight, a backend that cannot serve the device.
    """
    hidden, weight, bias, shard = local_parts(hidden, weight, bias, tp_group)
    hidden, transform, resolved = _check_head(hidden, weight, bias, temperature, softcap, logit_scale, backend)
    flat = hidden.reshape(-1, hidden.shape[-1])
    _check_rows(flat, _vocabulary(weight, shard), targets, rows)
    if shard is not None:
        if support is not None:
            raise ValueError("support is not served for a weight that is cut over ranks: gather the weight first")
        head = Head(flat, weight, bias, rows, targets, transform, resolved, shard)
        stats = sharded_statistics(head, return_entropy)
        return (stats[2], stats[3]) if return_entropy else stats[2]
    if support is not None:
        check_support(support, targets, weight.shape[0])
        logp, entropy = restricted_logprob(flat, weight, bias, rows, targets, support, transform)
        return (logp, entropy) if return_entropy else logp
    if resolved == "reference":
        both = reference.masked_logprob(flat, weight.to(flat.dtype), bias, rows, targets, transform)
        return both if return_entropy else both[0]
    stats = ops.head_statistics(
        flat, weight, bias, rows, targets, transform.scale, transform.softcap_or_zero, transform.temperature,
        return_entropy, resolved,
    )  # fmt: skip
    return (stats[2], stats[3]) if return_entropy else stats[2]


def bgpo_head_loss(
    hidden: Tensor,
    weight: Tensor,
    draw: MaskDraw,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    old_logprob: Tensor | None = None,
    length: Tensor | None = None,
    clip_range: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    normalizer: float | None = None,
    tp_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, BoundStats]:
    """``bgpo_loss(draw.reduce(masked_logprob(...)), ...)`` with its gradients in ONE pass over the head.

    6NHV FLOPs (4NHV when the weight needs no gradient) instead of 8NHV, whatever the advantages' signs, on- or
    off-policy: chunks hold whole segments, so the coefficient of every row is known while its logits are still there.
    The gradients are computed here and handed to autograd; ``loss.backward()`` only scales them.

    Args:
        hidden: ``[..., H]`` with B*n*T rows in the order of ``draw.noisy_ids``.
        weight, bias, temperature, softcap, logit_scale: as :func:`masked_logprob`. A parameter ``weight`` with an fp32
            ``main_grad`` (Megatron's convention) has its gradient added there by ``loss.backward()``, unrounded, and
            its ``.grad`` stays as it is.
        draw: from :func:`random_mask`.
        advantages, old_logprob, length, clip_range, dual_clip, normalizer: as :func:`bgpo_loss`.
        tp_group: as :func:`masked_logprob`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``(loss, logprob [B, n] detached, BoundStats)``.

    Raises:
        As :func:`masked_logprob` and :func:`bgpo_loss`; ValueError when hidden does not have B*n*T rows.
    """
    hidden, weight, bias, shard = local_parts(hidden, weight, bias, tp_group)
    hidden, transform, resolved = _check_head(hidden, weight, bias, temperature, softcap, logit_scale, backend)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if not isinstance(draw, MaskDraw):
        raise TypeError(f"draw must be a MaskDraw, got {type(draw).__name__}")
    batch, samples, tokens = draw.noisy_ids.shape
    if flat.shape[0] != batch * samples * tokens:
        raise ValueError(
            f"hidden {list(hidden.shape)} has {flat.shape[0]} rows, but the draw has B*n*T = "
            f"{batch}*{samples}*{tokens} = {batch * samples * tokens}"
        )
    check.same_device("draw", draw.rows, "hidden", hidden)
    if draw.max_target >= (vocabulary := _vocabulary(weight, shard)):
        whole = [vocabulary, weight.shape[1]]
        raise ValueError(f"draw.targets holds id {draw.max_target}, but weight {whole} has fewer rows")
    check_samples(advantages, old_logprob, length, (batch, samples), "hidden", hidden)
    old_logprob = None if old_logprob is None else old_logprob.detach()
    clip = make_clip(clip_range, dual_clip)
    group = check.number("normalizer", batch if normalizer is None else normalizer, 0.0, exclusive=True)
    if resolved == "reference" and shard is None:
        loss, logprob, slope = reference.bgpo_head_loss(
            flat, weight.to(flat.dtype), bias, draw, transform, advantages.float(), old_logprob, length, clip, group
        )
        return loss, logprob, bound_stats(logprob, advantages, old_logprob, length, slope, group)
    grad = torch.is_grad_enabled()
    wide_weight = grad and weight.requires_grad and main_grad_of(weight) is not None
    wide_weight = wide_weight and not torch.compiler.is_compiling()  # a traced backward cannot write there
    needs = (
        grad and flat.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    if shard is not None:
        bound = SegmentBound(
            advantages.float(), old_logprob, length, clip, group * samples, (batch, samples), resolved
        )  # fmt: skip
        head = Head(flat, weight, bias, draw.rows, draw.targets, transform, resolved, shard)
        loss, logprob, slope = sharded_loss(head, draw, bound, needs, wide_weight)
        return loss, logprob, bound_stats(logprob, advantages, old_logprob, length, slope, group)
    loss, logprob, slope, *_grads = ops.head_loss(
        flat, weight, bias, draw.rows, draw.targets, draw.segment_offsets, list(draw.host_offsets),
        draw.segment_weight, advantages.float(), old_logprob, length, *clip, group,
        transform.scale, transform.softcap_or_zero, transform.temperature, resolved, *needs, wide_weight,
    )  # fmt: skip
    return loss, logprob, bound_stats(logprob, advantages, old_logprob, length, slope, group)


def _check_head(
    hidden: Any, weight: Any, bias: Any, temperature: Any, softcap: Any, logit_scale: Any, backend: str
) -> tuple[Tensor, LogitTransform, str]:
    """Checks of the head's own arguments; hidden comes back cast if autocast says so."""
    check.dtype("hidden", check.tensor("hidden", hidden), *_FLOATS)
    check.dtype("weight", check.tensor("weight", weight), *_FLOATS)
    check.shape("weight", weight, ("V", "H"))
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden [..., H] and weight [V, H] disagree: {list(hidden.shape)} and {list(weight.shape)}")
    check.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check.dtype("bias", check.tensor("bias", bias), *_FLOATS)
        check.shape("bias", bias, (weight.shape[0],), " (as the rows of weight)")
        check.same_device("bias", bias, "hidden", hidden)
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        if hidden.dtype != torch.float64:
            hidden = hidden.to(torch.get_autocast_dtype(device))
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one, or use torch.autocast")
    scale = check.number("logit_scale", logit_scale, -torch.inf)
    if scale == 0.0:
        raise ValueError("logit_scale must not be 0")
    transform = LogitTransform(
        scale,
        None if softcap is None else check.number("softcap", softcap, 0.0, exclusive=True),
        check.number("temperature", temperature, 0.0, exclusive=True),
    )
    return hidden, transform, resolve(backend, hidden.device)


def _vocabulary(weight: Tensor, shard: VocabShard | None) -> int:
    return weight.shape[0] if shard is None else shard.total


def _check_rows(flat: Tensor, vocabulary: int, targets: Any, rows: Any) -> None:
    check.dtype("targets", check.tensor("targets", targets), torch.int64)
    check.shape("targets", targets, ("N",))
    check.same_device("targets", targets, "hidden", flat)
    if rows is None:
        if targets.shape[0] != flat.shape[0]:
            raise ValueError(f"targets has {targets.shape[0]} entries for {flat.shape[0]} hidden rows (rows is None)")
    else:
        check.dtype("rows", check.tensor("rows", rows), torch.int64)
        check.shape("rows", rows, (targets.shape[0],), " (as targets)")
        check.same_device("rows", rows, "hidden", flat)
    given = () if rows is None else (check.outside("rows", rows, 0, flat.shape[0], "rows of hidden"),)
    check.values(*given, check.outside("targets", targets, 0, vocabulary, "vocabulary of weight"))


def check_support(support: Any, targets: Tensor, vocabulary: int) -> None:
    """Types, shapes and values of ``support [N, K]``."""
    check.dtype("support", check.tensor("support", support), torch.int64)
    check.shape("support", support, (targets.shape[0], "K"), " (rows as targets)")
    check.same_device("support", support, "targets", targets)

    def stray(missing: Tensor) -> str:
        where = missing.nonzero().flatten()[:4].tolist()
        return f"targets {targets[missing][:4].tolist()} at rows {where} are not in their row's support"

    def repeated(ids: Tensor) -> Tensor:
        ordered = ids.sort(-1).values
        return (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)

    check.values(
        check.outside("support", support, -1, vocabulary, "vocabulary of weight, -1 for an unused slot"),
        check.Suspect(support, lambda ids: ~(ids == targets[:, None]).any(-1), stray),
        check.Suspect(support, repeated, lambda _: "support holds an id twice in one row: it would be counted twice"),
    )
