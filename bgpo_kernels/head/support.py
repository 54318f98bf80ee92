"""Log-probabilities over a restricted support: each row's softmax runs over K given ids only (AGRPO's top-k policies).

Only the K weight rows of each masked row are touched: 2NKH FLOPs instead of 2NHV. The gathered weights ``[rows, K, H]``
are formed in pieces that fit the workspace and dropped; what stays is the logits ``[N, K]`` (as large as the support
itself), on which softmax and entropy are plain torch. Backward gathers again. dW sums in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..workspace import chunk_capacity
from .chunks import cut
from .options import LogitTransform


def _gathered_pieces(weight: Tensor, support: Tensor) -> tuple[tuple[int, int], ...]:
    columns = max(1, support.shape[1] * weight.shape[1])
    return cut(0, support.shape[0], chunk_capacity(columns, torch.float32, weight.device))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("bgpo_kernels::support_logits", mutates_args=())
def support_logits(hidden: Tensor, weight: Tensor, support: Tensor) -> Tensor:
    """``[N, K]`` in fp32: ``hidden[i] . weight[support[i, k]]``; slots of -1 give 0. ``hidden`` is [N, H]."""
    acc = _wide(hidden.dtype)
    out = torch.zeros(support.shape, dtype=acc, device=hidden.device)
    for begin, end in _gathered_pieces(weight, support):
        w = weight[support[begin:end].clamp(min=0)].to(acc)  # [c, K, H]
        out[begin:end] = torch.bmm(w, hidden[begin:end, :, None].to(acc))[..., 0]
    return out.masked_fill_(support < 0, 0.0)


@support_logits.register_fake
def _(hidden, weight, support):
    return hidden.new_empty(support.shape, dtype=_wide(hidden.dtype))


@torch.library.custom_op("bgpo_kernels::support_logits_backward", mutates_args=())
def support_logits_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, support: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; repeated ids add up in row order."""
    acc = _wide(hidden.dtype)
    grad = grad.masked_fill(support < 0, 0.0)
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape, dtype=acc, device=weight.device) if need_weight else hidden.new_empty(0)
    for begin, end in _gathered_pieces(weight, support):
        ids = support[begin:end].clamp(min=0)
        if need_hidden:
            w = weight[ids].to(acc)
            d_hidden[begin:end] = torch.bmm(grad[begin:end, None].to(acc), w)[:, 0].to(hidden.dtype)
        if need_weight:
            outer = grad[begin:end, :, None].to(acc) * hidden[begin:end, None].to(acc)
            d_weight.index_put_((ids.flatten(),), outer.flatten(0, 1), accumulate=True)
    return d_hidden, d_weight.to(weight.dtype)


@support_logits_backward.register_fake
def _(grad, hidden, weight, support, need_hidden, need_weight):
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight) if need_weight else hidden.new_empty(0, dtype=weight.dtype)
    return d_hidden, d_weight


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    found = support_logits_backward(grad, *ctx.saved_tensors, *needs)
    return (*(g if n else None for g, n in zip(found, needs, strict=True)), None)


support_logits.register_autograd(_backward, setup_context=_setup)


def restricted_logprob(
    hidden: Tensor,  # [N, H], gathered
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # [N]
    support: Tensor,  # [N, K]
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy over each row's support, ``[N]`` each; differentiable."""
    raw = support_logits(hidden, weight, support)
    if bias is not None:
        raw = raw + bias[support.clamp(min=0)].to(raw.dtype)
    logits = transform.apply(raw).masked_fill(support < 0, -torch.inf)
    logp = torch.log_softmax(logits, dim=-1)
    slot = (support == targets[:, None]).int().argmax(-1, keepdim=True)
    finite = logp.masked_fill(support < 0, 0.0)
    return logp.gather(-1, slot)[:, 0], -(finite * finite.exp().masked_fill(support < 0, 0.0)).sum(-1)
