"""``row_logprob``: log-probabilities of chosen tokens of given noisy sequences; the drop-in for per-token losses.

A trainer that calls the model, takes a log-softmax of all its logits and gathers a few of them needs the head on those
few rows only. The masks are the caller's. Where one micro-batch holds everything, the call is one ordinary forward with
its graph; otherwise the rows are scored without gradient and run again in the backward, one micro-batch alive at a
time (``two_pass.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import validation as check
from ..backends import resolve
from ..bound.segments import SegmentBound
from ..head.functional import check_support, masked_logprob
from ..head.options import LogitTransform
from ..models import HeadSpec, assert_bidirectional, find_head, forward_kwargs, without_gradient
from .head_pass import Roots, backward_segments, call_model
from .micro_batch import Group, MicroBatches
from .problem import check_embedding, padding_of
from .sink import HeadSink
from .two_pass import differentiable_scores


def row_logprob(
    model: nn.Module,
    input_ids: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    support: Tensor | None = None,
    return_entropy: bool = False,
    attention_mask: Tensor | None = None,
    model_kwargs: dict[str, Any] | None = None,
    micro_batch_tokens: int | None = None,
    replay: bool | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``log p(targets | input_ids)`` at the chosen tokens, the head run on their rows alone.

    Differentiable by any later loss of the row log-probabilities (PPO ratios per token, KL, entropy bonus). Head: 2NHV
    FLOPs forward for N rows, never N x V logits.

    Args:
        model: as :func:`bgpo_backward`.
        input_ids: ``[P, T]`` int64, what the model sees: P sequences, masked by the caller.
        rows: the tokens to score. ``[P, T]`` bool, or ``[N]`` int64 flat indices into P*T, in any order. Where row i-1
            of a model predicts token i (Dream), say i; the shift is made here.
        targets: ``[P, T]`` int64 of which those at ``rows`` are read, or ``[N]`` in the order of ``rows``.
        temperature, support, return_entropy, backend: as :func:`masked_logprob`.
        attention_mask: ``[P, T]`` of 0 and 1. Padding is cut away before the model sees it, so it never changes a
            result. None: every token is attended, padding too.
        model_kwargs: further arguments of the model's forward. Tensors with P as first dimension are cut with the
            micro-batches; those that begin with ``[P, T]`` lose their padding with the tokens.
        micro_batch_tokens: tokens alive at once; None chooses by free memory and halves on out-of-memory.
        replay: None: keep the graph where all tokens together are no more than a micro-batch, otherwise replay. True:
            always replay (one forward more, flat memory). False: never (the graphs of all micro-batches stay).
        head: as :func:`bgpo_backward`.

    Returns:
        ``[N]`` fp32 (fp64 for a model in fp64), in the order of ``rows``; with ``return_entropy`` the pair
        (logp, entropy).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that disagree; ids, rows or targets out of range; a first token
            that a shifted model cannot predict; rows on padding; arguments that cannot be cut; a causal model; a head
            that is not known. In backward: as :func:`elbo_logprob`.
    """
    work, order = _prepare(
        model, input_ids, rows, targets, temperature, support, return_entropy, attention_mask, model_kwargs, head,
        backend,
    )  # fmt: skip
    scores = _run(work, micro_batch_tokens, replay)
    if order is not None:
        scores = scores.index_select(-1, order)
    return (scores[0], scores[1]) if return_entropy else scores[0]


def _run(work: Rows, micro_batch_tokens: int | None, replay: bool | None) -> Tensor:
    batches = MicroBatches(work, micro_batch_tokens)
    ranks = batches.ranks
    if not torch.is_grad_enabled() or replay:
        return differentiable_scores(work, batches)
    ranks.check_gradients(own_backward=False)
    if replay is None:
        fits = 0 < sum(items * tokens for items, tokens in work.groups) <= batches.tokens
        fits = fits and not (ranks.sharded and len(work.groups) > 1)  # a forward per group
        if not any(ranks.most(not fits)):  # ranks that reduce gradients together all take the same way
            try:
                return ranks.through(work.all_scores)
            except torch.OutOfMemoryError:
                if ranks.agree or (len(work.groups) == 1 and not batches.shrink(0)):
                    raise
        return differentiable_scores(work, batches)
    if ranks.sharded:
        raise ValueError(
            "replay=False keeps as many graphs as there are micro-batches, which differ between the ranks "
            "that share this model's weights: pass replay=None or True"
        )
    parts: list[Tensor] = []

    def keep(g: int, lo: int, hi: int) -> None:
        parts.append(work.scores(g, lo, hi))

    def all_graphs() -> Tensor:
        batches.run(list(range(len(work.groups))), keep, parts.clear, idle=work.score)
        return torch.cat(parts, -1)

    return ranks.through(all_graphs)


