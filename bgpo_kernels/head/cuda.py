"""Row kernels on CUDA: csrc/cuda/row_statistics.cu and dlogits.cu state the cost, csrc/bgpo/softmax.h the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda
from ..bound.segments import RowSegments
from ..native import address, dense, stream
from .options import LogitTransform
from .reference import alias_as

_LOGIT_TYPES = {
    torch.float32: _cuda.LOGIT_FLOAT,
    torch.bfloat16: _cuda.LOGIT_BFLOAT16,
    torch.float16: _cuda.LOGIT_HALF,
    torch.float64: _cuda.LOGIT_DOUBLE,
}


def row_statistics(
    logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor, entropy: bool
) -> None:
    """As ``reference.row_statistics``."""
    chunk, _keep = _chunk(logits, targets, bias, transform, stats)
    _cuda.row_statistics(_cuda.Queue(*stream(logits)), chunk, entropy)


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
    """As ``reference.dlogits_``; ``out_dtype`` is the logits' own, or bf16 or fp16 over fp32."""
    chunk, _keep = _chunk(logits, targets, bias, transform, stats)
    grad_logprob, grad_entropy = grad_logprob.contiguous(), dense(grad_entropy, stats.dtype)
    _cuda.dlogits(
        _cuda.Queue(*stream(logits)), chunk, address(grad_logprob), address(grad_entropy), _LOGIT_TYPES[out_dtype]
    )
    return alias_as(logits, out_dtype)


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
    """As ``reference.bound_dlogits_``, in one launch."""
    chunk, _keep = _chunk(logits, targets, bias, transform, stats)
    bound, dtype = segments.bound, stats.dtype
    advantages, old = dense(bound.advantages, dtype), dense(bound.old, dtype)
    length = dense(bound.length, torch.float32)
    grad = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    arguments = _cuda.Segments(
        address(segments.offsets), address(segments.weight), segments.weight.shape[0], segments.begin,
        address(advantages), address(old), address(length), segments.first, bound.shape[1], *bound.clip,
        bound.divisor, address(sums), address(grad),
    )  # fmt: skip
    _cuda.bound_dlogits(_cuda.Queue(*stream(logits)), chunk, arguments, _LOGIT_TYPES[out_dtype])
    return alias_as(logits, out_dtype), grad


def _chunk(
    logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor
) -> tuple[_cuda.Chunk, list[Tensor | None]]:
    """The kernels' arguments, and the tensors whose memory they point into."""
    assert logits.stride(1) == 1 and stats.stride(1) == 1
    keep = [targets.contiguous(), dense(bias, stats.dtype)]
    chunk = _cuda.Chunk(
        address(logits), _LOGIT_TYPES[logits.dtype], *logits.shape, logits.stride(0), address(keep[0]),
        address(keep[1]), transform.scale, transform.softcap_or_zero, transform.temperature,
        address(stats), stats.stride(0),
    )  # fmt: skip
    return chunk, keep
