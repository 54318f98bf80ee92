"""``bound_dlogits_``: segment sums, the bound's coefficients and dlogits in one kernel, on every backend."""

from __future__ import annotations

import pytest
import torch
from fused_bound import CLIPPED, COUNTS, FIRST, OPEN, assert_right, make_case
from head_cases import BACKENDS, device_of, interpreted

from bgpo_kernels.backends import engine
from bgpo_kernels.head.options import LogitTransform

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
PLAIN, ALL = LogitTransform(), LogitTransform(0.7, 20.0, 1.3)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("clip", [OPEN, CLIPPED], ids=["open", "clipped"])
@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend: str, old: bool, clip: tuple[float, ...], dtype: torch.dtype) -> None:
    case = make_case(vocab=37, old=old, clip=clip, transform=ALL)
    assert_right(case.run(engine("head", backend), backend, dtype, dtype, device_of(backend)), case)


def test_the_cases_reach_every_branch() -> None:
    """Clips bind for some segments of either sign and not for others; without them the coefficients differ."""
    clipped, free = (make_case(37, True, clip, PLAIN).exact().grad for clip in (CLIPPED, OPEN))
    rows = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    of_segment = {int(s): (bool(free[i] == 0), bool(clipped[i] == 0)) for i, s in enumerate(rows)}
    states = set(of_segment.values())
    assert states == {(False, False), (False, True), (True, True)}
    assert {s for s, (dead, _) in of_segment.items() if dead} == {
        s for s in of_segment if (FIRST + s) // 3 == 3
    }  # the sequence whose advantage is 0


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("reference", "triton", "cuda")])
def test_narrow_over_wide(backend: str) -> None:
    """2-byte gradients over fp32 logits are the rounded fp32 gradients."""
    case = make_case(vocab=4205 if not interpreted(backend) else 41, old=True, clip=OPEN, transform=PLAIN)
    head, device = engine("head", backend), device_of(backend)
    wide, narrow = (case.run(head, backend, F32, out, device) for out in (F32, BF16))
    assert torch.equal(wide.dlogits.to(BF16), narrow.dlogits)
    assert torch.equal(wide.grad, narrow.grad) and torch.equal(wide.sums, narrow.sums)


@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_those_of_segment_sum(backend: str, old: bool) -> None:
    """To the bit, whichever kernel makes them: old and new log-probabilities of equal weights must not differ."""
    case = make_case(vocab=37, old=old, clip=OPEN, transform=PLAIN)
    head, device = engine("head", backend), device_of(backend)
    fused = case.run(head, backend, F32, F32, device)
    stats = torch.empty(4, len(case.targets), device=device)
    logits = case.logits.float().to(device)
    head.row_statistics(logits, case.targets.to(device), None, PLAIN, stats, False)
    offsets = (case.offsets - case.offsets[0]).to(device)
    alone = engine("bound", backend).segment_sum(stats[2], offsets, case.weight.to(device))
    assert torch.equal(fused.sums, alone.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_row_breaks_its_own_segment_only(backend: str) -> None:
    """NaN logits reach the sum and, off-policy, the gradients of their segment; a segment with A = 0 stays dead."""
    case = make_case(vocab=37, old=True, clip=OPEN, transform=PLAIN)
    dead_row = int((case.exact().grad == 0).nonzero()[0])
    for row, spreads in ((5, True), (dead_row, False)):
        logits = case.logits.clone()
        logits[row, 3] = torch.nan
        broken = case._replace(logits=logits)
        got, clean = (c.run(engine("head", backend), backend, F32, F32, device_of(backend)) for c in (broken, case))
        s = int(torch.searchsorted(case.offsets - case.offsets[0], row, right=True)) - 1
        others = torch.arange(len(COUNTS)) != s
        assert got.sums[s].isnan() and torch.equal(got.sums[others], clean.sums[others])
        mine = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS)) == s
        assert torch.equal(got.dlogits[~mine], clean.dlogits[~mine])
        if not spreads:
            assert (got.dlogits[mine] == 0).all()