@dataclass(frozen=True)
class _Cut:
    """The rows of a range of one group's sequences; a micro-batch of ``head_pass`` in which every row is a segment."""

    noisy_ids: Tensor  # [1, m, T']
    rows: Tensor  # [N'] into m*T'
    targets: Tensor  # [N']
    segment_offsets: Tensor  # [N'+1]
    host_offsets: Sequence[int]
    segment_weight: Tensor  # [N']


@dataclass(frozen=True)
class _SameLength:
    """Sequences of one length, and their rows: sequence i owns ``first[i] : first[i + 1]`` of the sorted rows."""

    input_ids: Tensor  # [m, T']
    kwargs: dict[str, Any]
    first: list[int]  # m + 1


@dataclass(frozen=True)
class Rows:
    """A group is a set of sequences of one length, an item one of them; scores are ``[1 or 2, N]`` in sorted order."""

    model: nn.Module
    head: HeadSpec
    transform: LogitTransform
    backend: str
    entropy: bool
    lengths: list[_SameLength]
    item: Tensor  # [N] sequence within the group
    token: Tensor  # [N] token within the sequence
    targets: Tensor  # [N]
    support: Tensor | None  # [N, K]
    distinct: bool  # no row repeats
    kwargs: dict[str, Any]  # of every forward call
    name: ClassVar[str] = "row_logprob"

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def groups(self) -> list[Group]:
        return [Group(*same.input_ids.shape) for same in self.lengths]

    def empty_scores(self) -> Tensor:
        wide = self.head.module.weight.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        return torch.zeros(1 + self.entropy, self.targets.shape[0], dtype=dtype, device=self.device)

    def place(self, g: int, lo: int, hi: int) -> Any:
        first = self.lengths[g].first
        return slice(None), slice(first[lo], first[hi])

    def score(self, g: int, lo: int, hi: int) -> Tensor:
        with without_gradient():
            return self.scores(g, lo, hi)

    def scores(self, g: int, lo: int, hi: int) -> Tensor:
        """``[1 or 2, N']`` of a micro-batch, with its graph where gradients are on."""
        cut = self._cut(g, lo, hi)
        begin, end = self.lengths[g].first[lo], self.lengths[g].first[hi]
        support = None if self.support is None else self.support[begin:end]
        module: Any = self.head.module
        f = self.transform

        def consume(hidden: Tensor) -> Tensor:
            with check.check_values(False):  # they were, once
                both = masked_logprob(
                    hidden, module.weight, cut.targets, rows=cut.rows - self.head.shift,
                    bias=getattr(module, "bias", None), temperature=f.temperature, softcap=f.softcap,
                    logit_scale=f.scale, support=support, return_entropy=self.entropy, tp_group=self.head.tp_group,
                    backend=self.backend,
                )  # fmt: skip
            return torch.stack(both) if isinstance(both, tuple) else both[None]

        return call_model(self, cut, consume, self._kwargs(g, lo, hi))

    def all_scores(self) -> Tensor:
        """Those of all groups, one forward for each, with their graphs."""
        return torch.cat([self.scores(g, 0, items) for g, (items, _) in enumerate(self.groups)], -1)

    def backward(self, g: int, lo: int, hi: int, coefficients: Tensor, sink: HeadSink) -> Roots:
        if self.support is None and not self.entropy:
            bound = SegmentBound.linear(coefficients[0], self.backend)
            kwargs = self._kwargs(g, lo, hi)
            return backward_segments(self, self._cut(g, lo, hi), bound, sink, kwargs, self.distinct)[1]
        with torch.enable_grad():
            scores = self.scores(g, lo, hi)
        return [(scores, coefficients)] if scores.requires_grad else []

    def wanted(self, coefficients: Tensor) -> list[list[bool]]:
        some = (coefficients != 0).any(0).tolist()
        return [
            [any(some[begin:end]) for begin, end in zip(same.first[:-1], same.first[1:], strict=True)]
            for same in self.lengths
        ]

    def _cut(self, g: int, lo: int, hi: int) -> _Cut:
        same = self.lengths[g]
        begin, end = same.first[lo], same.first[hi]
        rows = (self.item[begin:end] - lo) * same.input_ids.shape[1] + self.token[begin:end]
        count = end - begin
        offsets = torch.arange(count + 1, device=self.device)
        weight = torch.ones(count, dtype=torch.float32, device=self.device)
        return _Cut(same.input_ids[None, lo:hi], rows, self.targets[begin:end], offsets, range(count + 1), weight)

    def _kwargs(self, g: int, lo: int, hi: int) -> dict[str, Any]:
        same = self.lengths[g]
        count = same.input_ids.shape[0]

        def share(name: str, value: Any) -> Any:
            if _batch_of(value) != count or (lo, hi) == (0, count):
                return value
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"model_kwargs[{name!r}], a {type(value).__name__}, cannot be cut into micro-batches: pass "
                    f"micro_batch_tokens >= {same.input_ids.numel()}, or the mask as a tensor"
                )
            return value[lo:hi]

        return self.kwargs | {name: share(name, value) for name, value in same.kwargs.items()}


