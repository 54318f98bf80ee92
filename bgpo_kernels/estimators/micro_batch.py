"""How many MC samples run at once, and what happens when memory runs out.

A micro-batch is a range of items of one group, which all have the same length: MC samples of one sequence, or rows of
a batch of equal length. Its size depends on that length alone (not on gradients, policy or batch), so that old and new
policy meet the same batch shapes and agree bit for bit at equal weights; what an out-of-memory has taught is kept per
model.

With ``micro_batch_tokens=None``: 2048 tokens on a CPU (GEMMs are at full rate, activations stay small); on a GPU as
many as a rough estimate of activation memory allows, 16384 at most, halved on out-of-memory. Halving never changes a
result: masks do not depend on micro-batches, and a failed micro-batch leaves no trace in any .grad. (Dropout does
depend on them: the second pass of a model that draws it raises, and the next call begins with the smaller size.)

Where micro-batches are collective operations (``Ranks.alike``) all ranks take the same size, and nothing is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import validation as check
from ..models import HeadSpec, unwrap
from .parallel import Ranks, hooks_suspended, local
from .sink import HeadSink

CPU_TOKENS = 2048
MAX_CUDA_TOKENS = 16384
#: fp32-equivalent activations of a transformer layer per token and hidden unit, without checkpointing: attention and
#: MLP inputs, queries, keys, values, gate and up projections (about 34 16-bit numbers, Korthikanti et al. 2022).
BYTES_PER_HIDDEN = 68

_learned: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # tokens per micro-batch that fitted, or were cut to


class Group(NamedTuple):
    """Items of one length, any range of which can be a micro-batch."""

    items: int
    tokens: int  # of each


Body = Callable[[int, int, int], object]  # group, range of its items


class Work(Protocol):
    """What can be walked over in micro-batches."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def head(self) -> HeadSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def groups(self) -> list[Group]: ...


