"""Every test of this folder is marked ``gpu`` and needs a CUDA device.

Without one they are skipped, unless ``--rehearse`` is given (tests/conftest.py): then the same code runs on the CPU at
tiny shapes. That shows that the tests run, and nothing about a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
#: most valuable first, in case the time is up before the end
ORDER = ("test_gpu_head", "test_gpu_masks", "test_gpu_repeats", "test_gpu_models", "test_gpu_queue", "test_gpu_memory")


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.parent == HERE]
    skip = not torch.cuda.is_available() and not config.getoption("--rehearse")
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if skip:
            item.add_marker(pytest.mark.skip(reason="no CUDA device (--rehearse runs it on the CPU at tiny shapes)"))
    ours.sort(key=lambda item: ORDER.index(item.path.stem))  # stable: the order within a file stays
    others = [item for item in items if item.path.parent != HERE]
    items[:] = others + ours