def _prepare(
    model: nn.Module, input_ids: Tensor, rows: Tensor, targets: Tensor, temperature: float, support: Tensor | None,
    return_entropy: bool, attention_mask: Tensor | None, model_kwargs: dict[str, Any] | None,
    head: nn.Module | HeadSpec | None, backend: str,
) -> tuple[Rows, Tensor | None]:  # fmt: skip
    """The checked work, and where each of the caller's rows is among the sorted ones (None: they are in order)."""
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("P", "T"))
    spec = find_head(model, head)
    temperature = check.number("temperature", temperature, 0.0, exclusive=True)
    resolved = resolve(backend, input_ids.device)
    attended = padding_of(attention_mask, input_ids)
    flat, targets = _flat_rows(rows, targets, input_ids)
    given = dict(model_kwargs or {})
    if attention_mask is not None and "attention_mask" in given:
        raise ValueError("attention_mask is given twice: as an argument (padding, cut away) and in model_kwargs")
    token = flat % input_ids.shape[1]
    if attended is not None:
        token = (attended.cumsum(-1) - 1).flatten()[flat]
    check.values(check.outside("targets", targets, 0, spec.vocab_size, "vocabulary of the head"))
    check_embedding(model, {"input_ids": input_ids}, attended)
    _check_rows(spec.shift, attended, flat, token)
    if support is not None:
        check_support(support, targets, spec.vocab_size)
    if "attention_mask" not in given:  # whoever makes the mask decides on the attention
        assert_bidirectional(model, spec)

    lengths, item, order = _sort(input_ids, attended, flat, given)
    if order is not None:
        token, targets = token[order], targets[order]
        support = None if support is None else support[order]
    distinct = rows.dtype == torch.bool or flat.unique().numel() == flat.numel()
    transform = LogitTransform(spec.logit_scale, spec.softcap, temperature)
    kwargs = {name: value for name, value in forward_kwargs(model).items() if name not in given}
    work = Rows(
        model, spec, transform, resolved, return_entropy, lengths, item, token, targets, support, distinct, kwargs
    )
    return work, None if order is None else order.argsort()


