"""Where the head's own gradients go.

The head holds the model's largest matrix, so a new dW [V, H] per micro-batch, added to .grad by autograd, would be the
largest transient of the step. When nothing watches the parameter, sums go straight into place instead:

* fp32 and fp64 parameters: into ``.grad`` itself;
* parameters with an fp32 ``main_grad`` (Megatron's convention): into that, when it holds zeros as the call begins;
* otherwise 16-bit parameters, and a ``main_grad`` that holds something: into one fp32 accumulator for the whole call,
  added once at its end, so that a call that fails leaves no trace.

A parameter that something does watch (tensor hooks, post-accumulate hooks) or that is no leaf (parametrizations) gets
its gradient from autograd, per micro-batch, like any other. (DistributedDataParallel sees the sum: ``parallel.py``.)

Where the head is sharded (FSDP, ZeRO-3) its gradient can only arrive while hooks have gathered the weight again, so it
goes with that of the hidden states: ``carry`` makes it part of what the backward of the head's output does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..head.engine import Gradients, Head, main_grad_of


def _unwatched(parameter: Tensor) -> bool:
    watched = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.is_leaf and not watched


class HeadSink:
    """Accumulates dW and db of the head over the micro-batches of one call.

    ``through_autograd``: leave every parameter to autograd (its gradients are wanted as values, not in .grad).
    ``sharded``: so too, and as part of the backward of what leaves the head.
    """

    def __init__(self, module: nn.Module, through_autograd: bool = False, sharded: bool = False) -> None:
        self._module, self.sharded = module, sharded
        self._buffers: dict[str, Tensor] = {}
        with torch.enable_grad():  # a parametrized weight is computed here, and requires grad in grad mode only
            found = {name: getattr(module, name, None) for name in ("weight", "bias")}
        trained = {name: p for name, p in found.items() if p is not None and p.requires_grad}
        self._direct = {name for name, p in trained.items() if not (through_autograd or sharded) and _unwatched(p)}
        self._through_autograd = set(trained) - self._direct
        mains = {name: main_grad_of(trained[name]) for name in self._direct}
        self._main = {name: main for name, main in mains.items() if main is not None}
        self._zeros = {name: main for name, main in self._main.items() if not bool(main.any())}

    def gradients(self, head: Head, hidden: bool) -> Gradients:
        """Accumulators for one micro-batch; those of parameters left to autograd are fresh."""
        wanted = {name: self._buffer(name) for name in self._direct}
        weight, bias = (wanted.get(name, name in self._through_autograd) for name in ("weight", "bias"))
        return Gradients(head, hidden, weight, bias)

    def roots(self, into: Gradients) -> list[tuple[Tensor, Tensor]]:
        """(parameter, gradient) pairs that autograd has to carry on after a micro-batch."""
        return [(p, g) for p, g in self._left_to_autograd(into) if g is not None]

    def carry(self, hidden: Tensor, grad: Tensor | None, into: Gradients) -> Tensor:
        """Where the head is sharded: a scalar to leave it, whose backward brings the gradients of hidden, dW and db."""
        pairs = [(hidden, torch.zeros_like(hidden) if grad is None else grad), *self._left_to_autograd(into)]
        # All ranks reduce the same gradients, hence zeros where this one's micro-batch has no masked row.
        given = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        return _Carry.apply(given, *(p for p, _ in pairs))

    def _left_to_autograd(self, into: Gradients) -> list[tuple[Tensor, Tensor | None]]:
        """Parameters and gradients; None where there was no masked row in this micro-batch."""
        names = sorted(self._through_autograd)
        found = [(getattr(self._module, name), getattr(into, name)) for name in names]
        return [(p, None if g is None else g.to(p.dtype)) for p, g in found]

    def _buffer(self, name: str) -> Tensor:
        parameter = getattr(self._module, name)
        if name in self._zeros:
            return self._zeros[name]
        if name not in self._main and parameter.dtype in (torch.float32, torch.float64):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            return parameter.grad
        if name not in self._buffers:
            self._buffers[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return self._buffers[name]

    def outside_grad(self) -> list[Tensor]:
        """What has been accumulated for ``main_grad``, before ``flush``."""
        return [*self._zeros.values(), *(total for name, total in self._buffers.items() if name in self._main)]

    def flush(self) -> None:
        """Add the fp32 accumulators to .grad or main_grad, once."""
        for name, total in self._buffers.items():
            parameter = getattr(self._module, name)
            if name in self._main:
                self._main[name].add_(total)
            elif parameter.grad is None:
                parameter.grad = total.to(parameter.dtype)
            else:
                parameter.grad.add_(total)
        self._buffers.clear()

    def reset(self) -> None:
        """Forget what was accumulated outside .grad."""
        self._buffers.clear()
        for zeros in self._zeros.values():
            zeros.zero_()


class _Carry(torch.autograd.Function):
    """A scalar whose derivatives by the tensors are given."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(g * upstream for g in ctx.gradients)
