"""benchmarks/head.py in its dry run: what the record holds, that wrong results are caught, and how it is resumed."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bgpo_kernels as bk
from bgpo_kernels.backends import triton_interpreted

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = ("--dry-run", "--heads", "dream", "--rows", "32")
PEER_FAMILIES = ("liger", "liger-sm90", "cce", "quack", "verl")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with no other library installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for package in ("liger_kernel", "cut_cross_entropy", "quack", "verl"):
        monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]  # an import of it fails
    threads = torch.get_num_threads()
    yield importlib.import_module("head")
    torch.set_num_threads(threads)  # a dry run takes one


@pytest.fixture
def run(script: ModuleType, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the script with an --out file and gives its document."""

    def go(*options: str, status: int = 0) -> dict[str, Any]:
        assert script.main([*options, "--device", "cpu", "--out", str(tmp_path / "head.json")]) == status
        return json.loads((tmp_path / "head.json").read_text())

    return go


def entries(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Variants of a row by name."""
    return {entry["name"]: entry for entry in row["variants"]}


def test_dry_run_has_every_case_and_variant(run: Any, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from _head.variants import families

    kept = [name for name in families(torch.device("cpu")) if name not in ("ours-triton", "torch-compile", "torch-lce")]
    document = run("--dry-run", "--variants", *kept)
    assert document["dry_run"] and document["environment"]["versions"]["torch"] == torch.__version__
    found = [(row["head"], row["N"], row["mode"], row["rows"]) for row in document["rows"]]
    assert found[0] == ("llada", 64, "trained", "masked") and found[-1] == ("dream", 96, "forward", "masked")
    columns = {64: ("masked", "full"), 32: ("masked", "full"), 96: ("masked",)}
    assert sorted(found) == sorted(
        (head, rows, mode, column)
        for head in ("llada", "dream")
        for rows in (64, 32, 96)
        for mode in ("trained", "frozen", "forward")
        for column in columns[rows]
    )
    names = {name for row in document["rows"] for name in entries(row) if row["rows"] == "masked"}
    assert {"bare GEMMs", "bare GEMMs, fp32 logits", "ours cpu, 64 KiB", "ours cpu, 128 KiB", "ours cpu, 1 MiB",
            "plain torch", "Liger Triton, none", "QuACK", "verl Triton", "Cut Cross Entropy"} <= names  # fmt: skip
    for row in document["rows"]:
        assert row["status"] == "ok" and row["targets"] and row["rounds"] == 1 and row["ceiling"] == "bare GEMMs"
        for entry in row["variants"]:
            _check_entry(row, entry)
    printed = capsys.readouterr().out
    assert "plain torch, all positions / ours cpu, 128 KiB, time" in printed and "target" in printed


def _check_entry(row: dict[str, Any], entry: dict[str, Any]) -> None:
    assert entry["rows"] == ("masked" if entry["family"] in ("gemm", "ours-cpu") else row["rows"]), entry["name"]
    if entry["family"] in PEER_FAMILIES:
        assert entry["status"] == "not installed" and "ModuleNotFoundError" in entry["message"]
        return
    if entry["name"] == "bare GEMMs, fp32 logits":
        assert entry["status"] == "not installed" and "out_dtype" in entry["message"]
    else:
        assert entry["status"] == "ok", entry
    if entry["status"] == "ok":
        assert len(entry["seconds"]) == row["rounds"] and entry["fraction"] > 0 and entry["tflops"] > 0
        assert all(entry["errors"][name] <= bound for name, bound in entry["bounds"].items())
    if entry["family"] == "ours-cpu":
        gradients = {"trained": {"d_hidden", "d_weight"}, "frozen": {"d_hidden"}, "forward": set()}[row["mode"]]
        assert {name.split()[0] for name in entry["errors"] if name.startswith("d_")} == gradients
        assert all(error < 0.02 for error in entry["errors"].values()) and entry["repeats"]
        assert ({"logprob"} if row["mode"] == "forward" else {"segment mean", "bound"}) <= entry["errors"].keys()


@pytest.mark.skipif(not triton_interpreted(), reason="Triton serves CPU tensors in its interpreter only")
def test_triton_backend_takes_part(run: Any) -> None:
    document = run(*SMALL, "--columns", "masked", "--modes", "trained", "--workspaces", "64KiB", "--variants",
                   "ours-triton")  # fmt: skip
    (row,) = document["rows"]
    assert entries(row)["ours triton, 64 KiB"]["status"] == "ok"


def _peer(name: str, prepare: Callable[..., Any], **options: Any) -> Any:
    from _head.peers import Peer

    return Peer(name, "torch", "for this test", prepare, **options)


def test_wrong_and_failing_variants_are_told_and_end_alone(
    run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from _head import peers

    def scaled(problem: Any, rows: Any) -> Any:
        good = peers.plain_torch(problem, rows)
        return lambda: (result := good())._replace(d_weight=result.d_weight * 1.3)

    def raising(error: Exception, calls: int = 0) -> Callable[..., Any]:
        def prepare(problem: Any, rows: Any) -> Any:
            good, made = peers.plain_torch(problem, rows), []

            def call() -> Any:
                made.append(1)
                if len(made) > calls:
                    raise error
                return good()

            return call

        return prepare

    def unavailable(*_given: Any) -> Any:
        raise peers.Unavailable("not on this machine")

    monkeypatch.setattr(peers, "PEERS", (
        _peer("scaled", scaled), _peer("fails", raising(RuntimeError("an odd shape"))),
        _peer("large", raising(torch.OutOfMemoryError("CUDA out of memory"))),
        _peer("fails when timed", raising(RuntimeError("later"), calls=2)), _peer("missing", unavailable),
        _peer("good", peers.plain_torch),
    ))  # fmt: skip
    document = run(*SMALL, "--columns", "masked", "--modes", "trained", "--variants", "torch", "ours-cpu")
    (row,) = document["rows"]
    found = entries(row)
    told = {name: found[name]["status"] for name in ("scaled", "fails", "large", "fails when timed", "missing", "good")}
    assert told == {"scaled": "wrong", "fails": "failed", "large": "out of memory", "fails when timed": "failed",
                    "missing": "not installed", "good": "ok"}  # fmt: skip
    assert "d_weight" in found["scaled"]["message"] and "not on this machine" in found["missing"]["message"]
    assert all("seconds" not in found[name] for name, status in told.items() if status != "ok")
    assert row["status"] == "ok", "what a peer does is no failure of ours"
    assert not [target for target in row["targets"] if "scaled" in target["name"]]


def test_ours_being_wrong_fails_the_run(run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bk.bgpo_head_loss

    def flipped(hidden: Tensor, weight: Tensor, draw: Any, advantages: Tensor, **options: Any) -> Any:
        loss, logprob, stats = right(hidden, weight, draw, advantages, **options)
        return 2 * loss - loss.detach(), logprob, stats  # the same value, twice the gradient

    monkeypatch.setattr(bk, "bgpo_head_loss", flipped)
    document = run(*SMALL, "--columns", "masked", "--modes", "frozen", "--variants", "ours-cpu", status=1)
    (row,) = document["rows"]
    assert row["status"] == "failed" and "d_hidden" in row["message"]
    assert entries(row)["ours cpu, 128 KiB"]["status"] == "wrong" and entries(row)["bare GEMMs"]["status"] == "ok"


def _damage(what: str, result: Any, problem: Any, truth: Any) -> Any:
    """A result with one thing wrong."""
    if what == "logprob":
        changed = result.logprob.clone()
        changed[problem.full.masked[5]] += 0.1
        return result._replace(logprob=changed)
    if what == "not a number":
        return result._replace(logprob=result.logprob.masked_fill(result.logprob < 0, torch.nan))
    name = "d_hidden" if "hidden" in what else "d_weight"
    changed = getattr(result, name).clone()
    if what == "d_weight of a token that is no target":
        free = [i for i in truth.ids.tolist() if i not in problem.draw.targets.tolist()]
        changed[free[0]] *= 1.2
    elif what == "d_weight of the last token":
        changed[-1] = 0.0
    elif what == "d_hidden of a row":
        changed[problem.full.masked[truth.rows[3]]] *= -1.0
    else:
        elsewhere = next(i for i in range(len(changed)) if i not in problem.full.masked.tolist())
        changed[elsewhere] = 1e-6
    return result._replace(**{name: changed})


@pytest.mark.parametrize(
    "what", ["logprob", "not a number", "d_weight of a token that is no target", "d_weight of the last token",
             "d_hidden of a row", "d_hidden elsewhere"])  # fmt: skip
def test_truth_sees_a_single_wrong_thing(script: ModuleType, what: str) -> None:
    from _head.peers import plain_torch
    from _head.problem import Size, make_problem
    from _head.truth import FACTOR, Truth

    problem = make_problem(Size("tiny", 32, 300, 32, 16, "trained"), torch.device("cpu"))
    truth = Truth(problem)
    result = plain_torch(problem, problem.full)()

    def beyond(given: Any) -> list[str]:
        bounds = truth.bounds(given, True, FACTOR)
        return [name for name, e in truth.errors(given, problem.full, True).items() if not e <= bounds[name]]

    assert beyond(result) == []
    assert beyond(_damage(what, result, problem, truth)) != []


def test_truth_is_autograd_in_double(script: ModuleType) -> None:
    from _head.problem import Size, make_problem
    from _head.truth import Truth

    problem = make_problem(Size("tiny", 16, 200, 32, 16, "trained"), torch.device("cpu"))
    truth = Truth(problem)
    hidden = problem.full.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    logprob = torch.log_softmax(hidden[problem.draw.rows] @ weight.T, -1)[torch.arange(32), problem.draw.targets]
    sums = torch.stack([part.sum() for part in logprob.split(problem.draw.count.flatten().tolist())])
    ell = problem.draw.segment_weight.double() * sums.view_as(problem.draw.count)
    d = (ell - ell.detach()) / problem.length[:, None]
    a = problem.advantages.double()[:, None]
    loss = -torch.where(a >= 0, a * (1 + d), a * d.exp()).mean()
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    exact = truth.sampled(weighted=True)  # its coefficients are rounded to fp32
    torch.testing.assert_close(exact.logprob, logprob.detach())
    torch.testing.assert_close(exact.d_hidden, d_hidden[problem.draw.rows[truth.rows]], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(exact.d_weight, d_weight[truth.ids], rtol=1e-6, atol=1e-8)


def _nll(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, ignore_index: int = -100) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction=reduction, ignore_index=ignore_index)


class _Liger(torch.nn.Module):
    """Stands in for Liger's loss: its arguments and its order of them."""

    def __init__(self, ignore_index: int = -100, reduction: str = "mean", accum_dtype: Any = None) -> None:
        super().__init__()
        assert accum_dtype == torch.float32
        self._options = (reduction, ignore_index)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return _nll(_input, lin_weight, target, *self._options)


def _no_ignored(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str) -> Any:
    assert temperature == 1.0 and bool((labels >= 0).all())
    return -_nll(hidden, weight, labels, reduction), torch.zeros(len(labels))


def _stand_ins() -> dict[str, dict[str, Any]]:
    """The peers' modules with the peers' signatures, computed by torch."""

    class ScaledSM90:
        @staticmethod
        def apply(x: Tensor, w: Tensor, t: Tensor, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
            return _nll(x, w, t, "none", ignore_index)

    class LinearSM90:
        @staticmethod
        def apply(x: Tensor, w: Tensor, t: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
            return _nll(x, w, t, reduction, ignore_index)

    def cce(e: Tensor, c: Tensor, targets: Tensor, ignore_index: int = -100, softcap: Any = None,
            reduction: str = "mean", shift: int = 0, filter_eps: Any = "auto") -> Tensor:  # fmt: skip
        return _nll(e, c, targets, reduction, ignore_index)

    def quack(x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096, ignore_index: int = -100,
              reduction: str = "mean", tuned: bool = True) -> Tensor:  # fmt: skip
        return _nll(x, weight, target, reduction, ignore_index)

    sm90 = "liger_kernel.ops.cutedsl.ops"
    return {
        "liger_kernel.transformers.fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyLoss": _Liger},
        f"{sm90}.fused_scaled_cross_entropy_sm90": {"LigerFusedScaledCrossEntropySM90Function": ScaledSM90},
        f"{sm90}.fused_linear_cross_entropy_sm90": {"LigerFusedLinearCrossEntropySM90Function": LinearSM90},
        "cut_cross_entropy": {"linear_cross_entropy": cce},
        "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": quack},
        "verl.utils.kernel.linear_cross_entropy": {"linear_cross_entropy": _no_ignored},
    }


def test_adapters_give_every_peer_the_same_work(run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, contents in _stand_ins().items():
        names = path.split(".")
        for depth in range(1, len(names) + 1):
            name = ".".join(names[:depth])
            if not isinstance(sys.modules.get(name), types.ModuleType) or depth == len(names):
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[path]).update(contents)
    document = run(*SMALL, "--variants", *PEER_FAMILIES, "torch-lce")
    assert len(document["rows"]) == 6
    for row in document["rows"]:
        peers = [entry for entry in row["variants"] if entry["family"] in PEER_FAMILIES]
        assert len(peers) == 8 and all(entry["status"] == "ok" for entry in peers), peers
        torchs = [entry for entry in row["variants"] if entry["family"] == "torch-lce"]
        assert len(torchs) == 2 and {entry["status"] for entry in torchs} <= {"ok", "not installed"}, torchs
        assert {entry["name"].split(",")[0] for entry in peers if not entry["weighted"]} == {
            "Liger Triton", "Liger linear CE", "QuACK"}  # fmt: skip


def test_resume_and_time_limit(run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (*SMALL, "--columns", "masked", "--variants", "ours-cpu")
    stopped = run(*chosen, "--seconds", "1e-9")
    assert [row["status"] for row in stopped["rows"]] == ["no time left"] * 3
    first = run(*chosen, "--resume", "--modes", "frozen")
    assert [row["status"] for row in first["rows"]] == ["ok"]
    measured = []
    right = script.run_case
    monkeypatch.setattr(script, "run_case", lambda size, *rest: measured.append(size.mode) or right(size, *rest))
    second = run(*chosen, "--resume")
    assert measured == ["trained", "forward"] and second["rows"][0] == first["rows"][0]
    assert len(second["earlier_environments"]) == 2
    run(*chosen, "--resume")
    assert measured == ["trained", "forward"]


def _row(**change: Any) -> dict[str, Any]:
    gib = 1 << 30
    ours = {"name": "ours", "family": "ours-cuda", "rows": "masked", "status": "ok", "workspace": gib, "fraction": 0.86,
            "extra_bytes": gib, "repeats": True, "seconds": [1.0, 1.1, 0.9]}  # fmt: skip
    peer = {"name": "peer", "family": "liger", "rows": "masked", "status": "ok", "recomputes": True,
            "seconds": [1.3, 1.43, 1.17]}  # fmt: skip
    return {"N": 4096, "H": 4096, "V": 126464, "mode": "trained", "dtype": "bfloat16",
            "variants": [ours | change, peer]}  # fmt: skip


@pytest.mark.parametrize("change,missed", [
    ({}, []), ({"fraction": 0.84}, ["fraction"]), ({"extra_bytes": 3 << 30}, ["extra"]), ({"repeats": False}, ["bit"]),
    ({"seconds": [1.1, 1.2, 1.0]}, ["time"]),
])  # fmt: skip
def test_targets_are_met_or_missed(script: ModuleType, change: dict[str, Any], missed: list[str]) -> None:
    from _head.report import targets

    found = targets(_row(**change))
    assert len(found) == 4
    assert [any(word in judged["name"] for word in missed) for judged in found] == [not j["met"] for j in found]


def test_plot(script: ModuleType, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run(*SMALL, "--columns", "masked", "--variants", "ours-cpu", "torch")
    assert script.main(["--plot", str(tmp_path / "head.json"), str(tmp_path / "head.png")]) == 0
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
    assert script.main(["--plot", str(tmp_path / "none.json"), str(tmp_path / "other.png")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize("options,told", [
    (("--dry-run", "--rows", "33"), "multiple of 16"), (("--dry-run", "--variants", "lyger"), "no lyger here"),
    (("--dry-run", "--workspaces", "1GB"), "not a size"), (("--dry-run", "--case-seconds", "0"), "positive"),
    (("--dry-run", "--resume"), "needs --out"), (("--device", "cuda:99"), "CUDA devices"),
])  # fmt: skip
def test_mistakes_are_told(
    script: ModuleType, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(list(options))
    assert ended.value.code == 2 and told in capsys.readouterr().err
