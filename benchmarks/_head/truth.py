"""What is right, in fp64, and how far plain torch is from it in the inputs' own dtype.

Log-probabilities are exact for all rows, from fp64 products in slices of the vocabulary. Gradients are exact for 64
sampled masked rows (d hidden) and 64 sampled vocabulary rows (d weight; half of them targets, and always the last row),
which need the log-probabilities' normaliser only. Nothing of size N x V exists.

The yardstick is torch's arithmetic (product, log-softmax in fp32, gradient rounded to the inputs' dtype, products) on
the same samples. It is computed here, in chunks, so that it is there even where plain torch itself runs out of memory.

Errors of gradients are told in two ways, both relative: of the largest entry (`max`), and of the worst row in the
Euclidean norm (`row`), which sees that small rows are wrong, too. A sum of log-probabilities may be off by what its
rows are off together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from _head.problem import Problem, Rows

SAMPLED = 64
VOCABULARY_SLICE = 8192
ROW_CHUNK = 1024
#: A result passes with this many times torch's own error: ours as in the tests; peers may choose coarser sums.
FACTOR, PEER_FACTOR = 2.0, 16.0


class Result(NamedTuple):
    """What a variant computed; None for what it does not give."""

    logprob: Tensor | None = None  # [M], or [N] of the masked rows
    segments: Tensor | None = None  # [B, n], weighted sums of log-probabilities
    value: Tensor | None = None  # the loss; with segments the bound's, which on-policy is -mean(A)
    d_hidden: Tensor | None = None  # [M, H]
    d_weight: Tensor | None = None  # [V, H]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the returned gradients."""
        return sum(gradient.nbytes for gradient in (self.d_hidden, self.d_weight) if gradient is not None)

    def equals(self, other: Result) -> bool:
        """Bit for bit."""
        return all(a is b or torch.equal(a, b) for a, b in zip(self, other, strict=True))


class Sampled(NamedTuple):
    """The comparable part of a result: all log-probabilities, gradients where they were sampled."""

    logprob: Tensor  # [N]
    d_hidden: Tensor  # [rows sampled, H]
    d_weight: Tensor  # [vocabulary sampled, H]


