"""The masked-row log-probabilities in plain torch: the specification, and what every other backend is tested against.

``masked_logprob`` is the whole operation with all logits in memory and autograd doing the gradients. The three
functions after it specify the *row kernels*, which work on one chunk of logits ``[C, V]`` in a workspace:

    z = transform(logits + bias),  m = max_k z_k,  s = sum_k exp(z_k - m)
    logprob = (z_y - m) - log s,   entropy = log s - sum_k exp(z_k - m) (z_k - m) / s
    d loss / d z_k = g (1[k = y] - p_k) - h p_k ((z_k - m) - log s + entropy)

with g, h the upstream gradients of logprob and entropy. Statistics are fp32 (fp64 for fp64 logits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bound.reference import bound, segment_sum
from ..bound.segments import RowSegments
from ..masks.draw import MaskDraw
from .options import LogitTransform


def masked_logprob(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    rows: Tensor | None,  # [N]
    targets: Tensor,  # [N]
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, ``[N]`` each; differentiable; fp32 after the vendor GEMM."""
    x = hidden if rows is None else hidden.index_select(0, rows)
    raw = x @ weight.T
    acc = torch.float64 if raw.dtype == torch.float64 else torch.float32
    raw = raw.to(acc)
    if bias is not None:
        raw = raw + bias.to(acc)
    logp = torch.log_softmax(transform.apply(raw), dim=-1)
    entropy = -(torch.where(logp == -torch.inf, 0.0, logp) * logp.exp()).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


def bgpo_head_loss(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    draw: MaskDraw,
    transform: LogitTransform,
    advantages: Tensor,  # [B]
    old: Tensor | None,  # [B, n]
    length: Tensor | None,  # [B]
    clip: tuple[float, float, float],
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-probability sums [B, n] and slopes [B, n], by composition; autograd does the gradients."""
    logp, _ = masked_logprob(hidden, weight, bias, draw.rows, draw.targets, transform)
    sums = segment_sum(logp, draw.segment_offsets, draw.segment_weight.flatten()).view(draw.segment_weight.shape)
    term, slope = bound(sums, advantages, None if old is None else old.to(sums.dtype), length, *clip)
    loss = -(term.sum(dtype=torch.float64) / (normalizer * draw.n_mc)).to(sums.dtype)
    return loss, sums.detach(), slope.detach()


def _transformed(logits: Tensor, bias: Tensor | None, transform: LogitTransform, acc: torch.dtype) -> Tensor:
    raw = logits.to(acc)
    return transform.apply(raw if bias is None else raw + bias.to(acc))


def row_statistics(
    logits: Tensor,  # [C, V]
    targets: Tensor,  # [C]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    stats: Tensor,  # [4, C] out: max, sum of exp, log-probability, entropy
    entropy: bool,
) -> None:
    """One sweep over the chunk; fills ``stats`` (row 3 only when ``entropy``)."""
    z = _transformed(logits, bias, transform, stats.dtype)
    top = z.amax(-1)
    shifted = z - top[:, None]
    e = torch.exp(shifted)
    total = e.sum(-1)
    stats[0], stats[1] = top, total
    stats[2] = torch.clamp(shifted.gather(-1, targets[:, None])[:, 0], max=0.0) - torch.log(total)
    if entropy:
        stats[3] = torch.log(total) - (e * torch.where(e == 0, 0.0, shifted)).sum(-1) / total


def dlogits_(
    logits: Tensor,  # [C, V], overwritten
    targets: Tensor,  # [C]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    stats: Tensor,  # [4, C]
    grad_logprob: Tensor,  # [C]
    grad_entropy: Tensor | None,  # [C]
    out_dtype: torch.dtype,
) -> Tensor:
    """Gradient of the raw logits ``[C, V]`` in ``out_dtype``, over the storage of ``logits``."""
    acc = stats.dtype
    z = _transformed(logits, bias, transform, acc)
    shifted = z - stats[0][:, None]
    p = torch.exp(shifted) / stats[1][:, None]
    onehot = torch.zeros_like(p).scatter_(-1, targets[:, None], 1.0)
    grad = grad_logprob[:, None] * (onehot - p)
    live = grad_logprob != 0
    if grad_entropy is not None:
        log_p = shifted - torch.log(stats[1])[:, None]
        grad = grad - grad_entropy[:, None] * p * torch.where(p == 0, 0.0, log_p + stats[3][:, None])
        live = live | (grad_entropy != 0)
    if transform.softcap is not None:  # d z / d a = 1 - tanh(a / c)^2, from z = c tanh(a / c) / temperature
        grad = grad * (1.0 - (z * transform.temperature / transform.softcap) ** 2)
    grad = torch.where(live[:, None], grad * (transform.scale / transform.temperature), 0.0)
    return alias_as(logits, out_dtype).copy_(grad)


def bound_dlogits_(
    logits: Tensor,  # [C, V], overwritten
    targets: Tensor,  # [C]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    stats: Tensor,  # [4, C]
    segments: RowSegments,  # the chunk's whole segments
    sums: Tensor,  # [segments] out
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradient of the raw logits for the bound's loss, over their storage; that of the log-probabilities ``[C]``."""
    segments.sum_up(stats[2], sums)
    grad = segments.row_gradients(sums)
    return dlogits_(logits, targets, bias, transform, stats, grad, None, out_dtype), grad


def alias_as(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The chunk's storage seen as ``[C, V]`` of a narrower ``dtype``; each row begins where the wide row began."""
    if dtype == logits.dtype:
        return logits
    assert logits.element_size() >= dtype.itemsize and logits.stride(1) == 1
    rows, columns = logits.shape
    if rows == 0:
        return logits.to(dtype)
    flat = logits.as_strided(((rows - 1) * logits.stride(0) + columns,), (1,)).view(dtype)
    return flat.as_strided((rows, columns), (logits.stride(0) * (logits.element_size() // dtype.itemsize), 1))
