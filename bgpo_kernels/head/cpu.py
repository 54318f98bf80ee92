"""Row kernels on the compiled CPU engine: csrc/cpu/rows.inl for the cost, csrc/bgpo/softmax.h for the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu
from ..bound.segments import RowSegments
from ..native import address, dense, threads
from .options import LogitTransform

_LOGIT_TYPES = {
    torch.float32: _cpu.LOGIT_FLOAT,
    torch.bfloat16: _cpu.LOGIT_BFLOAT16,
    torch.float64: _cpu.LOGIT_DOUBLE,
}


def row_statistics(
    logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor, entropy: bool
) -> None:
    """As ``reference.row_statistics``."""
    chunk, _keep = _chunk(logits, targets, bias, transform, stats)
    _cpu.row_statistics(chunk, entropy, threads())


def dlogits_(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As ``reference.dlogits_``; on a CPU the GEMMs take the logits' own dtype, so ``out_dtype`` must be that."""
    assert out_dtype == logits.dtype
    chunk, _keep = _chunk(logits, targets, bias, transform, stats)
    grad_logprob, grad_entropy = grad_logprob.contiguous(), dense(grad_entropy, stats.dtype)
    _cpu.dlogits(chunk, address(grad_logprob), address(grad_entropy), threads())
    return logits


def bound_dlogits_(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Tensor,
    segments: RowSegments,
    sums: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As ``reference.bound_dlogits_``."""
    segments.sum_up(stats[2], sums)
    grad = segments.row_gradients(sums)
    return dlogits_(logits, targets, bias, transform, stats, grad, None, out_dtype), grad


def _chunk(
    logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor
) -> tuple[_cpu.Chunk, list[Tensor | None]]:
    """The engine's arguments, and the tensors whose memory they point into."""
    assert logits.stride(1) == 1 and stats.stride(1) == 1
    keep = [targets.contiguous(), dense(bias, stats.dtype)]
    chunk = _cpu.Chunk(
        address(logits), _LOGIT_TYPES[logits.dtype], *logits.shape, logits.stride(0), address(keep[0]),
        address(keep[1]), transform.scale, transform.softcap_or_zero, transform.temperature,
        address(stats), stats.stride(0),
    )  # fmt: skip
    return chunk, keep
