"""The main job end to end on a tiny configuration, running out of memory, one's own model, and every refusal."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

for package in ("transformers", "tokenizers", "rich", "tqdm", "matplotlib"):
    pytest.importorskip(package)

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Two prompts, two rewards each: short, so that full logits of LLaDA's vocabulary stay small.
RECORDS = [
    {"task": "a", "prompt": "1+1=", "response": "2", "reward": 1},
    {"task": "a", "prompt": "1+1=", "response": "three", "reward": 0},
    {"task": "b", "prompt": "2+3=", "response": "5.", "reward": 1},
    {"task": "b", "prompt": "2+3=", "response": "4", "reward": 0.5},
]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark's script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_vs_mc

    yield memory_vs_mc


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def launch(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does, on RECORDS."""
    data = write(directory / "data.jsonl", RECORDS)
    command = [sys.executable, str(BENCHMARKS / "memory_vs_mc.py"), "--data", str(data), "--response-tokens", "6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def run(directory: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a successful run prints, and its JSON report."""
    done = launch(directory, "--json", "report.json", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((directory / "report.json").read_text())


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """One run of all methods with all outputs."""
    directory = tmp_path_factory.mktemp("main_job")
    text, report = run(directory, "--shape", "tiny", "--n-mc", "1,2,5", "--csv", "points.csv", "--plot", "plot.png")
    return directory, text, report


@pytest.mark.slow
def test_all_points_are_measured_and_recorded(outcome: tuple[Path, str, dict[str, Any]]) -> None:
    _, _, report = outcome
    assert [(p["n_mc"], p["method"]) for p in report["points"]] == [
        (n_mc, method) for n_mc in (1, 2, 5) for method in ("exact", "bgpo", "replay", "plain")
    ]
    for point in report["points"]:
        assert point["status"] == "ok"
        assert len(point["seconds"]) == len(point["peak_bytes"]) >= 1
        assert min(point["seconds"]) > 0 and min(point["peak_bytes"]) > 0
    assert report["environment"]["versions"]["torch"] and report["environment"]["command"]
    assert report["batch"]["sequences"] == 2 and report["batch"]["response_tokens"] == [6, 6]


@pytest.mark.slow
def test_all_gradients_agree_with_the_exact_objective(outcome: tuple[Path, str, dict[str, Any]]) -> None:
    compared = [point for point in outcome[2]["points"] if point["method"] != "exact"]
    assert len(compared) == 9
    for point in compared:
        assert point["reference"] == "exact"
        assert point["gradient_compared"] == point["gradient_entries"] > 4_000_000
        # fp32 sums in another order: a few units in the last place of the largest entries
        assert point["cosine"] > 1 - 1e-9
        assert point["relative_l2"] < 1e-5 and point["relative_max"] < 1e-5


@pytest.mark.slow
def test_retained_graphs_grow_by_the_logits_of_a_sample(outcome: tuple[Path, str, dict[str, Any]]) -> None:
    logits = 10 * 126464 * 4  # prompt and response of 10 tokens, fp32
    exact, ours = (
        {p["n_mc"]: max(p["peak_bytes"]) for p in outcome[2]["points"] if p["method"] == method}
        for method in ("exact", "bgpo")
    )
    assert exact[5] - exact[2] == pytest.approx(3 * logits, rel=0.1)
    assert ours[5] - ours[2] < logits / 4
    assert outcome[2]["findings"]["exact_growth"]["bytes_per_sample"] > logits


@pytest.mark.slow
def test_table_csv_and_plot(outcome: tuple[Path, str, dict[str, Any]]) -> None:
    directory, text, report = outcome
    for expected in ("exact, all graphs kept", "BGPO (bgpo_kernels)", "exact via replay", "BGPO plain", "largest n_mc"):
        assert expected in text
    with (directory / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [point["method"] for point in report["points"]]
    assert [int(row["peak_bytes"]) for row in rows] == [max(point["peak_bytes"]) for point in report["points"]]
    assert (directory / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_out_of_memory_is_a_result_and_larger_points_are_skipped(tmp_path: Path) -> None:
    limits = ("--n-mc", "1,48,49", "--memory-budget", "480MiB")
    text, report = run(tmp_path, "--shape", "tiny", "--methods", "exact,bgpo,replay", *limits)
    status = {(point["method"], point["n_mc"]): point["status"] for point in report["points"]}
    assert [status["exact", n_mc] for n_mc in (1, 48, 49)] == ["ok", "out of memory", "skipped"]
    assert {status[method, n_mc] for method in ("bgpo", "replay") for n_mc in (1, 48, 49)} == {"ok"}
    assert report["largest_fitting"] == {"exact": 1, "bgpo": 49, "replay": 49}
    assert {p["reference"] for p in report["points"] if p["method"] == "bgpo"} == {"exact", "replay"}
    assert "out of memory" in text and "skipped" in text
    assert "all graphs kept 1, BGPO (bgpo_kernels) at least 49" in text


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "bert"])
def test_own_checkpoint(tmp_path: Path, family: str) -> None:
    from transformers import BertConfig, BertForMaskedLM

    from bgpo_kernels.models.llada import build_llada, llada_config
    from bgpo_kernels.tasks.tokenizer import byte_tokenizer

    narrow = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if family == "llada":
        model = build_llada(llada_config("tiny", vocab_size=302, mask_token_id=300, eos_token_id=301))
    else:
        model = BertForMaskedLM(BertConfig(vocab_size=302, pad_token_id=301, **narrow))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(300, 301).save_pretrained(tmp_path / "model")
    _, report = run(tmp_path, "--model", str(tmp_path / "model"), "--n-mc", "3", "--plot", "none")
    assert [point["status"] for point in report["points"]] == ["ok"] * 4
    assert all(point["relative_l2"] < 1e-5 for point in report["points"] if point["method"] != "exact")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-mc", "1,0"], "--n-mc: expected whole numbers of at least 1"),
        (["--n-mc", "two"], "--n-mc: expected whole numbers"),
        (["--methods", "exact,magic"], "'magic' is none of exact, bgpo, replay, plain"),
        (["--memory-budget", "lots"], "--memory-budget: 'lots' is not a size"),
        (["--memory-budget", "0"], "--memory-budget: '0' is not a size"),
        (["--workspace", "x"], "--workspace: 'x' is not a size"),
        (["--device", "tpu9"], "--device"),
        (["--device", "cuda:99"], "torch sees"),
        (["--shape", "huge"], "--shape"),
        (["--dtype", "int8"], "--dtype"),
        (["--seed", "-1"], "--seed"),
        (["--sequences", "0"], "--sequences"),
        (["--data", "absent.jsonl"], "--data: no such file: absent.jsonl"),
        (["--model", "absent"], "--model: absent is not a directory with a config.json"),
        (["--mask-token-id", "5"], "belong to --model"),
        (["--json", "no/such/directory/x.json"], "--json: cannot write"),
        (["--plot", "no/such/directory/x.png"], "--plot: cannot write"),
    ],
)
def test_options_that_cannot_work_are_refused(
    job: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        job.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*RECORDS, "broken"], "data.jsonl, line 5: expected a JSON object, found str"),
        ([*RECORDS, {"prompt": "p", "response": "r"}], "data.jsonl, line 5: missing field 'reward'"),
        ([RECORDS[0] | {"response": "far too long"}, *RECORDS[1:]], "exceeds --response-tokens 6: 'far too long'"),
        ([r | {"reward": 1} for r in RECORDS], "needs 2 sequences, but the data offers 0 with a non-zero advantage"),
        ([RECORDS[0] | {"response": "<|mdm_mask|>"}, *RECORDS[1:]], "the mask token occurs in the text"),
    ],
)
def test_data_that_cannot_work_is_refused_by_line(
    job: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Any], message: str
) -> None:
    data = write(tmp_path / "data.jsonl", lines)
    assert job.main(["--data", str(data), "--response-tokens", "6", "--plot", "none"]) == 2
    assert message in capsys.readouterr().err


