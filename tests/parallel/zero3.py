"""An imitation of ZeRO-3's hooks: flat shards, gathered before a module's forward and its backward, released after.

As DeepSpeed does it: outside, `param.data` is empty; the gathering for the backward hangs on what leaves the module's
forward; a gradient is averaged as soon as it is there, its shard is kept aside, and `.grad` stays None. (Here that is
also when the weight is released.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.Module, output: Tensor) -> Tensor:
        ctx.module = module
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        _gather(ctx.module)
        return None, grad


def shard(model: Any) -> Any:
    """The model itself, with every module that owns parameters under the hooks."""
    for p in model.parameters():
        flat = p.detach().flatten()
        size = -(-flat.numel() // 2)
        p.ds_shape, p.ds_process_group = p.shape, dist.group.WORLD
        p.ds_tensor = nn.functional.pad(flat, (0, 2 * size - flat.numel())).view(2, size)[dist.get_rank()].clone()
        p.ds_grad = torch.zeros_like(p.ds_tensor)
        p.register_post_accumulate_grad_hook(_reduce)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda m, _: _gather(m))
            module.register_forward_hook(_leave)
            _release(module)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    """Whole ones, removed."""
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is None and p.numel() == 0
        found[name] = _whole(p.ds_grad, p.ds_shape)
        p.ds_grad.zero_()
    return found


def _whole(part: Tensor, shape: torch.Size) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part)
    return torch.cat(parts)[: shape.numel()].view(shape)


def _gather(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        if p.numel() == 0:
            p.data = _whole(p.ds_tensor, p.ds_shape)


def _release(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        p.data = torch.empty(0, dtype=p.dtype)


def _leave(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    _release(module)
    return _BeforeBackward.apply(module, output) if output.requires_grad else output


def _reduce(p: Any) -> None:
    whole = p.grad.flatten()
    dist.all_reduce(whole)
    size = p.ds_tensor.numel()
    p.ds_grad += nn.functional.pad(whole / 2, (0, 2 * size - whole.numel())).view(2, size)[dist.get_rank()]
    p.grad = None
    p.data = torch.empty(0, dtype=p.dtype)
