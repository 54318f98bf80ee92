"""The planning tasks: exact checkers, solvable endless problems, disjoint splits, JSON lines and the byte tokenizer."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

from bgpo_kernels.tasks import TASKS, Record, Task, read_records, scored_candidates, write_records
from bgpo_kernels.tasks.__main__ import main
from bgpo_kernels.tasks.countdown import TARGETS, Countdown, evaluate, random_expression
from bgpo_kernels.tasks.sudoku import Sudoku, canonical, solutions, solved_grids
from bgpo_kernels.tasks.task import Problem, answer_of

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
TO_24 = Problem("countdown", "", "1 3 4 6=24", "<answer>6 / (1 - 3 / 4)</answer>")
PUZZLE = Problem("sudoku", "text\n0034\n3412\n2143\n4321\n", "", "<answer>1234341221434321</answer>")


@every_task
def test_same_seed_gives_same_problems_and_other_seed_others(task: Task) -> None:
    first, again, other = (list(islice(task.problems(seed), 20)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


@every_task
def test_splits_share_no_problem(task: Task) -> None:
    train, heldout = ({p.key for p in islice(task.problems(seed=3, split=s), 100)} for s in ("train", "heldout"))
    assert train and heldout
    assert not train & heldout


@every_task
def test_split_of_a_problem_does_not_depend_on_the_seed(task: Task) -> None:
    assert all(p.split == "heldout" for seed in range(3) for p in islice(task.problems(seed, "heldout"), 10))


@every_task
def test_solution_is_worth_full_reward_and_empty_text_none(task: Task) -> None:
    for problem in islice(task.problems(seed=1), 50):
        assert task.reward(problem, problem.solution) == 1.0
        assert task.reward(problem, "") == 0.0


@every_task
def test_candidates_hold_right_and_wrong_answers(task: Task) -> None:
    for problem in islice(task.problems(seed=2), 30):
        for count in (2, 5):
            responses = task.candidates(problem, count, seed=4)
            assert len(responses) == count
            assert {task.is_correct(problem, response) for response in responses} == {True, False}
            assert responses == task.candidates(problem, count, seed=4)


@every_task
def test_reward_survives_any_text(task: Task) -> None:
    problem, rng = next(task.problems()), random.Random(0)
    for _ in range(300):
        junk = "".join(rng.choices("<answer/>0123456789+-*() \n", k=rng.randint(0, 60)))
        assert 0.0 <= task.reward(problem, f"<answer>{junk}</answer>") <= 1.0


def test_unknown_split_and_count_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        Countdown().problems(split="test")
    with pytest.raises(ValueError, match="count must be at least 1"):
        Sudoku().candidates(PUZZLE, 0)


def test_last_answer_counts() -> None:
    assert answer_of("<answer>1</answer> no: <answer> 2 </answer>") == "2"
    assert answer_of("<answer>1") is None


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("6 / (1 - 3 / 4)", 1.0),  # needs exact rationals
        ("6*4*1*3", 0.1),
        ("6 * 4", 0.0),  # a number left out
        ("6 * 4 * 1 + 3 - 3", 0.0),  # a number used twice
        ("-6 + 30", 0.0),
        ("(6 - 4) ** 3 * (3 * 1)", 0.0),
        ("6 // 1 * 4 * 3", 0.0),
        ("6 / (4 - 3 - 1)", 0.0),  # division by zero
        ("(" * 150 + "6" + ")" * 20, 0.0),
        ("24", 0.0),
        ("__import__('os')", 0.0),
        ("9" * 500, 0.0),
    ],
)
def test_countdown_rewards(answer: str, reward: float) -> None:
    assert Countdown().reward(TO_24, f"<answer>{answer}</answer>") == reward


def test_countdown_expressions_say_what_they_compute() -> None:
    rng = random.Random(5)
    for _ in range(500):
        numbers = [rng.randint(1, 99) for _ in range(rng.choice((2, 3, 4)))]
        expression = random_expression(numbers, rng)
        value, used = evaluate(expression.text)
        assert (value, sorted(used)) == (Fraction(expression.value), sorted(numbers))
        for step in expression.steps:
            left, right = step.split(" = ")
            assert evaluate(left)[0] == int(right)


def test_countdown_key_ignores_the_order_of_the_numbers() -> None:
    for problem in islice(Countdown().problems(), 20):
        numbers, target = problem.key.split("=")
        assert numbers.split() == sorted(numbers.split(), key=int)
        assert int(target) in TARGETS


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("1234\n3412\n2143\n4321", 1.0),
        ("1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1", 1.0),
        ("1134\n3412\n2143\n4321", 0.5),
        ("2134\n3412\n2143\n4321", 0.0),
        ("1234\n3412\n2143\n4312", 0.0),  # the blanks are right, two given digits are not
        ("1234\n3412\n2143\n432", 0.0),
        ("1234\n3412\n2143\n43215", 0.0),
        ("0034\n3412\n2143\n4321", 0.0),
    ],
)
def test_sudoku_rewards(answer: str, reward: float) -> None:
    assert Sudoku().reward(PUZZLE, f"<answer>{answer}</answer>") == reward


def test_sudoku_puzzles_have_one_solution() -> None:
    assert len(solved_grids()) == 288
    for problem in islice(Sudoku().problems(seed=11), 40):
        puzzle = "".join(problem.prompt.split("\n")[-5:])
        assert 6 <= puzzle.count("0") <= 11
        assert len(solutions(puzzle)) == 1
        assert solutions(puzzle)[0] == "".join((answer_of(problem.solution) or "").split())


def test_sudoku_key_is_the_same_for_symmetric_puzzles() -> None:
    puzzle = "0013302004322300"
    relabelled = puzzle.translate(str.maketrans("1234", "3142"))
    transposed = "".join(puzzle[4 * (cell % 4) + cell // 4] for cell in range(16))
    bands_swapped = puzzle[8:] + puzzle[:8]
    assert {canonical(p) for p in (relabelled, transposed, bands_swapped)} == {canonical(puzzle)}
    assert canonical(puzzle[4:] + puzzle[:4]) != canonical(puzzle)  # shifting one row breaks the boxes


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    records = [Record("custom", "prömpt\n", '日本 "quoted"', 0.25), Record("sudoku", "p", "r", -1.0)]
    assert write_records(tmp_path / "f.jsonl", records) == 2
    assert read_records(tmp_path / "f.jsonl") == records


GOOD = b'{"prompt": "p", "response": "r", "reward": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops\n", "line 3: not valid JSON"),
        (b"\xff\xfe\n", "line 3: not UTF-8"),
        (b"[1, 2]\n", "line 3: expected a JSON object, found list"),
        (b'{"prompt": "p", "reward": 1}\n', "line 3: missing field 'response'"),
        (b'{"prompt": "p", "response": 3, "reward": 1}\n', "line 3: field 'response' must be a non-empty string"),
        (b'{"prompt": "", "response": "r", "reward": 1}\n', "line 3: field 'prompt' must be a non-empty string"),
        (b'{"prompt": "p", "response": "r", "reward": "1"}\n', "line 3: field 'reward' must be a finite number"),
        (b'{"prompt": "p", "response": "r", "reward": NaN}\n', "line 3: field 'reward' must be a finite number"),
        (b'{"prompt": "p", "response": "r", "reward": true}\n', "line 3: field 'reward' must be a finite number"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(ValueError, match="broken.jsonl, " + message):
        read_records(path)


def test_reading_defaults_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(GOOD)
    assert read_records(path) == [Record("custom", "p", "r", 1.0)]
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="holds no record"):
        read_records(path)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "absent.jsonl")


@every_task
def test_command_line_writes_scored_records(task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    command = ["--task", task.name, "--count", "3", "--candidates", "2", "--seed", "5", "--out", str(out)]
    assert main(command) == 0
    assert "3 " + task.name in capsys.readouterr().out
    assert read_records(out) == list(scored_candidates(task, 3, 2, seed=5))
    assert set(json.loads(out.read_text().splitlines()[0])) == {"task", "prompt", "response", "reward"}


def test_command_line_refuses_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--task", "chess"], ["--task", "sudoku", "--count", "0"]):
        with pytest.raises(SystemExit):
            main([*wrong, "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        main(["--task", "sudoku", "--out", str(tmp_path / "absent" / "x")])
    assert "cannot write" in capsys.readouterr().err


def test_byte_tokenizer_round_trips_and_knows_llada_ids() -> None:
    pytest.importorskip("transformers")
    from bgpo_kernels.tasks.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    text = "héllo 日本\n\t <answer>(1 + 2) / 3</answer>  \x00\x7f"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    special = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (126336, 126081, 126081)
    assert tokenizer("a" + tokenizer.mask_token)["input_ids"] == [97, 126336]
    assert max(tokenizer.get_vocab().values()) < 126464
    assert byte_tokenizer(300, 301).mask_token_id == 300
    with pytest.raises(ValueError, match="special ids"):
        byte_tokenizer(300, 300)
