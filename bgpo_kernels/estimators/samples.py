"""The MC samples of a problem as scores [B, n]: a sample's score is its ELBO estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bound.segments import SegmentBound
from ..models import HeadSpec
from .head_pass import Roots, backward_segments, score_segments
from .micro_batch import Group
from .problem import Problem
from .sink import HeadSink


@dataclass(frozen=True)
class Samples:
    """A group is a sequence, an item one of its n_mc samples."""

    problem: Problem
    name: ClassVar[str] = "elbo_logprob"

    @property
    def model(self) -> nn.Module:
        return self.problem.model

    @property
    def head(self) -> HeadSpec:
        return self.problem.head

    @property
    def device(self) -> torch.device:
        return self.problem.device

    @property
    def groups(self) -> list[Group]:
        return self.problem.groups

    def empty_scores(self) -> Tensor:
        problem = self.problem
        return torch.zeros(len(problem.sequences), problem.n_mc, dtype=problem.score_dtype, device=problem.device)

    def place(self, b: int, lo: int, hi: int) -> Any:
        return b, slice(lo, hi)

    def score(self, b: int, lo: int, hi: int) -> Tensor:
        return score_segments(self.problem, self.problem.draw(b, lo, hi), self.problem.forward_kwargs)

    def backward(self, b: int, lo: int, hi: int, coefficients: Tensor, sink: HeadSink) -> Roots:
        problem = self.problem
        bound = SegmentBound.linear(coefficients, problem.backend)
        return backward_segments(problem, problem.draw(b, lo, hi), bound, sink, problem.forward_kwargs)[1]

    def wanted(self, coefficients: Tensor) -> list[list[bool]]:
        return (coefficients != 0).tolist()
