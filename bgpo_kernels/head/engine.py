"""The vocabulary head without N x V logits: vendor GEMMs into one reused workspace, our row kernels in between.

    score       for each chunk:  logits = X W^T;  row statistics                                               2NHV
    gradients   for each chunk:  logits again;  dlogits in place;  dX = dlogits W;  dW += dlogits^T X          6NHV
    one_pass    for each chunk:  logits;  statistics;  segment sums and coefficients;  dlogits in place;
                                 dX;  dW +=                                             6NHV, 4NHV with a frozen head

One pass is possible because the coefficient of a row depends on nothing outside its segment (``d loss / d logp_k =
w_s c_s``), and a chunk holds whole segments. Bytes beyond the operands: the workspace, O(N) statistics, and one fp32
accumulator of dW when the weight is narrower than that and there is more than one chunk.

On a GPU the forward GEMM runs in *panels* of a fixed number of rows, the last one filled up. A vendor library picks its
algorithm by shape; with one shape for all, a row's logits, hence its log-probability, are the same bits whatever its
chunk, batch or company. 512 rows: 15 full waves of 128 x 256 tiles on 132 multiprocessors at V = 126464, 18 at 152064;
the weight, read once per panel, takes a third of the time that the panel's FLOPs take (1.04 GB, 0.53 TFLOP). The price
is half a panel of a third of the FLOPs, on average. Where rows do not depend on their chunk and the coefficients do not
depend on sums (on-policy), chunks need not hold whole segments: all are full.

Nothing waits for the device: the plan follows from offsets that the host knows.

Numerics: logits are fp32 in the workspace wherever the vendor GEMM gives them from the inputs' dtype; on a CPU bf16
GEMMs write bf16, so bf16 logits carry that rounding (as torch's own do), and fp16 inputs are computed in fp32. Row
statistics, coefficients and sums over chunks are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backends import engine
from ..bound.segments import RowSegments, SegmentBound
from ..native import with_huge_pages
from ..workspace import chunk_capacity, logits_buffer
from .chunks import Group, cut, plan
from .options import LogitTransform
from .parallel import ShardKernels, VocabShard, is_dtensor

#: Rows of a forward GEMM on a GPU; a power of two. See the module's docstring.
PANEL_ROWS = 512


@cache
def _mm_has_out_dtype() -> bool:
    """torch >= 2.8: GEMMs of 16-bit inputs with fp32 output."""
    return hasattr(torch.ops.aten.mm, "dtype_out") and hasattr(torch.ops.aten.addmm, "dtype_out")


def runs_in_panels(device: torch.device) -> bool:
    """Whether forward GEMMs have one shape for all batches: on GPUs. (On a CPU it would cost small batches dearly.)"""
    return device.type == "cuda"


@cache
def _addmm_accumulates_wide() -> bool:
    """torch >= 2.10: ``addmm`` of 16-bit inputs adds to an fp32 tensor (pytorch PR 167931; an error before)."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


