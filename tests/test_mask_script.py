"""`benchmarks/mask.py`: what it records, and that a wrong draw is caught before anything is timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import bgpo_kernels as bk

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def mask(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, on one small shape."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import mask

    mask.expected.cache_clear()
    monkeypatch.setattr(mask, "DRY_SHAPES", ((2, 4, 24),))
    yield mask


def run(mask: ModuleType, path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status = mask.main(["--dry-run", "--device", "cpu", "--out", str(path), *options])
    return status, json.loads(path.read_text())


def test_every_scheme_is_proved_and_timed(mask: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run(mask, tmp_path / "out.json")
    assert status == 0 and document["benchmark"] == "mask" and document["environment"]["versions"]["torch"]
    assert [row["scheme"] for row in document["rows"]] == ["exact", "coupled", "bernoulli"]
    for row in document["rows"]:
        assert row["status"] == "ok"
        assert row["checks"]["consistent"] is True and row["checks"]["equals_reference"] is True
        assert min(row["seconds"]["call"] + row["seconds"]["memcpy"]) > 0
        assert row["ratios"]["call / memcpy"] > 0 and row["target"]["call / memcpy"] == 3.0
        # noisy ids, rows and targets, 9 offsets, 8 weights and counts
        assert row["output_bytes"] == 8 * (2 * 4 * 24 + 2 * row["masked"] + 9) + 4 * (8 + 8)
    table = capsys.readouterr().out
    exact = document["rows"][0]
    assert exact["checks"]["loop_consistent"] is True and exact["ratios"]["loop / call"] > 0
    assert document["rows"][1]["ratios"]["loop / call"] is None
    assert all(f"24 {row['scheme']}" in table for row in document["rows"])


def spoiled(draw: bk.MaskDraw, what: str) -> bk.MaskDraw:
    """`draw` with one thing wrong."""
    if what == "seed":
        return draw
    if what == "an unmasked token":
        noisy = draw.noisy_ids.clone()
        noisy[0, 0][noisy[0, 0] != 126336] += 1
        return replace(draw, noisy_ids=noisy)
    tensor = getattr(draw, what).clone()
    tensor.view(-1)[-1] += 1
    wrong = replace(draw)
    object.__setattr__(wrong, what, tensor)  # past the class's own checks
    return wrong


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("an unmasked token", "a token that is not masked was changed"),
        ("count", "count is not the number of masked tokens"),
        ("rows", "rows are not the masked positions"),
        ("targets", "targets are not the tokens under the masks"),
        ("segment_offsets", "offsets are not the running counts"),
        ("segment_weight", "weights are not those of scheme"),
        ("seed", "differs from the reference"),
    ],
)
def test_a_wrong_draw_is_a_failed_row_without_times(
    mask: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    right = mask.draw

    def wrong(ids: torch.Tensor, response: torch.Tensor, n_mc: int, scheme: str, backend: str) -> bk.MaskDraw:
        if backend == "reference":
            return right(ids, response, n_mc, scheme, backend)
        seed = mask.SEED + (what == "seed")
        options = {"mask_token_id": mask.MASK_TOKEN_ID, "n_mc": n_mc, "seed": seed, "scheme": scheme}
        return spoiled(bk.random_mask(ids, response, **options, backend=backend), what)

    monkeypatch.setattr(mask, "draw", wrong)
    status, document = run(mask, tmp_path / "out.json")
    assert status == 1
    for row in document["rows"]:
        assert row["status"] == "failed" and message in row["message"], row
        assert "seconds" not in row


def test_pairs_that_are_no_complements_are_caught(mask: ModuleType) -> None:
    ids, response = mask.inputs((2, 4, 24))
    draw = mask.draw(ids, response, 4, "coupled", "reference")
    order = torch.tensor([0, 0, 2, 2])
    twice = bk.MaskDraw(
        draw.noisy_ids[:, order].contiguous(),
        rows=(draw.noisy_ids[:, order] == mask.MASK_TOKEN_ID).flatten().nonzero()[:, 0],
        targets=ids[:, None].expand(2, 4, 24)[draw.noisy_ids[:, order] == mask.MASK_TOKEN_ID],
        segment_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), draw.count[:, order].flatten().cumsum(0)]),
        segment_weight=draw.segment_weight[:, order].contiguous(),
        count=draw.count[:, order].contiguous(),
    )
    with pytest.raises(mask.WrongDraw, match="complements"):
        mask.consistent(ids, twice, "coupled")


def test_a_resumed_run_measures_only_what_is_missing(mask: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    _, first = run(mask, path)
    document = json.loads(path.read_text())
    document["rows"][1]["status"] = "failed"
    path.write_text(json.dumps(document))
    status, second = run(mask, path, "--resume")
    assert status == 0
    kept = [row for row in second["rows"] if row["scheme"] != "coupled"]
    assert kept == [row for row in first["rows"] if row["scheme"] != "coupled"]
    (again,) = (row for row in second["rows"] if row["scheme"] == "coupled")
    assert again["status"] == "ok" and again["seconds"] != first["rows"][1]["seconds"]


def test_a_backend_that_does_not_serve_the_device_says_why(mask: ModuleType) -> None:
    case = {"B": 1, "n_mc": 2, "T": 8, "scheme": "exact", "backend": "cuda"}
    row = mask.measure(case, torch.device("cpu"), 1, 0.0)
    assert row["status"] == "not available" and "serves CUDA tensors" in row["message"]
    assert "not available" in mask.line(case | row)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(mask: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert mask.main(["--dry-run", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["backend"] for row in rows} == {"cuda", "triton"}
    measured = [row for row in rows if row["status"] == "ok"]
    assert measured and all(row["gpu_busy_seconds"]["call"] > 0 for row in measured)
