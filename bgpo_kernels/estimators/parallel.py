"""What a call has to settle with the other ranks that train the same model.

*Replicas* (DistributedDataParallel): every rank walks through its own micro-batches alone, below DDP's forward, so DDP
sees none of them. Their sum then leaves through DDP's forward and backward as one ordinary gradient, which DDP averages
as it is set up to: once per call, with its buckets, views and communication hooks, and not at all inside ``no_sync``.

*Shards* (FSDP2, ZeRO-3; FSDP1 without gradients): the weights are gathered and the gradients reduced within every
micro-batch, by all ranks together. So the ranks take the same number of micro-batches; one that has fewer runs its own
shortest sequence again without effect. Nothing can be halved on the way, since a rank cannot leave a collective
operation by itself.

*Parts* (tensor parallelism): the ranks run every forward together, too, but on the same sequences, so they walk alike
once they have the same size of micro-batch; gradients need no reduction beyond what the layers do.

Before anything reaches .grad, the ranks agree that all of them succeeded: one all-reduce of one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.heads import _CALL_WRAPPERS, _class_names

_FAILURES: list[type[Exception]] = [RuntimeError, torch.OutOfMemoryError, FloatingPointError]  # the gravest last
_MAX_RANKS = 1 << 32


class Ranks:
    """The processes that train ``model`` together, as far as one call is concerned."""

    def __init__(self, model: nn.Module, device: torch.device, tp_group: Any = None) -> None:
        self._device = device
        self._ddp = _ddp_around(model)
        self._engine: Any = model if "DeepSpeedEngine" in _class_names(model) else None
        self._units: list[Any] = [m for m in model.modules() if "FSDPModule" in _class_names(m)]
        self._fsdp1 = any("FullyShardedDataParallel" in _class_names(m) for m in model.modules())
        for unit in self._units:  # what an earlier forward left gathered does not show its process group
            unit.reshard()
        groups = _sharding_groups(model)
        self.sharded = bool(groups)  #: whether every micro-batch gathers weights and reduces gradients
        parts = [] if self.sharded else _tensor_parallel_groups(model, tp_group)
        groups += parts
        self.alike = self.sharded or bool(parts)  #: whether every micro-batch is a collective operation
        if self._ddp is not None and self._ddp.require_backward_grad_sync:
            groups.append(self._ddp.process_group)
        self._groups = groups
        self._in_a_walk = False

    # ----------------------------------------------------------------------------------------------- agreement

    @property
    def agree(self) -> bool:
        """Whether there is anyone to agree with."""
        return bool(self._groups)

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks."""
        if not self._groups:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
        return found.tolist()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave this normally or all by an exception: that of their own, or one like that of another rank."""
        try:
            yield
        except Exception as error:
            if not self._in_a_walk:  # otherwise the others wait for this rank somewhere in the model
                grave = max(i for i, kind in enumerate(_FAILURES) if i == 0 or isinstance(error, kind))
                self._vote(grave + 1)
            raise
        worst, rank = self._vote(0)
        if worst:
            raise _FAILURES[worst - 1](
                f"rank {rank} failed (see its own message), so nothing was added to .grad on any rank"
            )

    def _vote(self, grave: int) -> tuple[int, int]:
        rank = torch.distributed.get_rank() if self._groups else 0
        (found,) = self.most(grave * _MAX_RANKS + rank)
        return found // _MAX_RANKS, found % _MAX_RANKS

    @contextmanager
    def walk(self) -> Iterator[None]:
        """A walk through micro-batches that are collective operations: what fails inside fails on this rank alone."""
        self._in_a_walk = True
        yield
        self._in_a_walk = False

    # ------------------------------------------------------------------------------------------------ wrappers

    @contextmanager
    def session(self) -> Iterator[None]:
        """Makes the wrappers fit for many forwards and backwards in one call, and puts them back.

        DDP: its forward is that of the module inside. FSDP2: parameters are sharded as it begins and ends (its root
        stays gathered after a forward, and would then miss an optimizer step); gradients are reduced per micro-batch
        even where the user put that off, since what is not reduced is not in .grad and could not be undone.
        """
        with ExitStack() as stack:
            if self._ddp is not None:
                stack.enter_context(_attribute(self._ddp, "forward", partial(_bare_forward, self._ddp)))
            for unit in self._units:
                unit.reshard()
                if not _reduces_gradients(unit):
                    unit.set_requires_gradient_sync(True, recurse=False)
                    stack.callback(unit.set_requires_gradient_sync, False, recurse=False)
            try:
                yield
            finally:
                if not self._in_a_walk:
                    for unit in self._units:
                        unit.reshard()

    def backward(self, roots: list[tuple[Tensor, Tensor]], parameters: list[nn.Parameter]) -> None:
        """Autograd from (tensor, gradient) pairs into .grad of the parameters."""
        if not roots:
            return
        tensors, gradients = zip(*roots, strict=True)
        if self._engine is not None:
            with torch.enable_grad():  # it may multiply by its loss scale, perhaps within the caller's backward
                self._engine.backward(tensors[0], scale_wrt_gas=False)
            return
        if self._ddp is None or not self._ddp.static_graph:
            torch.autograd.backward(tensors, gradients)
            return
        # This DDP counts whatever autograd accumulates, in its first iteration and between iterations too.
        found = torch.autograd.grad(tensors, parameters, gradients, allow_unused=True)
        for parameter, new in zip(parameters, found, strict=True):
            if new is not None:
                parameter.grad = new if parameter.grad is None else parameter.grad + new

    def after_what_is_under_way(self, run: Callable[[], None]) -> None:
        """Run it, within a backward: now, or after FSDP2's own last step where that backward is already in FSDP2."""
        states = [unit._get_fsdp_state()._state_ctx for unit in self._units]
        if any(state.post_backward_final_callback_queued for state in states):
            torch.autograd.Variable._execution_engine.queue_callback(run)
        else:
            run()

    def check_gradients(self, own_backward: bool) -> None:
        """ValueError where gradients would be lost. ``own_backward``: this call makes them, not a later backward."""
        if self._fsdp1:
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) gathers weights for the backward only from the outputs of its own "
                "modules, so gradients cannot be made here; scoring under torch.no_grad works. Use FSDP2: "
                "torch.distributed.fsdp.fully_shard"
            )
        if own_backward and self._engine is not None and not self.sharded:
            raise ValueError(
                "a DeepSpeedEngine of ZeRO stage 0, 1 or 2 takes gradients only from its own backward: use "
                "loss = ...(elbo_logprob(engine, ...)); engine.backward(loss), or ZeRO stage 3"
            )

    def without_loss_scale(self, grad: Tensor) -> Tensor:
        """The gradient that came down from a loss, less what DeepSpeed multiplies each replay with once more."""
        scale = getattr(getattr(self._engine, "optimizer", None), "loss_scale", 1.0)
        return grad if scale == 1.0 else grad / scale

    def through(self, make: Callable[[], Tensor]) -> Tensor:
        """``make()`` as the output of DDP's own forward, so that its backward is one whose gradients DDP averages."""
        ddp = self._ddp
        if ddp is None:
            return make()
        with _attribute(ddp, "_run_ddp_forward", partial(_without_ddp, ddp, make)):
            return type(ddp).forward(ddp)  # ddp.forward itself is another one within a session

    @property
    def replicated(self) -> bool:
        """Whether sums have to leave through ``deliver``."""
        return self._ddp is not None

    def deliver(self, parameters: list[nn.Parameter], totals: list[Tensor | None]) -> None:
        """Add totals to .grad as the gradients of one backward through DDP. Empties ``totals``."""
        with torch.enable_grad():
            root = self.through(lambda: _Deliver.apply(totals, *parameters))
        root.backward()


