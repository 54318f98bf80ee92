"""Countdown: reach a target with three or four numbers, each used exactly once, and + - * /.

Problems are made backwards from a random expression whose every intermediate result is a positive integer, so each
has a solution. The checker evaluates exactly, in rationals, and accepts any expression that keeps the rules:

    reward = 1    the value is the target
             0.1  the rules are kept (each number exactly once) but the value is another
             0    anything else: other numbers, other operators, a division by zero, no <answer>
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from bgpo_kernels.tasks.task import Problem, Task, answer_of

RULES_KEPT = 0.1
TARGETS = range(10, 101)
# A longer text is no answer; the bound also keeps Python's parser away from hostile nesting.
LONGEST_EXPRESSION = 200
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Exact value of an expression of integers, + - * / and brackets, and the integers in it in order of appearance.

    Raises ValueError for any other text (signs, powers, floor division, names) and ZeroDivisionError.
    """
    if len(text) > LONGEST_EXPRESSION or not _ALLOWED.fullmatch(text):
        raise ValueError(f"not an arithmetic expression: {text[:LONGEST_EXPRESSION]!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an arithmetic expression: {text!r}") from error
    numbers: list[int] = []
    return _value(tree, numbers), numbers


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, numbers), _value(node.right, numbers)
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError(f"only + - * / of whole numbers, found {type(node).__name__}")


@dataclass(frozen=True)
class Expression:
    """An expression with a positive integer value: its text, how loosely it binds, and the steps that compute it."""

    text: str
    value: int
    loose: bool  # its outermost operator is + or -
    composite: bool
    steps: tuple[str, ...]

    @property
    def response(self) -> str:
        """The response that reasons through the steps and then answers with the expression."""
        lines = "\n".join(self.steps)
        return f"<reasoning>\n{lines}\n</reasoning>\n<answer>{self.text}</answer>"


def _join(left: Expression, right: Expression, rng: random.Random) -> Expression:
    a, b = left.value, right.value
    results = {"+": a + b, "*": a * b}
    if a > b:
        results["-"] = a - b
    if a % b == 0:
        results["/"] = a // b
    symbol = rng.choice(sorted(results))
    loose = symbol in "+-"
    bracket_left = left.loose and not loose
    bracket_right = (right.loose and symbol != "+") or (right.composite and symbol == "/")
    text = f"{_bracket(left.text, bracket_left)} {symbol} {_bracket(right.text, bracket_right)}"
    step = f"{a} {symbol} {b} = {results[symbol]}"
    return Expression(text, results[symbol], loose, True, (*left.steps, *right.steps, step))


def _bracket(text: str, needed: bool) -> str:
    return f"({text})" if needed else text


def random_expression(numbers: Sequence[int], rng: random.Random) -> Expression:
    """A random expression that uses each of the positive `numbers` once; every partial result is a positive integer."""
    parts = [Expression(str(number), number, False, False, ()) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        parts.append(_join(parts.pop(), parts.pop(), rng))
    return parts[0]


def _numbers_and_target(problem: Problem) -> tuple[list[int], int]:
    numbers, target = problem.key.split("=")
    return [int(number) for number in numbers.split()], int(target)


class Countdown(Task):
    """Three or four numbers of 1..99 and a target of 10..100; see the module's text for the rewards."""

    name = "countdown"

    def _draw(self, rng: random.Random) -> Problem:
        numbers = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
        expression = random_expression(numbers, rng)
        while expression.value not in TARGETS:
            numbers = [rng.randint(1, 99) for _ in numbers]
            expression = random_expression(numbers, rng)
        listed = ", ".join(map(str, numbers))
        prompt = (
            f"Reach {expression.value} with the numbers {listed}, each used exactly once, by + - * / and brackets. "
            "Answer in <answer></answer>.\n"
        )
        key = " ".join(map(str, sorted(numbers))) + f"={expression.value}"
        return Problem(self.name, prompt, key, expression.response)

    def reward(self, problem: Problem, response: str) -> float:
        """1 for an expression that hits the target, 0.1 for one that only keeps the rules, 0 for anything else."""
        numbers, target = _numbers_and_target(problem)
        answer = answer_of(response)
        if answer is None:
            return 0.0
        try:
            value, used = evaluate(answer)
        except (ValueError, ZeroDivisionError):
            return 0.0
        if sorted(used) != numbers:
            return 0.0
        return 1.0 if value == target else RULES_KEPT

    def _right(self, problem: Problem, rng: random.Random) -> str:
        numbers, target = _numbers_and_target(problem)
        for _ in range(200):  # another solution where a short search finds one
            expression = random_expression(numbers, rng)
            if expression.value == target:
                return expression.response
        return problem.solution

    def _wrong(self, problem: Problem, rng: random.Random) -> str:
        numbers, _ = _numbers_and_target(problem)
        kind = rng.choice(("other value", "other number", "cut short"))
        if kind == "other number":
            numbers[rng.randrange(len(numbers))] = rng.randint(1, 99)
        response = random_expression(numbers, rng).response
        return response[: -len("</answer>") - rng.randint(0, 3)] if kind == "cut short" else response