class Truth:
    """The exact result of a problem and torch's own distance to it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        rows, device = problem.packed, problem.device
        generator = torch.Generator(device).manual_seed(1)
        some = torch.randperm(len(rows.masked), generator=generator, device=device)
        self.rows = some[:SAMPLED].sort().values
        size = problem.size
        targets = rows.labels[some[: SAMPLED // 2]]
        others = torch.randint(0, size.V, (SAMPLED // 2 - 1,), generator=generator, device=device)
        self.ids = torch.cat([targets, others, others.new_tensor([size.V - 1])]).unique()
        with torch.no_grad():
            self._normaliser, self.logprob = self._exact_logprob()
            self._row_gradient = self._exact_row_gradient()
            self.torch = self._in_torch()

    def sampled(self, weighted: bool) -> Sampled:
        """Exact values for the weighted loss, or for the plain sum of -logp."""
        rows = self._problem.packed
        c = rows.coefficient.double() if weighted else torch.ones_like(self.logprob)
        probability = (
            rows.hidden.detach().double() @ self._problem.weight.detach()[self.ids].double().T
            - self._normaliser[:, None]
        ).exp_()
        probability -= (rows.labels[:, None] == self.ids).double()
        d_weight = (probability * c[:, None]).T @ rows.hidden.detach().double()
        return Sampled(self.logprob, self._row_gradient * c[self.rows, None], d_weight)

    def errors(self, result: Result, rows: Rows, weighted: bool) -> dict[str, float]:
        """Distances of a result from the truth, each by its name."""
        with torch.no_grad():
            exact, found = self.sampled(weighted), {}
            if result.logprob is not None:
                logprob = result.logprob if len(result.logprob) == len(rows.masked) else result.logprob[rows.masked]
                found["logprob"] = float((logprob.double() - exact.logprob).abs().max())
            if result.segments is not None:
                mean = result.segments.double() / self._segment_scale()
                found["segment mean"] = float((mean - self._segment_mean(exact.logprob)).abs().max())
                if result.value is not None:
                    found["bound"] = float((result.value + self._problem.advantages.mean()).abs())
            elif result.value is not None:
                true = self._value(exact.logprob, weighted)
                found["value"] = float((result.value.double() - true).abs() / true.abs())
            if result.d_hidden is not None:
                at = rows.masked[self.rows]
                found |= _relative("d_hidden", result.d_hidden[at], exact.d_hidden)
                if len(result.d_hidden) > len(rows.masked):
                    found["d_hidden elsewhere"] = float(result.d_hidden.index_fill(0, rows.masked, 0.0).abs().max())
            if result.d_weight is not None:
                found |= _relative("d_weight", result.d_weight[self.ids], exact.d_weight)
        return found

    def bounds(self, result: Result, weighted: bool, factor: float) -> dict[str, float]:
        """What the errors may be: `factor` times torch's own, and what rounding to the result's dtype costs."""
        exact, own = self.sampled(True), self.torch
        off = (own.logprob.double() - exact.logprob).abs()
        coefficient = self._problem.packed.coefficient.double().abs() if weighted else torch.ones_like(off)
        true = self._value(exact.logprob, weighted).abs()
        gradients = _relative("d_hidden", own.d_hidden, exact.d_hidden)
        gradients |= _relative("d_weight", own.d_weight, exact.d_weight)
        scale = float(exact.logprob.abs().max())
        return {
            "logprob": factor * float(off.max()) + _eps(result.logprob) * scale,
            "segment mean": factor * float(self._segment_mean(off).max()) + _eps(result.segments) * scale,
            "value": factor * float((coefficient * off).sum() / true) + _eps(result.value),
            **{name: factor * error + _eps(self._problem.weight) / 2 for name, error in gradients.items()},
            "bound": 4 * _eps(result.value) * float(self._problem.advantages.abs().max()),
            "d_hidden elsewhere": 0.0,  # positions that are not scored have no gradient
        }

    def _segment_scale(self) -> Tensor:
        draw = self._problem.draw
        return draw.segment_weight.double() * draw.count

    def _segment_mean(self, per_row: Tensor) -> Tensor:
        count = self._problem.draw.count.flatten()
        sums = torch.stack([part.sum() for part in per_row.split(count.tolist())])
        return (sums / count).view_as(self._problem.draw.count)

    def _value(self, logprob: Tensor, weighted: bool) -> Tensor:
        return -(logprob * self._problem.packed.coefficient.double()).sum() if weighted else -logprob.sum()

    def _slices(self) -> list[Tensor]:
        return list(self._problem.weight.detach().split(VOCABULARY_SLICE))

    def _exact_logprob(self) -> tuple[Tensor, Tensor]:
        x = self._problem.packed.hidden.detach().double()
        normaliser = x.new_full((len(x),), -torch.inf)
        for part in self._slices():
            normaliser = torch.logaddexp(normaliser, torch.logsumexp(x @ part.double().T, dim=-1))
        target = (x * self._problem.weight.detach()[self._problem.packed.labels].double()).sum(-1)
        return normaliser, target - normaliser

    def _exact_row_gradient(self) -> Tensor:
        """d(-logp) / d hidden of the sampled rows."""
        rows = self._problem.packed
        x = rows.hidden.detach()[self.rows].double()
        total = -self._problem.weight.detach()[rows.labels[self.rows]].double()
        for part in self._slices():
            wide = part.double()
            total += (x @ wide.T - self._normaliser[self.rows, None]).exp_() @ wide
        return total

    def _in_torch(self) -> Sampled:
        """Plain torch in the inputs' dtype, of the weighted loss."""
        rows, weight = self._problem.packed, self._problem.weight.detach()
        logprob, d_hidden, columns = [], [], []
        chosen = torch.zeros(len(rows.labels), dtype=torch.bool, device=weight.device)
        chosen[self.rows] = True
        for begin in range(0, len(rows.labels), ROW_CHUNK):
            part = slice(begin, begin + ROW_CHUNK)
            log_softmax = torch.log_softmax((rows.hidden.detach()[part] @ weight.T).float(), dim=-1)
            labels = rows.labels[part, None]
            logprob.append(log_softmax.gather(-1, labels)[:, 0])
            gradient = log_softmax.exp_().scatter_add_(-1, labels, -torch.ones_like(labels, dtype=torch.float32))
            gradient = gradient.mul_(rows.coefficient[part, None]).to(weight.dtype)
            d_hidden.append(gradient[chosen[part]] @ weight)
            columns.append(gradient[:, self.ids])
        return Sampled(torch.cat(logprob), torch.cat(d_hidden), torch.cat(columns).T @ rows.hidden.detach())


def _eps(result: Tensor | None) -> float:
    return 0.0 if result is None else torch.finfo(result.dtype).eps


def _relative(name: str, found: Tensor, exact: Tensor) -> dict[str, float]:
    off = found.double() - exact
    worst_row = (off.norm(dim=-1) / exact.norm(dim=-1)).max()
    return {f"{name} max": float(off.abs().max() / exact.abs().max()), f"{name} row": float(worst_row)}