class _Deliver(torch.autograd.Function):
    """A scalar whose backward hands given gradients to the parameters."""

    @staticmethod
    def forward(ctx: Any, totals: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.totals = totals
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        given = (None, *ctx.totals)
        ctx.totals.clear()  # the last references, so that autograd can take the tensors over without a copy
        return given


@contextmanager
def hooks_suspended(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hooks on parameters see the total in a later backward; inner backwards would run them on every part as well."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooks = [found for p in parameters for name in names if (found := getattr(p, name, None))]
    kept = [dict(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, entries in zip(hooks, kept, strict=True):
            h.update(entries)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _ddp_around(model: nn.Module) -> Any:
    """The DistributedDataParallel among the outer wrappers of a model, or None."""
    while "DistributedDataParallel" not in (names := _class_names(model)):
        wrapper = next((name for name in names if name in _CALL_WRAPPERS), None)
        if wrapper is None:
            return None
        model = _CALL_WRAPPERS[wrapper](model)
    return model


def _sharding_groups(model: nn.Module) -> list[Any]:
    """The process groups that gather weights in every forward."""
    modules = [(m, _class_names(m)) for m in model.modules()]
    found = [m.process_group for m, names in modules if "FullyShardedDataParallel" in names]
    found += [p.ds_process_group for p in model.parameters() if hasattr(p, "ds_process_group")]
    if any("FSDPModule" in names for _, names in modules):
        meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
        found += [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim)]
    return list({id(group): group for group in found}.values())


def _tensor_parallel_groups(model: nn.Module, tp_group: Any) -> list[Any]:
    """The process groups whose ranks hold parts of every layer, or of the head."""
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    found = [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim)]
    found += [] if tp_group is None else [tp_group]
    return list({id(group): group for group in found}.values())


def _without_ddp(ddp: Any, make: Callable[[], Tensor]) -> Tensor:
    with _attribute(ddp, "forward", partial(_bare_forward, ddp)):
        return make()


def _bare_forward(ddp: Any, *args: Any, **kwargs: Any) -> Any:
    return ddp.module(*args, **kwargs)


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance for a while; nests."""
    present, before = name in vars(module), vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if present:
            setattr(module, name, before)
        else:
            delattr(module, name)


def _reduces_gradients(unit: Any) -> bool:
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return all(group.reduce_grads for group in groups if group is not None)
