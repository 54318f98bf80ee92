"""The GPU suite without a GPU: parts that fail, crash or hang (stand-ins), time, resuming, refusals, the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python benchmarks/gpu_suite.py",
    "commit": "abc123",
    "versions": {"python": "3.12", "torch": "2.11"},
    "device": "Some GPU",
    "gpu": {"driver_version": "580", "cuda": "13.0"},
    "cpu": "Some CPU",
}
# Options of the scripts, then what to do: words that are statuses become rows, the others are deeds.
STAND_IN = """
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("--out", "--seconds"):
    parser.add_argument(name)
for name in ("--resume", "--dry-run"):
    parser.add_argument(name, action="store_true")
parser.add_argument("deeds", nargs="*")
given = parser.parse_args()
out, rows = Path(given.out), []
runs = out.with_suffix(".runs")
runs.write_text((runs.read_text() if runs.exists() else "") + json.dumps([given.seconds, given.resume]) + chr(10))
for deed in given.deeds:
    print("now:", deed, flush=True)
    if deed == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        out.with_suffix(".pid").write_text(str(child.pid))
        time.sleep(60)
    elif deed == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif deed == "exit 3":
        sys.exit(3)
    elif deed == "fail at first" and not given.resume:
        sys.exit(1)
    elif deed != "fail at first":
        rows.append({"status": deed, "message": f"row {len(rows)}"})
        out.write_text(json.dumps({"benchmark": out.stem, "dry_run": given.dry_run, "rows": rows}))
"""


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on a machine that is only described, and with little patience."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite
    from _gpu_suite import process
    from _gpu_suite import suite as runner

    monkeypatch.setattr(gpu_suite, "probe", lambda dry_run: dict(ENVIRONMENT))
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.5)
    return gpu_suite


@pytest.fixture
def make_part(suite: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A stand-in named `name` that does the given deeds."""
    from _gpu_suite.parts import Part, common

    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def make(name: str, *deeds: str, share: float = 1.0, needs: Path = script, plot: Any = None) -> Part:
        def command(call: Any) -> list[str]:
            return [sys.executable, str(script), *common(name, call), *deeds]

        return Part(name, f"stand-in {name}", share, needs, command, plot)

    return make


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "suite.json").read_text())


def runs_of(out: Path, part: str) -> list[list[Any]]:
    """[seconds, resume] of every time that a stand-in was started."""
    path = out / f"{part}.runs"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_parts_that_go_wrong_stop_no_other(suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path) -> None:
    parts = [
        make_part("exits", "ok", "exit 3"),
        make_part("crashes", "ok", "ok", "crash"),
        make_part("absent", needs=tmp_path / "nowhere.py"),
        make_part("hangs", "ok", "hang", share=0.1),
        make_part("silent"),
        make_part("short of time", "ok", "no time left"),
        make_part("says so", "ok", "failed"),
        make_part("lacks something", "not available"),
        make_part("fine", "ok", "out of memory"),
    ]
    out = tmp_path / "out"
    assert suite.main(["--out", str(out), "--seconds", "100"], parts) == 1
    entries = record_of(out)["parts"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "exits": "failed",
        "crashes": "crashed",
        "absent": "missing",
        "hangs": "out of time",
        "silent": "failed",
        "short of time": "incomplete",
        "says so": "failed",
        "lacks something": "not available",
        "fine": "ok",
    }
    assert entries["exits"]["exit_code"] == 3 and "rows: 1 ok" in entries["exits"]["message"]
    assert entries["crashes"]["message"] == "killed by SIGSEGV; rows kept: 2 ok"
    assert "rows kept: 1 ok" in entries["hangs"]["message"]
    assert entries["silent"]["message"] == "ended well, but wrote no results"
    assert entries["lacks something"]["message"] == "row 0"
    assert entries["crashes"]["output_tail"].endswith("now: ok\nnow: crash\n")
    assert "now: hang" in (out / "hangs.log").read_text()
    assert is_gone(int((out / "hangs.pid").read_text())), "a process of the hanging part lives on"
    assert "crashes: crashed" in (out / "table.md").read_text()


def test_all_well_is_exit_status_0(suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path) -> None:
    assert suite.main(["--out", str(tmp_path / "out")], [make_part("a", "ok"), make_part("b", "not available")]) == 0


