"""What a user can get wrong with masks: the type of the error, the argument it names and the offenders it shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mask_model import FALLING

import bgpo_kernels as bk
from bgpo_kernels.masks import ops

B, T, MASK = 3, 6, 9


def good() -> dict[str, Any]:
    """Arguments that draw; a case replaces some of them."""
    ids = torch.arange(B * T).view(B, T) % 8
    return {
        "input_ids": ids, "response_mask": (torch.arange(T) >= 2).expand(B, T), "mask_token_id": MASK, "n_mc": 4,
        "seed": 1, "prompt_mask": (torch.arange(T) < 2).expand(B, T), "prompt_mask_prob": 0.5,
        "sample_ids": torch.arange(B), "mc_range": (0, 4), "scheme": "exact", "schedule": "uniform",
    }  # fmt: skip


def call(**changes: Any) -> bk.MaskDraw:
    arguments = {**good(), **changes}
    return bk.random_mask(arguments.pop("input_ids"), arguments.pop("response_mask"), **arguments)


def cleared(name: str, *rows: int) -> torch.Tensor:
    mask = good()[name].clone()
    mask[list(rows)] = False
    return mask


def with_ids(*changes: tuple[int, int, int]) -> torch.Tensor:
    ids = good()["input_ids"].clone()
    for b, t, value in changes:
        ids[b, t] = value
    return ids


IDS, MASKS = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.bool)

WRONG_TYPES = [
    ({"input_ids": [[1, 2]]}, ["input_ids", "Tensor", "list"]),
    ({"input_ids": IDS.int()}, ["input_ids", "int64", "int32"]),
    ({"input_ids": IDS.float()}, ["input_ids", "int64", "float32"]),
    ({"response_mask": np.ones((B, T), dtype=bool)}, ["response_mask", "Tensor", "ndarray"]),
    ({"response_mask": MASKS.long()}, ["response_mask", "bool", "int64"]),
    ({"prompt_mask": [True]}, ["prompt_mask", "Tensor", "list"]),
    ({"prompt_mask": MASKS.to(torch.uint8)}, ["prompt_mask", "bool", "uint8"]),
    ({"sample_ids": [0, 1, 2]}, ["sample_ids", "Tensor", "list"]),
    ({"sample_ids": torch.arange(B, dtype=torch.int32)}, ["sample_ids", "int64", "int32"]),
    ({"n_mc": 2.0}, ["n_mc", "int", "float"]),
    ({"n_mc": True}, ["n_mc", "int", "bool"]),
    ({"seed": None}, ["seed", "int", "NoneType"]),
    ({"seed": "1"}, ["seed", "int", "str"]),
    ({"mask_token_id": torch.tensor(9)}, ["mask_token_id", "int", "Tensor"]),
    ({"prompt_mask_prob": "0.5"}, ["prompt_mask_prob", "number", "str"]),
    ({"prompt_mask_prob": True}, ["prompt_mask_prob", "number", "bool"]),
    ({"mc_range": 2}, ["mc_range", "(lo, hi)", "2"]),
    ({"mc_range": (0, 1, 2)}, ["mc_range", "(lo, hi)", "(0, 1, 2)"]),
    ({"mc_range": (0.0, 2)}, ["mc_range[0]", "int", "float"]),
    ({"scheme": None}, ["scheme", "NoneType"]),
    ({"schedule": [0.5, 0.5]}, ["schedule", "CountSchedule", "list"]),
    ({"schedule": None}, ["schedule", "CountSchedule", "NoneType"]),
]

WRONG_VALUES = [
    ({"input_ids": IDS[0]}, ["input_ids", "[B, T]", "[6]"]),
    ({"input_ids": IDS[:, :, None]}, ["input_ids", "[B, T]", "[3, 6, 1]"]),
    ({"response_mask": MASKS[:2]}, ["response_mask", "[3, 6]", "[2, 6]"]),
    ({"response_mask": MASKS[:, 1:]}, ["response_mask", "[3, 6]", "[3, 5]"]),
    ({"response_mask": MASKS[0]}, ["response_mask", "[3, 6]", "[6]"]),
    ({"prompt_mask": MASKS[:, :1]}, ["prompt_mask", "[3, 6]", "[3, 1]"]),
    ({"sample_ids": torch.arange(2)}, ["sample_ids", "[3]", "[2]"]),
    ({"sample_ids": torch.zeros(B, 1, dtype=torch.int64)}, ["sample_ids", "[3]", "[3, 1]"]),
    ({"response_mask": MASKS.to("meta")}, ["response_mask", "meta", "input_ids", "cpu"]),
    ({"prompt_mask": MASKS.to("meta")}, ["prompt_mask", "meta", "cpu"]),
    ({"sample_ids": torch.arange(B, device="meta")}, ["sample_ids", "meta", "cpu"]),
    ({"response_mask": cleared("response_mask", 1, 2)}, ["response_mask", "row(s) [1, 2]"]),
    ({"input_ids": with_ids((1, 4, -5), (2, 0, -6))}, ["input_ids", "-5", "-6", "[1, 4]", "[2, 0]"]),
    ({"input_ids": with_ids((0, 3, 2**31))}, ["input_ids", str(2**31), "[0, 3]"]),
    ({"input_ids": with_ids((2, 5, MASK))}, ["response", "row(s) [2]", "mask token 9"]),
    ({"prompt_mask": MASKS}, ["prompt_mask", "response_mask", "overlap"]),
    ({"prompt_mask": None}, ["prompt_mask_prob", "prompt_mask [B, T]"]),
    ({"prompt_mask_prob": -0.1}, ["prompt_mask_prob", "-0.1"]),
    ({"prompt_mask_prob": 1.5}, ["prompt_mask_prob", "1.5"]),
    ({"prompt_mask_prob": math.nan}, ["prompt_mask_prob", "nan"]),
    ({"n_mc": 0}, ["n_mc", "at least 1", "0"]),
    ({"n_mc": -3}, ["n_mc", "at least 1", "-3"]),
    ({"n_mc": 3, "scheme": "coupled", "mc_range": None}, ["n_mc", "coupled", "even", "3"]),
    ({"n_mc": 2**30}, ["n_mc", "2^31", str(2**30), "L=4"]),
    ({"seed": -1}, ["seed", str(2**64 - 1), "-1"]),
    ({"seed": 2**64}, ["seed", str(2**64 - 1), str(2**64)]),
    ({"mask_token_id": -1}, ["mask_token_id", "-1"]),
    ({"mask_token_id": 2**31}, ["mask_token_id", str(2**31 - 1), str(2**31)]),
    ({"mc_range": (-1, 2)}, ["mc_range[0]", "[0, 3]", "-1"]),
    ({"mc_range": (4, 5)}, ["mc_range[0]", "[0, 3]", "4"]),
    ({"mc_range": (2, 2)}, ["mc_range[1]", "[3, 4]", "2"]),
    ({"mc_range": (2, 5)}, ["mc_range[1]", "[3, 4]", "5"]),
    ({"scheme": "Exact"}, ["scheme", "exact, bernoulli, coupled, full", "'Exact'"]),
    ({"schedule": "linear"}, ["schedule", "uniform, stratified, harmonic", "CountSchedule", "'linear'"]),
    ({"scheme": "bernoulli", "schedule": "harmonic"}, ["schedule", "'bernoulli'", "'harmonic'"]),
    ({"scheme": "coupled", "schedule": FALLING}, ["schedule", "'coupled'", "'falling'"]),
    ({"scheme": "full", "schedule": FALLING}, ["schedule", "'full'", "'falling'"]),
    ({"backend": "gpu"}, ["backend", "auto, reference, cpu, triton, cuda", "'gpu'"]),
    ({"backend": "cuda"}, ["backend", "'cuda'", "CUDA tensors, not cpu"]),
]  # fmt: skip


def case_name(changes: Any) -> str | None:
    return "-".join(changes) if isinstance(changes, dict) else ""


def assert_message(error: pytest.ExceptionInfo[Exception], parts: list[str]) -> None:
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def test_the_good_arguments_are_good() -> None:
    assert call().noisy_ids.shape == (B, 4, T)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that comes after a kernel ran came too late."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(ops, "mask_draw", refuse)


@pytest.mark.parametrize(("changes", "parts"), WRONG_TYPES, ids=case_name)
def test_wrong_types(changes: dict[str, Any], parts: list[str], no_kernels: None) -> None:
    with pytest.raises(TypeError) as error:
        call(**changes)
    assert_message(error, parts)


@pytest.mark.parametrize(("changes", "parts"), WRONG_VALUES, ids=case_name)
def test_wrong_values(changes: dict[str, Any], parts: list[str], no_kernels: None) -> None:
    with pytest.raises(ValueError) as error:
        call(**changes)
    assert_message(error, parts)


def test_empty_batches_are_refused(no_kernels: None) -> None:
    with pytest.raises(ValueError, match=r"input_ids holds no token: shape \[0, 6\]"):
        call(input_ids=IDS[:0], response_mask=MASKS[:0], prompt_mask=MASKS[:0], sample_ids=torch.arange(0))
    with pytest.raises(ValueError, match=r"input_ids holds no token: shape \[3, 0\]"):
        call(input_ids=IDS[:, :0], response_mask=MASKS[:, :0], prompt_mask=MASKS[:, :0])


# --------------------------------------------------------------------------------------------------- CountSchedule


@pytest.mark.parametrize("law", [None, 5, "abcd", ["a", "b"], [[0.5, 0.5]]], ids=repr)
def test_a_law_that_is_none(law: Any) -> None:
    with pytest.raises(TypeError, match="law must hold probabilities"):
        bk.CountSchedule(law)


def law_cases() -> list[tuple[Any, type[Exception], list[str]]]:
    """Laws for responses of 4 tokens."""
    wrong = [
        ([0.5, 0.5], ValueError, ["2 probabilities", "4 tokens"]),
        ([0.2] * 5, ValueError, ["5 probabilities", "4 tokens"]),
        ([0.5, 0.5, 0.0, 0.0], ValueError, ["positive", "L=4", "[0.0, 0.0]", "[3, 4]"]),
        ([0.5, 0.7, -0.2, 0.0], ValueError, ["positive", "[-0.2, 0.0]", "[3, 4]"]),
        ([0.5, math.nan, 0.25, 0.25], ValueError, ["finite", "nan", "[2]"]),
        ([0.5, math.inf, 0.25, 0.25], ValueError, ["finite", "inf", "[2]"]),
        ([0.2] * 4, ValueError, ["sum to 0.8", "L=4"]),
        ([0.25, 0.25, 0.25, 0.25001], ValueError, ["sum to 1.00001"]),
    ]
    functions: list[tuple[Callable, type[Exception], list[str]]] = [
        (lambda length: None, TypeError, ["law(4)", "None"]),
        (lambda length: ["a"] * length, TypeError, ["law(4)", "['a'"]),
        (lambda length: torch.full((length + 1,), 1 / (length + 1)), ValueError, ["5 probabilities", "4 tokens"]),
    ]
    return wrong + functions


@pytest.mark.parametrize(("law", "kind", "parts"), law_cases())
def test_laws_that_do_not_fit(law: Any, kind: type[Exception], parts: list[str], no_kernels: None) -> None:
    with pytest.raises(kind) as error:
        call(schedule=bk.CountSchedule(law, name="mine"))
    assert_message(error, ["'mine'", *parts])


def test_laws_that_fit() -> None:
    """Sequences, tensors and functions of them; a sum within 1e-6 of 1 is normalised."""
    for law in ([0.1, 0.2, 0.3, 0.4], torch.tensor([0.1, 0.2, 0.3, 0.4]), lambda length: np.full(length, 1 / length)):
        assert call(schedule=bk.CountSchedule(law)).num_rows > 0
    nearly = bk.CountSchedule([0.25, 0.25, 0.25, 0.25 + 8e-7]).probabilities(4)
    assert float(nearly.sum()) == pytest.approx(1, abs=1e-15)


# -------------------------------------------------------------------------------------------------------- MaskDraw


def parts_of_a_draw() -> dict[str, torch.Tensor]:
    """B = 2, n = 2, T = 4: three, none, one and two masked tokens."""
    return {
        "noisy_ids": torch.zeros(2, 2, 4, dtype=torch.int64),
        "rows": torch.tensor([0, 1, 3, 8, 12, 15]),
        "targets": torch.tensor([5, 5, 4, 3, 2, 1]),
        "segment_offsets": torch.tensor([0, 3, 3, 4, 6]),
        "segment_weight": torch.tensor([[1.0, 0.0], [2.0, 0.5]]),
        "count": torch.tensor([[3, 0], [1, 2]], dtype=torch.int32),
    }


HAND_TYPES = [
    *(({name: None}, [name, "Tensor", "NoneType"]) for name in parts_of_a_draw()),
    ({"noisy_ids": torch.zeros(2, 2, 4, dtype=torch.int32)}, ["noisy_ids", "int64", "int32"]),
    ({"rows": torch.tensor([0.0] * 6)}, ["rows", "int64", "float32"]),
    ({"targets": torch.tensor([0] * 6, dtype=torch.int32)}, ["targets", "int64", "int32"]),
    ({"segment_offsets": torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32)}, ["segment_offsets", "int64", "int32"]),
    ({"segment_weight": torch.ones(2, 2, dtype=torch.float64)}, ["segment_weight", "float32", "float64"]),
    ({"count": torch.ones(2, 2, dtype=torch.int64)}, ["count", "int32", "int64"]),
]

HAND_VALUES = [
    ({"noisy_ids": torch.zeros(4, 4, dtype=torch.int64)}, ["noisy_ids", "[B, n, T]", "[4, 4]"]),
    ({"rows": torch.zeros(2, 3, dtype=torch.int64)}, ["rows", "[N]", "[2, 3]"]),
    ({"targets": torch.tensor([1, 2])}, ["targets", "[6]", "[2]"]),
    ({"segment_offsets": torch.tensor([0, 3, 6])}, ["segment_offsets", "[5]", "[3]"]),
    ({"segment_weight": torch.ones(4)}, ["segment_weight", "[2, 2]", "[4]"]),
    ({"count": torch.ones(2, 3, dtype=torch.int32)}, ["count", "[2, 2]", "[2, 3]"]),
    ({"rows": torch.zeros(6, dtype=torch.int64, device="meta")}, ["rows", "meta", "noisy_ids", "cpu"]),
    ({"segment_offsets": torch.tensor([1, 3, 3, 4, 6])}, ["segment_offsets", "N=6", "(1, 3, 3, 4, 6)"]),
    ({"segment_offsets": torch.tensor([0, 3, 3, 4, 5])}, ["segment_offsets", "N=6", "(0, 3, 3, 4, 5)"]),
    ({"segment_offsets": torch.tensor([0, 4, 3, 4, 6])}, ["segment_offsets", "N=6", "(0, 4, 3, 4, 6)"]),
    ({"count": torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)}, ["count", "[2, 1]", "[2, 3]", "[1, 2]"]),
    ({"rows": torch.tensor([-1, 1, 3, 8, 12, 15])}, ["rows", "[0, 16)", "-1"]),
    ({"rows": torch.tensor([0, 1, 3, 8, 12, 16])}, ["rows", "[0, 16)", "[16]"]),
    ({"rows": torch.tensor([0, 3, 1, 8, 12, 15])}, ["rows", "ascending", "[3, 1]"]),
    ({"rows": torch.tensor([0, 1, 1, 8, 12, 15])}, ["rows", "ascending", "[1, 1]"]),
    ({"rows": torch.tensor([0, 1, 4, 8, 11, 15])}, ["rows [4, 11]", "segments [0, 3]", "T=4"]),
    ({"targets": torch.tensor([5, 5, -100, 3, 2, 1])}, ["targets", "-100", "[[2]]"]),
    ({"targets": torch.tensor([5, 5, 4, 3, 2**31, 1])}, ["targets", str(2**31), "[[4]]"]),
    ({"segment_weight": torch.tensor([[1.0, 0.0], [math.nan, 0.5]])}, ["segment_weight", "nan", "[1, 0]"]),
]  # fmt: skip


def test_parts_of_a_draw_are_a_draw() -> None:
    drawn = bk.MaskDraw(**parts_of_a_draw())
    assert drawn.host_offsets == (0, 3, 3, 4, 6) and drawn.max_target == 5
    got = drawn.reduce(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]))
    assert got.tolist() == [[-6.0, 0.0], [-8.0, -5.5]]


@pytest.mark.parametrize(("changes", "parts"), HAND_TYPES, ids=case_name)
def test_draws_by_hand_of_wrong_types(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(TypeError) as error:
        bk.MaskDraw(**{**parts_of_a_draw(), **changes})
    assert_message(error, parts)


@pytest.mark.parametrize(("changes", "parts"), HAND_VALUES, ids=case_name)
def test_draws_by_hand_of_wrong_values(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        bk.MaskDraw(**{**parts_of_a_draw(), **changes})
    assert_message(error, parts)


def test_reduce_refuses_what_it_cannot_sum() -> None:
    drawn = bk.MaskDraw(**parts_of_a_draw())
    with pytest.raises(TypeError, match=r"logp must be a torch\.Tensor, got list"):
        drawn.reduce([0.0] * 6)
    with pytest.raises(TypeError, match="logp must be float32 or float64, got bfloat16"):
        drawn.reduce(torch.zeros(6, dtype=torch.bfloat16))
    for shape in ([5], [7], [6, 1]):
        with pytest.raises(ValueError, match=r"logp must have shape \[6\] \(one per masked row\), got " + r"\[\d"):
            drawn.reduce(torch.zeros(shape))
    with pytest.raises(ValueError, match="logp is on meta but rows is on cpu"):
        drawn.reduce(torch.zeros(6, device="meta"))


def test_a_draw_is_frozen() -> None:
    drawn = bk.MaskDraw(**parts_of_a_draw())
    with pytest.raises(AttributeError):
        drawn.rows = drawn.targets  # type: ignore[misc]
