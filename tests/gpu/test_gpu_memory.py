"""Memory on a GPU: one workspace beyond inputs and gradients, and nothing that grows with n_mc.

Sizes are counted by torch's caching allocator. A rehearsal runs the calls and counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine import DEVICE, GIB, HEADS, KERNELS, needs, new_draw, only_rehearsed, peak_bytes, randn, size, weight_of
from models_zoo import MASK, Plain
from torch import Tensor

import bgpo_kernels as bk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
MIB = 1 << 20
VOCAB, WIDTH = HEADS["llada"][1], size(1024, 16)
#: more rows than a workspace of 1 GiB holds
COUNTS, TOKENS = size(([[900, 1, 600], [700, 40, 1000]], 1024), ([[3, 1, 2], [4, 0, 5]], 6))


def head_loss(dtype: torch.dtype, backend: str, off_policy: bool) -> tuple[Callable[[], object], int, int]:
    """The call with its backward; bytes of the gradients; bytes of what else it may hold besides the workspace."""
    draw = new_draw(COUNTS, TOKENS, VOCAB)
    hidden = randn(draw.noisy_ids.numel(), WIDTH, dtype=dtype).requires_grad_()
    weight = weight_of((WIDTH, VOCAB), dtype).requires_grad_()
    advantages = torch.tensor([1.0, -0.5], device=DEVICE)
    old = torch.full((2, 3), -1000.0, device=DEVICE) if off_policy else None
    length = torch.full((2,), float(TOKENS), device=DEVICE)

    def call() -> tuple[Tensor | None, ...]:
        hidden.grad = weight.grad = None
        loss = bk.bgpo_head_loss(
            hidden, weight, draw, advantages, old_logprob=old, length=length, clip_range=0.2, backend=backend
        )[0]
        loss.backward()
        found = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        return found

    gradients = dtype.itemsize * (hidden.numel() + weight.numel())
    accumulator = 4 * weight.numel() if dtype.itemsize < 4 else 0  # documented: dW adds up in fp32
    rows = dtype.itemsize * draw.num_rows * WIDTH * 3  # gathered, the live ones of them, their gradient
    vendor = 34 * MIB  # what a GEMM library may take for itself, and a little
    return call, gradients, accumulator + rows + 256 * draw.num_rows + vendor


@needs(16)
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("workspace", [64 * MIB, GIB], ids=["64 MiB", "1 GiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_bgpo_head_loss_stays_within_the_workspace(
    backend: str, dtype: torch.dtype, workspace: int, off_policy: bool
) -> None:
    call, gradients, slack = head_loss(dtype, backend, off_policy)
    call()  # compiles kernels; libraries take their own workspaces
    bk.set_workspace_bytes(workspace)  # and gives the present one back
    peak = peak_bytes(call)
    only_rehearsed("the allocator of a GPU counts")
    print(f"peak {peak / MIB:.1f} MiB: gradients {gradients / MIB:.1f}, workspace {workspace / MIB:.0f}")
    assert peak <= gradients + workspace + slack
    assert peak >= gradients + workspace // 2, "too few rows to fill the workspace: this would test nothing"


@needs(16)
@pytest.mark.parametrize("backend", KERNELS)
def test_masked_logprob_without_gradient_needs_the_workspace_only(backend: str) -> None:
    draw = new_draw(COUNTS, TOKENS, VOCAB)
    hidden, weight = randn(draw.noisy_ids.numel(), WIDTH), weight_of((WIDTH, VOCAB))

    def call() -> Tensor:
        with torch.no_grad():
            return bk.masked_logprob(hidden, weight, draw.targets, rows=draw.rows, backend=backend)

    call()
    bk.set_workspace_bytes(64 * MIB)
    peak = peak_bytes(call)
    only_rehearsed("the allocator of a GPU counts")
    assert peak <= 64 * MIB + 4 * draw.num_rows * WIDTH + 256 * draw.num_rows + 34 * MIB
    assert peak < draw.num_rows * VOCAB * 4 / 4


@pytest.mark.parametrize("scheme", ["full", "exact"])
@pytest.mark.parametrize("backend", KERNELS)
def test_bgpo_backward_is_flat_in_n_mc(backend: str, scheme: str) -> None:
    """Against one sample with every token masked, which no draw of the same length exceeds."""
    tokens, vocab = size((256, 126464), (12, 131))
    model = Plain(vocabulary=vocab, width=size(64, 8)).to(DEVICE)
    bk.models.assume_bidirectional(model)
    ids = torch.randint(MASK, (2, tokens), device=DEVICE)  # MASK is the last id of the small vocabulary
    response = (torch.arange(tokens, device=DEVICE) >= 4).expand(2, -1)
    advantages = torch.tensor([1.0, -1.0], device=DEVICE)
    bk.set_workspace_bytes(16 * MIB)

    def update(samples: int, scheme: str) -> Callable[[], Any]:
        def call() -> Any:
            model.zero_grad(set_to_none=True)
            return bk.bgpo_backward(
                model, ids, response, advantages, n_mc=samples, scheme=scheme, mask_token_id=MASK, head=model.out,
                micro_batch_tokens=tokens, backend=backend,
            )  # fmt: skip

        return call

    update(2, scheme)()
    peaks = []
    for samples, which in ((1, "full"), (size(64, 3), scheme)):
        model.zero_grad(set_to_none=True)
        peaks.append(peak_bytes(update(samples, which)))
    only_rehearsed("the allocator of a GPU counts")
    assert peaks[1] <= 1.01 * peaks[0], f"{peaks[1] / MIB:.1f} MiB at n_mc 64, {peaks[0] / MIB:.1f} at 1"