def _flat_rows(rows: Any, targets: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and targets ``[N]`` each."""
    size = tuple(input_ids.shape)
    check.dtype("rows", check.tensor("rows", rows), torch.int64, torch.bool)
    check.dtype("targets", check.tensor("targets", targets), torch.int64)
    for name, value in (("rows", rows), ("targets", targets)):
        check.same_device(name, value, "input_ids", input_ids)
    if rows.dtype == torch.bool:
        check.shape("rows", rows, size, " (a bool mask, as input_ids)")
        flat = rows.flatten().nonzero()[:, 0]
    else:
        check.shape("rows", rows, ("N",))
        check.ids_in_range("rows", rows, 0, input_ids.numel(), "flat indices into P*T of input_ids")
        flat = rows
    if targets.dim() == 2:
        check.shape("targets", targets, size, " (as input_ids), or [N]")
        targets = targets.flatten()[flat]
    check.shape("targets", targets, (flat.shape[0],), " (one per row), or that of input_ids")
    return flat, targets


def _check_rows(shift: int, attended: Tensor | None, flat: Tensor, token: Tensor) -> None:
    """ValueError for rows on padding, and for rows that a shifted model cannot predict."""
    if attended is not None and bool((bad := ~attended.flatten()[flat]).any()):
        raise ValueError(f"rows {flat[bad][:8].tolist()} are padding (attention_mask 0)")
    if shift and bool((bad := token < shift).any()):
        raise ValueError(
            f"row i-{shift} predicts token i in this model, so the first token of a sequence cannot be scored, as rows "
            f"{flat[bad][:8].tolist()} ask"
        )


def _sort(
    input_ids: Tensor, attended: Tensor | None, flat: Tensor, given: dict[str, Any]
) -> tuple[list[_SameLength], Tensor, Tensor | None]:
    """Sequences by length, their rows' items, and the permutation that sorts the rows (None: they are sorted).

    Sequences without rows are left out: the model need not see them.
    """
    count, tokens = input_ids.shape
    sequence = flat // tokens
    owned = torch.bincount(sequence, minlength=count).tolist()
    length = [tokens] * count if attended is None else attended.sum(-1).tolist()
    indivisible = any(_batch_of(value) == count and not isinstance(value, Tensor) for value in given.values())
    wanted = [p for p in range(count) if owned[p] or indivisible]

    lengths, place, item, begin = [], [0] * count, [0] * count, 0
    for n, same in groupby(sorted(wanted, key=length.__getitem__), key=length.__getitem__):
        members = list(same)
        first = [begin, *(begin + total for total in accumulate(owned[p] for p in members))]
        for i, p in enumerate(members):
            place[p], item[p] = first[i], i
        begin = first[-1]
        lengths.append(_same_length(input_ids, attended, members, n, first, given))

    device = input_ids.device
    order = torch.tensor(place, device=device)[sequence].argsort(stable=True)
    items = torch.tensor(item, device=device)[sequence[order]]
    in_order = bool((order == torch.arange(order.shape[0], device=device)).all())
    return lengths, items, None if in_order else order


def _same_length(
    input_ids: Tensor, attended: Tensor | None, members: list[int], length: int, first: list[int], given: dict[str, Any]
) -> _SameLength:
    """The sequences ``members``, of ``length`` tokens each, with their share of the model's arguments."""
    count, tokens = input_ids.shape
    index = torch.tensor(members, device=input_ids.device)
    keep = attended[index] if attended is not None and length < tokens else None  # [m, T], `length` True in a row

    def share(name: str, value: Any) -> Any:
        if _batch_of(value) != count:
            return value
        if not isinstance(value, Tensor):
            if len(members) != count:
                raise ValueError(
                    f"model_kwargs[{name!r}], a {type(value).__name__}, cannot be cut: pass no attention_mask"
                )
            return value
        own = value if len(members) == count else value.index_select(0, index.to(value.device))
        if keep is None:
            return own
        if own.dim() < 2 or own.shape[1] != tokens:
            raise ValueError(
                f"model_kwargs[{name!r}] {list(value.shape)} cannot lose its padding as input_ids "
                f"{list(input_ids.shape)} does: pass it with dimensions [P, T, ...], or no attention_mask"
            )
        return own[keep].view(len(members), length, *own.shape[2:])

    return _SameLength(share("input_ids", input_ids), {name: share(name, v) for name, v in given.items()}, first)


def _batch_of(value: Any) -> int | None:
    """First dimension of a tensor, or of what has a shape (a BlockMask)."""
    shape = getattr(value, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and len(shape) else None
