"""`benchmarks/step.py`: FLOPs against a count by hand and by torch, the plain update against ours, what is recorded.

At the end, what the main job (`memory_vs_mc.py`) does on a GPU only, driven on the CPU.
"""

from __future__ import annotations

import json
import signal
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bgpo_kernels as bk

for package in ("transformers", "tokenizers", "rich", "tqdm", "matplotlib"):
    pytest.importorskip(package)

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' modules can be imported, and their processes run on one thread."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def step() -> Iterator[ModuleType]:
    """The script as a module."""
    import step

    yield step


def tiny(shape: str = "llada-8b") -> Any:
    """An fp32 model of a family with nothing else changed."""
    from _step.models import _TINY, _TINY_KEYS

    from bgpo_kernels.models.llada import build_llada, llada_config

    return build_llada(llada_config(shape, **_TINY, num_key_value_heads=_TINY_KEYS[shape]))


# FLOPs


def test_flops_of_a_case_counted_by_hand() -> None:
    from _step.flops import Dimensions, update_flops

    model = Dimensions(hidden=2, layers=1, width=2, kv_width=1, intermediate=3, vocabulary=5)
    # q 2x2, k 1x2, v 1x2, o 2x2, gate 3x2, up 3x2, down 2x3: 4 + 2 + 2 + 4 + 6 + 6 + 6 = 30 entries.
    # Two samples of 10 tokens: 3 x 2 x 30 x 10 = 1800 each; attention 3 x 4 x 100 x 2 = 2400 each.
    # Head on 7 rows: 6 x 7 x 2 x 5 = 420.
    assert update_flops(model, 2, 10, 7) == 2 * (1800 + 2400) + 420
    # Rank 1: forward and inputs 2 x 2 x 30 x 10 = 1200; adapters 4+3+3+4+5+5+5 = 29 entries, 6 x 29 x 10 = 1740;
    # not needed below the first layer 2 x 10 x (4 + 2 + 2 + 3 x 2) = 280; head 4 x 7 x 2 x 5 = 280.
    assert update_flops(model, 2, 10, 7, lora_rank=1) == 2 * (1200 + 2400 + 1740 - 280) + 280


