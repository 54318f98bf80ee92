"""4x4 Sudoku: fill the blanks so that every row, column and 2x2 box holds 1..4.

A puzzle is a solved grid with cells blanked one by one for as long as the solution stays unique. There are 288 solved
grids, so uniqueness is decided by looking at all of them.

    reward = share of the blank cells filled with the solution's digit; 0 when a given digit was changed, when the
    answer
             is not sixteen digits of 1..4, or when there is no <answer>

Two puzzles that differ only by the names of the digits or by a symmetry of the grid have the same key, so the held-out
puzzles are new in substance and not relabelled training puzzles.
"""

from __future__ import annotations

import itertools
import random
import re
from functools import cache

from bgpo_kernels.tasks.task import Problem, Task, answer_of

CELLS = range(16)
FEWEST_BLANKS, MOST_BLANKS = 6, 11
_UNITS = [
    *[[4 * r + c for c in range(4)] for r in range(4)],
    *[[4 * r + c for r in range(4)] for c in range(4)],
    *[[4 * (r + i) + c + k for i in range(2) for k in range(2)] for r in (0, 2) for c in (0, 2)],
]
_PEERS = [{cell for unit in _UNITS if here in unit for cell in unit} - {here} for here in CELLS]


@cache
def solved_grids() -> tuple[str, ...]:
    """All 288 solved grids as strings of sixteen digits, row by row, in lexicographic order."""
    grids = [""]
    for cell in CELLS:
        grids = [
            grid + digit
            for grid in grids
            for digit in "1234"
            if all(grid[peer] != digit for peer in _PEERS[cell] if peer < cell)
        ]
    return tuple(grids)


def solutions(puzzle: str) -> list[str]:
    """Every solved grid that agrees with `puzzle` (sixteen characters, 0 for a blank)."""
    agrees = re.compile(puzzle.replace("0", "."))
    return [grid for grid in solved_grids() if agrees.fullmatch(grid)]


@cache
def _symmetries() -> tuple[tuple[int, ...], ...]:
    """The 128 permutations of the cells that keep rows, columns and boxes: orders of the lines, and transposition."""
    orders = [order for order in itertools.permutations(range(4)) if order[0] // 2 == order[1] // 2]
    plain = [tuple(4 * r + c for r in rows for c in columns) for rows in orders for columns in orders]
    return tuple(plain + [tuple(4 * (cell % 4) + cell // 4 for cell in cells) for cells in plain])


def canonical(puzzle: str) -> str:
    """The puzzle that stands for all those equal to `puzzle` up to a symmetry of the grid and the digits' names."""
    return min(_relabelled("".join(puzzle[cell] for cell in cells)) for cells in _symmetries())


def _relabelled(puzzle: str) -> str:
    names = {"0": "0"}
    for digit in puzzle:
        names.setdefault(digit, str(len(names)))
    return "".join(names[digit] for digit in puzzle)


def _response(grid: str) -> str:
    rows = "\n".join(grid[row : row + 4] for row in range(0, len(grid), 4))
    return f"<answer>\n{rows}\n</answer>"


class Sudoku(Task):
    """4x4 puzzles of 6 to 11 blanks with one solution; see the module's text for the rewards."""

    name = "sudoku"

    def _draw(self, rng: random.Random) -> Problem:
        grid = rng.choice(solved_grids())
        puzzle, wanted = grid, rng.randint(FEWEST_BLANKS, MOST_BLANKS)
        for cell in rng.sample(CELLS, 16):
            blanked = f"{puzzle[:cell]}0{puzzle[cell + 1 :]}"
            if puzzle.count("0") < wanted and len(solutions(blanked)) == 1:
                puzzle = blanked
        rows = "\n".join(puzzle[row : row + 4] for row in range(0, 16, 4))
        prompt = (
            "Solve this 4x4 Sudoku (0 is a blank; rows, columns and 2x2 boxes hold 1 to 4). "
            f"Answer in <answer></answer>.\n{rows}\n"
        )
        return Problem(self.name, prompt, canonical(puzzle), _response(grid))

    def reward(self, problem: Problem, response: str) -> float:
        """Share of the blanks filled right; 0 for an answer that is not a grid or changes a given digit."""
        puzzle = _puzzle_of(problem)
        grid = "".join((answer_of(response) or "").split())
        if not re.fullmatch("[1-4]{16}", grid) or not re.fullmatch(puzzle.replace("0", "."), grid):
            return 0.0
        solved = "".join((answer_of(problem.solution) or "").split())
        blanks = [cell for cell in CELLS if puzzle[cell] == "0"]
        return sum(grid[cell] == solved[cell] for cell in blanks) / len(blanks)

    def _right(self, problem: Problem, rng: random.Random) -> str:
        return problem.solution

    def _wrong(self, problem: Problem, rng: random.Random) -> str:
        puzzle, grid = _puzzle_of(problem), list("".join((answer_of(problem.solution) or "").split()))
        kind = rng.choice(("guessed blanks", "changed given", "missing cell"))
        if kind == "missing cell":
            del grid[rng.randrange(16)]
            return _response("".join(grid))
        eligible = [cell for cell in CELLS if (puzzle[cell] == "0") == (kind == "guessed blanks")]
        for cell in rng.sample(eligible, rng.randint(1, len(eligible) // 2)):
            grid[cell] = rng.choice([digit for digit in "1234" if digit != grid[cell]])
        return _response("".join(grid))


def _puzzle_of(problem: Problem) -> str:
    """The sixteen characters of the puzzle, read back from the last four lines of its prompt."""
    return "".join(problem.prompt.split("\n")[-5:])