#: Rows of dW that are added at once where ``addmm`` cannot: a bounded temporary, 128 MiB at H = 4096.
SLICE_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """A head problem: N rows of ``hidden`` against the vocabulary. Tensors are detached: no autograd here."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H], or this rank's rows of it, as those of bias
    bias: Tensor | None  # [V]
    rows: Tensor | None  # [N] into R; None: all rows
    targets: Tensor  # [N]
    transform: LogitTransform
    backend: str  # resolved; not "reference"
    shard: VocabShard | None = None  # of a weight that is cut over ranks

    @property
    def kernels(self) -> Any:
        """The row kernels: a module, or one dressed for a shard."""
        plain = engine("head", self.backend)
        return plain if self.shard is None else ShardKernels(plain, self.shard)

    @property
    def num_rows(self) -> int:
        return self.targets.shape[0]

    @property
    def gemm_dtype(self) -> torch.dtype:
        """What the GEMMs take: fp16 GEMMs on a CPU are a hundred times slower than fp32 ones, so they are not used."""
        slow_half = self.hidden.dtype == torch.float16 and self.hidden.device.type == "cpu"
        return torch.float32 if slow_half else self.hidden.dtype

    @property
    def logits_dtype(self) -> torch.dtype:
        narrow = self.gemm_dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow and self.wide_output else self.gemm_dtype

    @property
    def wide_output(self) -> bool:
        """Whether GEMMs of 16-bit inputs can write fp32."""
        return self.hidden.device.type == "cuda" and _mm_has_out_dtype()

    @property
    def stats_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def _workspace_rows(self) -> int:
        """Rows that the workspace holds. Ranks exchange numbers chunk by chunk, so all count with the largest shard."""
        columns = self.weight.shape[0] if self.shard is None else self.shard.largest
        return chunk_capacity(columns, self.logits_dtype, self.hidden.device)

    @property
    def capacity(self) -> int:
        """Rows of a chunk; whole panels where there are panels."""
        rows = self._workspace_rows
        return rows if self.panel is None else rows - rows % self.panel

    @property
    def panel(self) -> int | None:
        """Rows of a forward GEMM, None for a whole chunk: PANEL_ROWS, or what the workspace holds of them."""
        if not runs_in_panels(self.hidden.device):
            return None
        return min(PANEL_ROWS, 1 << (self._workspace_rows.bit_length() - 1))

    def gemm_weight(self) -> Tensor:
        """The weight as the GEMMs take it; a cast copy only under autocast or for fp16 on a CPU."""
        return self.weight.to(self.gemm_dtype)


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """The fp32 buffer ``parameter.main_grad`` of trainers that keep gradients apart from 16-bit parameters, if any."""
    found = getattr(parameter, "main_grad", None)
    if not isinstance(found, Tensor) or not parameter.is_leaf:
        return None
    return found if found.shape == parameter.shape and found.dtype == torch.float32 else None


class Gradients:
    """Accumulators of one backward: each is None when not wanted. dW and db are fp32 sums over chunks (fp64 for fp64).

    ``weight`` and ``bias`` may be handed in, so that sums go straight into an existing ``.grad``; otherwise the first
    chunk writes them. ``hidden`` is [N, H], the gradient of each gathered row. Of a head cut over ranks, ``hidden`` is
    this rank's part, in fp32, until ``complete`` adds those of the others.
    """

    def __init__(self, head: Head, hidden: bool, weight: Tensor | bool, bias: Tensor | bool) -> None:
        device, width = head.hidden.device, head.weight.shape[1]
        dtype = head.gemm_dtype if head.shard is None else head.stats_dtype
        self.hidden = torch.empty(head.num_rows, width, dtype=dtype, device=device) if hidden else None
        self._want_weight, self._want_bias = weight is not False, bias is not False and head.bias is not None
        self.weight = _local(weight) if isinstance(weight, Tensor) else None
        self.bias = _local(bias) if isinstance(bias, Tensor) else None

    def complete(self, head: Head) -> None:
        """Add up what the ranks made of the hidden rows' gradient."""
        if head.shard is not None and self.hidden is not None:
            head.shard.add_up_(self.hidden)

    @property
    def wanted(self) -> bool:
        """Whether anything at all is."""
        return self.hidden is not None or self._want_weight or self._want_bias

    def add_weight(self, dlogits: Tensor, x: Tensor, live: Tensor, head: Head, last: bool) -> None:
        """dW += dlogits^T x over the rows that are ``live``: 0 times a NaN of another row must not come in."""
        if not self._want_weight:
            return
        x = x.masked_fill(~live[:, None], 0.0)
        if self.weight is None:
            single = last and head.weight.dtype == head.gemm_dtype
            dtype = head.weight.dtype if single else head.stats_dtype
            fresh = torch.empty_like(head.weight, dtype=dtype, memory_format=torch.contiguous_format)
            self.weight = with_huge_pages(fresh)
            _product(dlogits.T, x, self.weight, head)
        elif self.weight.dtype == dlogits.dtype:
            self.weight.addmm_(dlogits.T, x)
        elif head.wide_output and _addmm_accumulates_wide():
            torch.addmm(self.weight, dlogits.T, x, out_dtype=self.weight.dtype, out=self.weight)
        elif head.wide_output:
            for part, of in zip(self.weight.split(SLICE_ROWS), dlogits.T.split(SLICE_ROWS), strict=True):
                part.add_(torch.mm(of, x, out_dtype=part.dtype))
        else:
            self.weight.add_(torch.mm(dlogits.T, x))

    def add_bias(self, dlogits: Tensor, head: Head) -> None:
        """db += column sums of dlogits, in fp32."""
        if not self._want_bias:
            return
        sums = dlogits.sum(0, dtype=head.stats_dtype)
        if self.bias is None:
            self.bias = sums
        else:
            self.bias.add_(sums)


