"""Plain torch, and the libraries that trainers use today. Each is imported when its case begins, and may be missing.

A peer that gives log-probabilities per token computes the same weighted loss as ours: the coefficients come in as the
upstream gradient. One that only sums computes the plain sum of -logp, with no coefficients: less work than ours, and
compared with that loss's own truth. On all positions an ignored label marks those that are not scored, where the API
has one; elsewhere they are computed, with coefficient 0.

Random hidden states give nearly uniform softmaxes. A peer that drops small gradients drops almost all of them here; on
a trained model it would drop fewer.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from _head.problem import IGNORED, Problem, Rows
from _head.truth import Result

Call = Callable[[], Result]
COMPILED = "torch-compile"


class Unavailable(Exception):
    """A variant that cannot run here, with the reason."""


def load(module: str, name: str) -> Any:
    """`module.name`; whatever stops its import is the reason why it is not available."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a package that is broken, or too old, is as good as none
        text = (str(error).splitlines() or [""])[0]
        raise Unavailable(f"{type(error).__name__}: {text}") from None


def per_token(problem: Problem, rows: Rows, score: Callable[[], Tensor]) -> Call:
    """Log-probabilities per token, differentiated with the bound's coefficients as upstream gradient."""
    wanted, upstream = problem.wanted(rows), -rows.coefficient

    def run() -> Result:
        with torch.set_grad_enabled(bool(wanted)):
            logprob = score()
        if not wanted:
            return Result(logprob)
        return Result(logprob.detach(), None, None, *torch.autograd.grad(logprob, wanted, upstream))

    return run


def summed(problem: Problem, rows: Rows, loss: Callable[[], Tensor]) -> Call:
    """The plain sum of -logp and its gradients."""
    wanted = problem.wanted(rows)

    def run() -> Result:
        with torch.set_grad_enabled(bool(wanted)):
            value = loss()
        if not wanted:
            return Result(value=value)
        return Result(None, None, value.detach(), *torch.autograd.grad(value, wanted))

    return run


