"""`python -m bgpo_kernels.info` tells the truth about this machine, and about machines that lack things."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bgpo_kernels as bk
from bgpo_kernels import backends, info


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper and a Turing card, as far as torch's queries go."""
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(
            name=f"card {index}", major=capabilities[index][0], minor=capabilities[index][1], total_memory=141 << 30
        ),
    )


def test_json_from_the_command_line_is_what_the_package_does() -> None:
    command = [sys.executable, "-m", "bgpo_kernels.info", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["versions"]["bgpo_kernels"] == bk.__version__
    assert report["versions"]["torch"] == torch.__version__
    cpu = report["devices"]["cpu"]
    assert cpu["auto"] == backends.resolve("auto", torch.device("cpu"))
    assert set(cpu["serves"]) == set(backends.BACKENDS) - {"auto"}
    assert cpu["serves"]["reference"] is None and cpu["serves"][cpu["auto"]] is None
    assert report["workspace_bytes"]["cpu"] == bk.workspace_bytes("cpu")


def test_help_names_the_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        info.main(["--help"])
    assert "--json" in capsys.readouterr().out


def test_without_a_gpu_every_backend_on_cuda_has_a_reason(no_gpu: None, capsys: pytest.CaptureFixture) -> None:
    report = info.collect()
    assert report["gpus"] == [] and report["devices"]["cuda"]["auto"] is None
    assert all(report["devices"]["cuda"]["serves"].values())
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is built without CUDA") == 4  # the GPUs, and three backends
    assert printed.count("<- auto") == 1


def test_each_gpu_is_judged_by_itself(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_compiled", lambda name: None)
    monkeypatch.setattr(backends, "_triton", lambda: None)
    report = info.collect()
    assert [gpu["name"] for gpu in report["gpus"]] == ["card 0", "card 1"] and report["no_gpu"] is None
    assert [report["devices"][f"cuda:{i}"]["auto"] for i in range(2)] == ["cuda", "triton"]
    assert "7.5 is below 8.0" in report["devices"]["cuda:1"]["serves"]["cuda"]
    text = info.render(report)
    assert "cuda:0 card 0 (9.0, 141 GiB)" in text
    assert "cuda:1    cuda        no: compute capability 7.5" in text


def test_a_driver_that_does_not_work_is_reported(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(index: int) -> None:
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    report = info.collect()
    assert report["gpus"] == [] and report["no_gpu"] == "CUDA error: unknown error"
    assert "GPUs          none: CUDA error: unknown error" in info.render(report)


def test_nothing_compiled_nothing_installed(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bgpo_kernels._cpu", "bgpo_kernels._cuda", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(info, "_version", lambda distribution: None)
    monkeypatch.setattr(backends, "_compiled", backends._compiled.__wrapped__)
    report = info.collect()
    assert report["devices"]["cpu"]["auto"] == "reference"
    assert report["devices"]["cpu"]["serves"]["cpu"] == "bgpo_kernels._cpu was not built"
    assert not report["engines"]["cpu"]["built"] and not report["engines"]["cuda"]["built"]
    assert "triton        not installed" in info.render(report)


def test_a_build_without_its_info_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bgpo_kernels._cuda", SimpleNamespace())
    assert "CUDA kernels  built for unknown architectures\n" in info.render(info.collect())
    monkeypatch.setitem(sys.modules, "bgpo_kernels._cuda", SimpleNamespace(ARCHS="90a", TOOLKIT_VERSION=12080))
    assert "CUDA kernels  built for 90a by CUDA 12.8\n" in info.render(info.collect())
