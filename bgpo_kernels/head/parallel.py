"""A head whose weight [V, H] is cut over its rows, the vocabulary, among the ranks of a process group.

Rank r holds V_r rows and forms logits [C, V_r] of the same C masked rows as every other rank:

    statistics   one sweep here gives m_r, s_r, z_t - m_r (of the rank that holds the target) and the entropy H_r
    exchange     one all-gather of these 3 or 4 numbers a row, then on every rank, in fp64 and in the order of ranks:
                   m = max m_r,  s = sum s_r e^(m_r - m),  logprob = min(z_t - m, 0) - log s <= 0
                   H = sum w_r H_r - sum w_r log w_r,  w_r = s_r e^(m_r - m) / s
    dlogits      the kernels as they are, with the merged statistics; they want a target, so a row whose target is
                 elsewhere is given a stand-in column, which is then overwritten with the gradient of a class
                 that is not the target
    gradients    dW and db are this rank's own; dX = sum over ranks of dlogits_r W_r, one fp32 all-reduce a call

A gather and not an all-reduce, because then all ranks add the same numbers in the same order: the same bits everywhere,
which control flow may depend on. FLOPs are those of an unsharded head with V_r rows: the exchange happens while a
chunk's logits are there, so one pass stays one pass.

Every rank must make the same calls with the same rows, targets and options, and with the same workspace size.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import validation as check
from ..bound.segments import RowSegments
from . import reference
from .options import LogitTransform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def is_dtensor(value: object) -> bool:
    """By what it has, so that torch.distributed need not be there."""
    return isinstance(value, Tensor) and hasattr(value, "placements") and hasattr(value, "device_mesh")


def _all_gather() -> Any:
    """The collective that fills one tensor, under its name in this torch; the older one warns where both exist."""
    known = torch.distributed
    return getattr(known, "all_gather_single", None) or known.all_gather_into_tensor


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the weight this rank holds."""

    group: ProcessGroup
    start: int  # id of this rank's first row
    size: int  # V_r
    largest: int  # of all V_r: what decides how many rows a chunk holds, alike on every rank
    total: int  # V
    mesh: DeviceMesh | None = None  # where the parameters are DTensors

    def held(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Whether this rank holds each target ``[C]``, and its column here, or any column for those of others."""
        column = targets - self.start
        return (column >= 0) & (column < self.size), column.clamp(0, max(0, self.size - 1))

    def merge_(self, stats: Tensor, held: Tensor, entropy: bool) -> None:
        """``stats`` [4, C] of this shard become those of the whole vocabulary, the same bits on every rank."""
        mine = stats[: 3 + entropy].clone()
        mine[2] = torch.where(held, (stats[2] + stats[1].log()).clamp(max=0.0), -torch.inf)
        every = self._gather(mine).double()
        top = every[:, 0].amax(0)
        below = every[:, 0] - top  # -inf for a shard without rows, or all of whose logits are -inf
        share = every[:, 1] * below.exp()
        total = share.sum(0)
        stats[0], stats[1] = top, total
        stats[2] = (below + every[:, 2]).amax(0).clamp(max=0.0) - total.log()
        if entropy:
            w = share / total
            stats[3] = (torch.where(share == 0, 0.0, w * every[:, 3]) + torch.special.entr(w)).sum(0)

    def _gather(self, mine: Tensor) -> Tensor:
        """``[ranks, ...]`` in the order of ranks."""
        ranks = torch.distributed.get_world_size(self.group)
        every = torch.empty(ranks * mine.numel(), dtype=mine.dtype, device=mine.device)
        if mine.numel():
            _all_gather()(every, mine.flatten(), group=self.group)
        return every.view(ranks, *mine.shape)

    def add_up_(self, partial: Tensor) -> None:
        """Sum over the ranks, in place."""
        if partial.numel():
            torch.distributed.all_reduce(partial, group=self.group)

    def as_parameter(self, local: Tensor | None) -> Tensor | None:
        """A gradient [V_r, ..] in the form of the parameter that it belongs to."""
        if local is None or self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((self.total, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def check_agreement(self, capacity: int, targets: Tensor, rows: Tensor | None) -> None:
        """ValueError on every rank when they were called with different rows (a hang or nonsense otherwise)."""
        device = targets.device
        sums = [targets.sum(), targets.new_zeros(()) if rows is None else rows.sum()]
        sizes = [torch.full((), n, dtype=torch.int64, device=device) for n in (targets.shape[0], capacity)]
        every = self._gather(torch.stack([*sizes, *sums]))

        def message(_: Tensor) -> str:
            return (
                "the ranks of the tensor-parallel group must make the same call, but (rows, rows that the workspace "
                f"holds, sum of targets, sum of row indices) by rank are {every.tolist()}"
            )

        check.values(check.Suspect(every, lambda x: x != x[:1], message))


class ShardKernels:
    """The row kernels (see ``reference.py``) of a head of which this rank holds a shard; targets are ids of 0..V-1."""

    def __init__(self, kernels: ModuleType, shard: VocabShard) -> None:
        self._kernels, self._shard = kernels, shard

    def row_statistics(
        self, logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor,
        entropy: bool,
    ) -> None:  # fmt: skip
        """As ``reference.row_statistics`` over the whole vocabulary."""
        held, column = self._shard.held(targets)
        if logits.shape[1]:
            self._kernels.row_statistics(logits, column, bias, transform, stats, entropy)
        else:
            stats[0], stats[1:] = -torch.inf, 0.0
        self._shard.merge_(stats, held, entropy)

    def dlogits_(
        self, logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor,
        grad_logprob: Tensor, grad_entropy: Tensor | None, out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """As ``reference.dlogits_``: the columns of this rank."""
        if not logits.shape[1]:
            return logits.to(out_dtype)
        held, column = self._shard.held(targets)
        upstream = (grad_logprob, grad_entropy)
        other = _gradient_of_others(logits, column, bias, transform, stats, *upstream)
        out = self._kernels.dlogits_(logits, column, bias, transform, stats, *upstream, out_dtype)
        place = column[:, None]
        return out.scatter_(1, place, torch.where(held[:, None], out.gather(1, place), other.to(out_dtype)))

    def bound_dlogits_(
        self, logits: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor,
        segments: RowSegments, sums: Tensor, out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As ``reference.bound_dlogits_``."""
        segments.sum_up(stats[2], sums)
        grad = segments.row_gradients(sums)
        return self.dlogits_(logits, targets, bias, transform, stats, grad, None, out_dtype), grad


def _gradient_of_others(
    logits: Tensor, column: Tensor, bias: Tensor | None, transform: LogitTransform, stats: Tensor,
    grad_logprob: Tensor, grad_entropy: Tensor | None,
) -> Tensor:  # fmt: skip
    """``[C, 1]``: gradient of the logit at each row's ``column``, as of a class that is not the target.

    The specification, on two copies of that logit of which the second plays the target.
    """
    raw = logits.gather(1, column[:, None]).to(stats.dtype)
    if bias is not None:
        raw = raw + bias[column, None].to(stats.dtype)
    second = torch.ones_like(column)
    pair = raw.expand(-1, 2).contiguous()
    return reference.dlogits_(pair, second, None, transform, stats, grad_logprob, grad_entropy, stats.dtype)[:, :1]


def local_parts(
    hidden: Any, weight: Any, bias: Any, group: ProcessGroup | None
) -> tuple[Any, Any, Any, VocabShard | None]:
    """Plain tensors of this rank, and its shard; all as given, and None, where nothing is sharded."""
    if not is_dtensor(weight):
        return hidden, weight, bias, None if group is None else _equal_shards(weight, group)
    shard = shard_of("weight", weight)
    if group is not None and group is not shard.group:
        raise ValueError("tp_group is not the group of weight's mesh; a DTensor brings its own, so leave tp_group out")
    if is_dtensor(bias):
        if _placement(bias) != "Shard(0)" or bias.device_mesh != shard.mesh:
            raise ValueError(f"bias is a DTensor with {bias.placements}, but weight is cut over its rows: cut it alike")
        bias = bias.to_local()
    if is_dtensor(hidden):
        if _placement(hidden) != "Replicate" or hidden.device_mesh != shard.mesh:
            raise ValueError(
                f"hidden is a DTensor with {hidden.placements}, but every rank of the head needs all rows: "
                "hidden.redistribute(placements=[Replicate()]) on weight's mesh first"
            )
        hidden = hidden.to_local()  # whose gradient comes back whole, hence Replicate too
    local = weight.to_local()
    return hidden, local, bias, shard


def shard_of(name: str, weight: Any) -> VocabShard:
    """The shard of a DTensor weight [V, H], or ValueError for a layout that is not served."""
    placements, mesh = weight.placements, weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} is a DTensor over a mesh of {mesh.ndim} dimensions with {placements}: only a head that is cut "
            "over the vocabulary on a mesh of one dimension is served; leave it out of one of the parallel plans"
        )
    if _placement(weight) != "Shard(0)":
        raise ValueError(
            f"{name} is a DTensor with {placements}: a head may be cut over its rows, the vocabulary (Shard(0), "
            "ColwiseParallel), only"
        )
    total, ranks, rank = weight.shape[0], mesh.size(), mesh.get_local_rank()
    largest = -(-total // ranks)  # as torch.chunk cuts: full shards first, then a shorter one, then empty ones
    start = min(rank * largest, total)
    size, held = min(largest, total - start), weight.to_local().shape[0]
    if held != size:
        raise ValueError(
            f"{name} {list(weight.shape)} has {held} rows on rank {rank} of {ranks}, where DTensor cuts {size}"
        )
    return VocabShard(mesh.get_group(), start, size, largest, total, mesh)


def _placement(value: Any) -> str:
    """``Shard(0)`` for a cut of the first dimension however written, else the class of the only placement."""
    if len(value.placements) != 1:
        return "several"
    (found,) = value.placements
    name = type(found).__name__
    return f"Shard({found.dim % value.dim()})" if name == "Shard" else name


def _equal_shards(weight: Any, group: ProcessGroup) -> VocabShard:
    """Megatron's layout: rank r holds rows r V/p and on."""
    check.shape("weight", check.tensor("weight", weight), ("V of this rank", "H"))
    size, ranks = weight.shape[0], torch.distributed.get_world_size(group)
    rank = torch.distributed.get_rank(group)
    if rank < 0:
        raise ValueError("tp_group does not hold this process")
    return VocabShard(group, rank * size, size, size, ranks * size)
