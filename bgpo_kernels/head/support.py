"""Log-probabilities over a restricted support: each row's softmax runs over K given ids only (AGRPO's top-k policies).

Only the K weight rows of each masked row are touched: 2NKH FLOPs instead of 2NHV. The gathered weights ``[rows, K, H]``
are formed in pieces that fit the workspace and dropped; what stays is the logits ``[N, K]`` (as large as the support
itself), on which softmax and entropy are plain torch. Backward gathers again. Sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..workspace import chunk_capacity
from .chunks import cut
from .ops import add_at, empty_or, scatter_rows
from .options import LogitTransform


def _gathered_pieces(weight: Tensor, support: Tensor) -> tuple[tuple[int, int], ...]:
    columns = max(1, support.shape[1] * weight.shape[1])
    return cut(0, support.shape[0], chunk_capacity(columns, torch.float32, weight.device))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather(hidden: Tensor, rows: Tensor | None, piece: tuple[int, int]) -> Tensor:
    """The piece's hidden rows ``[c, H]``, in the accumulation dtype."""
    begin, end = piece
    x = hidden[begin:end] if rows is None else hidden.index_select(0, rows[begin:end])
    return x.to(_wide(hidden.dtype))


@torch.library.custom_op("bgpo_kernels::support_logits", mutates_args=())
def support_logits(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    rows: Tensor | None,  # [N]
    support: Tensor,  # [N, K]
) -> Tensor:
    """``[N, K]`` in fp32: ``hidden[rows[i]] . weight[support[i, k]] + bias[support[i, k]]``; slots of -1 give 0."""
    acc = _wide(hidden.dtype)
    out = torch.zeros(support.shape, dtype=acc, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round these products to 16 bits
        for begin, end in _gathered_pieces(weight, support):
            ids = support[begin:end].clamp(min=0)
            x = _gather(hidden, rows, (begin, end))
            out[begin:end] = torch.bmm(weight[ids].to(acc), x[:, :, None])[..., 0]
            if bias is not None:
                out[begin:end] += bias[ids].to(acc)
    return out.masked_fill_(support < 0, 0.0)


@support_logits.register_fake
def _(hidden, weight, bias, rows, support):
    return hidden.new_empty(support.shape, dtype=_wide(hidden.dtype))


@torch.library.custom_op("bgpo_kernels::support_logits_backward", mutates_args=())
def support_logits_backward(
    grad: Tensor,  # [N, K]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    support: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; repeated rows and ids add up in order. Empty where not wanted."""
    acc, width = _wide(hidden.dtype), weight.shape[1]
    grad = grad.masked_fill(support < 0, 0.0)
    d_rows = hidden.new_empty(support.shape[0] if need_hidden else 0, width, dtype=acc)
    d_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=acc, device=weight.device)
    for begin, end in _gathered_pieces(weight, support):
        ids, g = support[begin:end].clamp(min=0), grad[begin:end]
        if need_hidden:
            d_rows[begin:end] = torch.bmm(g[:, None], weight[ids].to(acc))[:, 0]
        if need_weight:
            outer = g[:, :, None] * _gather(hidden, rows, (begin, end))[:, None]
            add_at(d_weight, ids.flatten(), outer.flatten(0, 1))
    d_hidden = scatter_rows(d_rows, rows, hidden, unique=False) if need_hidden else hidden.new_empty(0)
    d_bias = hidden.new_empty(0)
    if need_bias and bias is not None:
        total = torch.zeros(bias.shape, dtype=acc, device=bias.device)
        d_bias = add_at(total, support.clamp(min=0).flatten(), grad.flatten()).to(bias.dtype)
    return d_hidden, d_weight.to(weight.dtype) if need_weight else hidden.new_empty(0), d_bias


@support_logits_backward.register_fake
def _(grad, hidden, weight, bias, rows, support, need_hidden, need_weight, need_bias):
    return (
        empty_or(need_hidden, hidden, hidden),
        empty_or(need_weight, weight, hidden),
        empty_or(need_bias, bias, hidden),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:3]
    found = support_logits_backward(grad, *ctx.saved_tensors, *needs)
    return (*(g if n else None for g, n in zip(found, needs, strict=True)), None, None)


support_logits.register_autograd(_backward, setup_context=_setup)


def restricted_logprob(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    rows: Tensor | None,  # [N]
    targets: Tensor,  # [N]
    support: Tensor,  # [N, K]
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy over each row's support, ``[N]`` each; differentiable."""
    raw = support_logits(hidden, weight, bias, rows, support)
    logp = torch.log_softmax(transform.apply(raw).masked_fill(support < 0, -torch.inf), dim=-1)
    slot = (support == targets[:, None]).int().argmax(-1, keepdim=True)
    entropy = -(logp.masked_fill(logp == -torch.inf, 0.0) * logp.exp()).sum(-1)
    return logp.gather(-1, slot)[:, 0], entropy