class MicroBatches:
    """Walks over (group, range of its items) in a fixed order, shrinking the range when memory runs out."""

    def __init__(self, work: Work, micro_batch_tokens: int | None) -> None:
        self.work, self.groups = work, work.groups
        self.ranks = Ranks(work.model, work.device, work.head.tp_group)
        self.automatic = micro_batch_tokens is None
        if micro_batch_tokens is None:
            key = unwrap(work.model)
            if key not in _learned:
                _learned[key] = _first_guess(work)
            self.tokens = _learned[key]
        else:
            self.tokens = check.integer("micro_batch_tokens", micro_batch_tokens, 1)
        if self.automatic and self.ranks.alike:
            self.tokens = -self.ranks.most(-self.tokens)[0]

    def ranges(self, g: int) -> Iterator[tuple[int, int]]:
        """Ranges of group g's items; the size is read anew at every step."""
        lo, (items, tokens) = 0, self.groups[g]
        while lo < items:
            hi = min(items, lo + max(1, self.tokens // tokens))
            yield lo, hi
            lo = hi

    def shrink(self, g: int) -> bool:
        """Halve what was alive at an out-of-memory; False when that was one item of group g."""
        items, tokens = self.groups[g]
        alive = min(items, self.tokens // tokens)
        if not self.automatic or alive < 2 or self.ranks.alike:
            return False
        self.tokens = _learned[unwrap(self.work.model)] = alive // 2 * tokens
        return True

    def run(
        self,
        groups: list[int],
        body: Body,
        restart: Callable[[], None],
        idle: Body,
        wanted: Callable[[int, int, int], bool] = lambda *_: True,
        pinned: bool = False,
    ) -> None:
        """``body(g, lo, hi)`` for every wanted range; after an out-of-memory ``restart`` undoes all and it begins anew.

        ``idle`` does the same work as ``body``, to no effect. ``pinned``: the ranges must stay, because they have to
        draw the dropout of an earlier pass again.
        """
        walk = self._walk_in_step if self.ranks.sharded else self._walk
        while (failed := walk(groups, body, wanted, idle)) is not None:
            g, error = failed
            # Outside the except block: the traceback no longer keeps the failed graph alive.
            restart()
            if not self.shrink(g):
                raise torch.OutOfMemoryError(f"{error}\nbgpo_kernels: {self._advice(g)}")
            if pinned:
                raise torch.OutOfMemoryError(
                    f"{error}\nbgpo_kernels: a second pass repeats the dropout of the first, so it cannot go on with "
                    f"smaller micro-batches; the next call begins with them (micro_batch_tokens={self.tokens})"
                )
            if self.work.device.type == "cuda":
                torch.cuda.empty_cache()

    def _advice(self, g: int) -> str:
        rest = "use gradient checkpointing or a smaller workspace (set_workspace_bytes)"
        if self.ranks.alike:
            return (
                f"micro-batches of {self.tokens} tokens do not fit, and ranks that share weights cannot halve them "
                f"while the others wait: pass a smaller micro_batch_tokens, or {rest}"
            )
        if self.automatic:
            return f"one sample of {self.groups[g].tokens} tokens does not fit; {rest}"
        return f"micro_batch_tokens={self.tokens} do not fit; pass fewer, or None, which halves by itself, or {rest}"

    def _walk(
        self, groups: list[int], body: Body, wanted: Callable[[int, int, int], bool], _: Body
    ) -> tuple[int, str] | None:
        for g in groups:
            for lo, hi in self.ranges(g):
                if not wanted(g, lo, hi):
                    continue
                try:
                    body(g, lo, hi)
                except torch.OutOfMemoryError as error:
                    return g, str(error)
        return None

    def _walk_in_step(
        self, groups: list[int], body: Body, wanted: Callable[[int, int, int], bool], idle: Body
    ) -> tuple[int, str] | None:
        """As many micro-batches as the rank that has most: the rest are one item of the shortest group, idle."""
        count = sum(wanted(g, lo, hi) for g in groups for lo, hi in self.ranges(g))
        most, nothing = self.ranks.most(count, not self.groups)
        if nothing and most:
            raise ValueError(
                "a rank has nothing to score while others do, so it cannot keep step: give it one sequence"
            )
        with self.ranks.walk():
            failed = self._walk(groups, body, wanted, idle)
            if failed is None and most > count:
                shortest = min(range(len(self.groups)), key=lambda g: self.groups[g].tokens)
                for _ in range(most - count):
                    idle(shortest, 0, 1)
        return failed


def _first_guess(work: Work) -> int:
    if work.device.type != "cuda":
        return CPU_TOKENS
    config = getattr(unwrap(work.model), "config", None)
    hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 4096
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None) or 32
    free, _total = torch.cuda.mem_get_info(work.device)
    free += torch.cuda.memory_reserved(work.device) - torch.cuda.memory_allocated(work.device)
    return int(min(MAX_CUDA_TOKENS, max(1, free // (hidden * layers * BYTES_PER_HIDDEN))))


class GradientGuard:
    """Makes a call that accumulates into .grad all or nothing.

    Gradients that hold something when the call begins are set aside and added to at its end, so that a failure at any
    moment can be undone exactly; the price, one more set of gradients, is paid only by calls that add to earlier ones.
    Buffers of zeros (``zero_grad(set_to_none=False)``) are accumulated into as they are, and zeroed on failure.
    """

    def __init__(self, model: nn.Module, sink: HeadSink, ranks: Ranks) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("gradients cannot be made under torch.inference_mode; torch.no_grad does no harm")
        ranks.check_gradients(own_backward=True)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sink, self._ranks = sink, ranks
        holds = _hold_something([p.grad for p in self._parameters])
        pairs = list(zip((p.grad for p in self._parameters), holds, strict=True))
        self._aside = [grad if held else None for grad, held in pairs]
        self._zeros = [None if held else grad for grad, held in pairs]

    def backward(self, roots: list[tuple[Tensor, Tensor]]) -> None:
        """Autograd from (tensor, gradient) pairs into .grad."""
        self._ranks.backward(roots, self._parameters)

    def clear(self) -> None:
        """Drop what this call has accumulated so far."""
        self._sink.reset()
        for parameter, zeros in zip(self._parameters, self._zeros, strict=True):
            parameter.grad = None if zeros is None else zeros.zero_()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside, .grad holds this call's gradients alone; leaving adds them to the earlier ones, or restores those."""
        for parameter, zeros in zip(self._parameters, self._zeros, strict=True):
            parameter.grad = zeros
        waiting = self._parameters if self._ranks.replicated else []  # the sum will meet their hooks
        try:
            with hooks_suspended(waiting), self._ranks.together():
                yield
                _assert_finite(self._sink.outside_grad())
                self._sink.flush()
                _assert_finite([p.grad for p in self._parameters if p.grad is not None])
        except BaseException:
            self.clear()
            self._bring_back(add=False)
            raise
        self._bring_back(add=True)

    def _bring_back(self, add: bool) -> None:
        if add and self._ranks.replicated:
            totals = [p.grad for p in self._parameters]
            for parameter, before in zip(self._parameters, self._aside, strict=True):
                parameter.grad = before
            self._zeros.clear()
            self._ranks.deliver(self._parameters, totals)
            return
        for parameter, before in zip(self._parameters, self._aside, strict=True):
            if before is None:
                continue
            if add and parameter.grad is not None:
                before.add_(parameter.grad)
            parameter.grad = before


def _assert_finite(gradients: list[Tensor]) -> None:
    if gradients and not bool(torch.isfinite(largest_magnitude(gradients))):
        raise FloatingPointError(
            "non-finite gradient: nothing was added to .grad; skip this step (log-probabilities were "
            "finite, so the overflow is in the model's backward)"
        )


def _hold_something(gradients: list[Tensor | None]) -> list[bool]:
    """Which gradients exist and are not all zeros; one host read."""
    present = [local(g) for g in gradients if g is not None]
    if not present:
        return [False] * len(gradients)
    flags = iter(torch.stack([g.any().to(present[0].device) for g in present]).tolist())
    return [g is not None and next(flags) for g in gradients]


def largest_magnitude(tensors: list[Tensor]) -> Tensor:
    """max |x| over all entries that this rank holds, on the first tensor's device; NaN if there is one. No copies."""
    device = tensors[0].device
    norms = (torch.linalg.vector_norm(t, torch.inf) for t in map(local, tensors) if t.numel())
    tops = [norm.to(device=device, dtype=torch.float64) for norm in norms]
    return torch.stack(tops).amax() if tops else torch.zeros((), device=device)


def assert_finite_logprob(logprob: Tensor, sample_ids: list[int]) -> None:
    """FloatingPointError that names the sequences whose log-probabilities are not finite."""
    bad = ~torch.isfinite(logprob)
    if bool(bad.any()):
        places = bad.nonzero()[:4].tolist()
        named = [(sample_ids[b], j) for b, j in places]
        raise FloatingPointError(
            f"non-finite log-probability for (sample id, MC sample) {named}: nothing was added to .grad; skip this "
            "step and look at these inputs, the weights, or the learning rate"
        )