def _local(accumulator: Any) -> Tensor:
    """This rank's memory of a .grad that is a DTensor."""
    return accumulator.to_local() if is_dtensor(accumulator) else accumulator


def _product(a: Tensor, b: Tensor, out: Tensor, head: Head) -> None:
    """out = a b, in the dtype of ``out`` wherever the GEMM can write that."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif head.wide_output:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


class _Chunk:
    """One chunk in the workspace: its gathered hidden rows, its logits, then, in the same memory, their gradient."""

    def __init__(self, head: Head, weight: Tensor, begin: int, end: int) -> None:
        self.head, self.w, self.begin, self.end = head, weight, begin, end
        self.kernels = head.kernels
        self.targets = head.targets[begin:end]
        rows, panel = end - begin, head.panel or max(1, end - begin)
        padded = -(-rows // panel) * panel
        x = self._gather(padded)
        logits = logits_buffer(padded, weight.shape[0], head.logits_dtype, head.hidden.device)
        for i in range(0, padded, panel):
            _product(x[i : i + panel], weight.T, logits[i : i + panel], head)
        self.x, self.logits = x[:rows], logits[:rows]

    def _gather(self, padded: int) -> Tensor:
        """The chunk's hidden rows [padded, H] in the GEMMs' dtype, zeros behind them."""
        head, rows = self.head, self.end - self.begin
        if head.rows is None:
            x = head.hidden[self.begin : self.end]
        elif padded == rows:
            x = head.hidden.index_select(0, head.rows[self.begin : self.end])
        else:
            x = head.hidden.new_empty(padded, head.hidden.shape[1])
            torch.index_select(head.hidden, 0, head.rows[self.begin : self.end], out=x[:rows])
            x[rows:].zero_()
        if x.shape[0] != padded:
            x = torch.nn.functional.pad(x, (0, 0, 0, padded - rows))
        return x.to(head.gemm_dtype)

    def statistics(self, stats: Tensor, entropy: bool) -> None:
        """Fills the chunk's columns of ``stats`` [4, N]."""
        head, part = self.head, self._part(stats)
        self.kernels.row_statistics(self.logits, self.targets, head.bias, head.transform, part, entropy)

    def backward(
        self, stats: Tensor, grad_logprob: Tensor, grad_entropy: Tensor | None, into: Gradients, last: bool
    ) -> None:
        """Turns the logits into their gradient in place and feeds the two GEMMs; gradients are [chunk rows]."""
        if not into.wanted:
            return
        head = self.head
        dlogits = self.kernels.dlogits_(
            self.logits, self.targets, head.bias, head.transform, self._part(stats), grad_logprob, grad_entropy,
            head.gemm_dtype,
        )  # fmt: skip
        live = grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
        self._feed(dlogits, live, into, last)

    def backward_of_bound(
        self, stats: Tensor, segments: RowSegments, sums: Tensor, into: Gradients, last: bool
    ) -> None:
        """As ``backward`` for the bound's loss over the chunk's whole segments, whose ``sums`` it fills."""
        if not into.wanted:
            return segments.sum_up(self._part(stats)[2], sums)
        head = self.head
        dlogits, grad_logprob = self.kernels.bound_dlogits_(
            self.logits, self.targets, head.bias, head.transform, self._part(stats), segments, sums, head.gemm_dtype
        )
        self._feed(dlogits, grad_logprob != 0, into, last)

    def _part(self, stats: Tensor) -> Tensor:
        return stats[:, self.begin : self.end]

    def _feed(self, dlogits: Tensor, live: Tensor, into: Gradients, last: bool) -> None:
        if into.hidden is not None:
            _product(dlogits, self.w, into.hidden[self.begin : self.end], self.head)
        into.add_weight(dlogits, self.x, live, self.head, last)
        into.add_bias(dlogits, self.head)


def new_stats(head: Head) -> Tensor:
    """``[4, N]``: max, sum of exp, log-probability, entropy."""
    return torch.empty(4, head.num_rows, dtype=head.stats_dtype, device=head.hidden.device)


def _pieces(head: Head, offsets: Sequence[int] | None) -> list[tuple[int, int]]:
    """Chunks in order: whole segments where offsets are given (the plan that one_pass uses), full chunks otherwise."""
    if offsets is None:
        return list(cut(0, head.num_rows, head.capacity))
    return [piece for group in plan(offsets, head.capacity) for piece in group.pieces]