class Lora(nn.Module):
    """A frozen projection and its adapter."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.no_poison
@pytest.mark.parametrize("shape", ["llada-8b", "dream-7b"])
@pytest.mark.parametrize("rank", [None, 4])
def test_flops_are_those_torch_counts(shape: str, rank: int | None) -> None:
    """All positions masked, attention written out: every product of the model is one that torch's counter sees."""
    from _step.flops import Dimensions, update_flops
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = tiny(shape), 12
    model.set_attn_implementation("eager")
    if rank is not None:
        model.requires_grad_(False)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, module in list(block.named_children()):
                    if isinstance(module, nn.Linear):
                        setattr(block, name, Lora(module, rank))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 300, (1, tokens))).logits.square().sum().backward()
    rotation = 2 * (32 // 4 // 2) * tokens  # positions times frequencies, a matrix product in some versions
    expected = update_flops(Dimensions.of(model.config), 1, tokens, tokens, rank)
    assert counter.get_total_flops() in (expected, expected + rotation)


def test_dimensions_of_the_published_models() -> None:
    from _step.flops import Dimensions, update_flops

    from bgpo_kernels.models.llada import llada_config

    llada, dream = (Dimensions.of(llada_config(shape)) for shape in ("llada-8b", "dream-7b"))
    assert llada == Dimensions(4096, 32, 4096, 4096, 12288, 126464)
    assert dream == Dimensions(3584, 28, 3584, 512, 18944, 152064)
    # 6.98e9 entries in projections, 6 FLOPs each a token; attention 3 x 4 x 1024^2 x 4096 x 32; half of 512 rows
    assert update_flops(llada, 1, 1024, 256) == pytest.approx(6 * 6.98e9 * 1024 + 1.65e12 + 0.80e12, rel=0.01)


# The plain update


@pytest.mark.parametrize("shape", ["llada-8b", "dream-7b"])
@pytest.mark.parametrize("old_pass", [True, False])
def test_plain_and_ours_have_one_gradient(shape: str, old_pass: bool) -> None:
    from _step.batch import make_batch, our_update
    from _step.plain import plain_update

    model = tiny(shape)
    batch = make_batch(3, 5, 9, 318, CPU)
    draw = bk.random_mask(batch.input_ids, batch.response_mask, mask_token_id=318, n_mc=4, seed=7)
    gradients = []
    for update in (
        lambda: our_update(model, batch, 4, seed=7),
        lambda: plain_update(model, batch, 4, seed=7, old_pass=old_pass, draw=draw),
    ):
        model.zero_grad(set_to_none=True)
        update()
        gradients.append([parameter.grad.double() for parameter in model.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        # fp32 sums in another order: a few units in the last place of the largest entry
        assert float((ours - plain).abs().max()) <= 32 * 2.0**-24 * max(float(plain.abs().max()), 1e-3)
    assert sum(float(plain.square().sum()) for plain in gradients[1]) > 0


def test_plain_masks_have_the_distribution_of_random_mask() -> None:
    from _step.batch import make_batch
    from _step.plain import draw_masks

    batch = make_batch(2, 6, 40, 318, CPU)
    samples = list(draw_masks(batch, 8, seed=1))
    assert [sample.sequence for sample in samples] == [0] * 8 + [1] * 8
    for number, sample in enumerate(samples):
        count, stratum = int(sample.masked.sum()), number % 8
        assert 1 + stratum * 5 <= count <= 1 + (stratum + 1) * 5 - (stratum == 7) and sample.weight == 40 / count
        assert not sample.masked[:6].any()
        clean = batch.input_ids[sample.sequence]
        assert torch.equal(sample.noisy_ids, torch.where(sample.masked, 318, clean))
    frequency = torch.stack([s.masked[6:] for seed in range(200) for s in draw_masks(batch, 2, seed)]).double().mean(0)
    assert (frequency - (41 / 80)).abs().max() < 6 * 0.5 / 800**0.5


def test_plain_runs_sequences_of_zero_advantage_too() -> None:
    from dataclasses import replace

    from _step.batch import make_batch
    from _step.plain import plain_update

    model, calls = tiny(), []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    batch = replace(make_batch(2, 2, 4, 318, CPU), advantages=torch.tensor([0.0, 1.0]))
    plain_update(model, batch, 3, seed=0)
    assert calls == [False] * 6 + [True] * 6


# The worker


def options(**changed: Any) -> Namespace:
    """Those of a dry run."""
    defaults = {
        "device": CPU, "dry_run": True, "rounds": 1, "n_mc": [1, 2], "plain_n_mc": 2, "sequences": 2,
        "micro_batch_tokens": None, "prompt_tokens": 8, "response_tokens": 8,
    }  # fmt: skip
    return Namespace(**defaults | changed)


def test_the_worker_sees_how_many_tokens_run_at_once() -> None:
    from _step.worker import Worker

    for given, expected in ((16, 16), (50, 48), (None, 256)):  # samples of 16 tokens; None: all 16 of them
        worker = Worker(options(micro_batch_tokens=given), "llada-8b", "full")
        assert worker.start()["micro_batch_tokens"] == expected


def test_the_worker_ignores_attempts_that_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from _step.worker import Worker

    worker = Worker(options(), "llada-8b", "full")
    worker.start()
    embedding, whole = worker.subject.model.get_input_embeddings(), 256

    def refuse(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].numel() > whole // 2:
            raise torch.OutOfMemoryError("too many")

    embedding.register_forward_pre_hook(refuse)
    assert worker._learn_micro_batch() == whole // 2


def test_the_optimizer_step_fits_or_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import _step.worker
    from _step import fits
    from _step.worker import FITS, Worker

    monkeypatch.setattr(_step.worker, "limit_memory", lambda *_: None)  # it would outlast this test
    worker = Worker(options(), "llada-8b", FITS)
    start = worker.start()
    assert start["trained"] == start["parameters"] and start["gradient_bytes"] == start["weight_bytes"]

    monkeypatch.setattr(fits, "eight_bit_adamw", lambda: ("torch", torch.optim.AdamW))
    row = worker.measure({"measure": "optimizer step", "n_mc": 4})
    assert row["status"] == "ok" and row["fits"] is True and row["library"] == "torch"
    assert set(row["peak_bytes"]) == set(row["seconds"]) == {"update", "optimizer"}
    assert min(row["peak_bytes"].values()) >= 0.9 * row["held_bytes"] > 0

    class Idle(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            return None

    monkeypatch.setattr(fits, "eight_bit_adamw", lambda: ("none", Idle))
    with pytest.raises(AssertionError, match="changed nothing"):
        worker.measure({"measure": "optimizer step", "n_mc": 1})

    class Greedy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fits, "eight_bit_adamw", lambda: ("none", Greedy))
    row = worker.measure({"measure": "optimizer step", "n_mc": 1})
    assert row["status"] == "out of memory" and row["fits"] is False


# The script


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A dry run of a mode that needs peft, one that does not, and the optimizer's; its JSON and what it printed."""
    import os
    import subprocess
    import sys

    path = tmp_path_factory.mktemp("step") / "out.json"
    command = [sys.executable, str(BENCHMARKS / "step.py"), "--dry-run", "--device", "cpu", "--out", str(path)]
    only = "llada-8b:lora,llada-8b:full+AdamW8bit,dream-7b:full+checkpointing"
    command += ["--only", only, "--plot", str(path.with_suffix(".png"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def rows_of(path: Path, shape: str, mode: str) -> list[dict[str, Any]]:
    return [row for row in json.loads(path.read_text())["rows"] if (row["shape"], row["mode"]) == (shape, mode)]


@pytest.mark.slow
def test_a_dry_run_measures_everything(outcome: tuple[Path, str]) -> None:
    path, text = outcome
    rows = rows_of(path, "dream-7b", "full+checkpointing")
    expected = ["start", "gemm", "against plain", "memory", "memory", "throughput", "throughput"]
    assert [row["measure"] for row in rows] == expected and {row["status"] for row in rows} == {"ok"}
    start, gemm, against, *rest = rows
    assert start["trained"] == start["parameters"] > 0 and start["weight_bytes"] == 2 * start["parameters"]
    assert gemm["tokens"] == start["micro_batch_tokens"] and gemm["flops_per_second"] > 0
    assert set(against["seconds"]) == {"ours", "plain", "plain, no old pass"}
    rates = {name: 2 * against["n_mc"] / samples[0] for name, samples in against["seconds"].items()}
    assert against["mc_samples_per_second"] == pytest.approx(rates)
    assert against["times_plain"] == pytest.approx(rates["ours"] / rates["plain"])
    assert against["utilisation"] == pytest.approx(against["flops_per_second"] / gemm["flops_per_second"])
    assert [row["n_mc"] for row in rest] == [1, 2, 1, 2]
    assert all(row["peak_bytes"] > 0 for row in rest[:2])
    assert all(0 < row["masked_rows"] <= 2 * row["n_mc"] * 8 for row in rest[2:])
    assert "times plain" in text and "dry run: the figures below mean nothing" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_optional_library_that_is_missing_is_said_so(outcome: tuple[Path, str]) -> None:
    from importlib.util import find_spec

    lora = rows_of(outcome[0], "llada-8b", "lora")
    if find_spec("peft"):
        assert lora[0]["trained"] < lora[0]["parameters"] and {row["status"] for row in lora} == {"ok"}
    else:
        assert [row["status"] for row in lora] == ["not installed"] and "peft" in lora[0]["message"]
    (step,) = (r for r in rows_of(outcome[0], "llada-8b", "full+AdamW8bit") if r["measure"] == "optimizer step")
    installed = find_spec("torchao") or find_spec("bitsandbytes")
    assert step["status"] == ("ok" if installed else "not installed")


@pytest.mark.slow
def test_a_resumed_run_measures_only_what_is_missing(
    step: ModuleType, outcome: tuple[Path, str], tmp_path: Path
) -> None:
    document = json.loads(outcome[0].read_text())
    subject = ("dream-7b", "full+checkpointing")
    document["rows"] = [row for row in document["rows"] if (row["shape"], row["mode"]) == subject]
    missing = next(row for row in document["rows"] if row["measure"] == "throughput" and row["n_mc"] == 2)
    missing["status"] = "failed"
    path = tmp_path / "out.json"
    path.write_text(json.dumps(document))
    arguments = ["--dry-run", "--device", "cpu", "--only", ":".join(subject), "--out", str(path), "--resume"]
    assert step.main(arguments) == 0
    after = rows_of(path, *subject)
    again = next(row for row in after if row["measure"] == "throughput" and row["n_mc"] == 2)
    assert again["status"] == "ok" and again["seconds"] != missing["seconds"]
    kept = [row for row in document["rows"] if row is not missing and row["measure"] != "start"]
    assert all(row in after for row in kept) and len(after) == len(document["rows"])
    before = path.stat().st_mtime_ns, after
    assert step.main(arguments) == 0  # nothing is missing: no process
    assert rows_of(path, *subject) == before[1]


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("raise SystemExit(3)", "failed", "ended with status 3"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "out of memory", "killed by the system"),
    ],
)
def test_a_process_that_dies_loses_no_row(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, status: str, message: str
) -> None:
    from _step import processes

    script = tmp_path / "dying.py"
    row = {"shape": "llada-8b", "mode": "full", "measure": "gemm", "status": "ok", "tokens": 7, "flops_per_second": 1.0}
    script.write_text(
        "import json, pathlib, sys\n"
        "part = pathlib.Path(sys.argv[sys.argv.index('--out', sys.argv.index('--worker')) + 1])\n"
        f"part.write_text(json.dumps(json.loads(part.read_text()) | {{'rows': [{row!r}]}}))\n" + program
    )
    monkeypatch.setattr(processes, "SCRIPT", script)
    path = tmp_path / "out.json"
    returned = step.main(["--dry-run", "--device", "cpu", "--only", "llada-8b:full", "--out", str(path)])
    first, process = rows_of(path, "llada-8b", "full")
    assert first == row and process["measure"] == "process" and process["status"] == status
    assert message in process["message"] and returned == (status == "failed")


def test_without_time_nothing_is_begun(step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert step.main(["--dry-run", "--device", "cpu", "--seconds", "1e-9", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["status"] for row in rows] == ["no time left"] * 7
    assert "nothing measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "llada-8b:magic"], "'llada-8b:magic' is none of llada-8b:lora"),
        (["--n-mc", "1,zero"], "--n-mc: expected whole numbers"),
        (["--sequences", "0"], "--sequences must be at least 1"),
        (["--micro-batch-tokens", "0"], "--micro-batch-tokens must be at least 1"),
        (["--plot", "no/such/directory/x.png"], "--plot"),
    ],
)
def test_options_that_cannot_work_are_refused(
    step: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        step.main(["--dry-run", "--device", "cpu", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_findings_against_their_targets(tmp_path: Path) -> None:
    from _step.plot import draw
    from _step.report import findings

    def rows(times: float, last: int) -> list[dict[str, Any]]:
        subject = {"shape": "llada-8b", "mode": "lora", "status": "ok"}
        names = ("ours", "plain", "plain, no old pass")
        against = {"measure": "against plain", "times_plain": times, "mc_samples_per_second": dict.fromkeys(names, 2.0)}
        memory = [
            {"measure": "memory", "n_mc": n, "peak_bytes": 10 * peak, "above_weights_and_gradients_bytes": peak}
            for n, peak in ((64, last), (1, 1000))
        ]
        return [subject | row for row in (against, *memory)]

    met, missed = findings(rows(1.5, 1009))[0], findings(rows(1.49, 1011))[0]
    assert met["times_plain_met"] is True and met["peak_growth_met"] is True and met["fits"] is None
    assert missed["times_plain_met"] is False and missed["peak_growth_met"] is False
    assert missed["peak_growth"] == pytest.approx(0.011)
    document = {"rows": rows(1.5, 1009), "environment": {"device": "a device"}, "dry_run": False}
    assert draw(document, tmp_path / "plot.png") and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not draw(document | {"rows": []}, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


# The main job on a GPU


def spec(directory: Path, method: str) -> dict[str, Any]:
    """A point of the tiny model on the CPU."""
    ids = np.random.default_rng(0).integers(0, 255, (2, 10))
    scored = np.broadcast_to(np.arange(10) >= 4, ids.shape)
    np.savez(
        directory / "tokens.npz", input_ids=ids, attention_mask=np.ones_like(ids), response_mask=scored,
        advantages=np.array([1, -1], dtype=np.float32),
    )  # fmt: skip
    return {
        "method": method, "n_mc": 2, "seed": 0, "shape": "tiny", "model": None, "trust_remote_code": False,
        "dtype": "float32", "device": "cpu", "memory_budget": None, "workspace": None, "mask_token_id": 126336,
        "tokens": str(directory / "tokens.npz"), "gradient": str(directory / "gradient.f32"),
        "result": str(directory / "result.json"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.no_poison
def test_main_job_with_the_workspace_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace is filled above the baseline, and the gradient is that of the masks all the same."""
    from _memory_vs_mc import point

    gradients = {}
    for method, keep in (("exact", False), ("bgpo", False), ("bgpo", True)):
        monkeypatch.setattr(point, "keeps_workspace", lambda _, keep=keep: keep)
        result: dict[str, Any] = {}
        point.measure(spec(tmp_path, method), result)
        gradients[method, keep] = np.fromfile(tmp_path / "gradient.f32", dtype=np.float32)
        assert len(result["seconds"]) >= 1 and min(result["peak_bytes"]) > 0
    reference = gradients["exact", False]
    for gradient in gradients.values():
        assert np.abs(gradient - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.slow
def test_main_job_starts_a_process_ahead_for_cuda(tmp_path: Path) -> None:
    """Every point gets a process of its own, the next of which waits; errors and results come back."""
    from _memory_vs_mc.sweep import FAILED, OK, Launcher, run_point

    with Launcher("cuda") as launcher:
        waiting = launcher._next
        good = run_point(launcher, spec(tmp_path, "bgpo"), tmp_path)
        assert launcher._next is not waiting and waiting is not None and waiting.returncode == 0
        bad = run_point(launcher, spec(tmp_path, "bgpo") | {"shape": "no such shape"}, tmp_path)
        last = launcher._next
    assert good.status == OK and good.gradient_entries > 4_000_000
    assert bad.status == FAILED and "no such shape" in bad.message
    assert last is not None and last.poll() is not None


def test_main_job_measures_both_ends_first_under_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from _memory_vs_mc import sweep
    from _memory_vs_mc.options import parse

    monkeypatch.setattr(sweep, "compare_gradients", lambda *_: None)
    monkeypatch.setattr(sweep.Launcher, "__enter__", lambda self: self)
    order: list[int] = []

    def run_point(_: Any, spec: dict[str, Any], __: Path) -> Any:
        order.append(spec["n_mc"])
        return sweep.Point("exact", spec["n_mc"], sweep.OK if spec["n_mc"] < 4 else sweep.OUT_OF_MEMORY)

    monkeypatch.setattr(sweep, "run_point", run_point)
    tokens = SimpleNamespace(save=lambda _: None, mask_token_id=0)
    for limit, expected in ((["--seconds", "1000"], [1, 16, 2, 4]), ([], [1, 2, 4])):
        order.clear()
        chosen = parse(["--n-mc", "1,2,4,8,16", "--methods", "exact", *limit])
        points = sweep.sweep(chosen, tokens, tmp_path, lambda _: None)  # type: ignore[arg-type]
        assert order == expected and [point.n_mc for point in points] == [1, 2, 4, 8, 16]
        assert points[3].status == "skipped" and points[3].message == "a smaller n_mc ran out of memory"
    assert sweep.ends_first([3]) == [3] and sweep.ends_first([3, 5]) == [3, 5]


def test_main_job_out_of_time_skips_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from _memory_vs_mc import sweep
    from _memory_vs_mc.options import parse
    from _memory_vs_mc.report import largest_fitting

    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sweep, "compare_gradients", lambda *_: None)
    outcomes = {("exact", 1): sweep.OK, ("bgpo", 1): sweep.FAILED, ("plain", 1): sweep.OK}

    def run_point(_: Any, spec: dict[str, Any], __: Path) -> Any:
        return sweep.Point(spec["method"], spec["n_mc"], outcomes[spec["method"], spec["n_mc"]])

    monkeypatch.setattr(sweep, "run_point", run_point)
    monkeypatch.setattr(sweep.Launcher, "__enter__", lambda self: self)
    tokens = SimpleNamespace(save=lambda _: None, mask_token_id=0)
    chosen = parse(["--n-mc", "1,2", "--methods", "exact,bgpo,plain", "--seconds", "35"])
    points = sweep.sweep(chosen, tokens, tmp_path, lambda _: None)  # type: ignore[arg-type]
    assert [(point.status, point.message) for point in points] == [
        ("ok", ""),
        ("failed", ""),
        ("ok", ""),
        ("skipped", "no time left"),
        ("skipped", "it failed before"),
        ("skipped", "no time left"),
    ]
    assert largest_fitting(points) == {"exact": (1, False), "bgpo": (0, False), "plain": (1, False)}