def test_line_that_is_not_json_is_named(job: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl", RECORDS[:2])
    data.write_text(data.read_text() + '{"prompt": \n')
    assert job.main(["--data", str(data), "--plot", "none"]) == 2
    assert "data.jsonl, line 3: not valid JSON" in capsys.readouterr().err


@pytest.mark.slow
def test_failure_that_is_no_lack_of_memory_is_shown(tmp_path: Path) -> None:
    """A checkpoint that attends causally is refused by the package; the user reads why and gets exit status 1."""
    from bgpo_kernels.models.llada import build_llada, llada_config
    from bgpo_kernels.tasks.tokenizer import byte_tokenizer

    model = build_llada(llada_config("tiny", vocab_size=302, mask_token_id=300, eos_token_id=301))
    model.config.is_causal = True
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(300, 301).save_pretrained(tmp_path / "model")
    done = launch(tmp_path, "--model", str(tmp_path / "model"), "--methods", "bgpo", "--n-mc", "1", "--plot", "none")
    assert done.returncode == 1
    assert "BGPO (bgpo_kernels) at n_mc = 1 failed" in done.stderr and "causal" in done.stderr


def test_generated_data_holds_both_tasks_and_both_signs(job: ModuleType, tmp_path: Path) -> None:
    from _memory_vs_mc.data import load_tokens
    from _memory_vs_mc.options import parse

    for count in (2, 3, 6):
        tokens = load_tokens(parse(["--sequences", str(count)]), tmp_path)
        assert len(tokens.input_ids) == len(tokens.advantages) == count
        assert {record.task for record in tokens.records} == {"countdown", "sudoku"}
        assert (tokens.advantages > 0).any() and (tokens.advantages < 0).any()
        assert (tokens.response_mask.sum(axis=1) == 128).all()
        assert not (tokens.response_mask & (tokens.attention_mask == 0)).any()
        assert not (tokens.input_ids == tokens.mask_token_id).any()


def test_advantages_are_normalised_in_their_group(job: ModuleType) -> None:
    from _memory_vs_mc.data import choose

    from bgpo_kernels.tasks import Record

    records = [Record("t", "p", str(reward), reward) for reward in (0.0, 0.0, 0.0, 1.0)]
    chosen = choose([*records, Record("t", "lonely", "x", 5.0)], 4)
    assert [pair[1] for pair in chosen] == pytest.approx([3**0.5] + [-(3**-0.5)] * 3)


def test_agreement_sees_a_difference(job: ModuleType) -> None:
    from _memory_vs_mc.sweep import agreement

    reference = np.array([3.0, 4.0, 0.0, 0.0], dtype=np.float32)
    assert agreement(reference, reference) == (1.0, 0.0, 0.0)
    assert agreement(-reference, reference) == pytest.approx((-1.0, 2.0, 2.0))
    other = np.array([3.0, 4.0, 0.0, 1.0], dtype=np.float32)
    for chunk in (1, 3, 100):
        assert agreement(other, reference, chunk) == pytest.approx((25 / (5 * 26**0.5), 0.25, 0.2))


def test_growth_is_the_slope_of_the_peaks(job: ModuleType) -> None:
    from _memory_vs_mc.report import growth, largest_fitting
    from _memory_vs_mc.sweep import OK, OUT_OF_MEMORY, Point

    points = [Point("exact", n, OK, peak_bytes=[100 + 7 * n], seconds=[1.0]) for n in (1, 2, 8)]
    assert growth(points[:2], "exact") is None
    assert growth(points, "exact") == pytest.approx((7.0, 1.0))
    assert largest_fitting(points) == {"exact": (8, False)}
    assert largest_fitting([*points, Point("exact", 16, OUT_OF_MEMORY)]) == {"exact": (8, True)}


def test_sizes(job: ModuleType) -> None:
    from _memory_vs_mc.options import parse_size

    assert parse_size("--x", None) is None
    sizes = {"512MiB": 2**29, "4GiB": 2**32, "1.5 GB": 1_500_000_000, "80gb": 80 * 10**9, "7": 7}
    assert {text: parse_size("--x", text) for text in sizes} == sizes


def test_peak_memory_sees_what_was_freed_again() -> None:
    program = (
        "from _measure import PeakMemory\n"
        "memory = PeakMemory('cpu'); memory.start()\n"
        "block = bytearray(64 << 20); del block; first = memory.above()\n"
        "memory.restart(); print(first, memory.above())"
    )
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first == pytest.approx(64 << 20, rel=0.05)
    assert second < 4 << 20
