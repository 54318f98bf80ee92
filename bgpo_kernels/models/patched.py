"""``patch``: a model whose own forward gives log-probabilities of chosen rows where it would give logits.

For trainers that cannot hand the model over: the loss is computed inside the model's forward, the forward is called by
another library, its arguments are built elsewhere. The head's forward is replaced for the length of a context and
returns what ``masked_logprob`` makes of the hidden states it receives, inside the module that owns (and under FSDP or
ZeRO-3 gathers) the weight.

Models that scale or cap their logits after the head would do it to log-probabilities, too. There the head is captured
instead, and the log-probabilities appear where the model's output has its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..head.functional import masked_logprob
from .heads import (
    _ALL_WRAPPERS,
    HeadSpec,
    _cut_over_ranks,
    _forward_attribute,
    _fsdp_units_around,
    _peel,
    _refuse_unfit,
    _restorer,
    capture_head,
    find_head,
)

IGNORED = -100  # torch's and transformers' label of a token that is not scored


class Patched:
    """What a context of :func:`patch` yields: says what to score next, and keeps the entropies of the last call."""

    entropy: Tensor | None = None  #: of the last call's rows, shaped as its log-probabilities; with return_entropy only

    def __init__(self, spec: HeadSpec, **options: Any) -> None:
        self._spec, self._options = spec, options
        self._wanted: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def score(self, targets: Tensor, *, rows: Tensor | None = None, support: Tensor | None = None) -> None:
        """What calls of the model score from now on; arguments as those of :func:`patch`."""
        check.dtype("targets", check.tensor("targets", targets), torch.int64)
        if targets.dim() != 1 and (rows is not None or support is not None):
            raise ValueError(f"rows and support go with targets [N], not with targets {list(targets.shape)}")
        self._wanted = targets, rows, support

    def logprob(self, hidden: Tensor) -> Tensor:
        """In place of the head's forward."""
        if self._wanted is None:
            raise ValueError("the patched model was called before it was told what to score: give targets to patch, or "
                             "to the score(...) of what it yields")  # fmt: skip
        targets, rows, support = self._wanted
        module: Any = self._spec.module
        shape, scored = hidden.shape[:-1], None
        if targets.dim() != 1:
            check.shape("targets", targets, tuple(shape), " (as the rows the head receives)")
            scored = targets != IGNORED
            rows, targets = scored.flatten().nonzero()[:, 0], targets[scored]
        if self._spec.shift:
            rows = _shifted(rows, self._spec.shift, tuple(shape))
        both = masked_logprob(
            hidden, module.weight, targets, rows=rows, bias=getattr(module, "bias", None), softcap=self._spec.softcap,
            logit_scale=self._spec.logit_scale, support=support, tp_group=self._spec.tp_group, **self._options,
        )  # fmt: skip
        logp, entropy = both if isinstance(both, tuple) else (both, None)
        if scored is not None:
            logp, entropy = expand_rows(logp, scored), None if entropy is None else expand_rows(entropy, scored)
        self.entropy = entropy
        return logp


