"""Planning tasks with exact checkers, for training runs and benchmarks on real input: Countdown and 4x4 Sudoku.

    task = TASKS["countdown"]
    problem = next(task.problems(seed=0, split="heldout"))
    task.reward(problem, "<answer>19 + 36</answer>")

`python -m bgpo_kernels.tasks --help` writes problems with scored candidate responses to a JSON-lines file; `jsonl`
reads it back and `tokenizer` turns it into ids. This package imports neither torch nor transformers; `tokenizer`
imports the latter.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from bgpo_kernels.tasks.countdown import Countdown
from bgpo_kernels.tasks.jsonl import Record, read_records, write_records
from bgpo_kernels.tasks.sudoku import Sudoku
from bgpo_kernels.tasks.task import SPLITS, Problem, Task

TASKS: dict[str, Task] = {task.name: task for task in (Countdown(), Sudoku())}


def scored_candidates(task: Task, count: int, candidates: int, seed: int = 0, split: str = "train") -> Iterator[Record]:
    """Records of `count` problems of `split`, each with `candidates` scored responses, fixed by `seed`."""
    for problem in islice(task.problems(seed, split), count):
        for response in task.candidates(problem, candidates, seed):
            yield Record(task.name, problem.prompt, response, task.reward(problem, response))


__all__ = [
    "SPLITS",
    "TASKS",
    "Countdown",
    "Problem",
    "Record",
    "Sudoku",
    "Task",
    "read_records",
    "scored_candidates",
    "write_records",
]
