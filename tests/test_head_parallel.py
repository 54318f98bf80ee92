"""A head cut over the vocabulary: two processes make the checks of head_parallel_worker.py, one test for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)
pytest.importorskip("transformers")

from head_parallel_worker import CHECKS, RANKS, SECONDS

WORKER = Path(__file__).with_name("head_parallel_worker.py")


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> list[dict[str, str | None]]:
    """Of every rank: what each check said, None where it passed."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(RANKS)]
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(folder)], env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        for worker in workers:
            worker.wait(SECONDS + 20)
    finally:
        for worker in workers:
            worker.kill()
    written = [folder / f"{rank}.json" for rank in range(RANKS)]
    said = "".join((folder / f"{rank}.log").read_text()[-4000:] for rank in range(RANKS))
    assert all(path.exists() for path in written), f"the workers did not finish:\n{said}"
    return [json.loads(path.read_text()) for path in written]


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, results: list[dict[str, str | None]]) -> None:
    for rank, found in enumerate(results):
        assert name in found, f"not run on rank {rank}: a check before it failed on one rank alone"
        assert found[name] is None, f"rank {rank}:\n{found[name]}"