def test_time_left_over_goes_to_later_parts(suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts = [make_part("a", "ok", share=1), make_part("b", "ok", share=1), make_part("c", "ok", share=2)]
    assert suite.main(["--out", str(out), "--seconds", "400"], parts) == 0
    limits = {name: entry["limit"] for name, entry in record_of(out)["parts"].items()}
    assert limits["a"] == pytest.approx(100, abs=5)
    assert limits["b"] == pytest.approx(400 / 3, abs=10)
    assert limits["c"] == pytest.approx(400, abs=30)
    # Told to begin nothing new a while before the limit.
    assert [float(runs_of(out, name)[0][0]) for name in "abc"] == pytest.approx([75, 103, 370], abs=30)


def test_without_time_the_later_parts_are_not_run(
    suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parts = [make_part("hangs", "hang", share=9), make_part("late", "ok", share=1)]
    begin = time.monotonic()
    assert suite.main(["--out", str(out), "--seconds", "2"], parts) == 1
    assert time.monotonic() - begin < 10
    late = record_of(out)["parts"]["late"]
    assert (late["status"], late["message"]) == ("not run", "no time left")
    assert not runs_of(out, "late")


def test_resume_runs_what_failed_or_is_new(suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts = [make_part("good", "ok"), make_part("bad", "ok", "fail at first"), make_part("later", "ok")]
    assert suite.main(["--out", str(out), "--skip", "later"], parts) == 1
    assert suite.main(["--out", str(out), "--resume"], parts) == 0
    assert len(runs_of(out, "good")) == len(runs_of(out, "later")) == 1
    assert [resume for _, resume in runs_of(out, "bad")] == [False, True]
    assert runs_of(out, "later")[0][1] is False  # it has nothing to resume from
    assert len(record_of(out)["earlier_environments"]) == 1
    (out / "good.json").unlink()  # how to have a part measured again
    assert suite.main(["--out", str(out), "--resume", "--only", "good"], parts) == 0
    assert len(runs_of(out, "good")) == 2 and set(record_of(out)["parts"]) == {"good", "bad", "later"}


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        ([], {}, "holds results of 2026-01-02T03:04:05+00:00: --resume goes on with them"),
        (["--resume", "--dry-run"], {}, "holds measurements; a dry run must go into another folder"),
        (["--resume"], {"commit": "def456"}, "was measured at commit abc123, this is def456"),
        (["--resume"], {"device": "Another GPU"}, "was measured at device Some GPU, this is Another GPU"),
    ],
)
def test_results_that_do_not_mix_are_refused(
    suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], changed: dict[str, str], message: str,
) -> None:  # fmt: skip
    out, parts = tmp_path / "out", [make_part("a", "ok")]
    assert suite.main(["--out", str(out)], parts) == 0
    before = (out / "suite.json").read_text()
    monkeypatch.setattr(suite, "probe", lambda dry_run: ENVIRONMENT | changed)
    with pytest.raises(SystemExit) as stopped:
        suite.main(["--out", str(out), *arguments], parts)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert (out / "suite.json").read_text() == before
    if changed:
        assert suite.main(["--out", str(out), *arguments, "--force"], parts) == 0


def test_measurements_do_not_go_into_a_dry_run(
    suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, parts = tmp_path / "out", [make_part("a", "ok")]
    assert suite.main(["--out", str(out), "--dry-run"], parts) == 0
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--out", str(out), "--resume"], parts)
    assert "holds a dry run; measurements must go into another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out DIR (or --report DIR) is needed"),
        (["--out", "x", "--only", "hed"], "--only: 'hed' is none of build, tests, sanitizer, mask, head, step, main"),
        (["--out", "x", "--only", "head", "--skip", "head"], "leave nothing to run"),
        (["--out", "x", "--seconds", "0"], "--seconds must be a positive number"),
        (["--out", "x", "--force"], "--force belongs to --resume"),
        (["--out", "x", "--markdown"], "--markdown belongs to --report"),
        (["--out", __file__], "is not a directory"),
        (["--report", "nowhere"], "holds no results of this suite"),
    ],
)
def test_mistakes_are_named(
    suite: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        suite.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_goes(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device here; --dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_part_and_writes_the_record(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "driver.py").write_text(
        "import sys; from pathlib import Path; import gpu_suite; from _gpu_suite.parts import Part, common\n"
        f"gpu_suite.probe = lambda dry_run: {ENVIRONMENT!r}\n"
        f"script = Path({str(tmp_path / 'stand_in.py')!r})\n"
        "def part(name, *deeds):\n"
        "    start = [sys.executable, str(script)]\n"
        "    return Part(name, name, 1.0, script, lambda call: [*start, *common(name, call), *deeds])\n"
        "import _gpu_suite.process; _gpu_suite.process.GRACE_SECONDS = 0.3\n"
        f"arguments = ['--out', {str(tmp_path / 'out')!r}]\n"
        "sys.exit(gpu_suite.main(arguments, [part('a', 'ok'), part('b', 'ok', 'hang'), part('c', 'ok')]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    pid, deadline = tmp_path / "out" / "b.pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and f"{number.name}: stopped; --resume goes on" in output
    record = record_of(tmp_path / "out")
    assert [entry["status"] for entry in record["parts"].values()] == ["ok", "stopped", "not run"]
    assert is_gone(int(pid.read_text()))
    assert (tmp_path / "out" / "table.md").exists()


def test_plot_that_fails_changes_nothing_else(suite: ModuleType, make_part: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def plot(program: str) -> Callable[[Path], list[str]]:
        return lambda folder: [sys.executable, "-c", program, str(folder)]

    good = "import sys; open(sys.argv[1] + '/a.png', 'w')"
    parts = [make_part("a", "ok", plot=plot(good)), make_part("b", "ok", plot=plot("raise SystemExit(7)"))]
    assert suite.main(["--out", str(out)], parts) == 0
    assert (out / "a.png").exists()
    assert record_of(out)["plot_problems"] == ["b.png: exit status 7; see b.log"]