@contextmanager
def patch(
    model: nn.Module,
    targets: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    support: Tensor | None = None,
    return_entropy: bool = False,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Iterator[Patched]:
    """Within the context the model's own forward returns fp32 log-probabilities instead of logits.

    ``with bk.patch(model, targets, rows=rows): logp = model(input_ids=noisy, attention_mask=mask).logits``. Code inside
    the model's forward that takes ``self.lm_head(hidden)`` gets them as well. For several calls that score different
    rows: ``with bk.patch(model) as patched:`` and ``patched.score(targets, rows=rows)`` before each. The gradients are
    those of :func:`masked_logprob`; no logits are made. The model's attention is the caller's affair here: nothing
    checks that it looks both ways.

    Args:
        model: a model whose head is found as by :func:`bgpo_backward`.
        targets: ``[N]`` int64; or int64 of the shape of the head's input without its last dimension (``[B, T]``),
            -100 where nothing is scored. Then the result has that shape, too, and zeros there.
        rows: ``[N]`` int64, flat indices of the tokens to score among those the head receives; None: all of them.
            Where row i-1 predicts token i (Dream), say i.
        temperature, support, return_entropy, backend: as :func:`masked_logprob`; ``support`` needs ``targets [N]``.

    Yields:
        A :class:`Patched`: its ``score(...)`` changes what is scored, its ``entropy`` is set by each call, with
        ``return_entropy``.

    Raises:
        TypeError, ValueError: as :func:`masked_logprob`, from within the model's forward; a head that is not known; a
            call before anything is to be scored; a tensor-parallel head. Code of the model that indexes the vocabulary
            or takes ``labels`` cannot work on the result.
    """
    spec = find_head(model, head)
    if _cut_over_ranks(_peel(model, _ALL_WRAPPERS), spec.module):
        raise ValueError(
            "patch cannot serve a tensor-parallel head, whose plan gathers what leaves it: use row_logprob"
        )
    patched = Patched(spec, temperature=temperature, return_entropy=return_entropy, backend=backend)
    if targets is not None:
        patched.score(targets, rows=rows, support=support)
    elif rows is not None or support is not None:
        raise ValueError("rows and support need targets")
    if spec.logit_scale == 1.0 and spec.softcap is None:
        with _at_the_head(spec.module, patched.logprob):
            yield patched
    else:
        with _at_the_output(model, spec, patched.logprob):
            yield patched


def expand_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values [N]`` at the True places of ``rows`` (bool, any shape), zeros elsewhere; differentiable."""
    return torch.zeros(rows.shape, dtype=values.dtype, device=values.device).masked_scatter(rows, values)


def _shifted(rows: Tensor | None, shift: int, shape: tuple[int, ...]) -> Tensor:
    """The rows of hidden ``[.., T, H]`` that predict the tokens ``rows``."""
    if rows is None:
        raise ValueError(f"row i-{shift} predicts token i in this model: pass rows, or targets {list(shape)}")
    early = rows % shape[-1] < shift
    if bool(early.any()):
        raise ValueError(f"rows {rows[early][:8].tolist()} are first tokens, which no row of this model predicts")
    return rows - shift


@contextmanager
def _at_the_head(module: nn.Module, logprob: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head's forward is ``logprob``."""
    attribute = _forward_attribute(module)
    restore = _restorer(module, attribute)

    @torch.compiler.disable  # traced, it would be baked into a graph that outlives the context
    def forward(input: Tensor) -> Tensor:
        _refuse_unfit(module, input)
        return logprob(input)

    vars(forward)["stand_in"] = True  # find_head knows us by it
    setattr(module, attribute, forward)
    try:
        yield
    finally:
        restore()


@contextmanager
def _at_the_output(model: nn.Module, spec: HeadSpec, logprob: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every call of the model has its logits replaced once it has returned."""
    core: Any = _peel(model, _ALL_WRAPPERS)
    if any(unit is not spec.module for unit in _fsdp_units_around(core, spec.module)):
        raise ValueError(
            f"{type(core).__name__} scales or caps its logits and is sharded by FSDP2, which patch cannot serve: use "
            "row_logprob, or shard the head as a unit of its own"
        )
    present, original = "forward" in vars(core), core.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with capture_head(core, spec, logprob) as capture:
            output = original(*args, **kwargs)
        return _with_logits(output, capture.value)

    core.forward = forward
    try:
        yield
    finally:
        if present:
            core.forward = original
        else:
            del core.forward


def _with_logits(output: Any, logprob: Tensor) -> Any:
    if isinstance(output, Tensor):
        return logprob
    if isinstance(output, tuple):
        return (logprob, *output[1:])
    if not hasattr(output, "logits"):
        raise ValueError(
            f"the model returns a {type(output).__name__} without logits, so log-probabilities have no place"
        )
    output.logits = logprob
    return output