def _plain(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(F.linear(hidden, weight).float(), dim=-1).gather(-1, ids[:, None])[:, 0]


def plain_torch(problem: Problem, rows: Rows) -> Call:
    """Logits, log-softmax in fp32, gather; autograd."""
    ids = rows.ids
    return per_token(problem, rows, lambda: _plain(rows.hidden, problem.weight, ids))


def compiled_torch(problem: Problem, rows: Rows) -> Call:
    """The same under torch.compile, for this shape."""
    torch.compiler.reset()  # or a few cases exhaust the number of recompilations, and what follows runs uncompiled
    compiled, ids = torch.compile(_plain, dynamic=False), rows.ids
    return per_token(problem, rows, lambda: compiled(rows.hidden, problem.weight, ids))


def torch_chunked(reduction: str) -> Callable[[Problem, Rows], Call]:
    """torch.nn.functional.linear_cross_entropy with its chunked path."""

    def prepare(problem: Problem, rows: Rows) -> Call:
        options = load("torch.nn", "LinearCrossEntropyOptions")()
        call = load("torch.nn.functional", "linear_cross_entropy")

        def loss() -> Tensor:
            return call(
                rows.hidden, problem.weight, rows.labels, reduction=reduction, ignore_index=IGNORED, options=options
            )

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            try:  # where its chunked path does not serve a reduction, it warns and computes all logits at once
                call(rows.hidden[:1], problem.weight, rows.labels[:1], reduction=reduction, options=options)
            except Warning as warning:
                raise Unavailable(f"torch {torch.__version__}: {str(warning).splitlines()[0]}") from None
        return summed(problem, rows, loss) if reduction == "sum" else per_token(problem, rows, lambda: -loss())

    return prepare


def liger(reduction: str) -> Callable[[Problem, Rows], Call]:
    """Liger's Triton kernel, dW summed in fp32 where it can."""

    def prepare(problem: Problem, rows: Rows) -> Call:
        kind = load("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
        fp32 = {"accum_dtype": torch.float32} if "accum_dtype" in inspect.signature(kind.__init__).parameters else {}
        module = kind(ignore_index=IGNORED, reduction=reduction, **fp32)

        def loss() -> Tensor:
            return module(problem.weight, rows.hidden, rows.labels)

        return summed(problem, rows, loss) if reduction == "sum" else per_token(problem, rows, lambda: -loss())

    return prepare


def liger_scaled_sm90(problem: Problem, rows: Rows) -> Call:
    """Liger's scaled cross entropy for Hopper."""
    function = load(
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "LigerFusedScaledCrossEntropySM90Function"
    )
    return per_token(problem, rows, lambda: -function.apply(rows.hidden, problem.weight, rows.labels, 1.0, IGNORED))


def liger_linear_sm90(problem: Problem, rows: Rows) -> Call:
    """Liger's fused linear cross entropy for Hopper."""
    function = load(
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "LigerFusedLinearCrossEntropySM90Function"
    )
    return summed(problem, rows, lambda: function.apply(rows.hidden, problem.weight, rows.labels, IGNORED, "sum"))


def cut_cross_entropy(**options: Any) -> Callable[[Problem, Rows], Call]:
    """Apple's; skips ignored rows."""

    def prepare(problem: Problem, rows: Rows) -> Call:
        call = load("cut_cross_entropy", "linear_cross_entropy")

        def score() -> Tensor:
            return -call(
                rows.hidden, problem.weight, rows.labels, ignore_index=IGNORED, reduction="none", **options
            ).float()

        return per_token(problem, rows, score)

    return prepare


def quack(problem: Problem, rows: Rows) -> Call:
    """QuACK's chunked loss with its default chunk."""
    call = load("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return summed(
        problem,
        rows,
        lambda: call(rows.hidden, problem.weight, rows.labels, ignore_index=IGNORED, reduction="sum"),
    )


def verl(problem: Problem, rows: Rows) -> Call:
    """verl's Triton kernel; it returns the entropy, too, and has no ignored label."""
    call, ids = load("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"), rows.ids
    return per_token(problem, rows, lambda: call(rows.hidden, problem.weight, ids, 1.0, "none")[0])


@dataclass(frozen=True)
class Peer:
    """A peer's place in the table; fields as in `variants.Variant`."""

    name: str
    family: str
    computes: str
    prepare: Callable[[Problem, Rows], Call]
    weighted: bool = True
    recomputes: bool = False
    approximate: bool = False


_WEIGHTED = "the same weighted loss, from log-probabilities per token"
_SUM = "the plain sum of -logp, without weights"
PEERS = (
    Peer("plain torch", "torch", f"{_WEIGHTED}; all logits kept", plain_torch),
    Peer("torch.compile", COMPILED, f"{_WEIGHTED}; all logits kept", compiled_torch),
    Peer("torch linear_cross_entropy, none", "torch-lce", _WEIGHTED, torch_chunked("none"), recomputes=True),
    Peer("torch linear_cross_entropy, sum", "torch-lce", _SUM, torch_chunked("sum"), weighted=False),
    Peer("Liger Triton, none", "liger", _WEIGHTED, liger("none"), recomputes=True),
    Peer("Liger Triton, sum", "liger", _SUM, liger("sum"), weighted=False),
    Peer("Liger scaled CE, SM90", "liger-sm90", f"{_WEIGHTED}; d weight also for a frozen head", liger_scaled_sm90,
         recomputes=True),
    Peer("Liger linear CE, SM90", "liger-sm90", _SUM, liger_linear_sm90, weighted=False),
    Peer("Cut Cross Entropy", "cce", f"{_WEIGHTED}; drops gradients where the softmax is small, which on random inputs "
         "is nearly everywhere", cut_cross_entropy(), recomputes=True, approximate=True),
    Peer("Cut Cross Entropy, unfiltered", "cce", _WEIGHTED, cut_cross_entropy(filter_eps=None), recomputes=True),
    Peer("QuACK", "quack", _SUM, quack, weighted=False),
    Peer("verl Triton", "verl", f"{_WEIGHTED}, and the entropy; d weight also for a frozen head", verl,
         recomputes=True),
)  # fmt: skip
