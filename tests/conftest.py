"""Settings of every test run.

Without a GPU the Triton kernels run in Triton's interpreter, which must be switched on before triton is imported.
`empty` memory is poisoned: floats come up as NaN and integers as out-of-range values, so a kernel that leaves a tile
unwritten fails loudly instead of reading zeros.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

with torch.device("cpu"):  # torch notes which functions make tensors at the first use, which must see the true `empty`
    torch.empty(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here and not in gpu/, so that it is known whichever folder the command names."""
    text = "run tests/gpu without a GPU, on the CPU at tiny shapes: tries the tests, not the kernels"
    parser.addoption("--rehearse", action="store_true", help=text)


POISON = {torch.int64: -(2**62), torch.int32: -(2**30), torch.uint8: 0xA5}


def _poisoned(make):
    def empty(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
            return tensor
        poison = torch.nan if tensor.is_floating_point() else POISON.get(tensor.dtype)
        if poison is not None:
            tensor.detach().fill_(poison)  # detached: torch makes leaves that require gradients with `empty`, too
        return tensor

    return empty


@pytest.fixture(autouse=True)
def poison_empty(request, monkeypatch):
    """`torch.empty` and `torch.empty_like` give poison; a test of torch.compile opts out with the `no_poison` mark."""
    if request.node.get_closest_marker("no_poison") is None:
        monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state."""
    torch.manual_seed(20251013)


@pytest.fixture(autouse=True)
def default_workspace():
    """A test that sets the workspace does not leak it into the next."""
    import bgpo_kernels as bk

    yield
    bk.set_workspace_bytes(None)