def score(head: Head, offsets: Sequence[int] | None = None, entropy: bool = False) -> Tensor:
    """Statistics ``[4, N]`` of every row (row 3 only with ``entropy``). 2NHV."""
    stats, weight = new_stats(head), head.gemm_weight()
    for begin, end in _pieces(head, offsets):
        _Chunk(head, weight, begin, end).statistics(stats, entropy)
    return stats


def gradients(
    head: Head,
    stats: Tensor,
    grad_logprob: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    into: Gradients,
    offsets: Sequence[int] | None = None,
) -> None:
    """Gradients for any upstream gradient per row, from saved statistics and logits computed again (2NHV)."""
    weight = head.gemm_weight()
    pieces = _pieces(head, offsets)
    for begin, end in pieces:
        chunk = _Chunk(head, weight, begin, end)
        upstream = None if grad_entropy is None else grad_entropy[begin:end]
        chunk.backward(stats, grad_logprob[begin:end], upstream, into, last=len(pieces) == 1)
    into.complete(head)


@dataclass(frozen=True)
class Segments:
    """Which rows belong together, and the weight of each row's log-probability."""

    offsets: Tensor  # [S+1] int64
    host_offsets: Sequence[int]
    weight: Tensor  # [S] fp32


def one_pass(head: Head, segments: Segments, bound: SegmentBound, into: Gradients) -> Tensor:
    """Segment sums ``[S]`` and the gradients of the bound's loss.

    Where the bound's slopes are ``known`` beforehand, even a segment larger than the workspace needs no second look;
    otherwise such a segment's logits are computed twice.
    """
    stats, weight = new_stats(head), head.gemm_weight()
    num_segments = len(segments.host_offsets) - 1
    sums = torch.zeros(num_segments, dtype=head.stats_dtype, device=head.hidden.device)
    if bound.known and head.panel is not None:
        groups = [Group(0, head.num_rows, 0, num_segments, cut(0, head.num_rows, head.capacity))]
    else:
        groups = plan(segments.host_offsets, head.capacity)
    single = sum(len(group.pieces) for group in groups) == 1
    for group in groups:
        run = _GroupRun(head, weight, segments, bound, group, stats, sums, into, single)
        if bound.known and (head.panel is not None or len(group.pieces) > 1):
            run.piece_by_piece()
        elif len(group.pieces) > 1:
            run.twice()
        elif group.pieces:
            run.in_one_chunk()
    into.complete(head)
    return sums


@dataclass(frozen=True)
class _GroupRun:
    """One group of segments on its way through the head."""

    head: Head
    weight: Tensor
    segments: Segments
    bound: SegmentBound
    group: Group
    stats: Tensor  # [4, N]
    all_sums: Tensor  # [S]
    into: Gradients
    single: bool  # the only chunk of the call

    def in_one_chunk(self) -> None:
        chunk = self.chunk(self.group.pieces[0])
        chunk.statistics(self.stats, entropy=False)
        chunk.backward_of_bound(self.stats, self.local, self.sums, self.into, last=self.single)

    def piece_by_piece(self) -> None:
        grad = self.local.row_gradients(self.sums)
        for piece in self.group.pieces:
            chunk = self.chunk(piece)
            chunk.statistics(self.stats, entropy=False)
            self.backward(chunk, grad)
        self.sum_up()

    def twice(self) -> None:
        for piece in self.group.pieces:
            self.chunk(piece).statistics(self.stats, entropy=False)
        self.sum_up()
        if not self.into.wanted:
            return
        grad = self.local.row_gradients(self.sums)
        for piece in self.group.pieces:
            self.backward(self.chunk(piece), grad)

    def chunk(self, piece: tuple[int, int]) -> _Chunk:
        return _Chunk(self.head, self.weight, *piece)

    def backward(self, chunk: _Chunk, grad: Tensor) -> None:
        part = grad[chunk.begin - self.group.begin : chunk.end - self.group.begin]
        chunk.backward(self.stats, part, None, self.into, last=self.single)

    def sum_up(self) -> None:
        self.local.sum_up(self.stats[2, self.group.begin : self.group.end], self.sums)

    @property
    def sums(self) -> Tensor:
        """Those of the group."""
        return self.all_sums[self.group.first : self.group.last]

    @property
    def local(self) -> RowSegments:
        """The group's segments."""
        g = self.group
        offsets, weight = self.segments.offsets[g.first : g.last + 1], self.segments.weight[g.first : g.last]
        return RowSegments(offsets, weight, g.begin, g.end, g.first, g.last, self.bound)
