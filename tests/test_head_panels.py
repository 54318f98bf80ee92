"""Forward GEMMs of one shape, as GPUs run them, rehearsed on the CPU: the same results, whatever shares a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from head_cases import ENGINES, OPTIONS, assert_same_bits, device_of, make_draw, make_problem, ours, outcome, whole
from test_head_engine import COUNTS, head_loss
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.head import engine
from bgpo_kernels.workspace import MIN_BYTES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
PANEL, VOCAB, WIDTH = 4, MIN_BYTES // (4 * 11), 8  # the smallest workspace holds 11 rows: two panels


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "runs_in_panels", lambda device: True)
    monkeypatch.setattr(engine, "PANEL_ROWS", PANEL)
    yield


@pytest.fixture
def gemms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the products so far."""
    shapes: list[tuple[int, int]] = []
    real = torch.mm

    def mm(a: Tensor, b: Tensor, **options: object) -> Tensor:
        shapes.append((a.shape[0], b.shape[1]))
        return real(a, b, **options)

    monkeypatch.setattr(torch, "mm", mm)
    return shapes


@pytest.mark.parametrize("backend", ENGINES)
def test_log_probabilities_and_gradients_are_the_same(backend: str, panels: None, monkeypatch) -> None:
    """With exact GEMMs, to the bit; a partly filled panel is multiplied whole."""
    problem = make_problem(backend, n=30, v=VOCAB, **OPTIONS["all"])
    problem = replace(problem, hidden=whole(problem.hidden), weight=whole(problem.weight))
    for size in (None, MIN_BYTES):
        bk.set_workspace_bytes(size)
        got = outcome(ours(backend), problem)
        with monkeypatch.context() as without:
            without.setattr(engine, "runs_in_panels", lambda device: False)
            want = outcome(ours(backend), problem)
        assert_same_bits({n: got[n] for n in ("logp", "entropy")}, {n: want[n] for n in ("logp", "entropy")})
        for name in ("d_hidden", "d_weight", "d_bias"):
            torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("size", [None, MIN_BYTES], ids=["one chunk", "chunks of 8"])
@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("backend", ENGINES)
def test_one_pass_is_the_same(backend: str, old: bool, size: int | None, panels: None, monkeypatch) -> None:
    device = device_of(backend)
    draw = make_draw(COUNTS, vocab=VOCAB, device=device)
    hidden, weight = whole(torch.empty(180, WIDTH, device=device)), whole(torch.empty(VOCAB, WIDTH, device=device)) / 4
    bk.set_workspace_bytes(size)
    got = head_loss(draw, weight, hidden, backend, old)
    monkeypatch.setattr(engine, "runs_in_panels", lambda device: False)
    want = head_loss(draw, weight, hidden, backend, old)
    assert torch.equal(got["logprob"], want["logprob"])
    for name in ("loss", "d_hidden", "d_weight"):
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 4, 5, 17])
def test_every_forward_product_has_one_shape(rows: int, panels: None, gemms: list[tuple[int, int]]) -> None:
    """So that a library which picks its algorithm by shape picks one: a row's bits do not depend on its company."""
    bk.set_workspace_bytes(MIN_BYTES)
    hidden, weight = torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH)
    bk.masked_logprob(hidden, weight, torch.arange(rows))
    assert gemms == [(PANEL, VOCAB)] * -(-rows // PANEL)


def test_on_policy_chunks_are_full(panels: None, gemms: list[tuple[int, int]]) -> None:
    """30 rows in chunks of 8, though segments end elsewhere; off-policy segments stay whole, and chunks are more."""
    draw = make_draw([[3, 6, 5], [6, 5, 5]], vocab=VOCAB)
    hidden, weight = torch.randn(72, WIDTH), torch.randn(VOCAB, WIDTH)
    bk.set_workspace_bytes(MIN_BYTES)
    for old, chunks in ((False, [8, 8, 8, 6]), (True, [3, 6, 5, 6, 5, 5])):
        with torch.no_grad():
            before = draw.reduce(bk.masked_logprob(hidden, weight, draw.targets, rows=draw.rows)) if old else None
        gemms.clear()
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        bk.bgpo_head_loss(h, w, draw, torch.ones(2), old_logprob=before)
        assert [m for m, columns in gemms if columns == WIDTH and m != VOCAB] == chunks  # the products of dX


@pytest.mark.parametrize(
    ("workspace_rows", "panel", "capacity"), [(1, 1, 1), (3, 2, 2), (5, 4, 4), (11, 4, 8), (12, 4, 12)]
)
def test_panels_fit_the_workspace(workspace_rows: int, panel: int, capacity: int, panels: None) -> None:
    vocab = MIN_BYTES // 4
    bk.set_workspace_bytes(workspace_rows * MIN_BYTES)
    weight, targets = torch.empty(vocab, 1), torch.zeros(1, dtype=torch.int64)
    head = engine.Head(torch.empty(1, 1), weight, None, None, targets, engine.LogitTransform(), "cpu")
    assert (head.panel, head.capacity) == (panel, capacity)
