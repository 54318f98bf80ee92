"""``MaskDraw``: the Monte Carlo maskings of a batch, as row lists that the head consumes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import validation as check
from ..backends import resolve
from ..bound import ops as bound_ops

MAX_ID = 2**31 - 1  # of a token


@dataclass(frozen=True, eq=False)
class MaskDraw:
    """n masked copies of each of B sequences. Segment s = b*n + j is sample j of sequence b.

    Made by :func:`random_mask`; can be built by hand from explicit masks (then shapes and offsets are checked).
    """

    noisy_ids: Tensor  #: ``[B, n, T] int64``, model input
    rows: Tensor  #: ``[N] int64``, flat indices into B*n*T of the masked response tokens, ascending
    targets: Tensor  #: ``[N] int64``, the tokens they hide
    segment_offsets: Tensor  #: ``[S+1] int64``, rows of segment s are ``rows[offsets[s] : offsets[s+1]]``
    segment_weight: Tensor  #: ``[B, n] fp32``, weight of each masked token
    count: Tensor  #: ``[B, n] int32``, number of masked response tokens
    host_offsets: tuple[int, ...] = field(default=(), repr=False)  #: ``segment_offsets`` on the host
    max_target: int = field(default=-1, repr=False)  #: no target id is larger

    def __post_init__(self) -> None:
        check.dtype("noisy_ids", check.tensor("noisy_ids", self.noisy_ids), torch.int64)
        check.shape("noisy_ids", self.noisy_ids, ("B", "n", "T"))
        batch, samples, _tokens = self.noisy_ids.shape
        for name, dtype, shape, because in (
            ("rows", torch.int64, ("N",), ""),
            ("targets", torch.int64, None, " (as rows)"),
            ("segment_offsets", torch.int64, (batch * samples + 1,), " (B*n + 1)"),
            ("segment_weight", torch.float32, (batch, samples), " (B, n)"),
            ("count", torch.int32, (batch, samples), " (B, n)"),
        ):
            value = getattr(self, name)
            check.dtype(name, check.tensor(name, value), dtype)
            check.shape(name, value, tuple(self.rows.shape) if shape is None else shape, because)
            check.same_device(name, value, "noisy_ids", self.noisy_ids)
        if not self.host_offsets:
            object.__setattr__(self, "host_offsets", tuple(self.segment_offsets.tolist()))
            self._check_by_hand()
        if self.max_target < 0 and self.targets.numel():
            object.__setattr__(self, "max_target", int(self.targets.max()))

    def _check_by_hand(self) -> None:
        """Values of a draw that did not come from our own engines: kernels index memory with them."""
        offsets, size = self.host_offsets, self.segment_offsets.diff()
        if offsets[0] != 0 or offsets[-1] != self.rows.shape[0] or bool((size < 0).any()):
            raise ValueError(f"segment_offsets must ascend from 0 to N={self.rows.shape[0]}, got {offsets[:8]}...")
        wrong = (size != self.count.flatten()).nonzero().flatten()[:4]
        if wrong.numel():
            raise ValueError(
                f"count {self.count.flatten()[wrong].tolist()} disagrees with segment_offsets, which give segments "
                f"{wrong.tolist()} {size[wrong].tolist()} rows"
            )
        check.ids_in_range("rows", self.rows, 0, self.noisy_ids.numel(), "flat indices into B*n*T")
        if bool((self.rows.diff() <= 0).any()):
            at = int((self.rows.diff() <= 0).nonzero()[0, 0])
            raise ValueError(f"rows must be strictly ascending, got {self.rows[at : at + 2].tolist()} at {at}")
        segment = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=size.device), size)
        stray = (self.rows // self.noisy_ids.shape[2] != segment).nonzero().flatten()[:4]
        if stray.numel():
            raise ValueError(
                f"rows {self.rows[stray].tolist()} lie outside their segments {segment[stray].tolist()}: "
                f"segment s owns s*T .. s*T + T - 1 with T={self.noisy_ids.shape[2]}"
            )
        check.ids_in_range("targets", self.targets, 0, MAX_ID + 1, "token ids")
        check.finite("segment_weight", self.segment_weight)

    @property
    def n_mc(self) -> int:
        """Samples per sequence in this draw."""
        return self.noisy_ids.shape[1]

    @property
    def num_rows(self) -> int:
        """N, the masked rows of all segments."""
        return self.rows.shape[0]

    def reduce(self, logp: Tensor) -> Tensor:
        """``[B, n] = weight * sum of the segment's logp``: the ELBO estimate of every sample. Differentiable.

        Args:
            logp: ``[N]`` fp32 (or fp64) log-probabilities of the masked rows, in the order of ``rows``.

        Raises:
            ValueError: another length than N, another device. TypeError: another dtype.
        """
        check.dtype("logp", check.tensor("logp", logp), torch.float32, torch.float64)
        check.shape("logp", logp, (self.num_rows,), " (one per masked row)")
        check.same_device("logp", logp, "rows", self.rows)
        backend = resolve("auto", logp.device)
        sums = bound_ops.segment_sum(logp, self.segment_offsets, self.segment_weight.flatten(), backend)
        return sums.view(self.segment_weight.shape)

    def sequence(self, b: int, lo: int, hi: int, keep: Tensor) -> MaskDraw:
        """Samples lo..hi-1 of sequence b alone, its tokens restricted to the indices ``keep [T'] int64``."""
        samples, tokens = self.noisy_ids.shape[1:]
        first = b * samples + lo
        begin, end = self.host_offsets[first], self.host_offsets[first + hi - lo]
        new_index = torch.full((tokens,), -1, dtype=torch.int64, device=keep.device)
        new_index[keep] = torch.arange(keep.shape[0], device=keep.device)
        local = self.rows[begin:end] - first * tokens
        rows = local // tokens * keep.shape[0] + new_index[local % tokens]
        host = tuple(o - begin for o in self.host_offsets[first : first + hi - lo + 1])
        return MaskDraw(
            self.noisy_ids[b : b + 1, lo:hi].index_select(2, keep),
            rows,
            self.targets[begin:end],
            self.segment_offsets[first : first + hi - lo + 1] - begin,
            self.segment_weight[b : b + 1, lo:hi],
            self.count[b : b + 1, lo:hi],
            host,
            max(self.max_target, 0),
        )
