"""What a planning task is: endless seeded problems, an exact checker, and candidate answers of both kinds.

A problem belongs to the held-out split when the hash of its `key` says so: no seed and no order of drawing can move it,
so training and held-out problems never meet. `key` is the same for problems that are the same up to a symmetry.
All randomness comes from `random.Random(str)`, whose stream is fixed across machines and Python versions.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 10
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """One problem: `prompt` for the model, `key` that decides its split, `solution` a response worth full reward."""

    task: str
    prompt: str
    key: str
    solution: str

    @property
    def split(self) -> str:
        """The split this problem belongs to, by the hash of its key: one key in ten is held out."""
        digest = hashlib.sha256(f"{self.task}:{self.key}".encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def answer_of(response: str) -> str | None:
    """The text of the last <answer>...</answer> in `response`, stripped; None when there is none."""
    found = _ANSWER.findall(response)
    return found[-1].strip() if found else None


class Task(ABC):
    """A family of problems with a checker that computes the reward of any response, in [0, 1]."""

    name: str

    def problems(self, seed: int = 0, split: str = "train") -> Iterator[Problem]:
        """An endless stream of problems of `split` ("train" or "heldout"), the same for the same seed.

        Raises ValueError for an unknown split. Small tasks (4x4 Sudoku) repeat problems sooner or later.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        return self._stream(random.Random(f"{self.name}/{split}/{seed}"), split)

    def _stream(self, rng: random.Random, split: str) -> Iterator[Problem]:
        while True:
            problem = self._draw(rng)
            if problem.split == split:
                yield problem

    def candidates(self, problem: Problem, count: int, seed: int = 0) -> list[str]:
        """`count` responses to `problem` in random order; from two on, at least one is right and at least one wrong.

        They stand in for a policy's rollouts: a right answer may be another solution than `problem.solution`, a wrong
        one may miss the goal, break a rule or be cut short. Raises ValueError when count < 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        rng = random.Random(f"{self.name}/candidates/{problem.key}/{seed}")
        right = rng.randint(1, max(1, count - 1))
        responses = [self._right(problem, rng) for _ in range(right)]
        while len(responses) < count:
            response = self._wrong(problem, rng)
            if not self.is_correct(problem, response):
                responses.append(response)
        rng.shuffle(responses)
        return responses

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether `response` solves `problem` entirely."""
        return self.reward(problem, response) == 1.0

    @abstractmethod
    def reward(self, problem: Problem, response: str) -> float:
        """The reward of any text as a response, in [0, 1]; 1 exactly when the problem is solved. Never raises."""

    @abstractmethod
    def _draw(self, rng: random.Random) -> Problem:
        """One problem of either split."""

    @abstractmethod
    def _right(self, problem: Problem, rng: random.Random) -> str:
        """A response with full reward."""

    @abstractmethod
    def _wrong(self, problem: Problem, rng: random.Random) -> str:
        """A response that is meant to be wrong (and is drawn again if by chance it is not)."""
