"""The checks of the other files here, run in two gloo processes once; every test is what both of them say of one."""

from __future__ import annotations

import launch
import pytest
import torch

MODULES = ["ddp_checks", "sharded_checks"]
NAMES = [name for module in MODULES for name in launch.names(module)]


@pytest.fixture(scope="session")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    return launch.run(tmp_path_factory.mktemp("two_ranks"), MODULES)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(said: dict[str, list[str]], name: str) -> None:
    for rank, message in enumerate(said.get(name, said[""])):
        if message.startswith("skipped: "):
            pytest.skip(message)
        assert not message, f"rank {rank}:\n{message}"
