"""The one workspace: its size is a bound, it is reused, every thread has its own, and it outlives odd contexts."""

from __future__ import annotations

import threading

import pytest
import torch

import bgpo_kernels as bk
from bgpo_kernels import workspace

CPU = torch.device("cpu")


def logits(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return workspace.logits_buffer(rows, columns, dtype, CPU)


def test_defaults_and_setting() -> None:
    assert bk.workspace_bytes() == 256 << 20 and bk.workspace_bytes("cuda") == 1 << 30
    bk.set_workspace_bytes(1 << 20)
    assert bk.workspace_bytes() == bk.workspace_bytes("cuda:3") == 1 << 20
    bk.set_workspace_bytes(None)
    assert bk.workspace_bytes() == 256 << 20


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (0, ValueError, "size must be at least 65536, got 0"),
        (-1, ValueError, "got -1"),
        (65535, ValueError, "got 65535"),
        (1e9, TypeError, "size must be an int, got float"),
        (True, TypeError, "size must be an int, got bool"),
        ("1GiB", TypeError, "got str"),
    ],
)
def test_errors(size: object, error: type[Exception], words: str) -> None:
    bk.set_workspace_bytes(1 << 17)
    with pytest.raises(error, match=words):
        bk.set_workspace_bytes(size)
    assert bk.workspace_bytes() == 1 << 17  # unchanged


def test_capacity() -> None:
    """As many rows as fit; one when not even that does."""
    bk.set_workspace_bytes(1 << 16)
    assert workspace.chunk_capacity(1 << 12, torch.float32, CPU) == 4
    assert workspace.chunk_capacity((1 << 12) + 1, torch.float32, CPU) == 3
    assert workspace.chunk_capacity(1 << 12, torch.bfloat16, CPU) == 8
    assert workspace.chunk_capacity(1, torch.float64, CPU) == 1 << 13
    assert workspace.chunk_capacity(1 << 30, torch.float32, CPU) == 1
    bk.set_workspace_bytes(None)
    llada = workspace.chunk_capacity(126464, torch.float32, torch.device("cuda"))
    assert llada == (1 << 30) // (4 * 126464) == 2122


@pytest.mark.parametrize("columns", [1, 7, 8, 126464, 152064, 100003])
def test_rows_keep_their_alignment_on_a_gpu(columns: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        stride = workspace.row_stride(columns, dtype, torch.device("cuda"))
        assert columns <= stride < columns + 16 and stride * dtype.itemsize % 16 == 0
        assert workspace.row_stride(columns, dtype, CPU) == columns


def test_reuse_and_growth() -> None:
    """The same memory for anything that fits what was ever needed; a new limit starts afresh."""
    bk.set_workspace_bytes(1 << 20)
    first = logits(8, 1000)
    assert first.shape == (8, 1000) and first.stride() == (1000, 1)
    assert logits(3, 77, torch.bfloat16).data_ptr() == first.data_ptr()
    large = logits(64, 1000)
    assert logits(8, 1000).data_ptr() == large.data_ptr()
    assert large.untyped_storage().nbytes() == 256_000
    bk.set_workspace_bytes(1 << 17)
    assert logits(8, 1000).untyped_storage().nbytes() == 32_000  # the larger buffer was given back


def test_calls_share_it() -> None:
    """No call leaves a buffer behind, none is larger than the bound."""
    hidden, weight = torch.randn(200, 8, requires_grad=True), torch.randn(2048, 8, requires_grad=True)
    targets = torch.randint(0, 2048, (200,))
    bk.set_workspace_bytes(1 << 18)
    bk.masked_logprob(hidden, weight, targets).sum().backward()
    buffer = workspace._cpu.buffer
    assert buffer.numel() == 1 << 18
    bk.masked_logprob(hidden[:7], weight, targets[:7], return_entropy=True)[1].sum().backward()
    assert workspace._cpu.buffer is buffer


def test_threads_do_not_share_it() -> None:
    """Concurrent calls (the engine releases the GIL) each use their own buffer and get their own answers."""
    torch.manual_seed(0)
    problems = [(torch.randn(90, 8), torch.randn(3000, 8), torch.randint(0, 3000, (90,))) for _ in range(4)]
    expected = [bk.masked_logprob(*problem) for problem in problems]
    bk.set_workspace_bytes(1 << 17)  # ten rows: many chances to collide
    found: dict[int, list[torch.Tensor]] = {}
    buffers: dict[int, int] = {}
    start = threading.Barrier(4)

    def work(index: int) -> None:
        start.wait()
        found[index] = [bk.masked_logprob(*problems[index]) for _ in range(5)]
        buffers[index] = workspace._cpu.buffer.data_ptr()
        start.wait()  # all buffers alive at once

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(buffers.values())) == 4
    for index, results in found.items():
        for result in results:
            torch.testing.assert_close(result, expected[index], rtol=1e-5, atol=1e-5)
            assert torch.equal(result, results[0])


def test_inference_mode_first() -> None:
    """A buffer first needed while scoring under inference_mode serves training afterwards."""
    hidden, weight, targets = torch.randn(5, 8), torch.randn(30, 8, requires_grad=True), torch.randint(0, 30, (5,))
    bk.set_workspace_bytes(1 << 16)  # no buffer yet
    with torch.inference_mode():
        scored = bk.masked_logprob(hidden, weight, targets)
    assert not workspace._cpu.buffer.is_inference()
    logp = bk.masked_logprob(hidden, weight, targets)
    logp.sum().backward()
    assert torch.equal(scored, logp.detach()) and weight.grad is not None
