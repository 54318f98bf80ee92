"""What users get wrong in the head and the bound: an error that names the argument and shows what is at fault."""

from __future__ import annotations

import re

import pytest
import torch
from head_cases import CUDA, make_draw
from torch import Tensor

import bgpo_kernels as bk

N, H, V = 5, 4, 11


def arguments() -> dict[str, object]:
    return {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "targets": torch.arange(N)}


class DTensor(torch.Tensor):
    """Stands for torch.distributed's, which needs a process group."""


def support(*rows: list[int]) -> Tensor:
    return torch.tensor(rows).expand(N, -1) if len(rows) == 1 else torch.tensor(rows)


HEAD = [
    # hidden and weight
    ({"hidden": [[1.0] * H] * N}, TypeError, "hidden must be a torch.Tensor, got list"),
    ({"hidden": torch.ones(N, H, dtype=torch.int64)}, TypeError, "hidden must be float32 or .*, got int64"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden .* and weight .* disagree: \[\] and \[11, 4\]"),
    ({"hidden": torch.randn(N, H + 1)}, ValueError, r"disagree: \[5, 5\] and \[11, 4\]"),
    ({"hidden": torch.randn(N, H, device="meta")}, ValueError, "weight is on cpu but hidden is on meta"),
    ({"hidden": torch.randn(N, H).bfloat16()}, TypeError, "hidden is .*bfloat16 but weight is .*float32.*autocast"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"weight": torch.randn(V)}, ValueError, r"weight must have shape \[V, H\], got \[11\]"),
    ({"weight": torch.ones(V, H, dtype=torch.complex64)}, TypeError, "weight must be .*, got complex64"),
    ({"weight": torch.randn(V, H).as_subclass(DTensor)}, ValueError, r"weight is a DTensor \(\(11, 4\)\).*full_tensor"),
    ({"hidden": torch.randn(N, H).as_subclass(DTensor)}, ValueError, "hidden is a DTensor"),
    # bias
    ({"bias": torch.randn(V - 1)}, ValueError, r"bias must have shape \[11\] \(as the rows of weight\), got \[10\]"),
    ({"bias": torch.randn(V, 1)}, ValueError, r"got \[11, 1\]"),
    ({"bias": torch.zeros(V, dtype=torch.int32)}, TypeError, "bias must be .*, got int32"),
    ({"bias": 0.5}, TypeError, "bias must be a torch.Tensor, got float"),
    ({"bias": torch.randn(V, device="meta")}, ValueError, "bias is on meta but hidden is on cpu"),
    # targets and rows
    ({"targets": torch.arange(N).int()}, TypeError, "targets must be int64, got int32"),
    ({"targets": torch.arange(N)[:, None]}, ValueError, r"targets must have shape \[N\], got \[5, 1\]"),
    ({"targets": torch.arange(N - 1)}, ValueError, r"targets has 4 entries for 5 hidden rows \(rows is None\)"),
    ({"targets": torch.tensor([0, V, 2, 3, 4])}, ValueError, r"targets must be in \[0, 11\) .*got \[11\] at \[\[1\]\]"),
    ({"targets": torch.tensor([0, 1, -1, 3, -5])}, ValueError, r"got \[-1, -5\] at \[\[2\], \[4\]\]"),
    ({"targets": torch.arange(N, device="meta")}, ValueError, "targets is on meta but hidden is on cpu"),
    ({"targets": list(range(N))}, TypeError, "targets must be a torch.Tensor, got list"),
    ({"rows": torch.arange(N - 1)}, ValueError, r"rows must have shape \[5\] \(as targets\), got \[4\]"),
    ({"rows": torch.arange(N).float()}, TypeError, "rows must be int64, got float32"),
    ({"rows": torch.tensor([0, 1, 2, 3, N])}, ValueError, r"rows must be in \[0, 5\) \(rows of .*\[5\] at \[\[4\]\]"),
    ({"rows": torch.tensor([-1, 1, 2, 3, 4])}, ValueError, r"rows must be in .*got \[-1\] at \[\[0\]\]"),
    ({"rows": torch.arange(N, device="meta")}, ValueError, "rows is on meta but hidden is on cpu"),
    # options
    ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0.0, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be .*got -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite.*got nan"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
    ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ({"softcap": 0.0}, ValueError, "softcap must be finite and above 0.0, got 0.0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be finite.*got inf"),
    ({"logit_scale": 0}, ValueError, "logit_scale must not be 0"),
    ({"logit_scale": float("-inf")}, ValueError, "logit_scale must be finite.*got -inf"),
    ({"logit_scale": torch.tensor(1.0)}, TypeError, "logit_scale must be a number, got Tensor"),
    # support
    ({"support": support([0, 1, 2, 3, 4]).int()}, TypeError, "support must be int64, got int32"),
    ({"support": torch.arange(N)}, ValueError, r"support must have shape \[5, K\] \(rows as targets\), got \[5\]"),
    ({"support": support([0, 1, 2, 3, 4])[:3]}, ValueError, r"support must have shape .*got \[3, 5\]"),
    ({"support": support([0, 1, 2, 3, 4, V])}, ValueError, r"support must be in \[-1, 11\).*got \[11, 11, 11, 11\]"),
    ({"support": support([0, 1, 2, 3, 4, -2])}, ValueError, r"support must be in .*got \[-2"),
    ({"support": support([0, 1, 2, -1])}, ValueError, r"targets \[3, 4\] at rows \[3, 4\] are not in their"),
    ({"support": support([0, 1, 2, 3, 4, 0])}, ValueError, "support holds an id twice in one row"),
    ({"support": support([0, 1, 2, 3, 4]).to("meta")}, ValueError, "support is on meta but targets is on cpu"),
    # backends
    ({"backend": "tpu"}, ValueError, "backend must be one of auto, reference, cpu, triton, cuda; got 'tpu'"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve tensors on cpu: .* serves CUDA tensors"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), HEAD, ids=lambda v: v if isinstance(v, str) else None)
def test_masked_logprob(wrong: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        bk.masked_logprob(**(arguments() | wrong))
    assert re.search(words, str(caught.value)), str(caught.value)


def test_triton_on_cpu_tensors_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend='triton' cannot serve tensors on cpu.*TRITON_INTERPRET=1"):
        bk.masked_logprob(**arguments(), backend="triton")


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_cpu_backend_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="backend='cpu' cannot serve tensors on cuda"):
        bk.masked_logprob(**{name: x.cuda() for name, x in arguments().items()}, backend="cpu")


def test_autocast_only_lifts_the_dtype_rule() -> None:
    """Under autocast hidden is cast; without it nothing is, silently."""
    wrong = arguments() | {"hidden": torch.randn(N, H).bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert bk.masked_logprob(**wrong).dtype == torch.float32
    with pytest.raises(TypeError):
        bk.masked_logprob(**wrong)


B, S = 2, 3
BOUND = [
    ({"advantages": torch.zeros(B + 1)}, ValueError, r"advantages must have shape \[2\] \(one per .*, got \[3\]"),
    ({"advantages": torch.zeros(B, 1)}, ValueError, r"advantages must have shape .*got \[2, 1\]"),
    ({"advantages": torch.zeros(B, dtype=torch.int64)}, TypeError, "advantages must be .*, got int64"),
    ({"advantages": [0.0, 1.0]}, TypeError, "advantages must be a torch.Tensor, got list"),
    ({"advantages": torch.tensor([1.0, torch.nan])}, ValueError, r"advantages holds non-finite .*\[\[1\]\]: \[nan\]"),
    ({"advantages": torch.tensor([torch.inf, 0.0])}, ValueError, r"advantages holds non-finite values.*\[inf\]"),
    ({"advantages": torch.zeros(B, device="meta")}, ValueError, "advantages is on meta but (logprob|hidden) is on cpu"),
    ({"old_logprob": torch.zeros(B, S - 1)}, ValueError, r"old_logprob must have shape \[2, 3\] .*, got \[2, 2\]"),
    ({"old_logprob": torch.zeros(B, S).bfloat16()}, TypeError, "old_logprob must be float32 or float64, got bfloat16"),
    ({"old_logprob": torch.full((B, S), torch.nan)}, ValueError, "old_logprob holds non-finite values"),
    ({"old_logprob": torch.full((B, S), -torch.inf)}, ValueError, r"old_logprob holds non-finite .*at \[\[0, 0\]"),
    ({"old_logprob": torch.zeros(B, S, device="meta")}, ValueError, "old_logprob is on meta"),
    ({"old_logprob": 0.0}, TypeError, "old_logprob must be a torch.Tensor, got float"),
    ({"length": torch.ones(B, S)}, ValueError, r"length must have shape \[2\] \(one per sequence\), got \[2, 3\]"),
    ({"length": torch.tensor([1, 0])}, ValueError, r"length must be positive, got \[1, 0\]"),
    ({"length": torch.tensor([1.0, -2.0])}, ValueError, r"length must be positive, got \[1.0, -2.0\]"),
    ({"length": torch.tensor([1.0, torch.inf])}, ValueError, r"length holds non-finite values.*\[inf\]"),
    ({"length": torch.tensor([True, True])}, TypeError, "length must be .*, got bool"),
    ({"length": 12}, TypeError, "length must be a torch.Tensor, got int"),
    ({"length": torch.ones(B, device="meta")}, ValueError, "length is on meta"),
    ({"clip_range": -0.1}, ValueError, r"clip_range \(low\) must be .*got -0.1"),
    ({"clip_range": 1.5}, ValueError, r"clip_range \(low\) must be finite and at least 0.0, at most 1.0, got 1.5"),
    ({"clip_range": (0.2, -1.0)}, ValueError, r"clip_range \(high\) must be .*got -1.0"),
    ({"clip_range": (0.1, 0.2, 0.3)}, ValueError, r"clip_range must be a number or a pair .*\(0.1, 0.2, 0.3\)"),
    ({"clip_range": "0.2"}, TypeError, "clip_range .*must be a number, got str"),
    ({"clip_range": float("nan")}, ValueError, "clip_range .*got nan"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip must be finite and above 1.0, got 1.0"),
    ({"dual_clip": float("inf")}, ValueError, "dual_clip must be finite.*got inf"),
    ({"dual_clip": True}, TypeError, "dual_clip must be a number, got bool"),
    ({"normalizer": 0}, ValueError, "normalizer must be finite and above 0.0, got 0.0"),
    ({"normalizer": -4.0}, ValueError, "normalizer must be .*got -4.0"),
    ({"normalizer": "B"}, TypeError, "normalizer must be a number, got str"),
]


@pytest.mark.parametrize("call", ["bgpo_loss", "bgpo_head_loss"])
@pytest.mark.parametrize(("wrong", "error", "words"), BOUND, ids=lambda v: v if isinstance(v, str) else None)
def test_bound_arguments(call: str, wrong: dict[str, object], error: type[Exception], words: str) -> None:
    """The same checks through both doors."""
    given = {"advantages": torch.ones(B)} | wrong
    with pytest.raises(error) as caught:
        if call == "bgpo_loss":
            bk.bgpo_loss(torch.zeros(B, S), **given)
        else:
            draw = make_draw([[1] * S] * B, vocab=V)
            bk.bgpo_head_loss(torch.randn(B * S * 12, H), torch.randn(V, H), draw, **given)
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("logprob", "error", "words"),
    [
        (torch.zeros(B * S), ValueError, r"logprob must have shape \[B, n\], got \[6\]"),
        (torch.zeros(B, 0), ValueError, r"logprob \[B, n\] must hold at least one sample, got \[2, 0\]"),
        (torch.zeros(B, S).half(), TypeError, "logprob must be float32 or float64, got float16"),
        ([[0.0] * S] * B, TypeError, "logprob must be a torch.Tensor, got list"),
    ],
)
def test_logprob(logprob: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bk.bgpo_loss(logprob, torch.ones(B))


def test_head_loss_draws() -> None:
    draw = make_draw([[1] * S] * B, vocab=V)
    weight, advantages = torch.randn(V, H), torch.ones(B)
    with pytest.raises(TypeError, match="draw must be a MaskDraw, got tuple"):
        bk.bgpo_head_loss(torch.randn(72, H), weight, (1, 2), advantages)
    with pytest.raises(ValueError, match=re.escape("hidden [71, 4] has 71 rows, but the draw has B*n*T = 2*3*12 = 72")):
        bk.bgpo_head_loss(torch.randn(71, H), weight, draw, advantages)
    with pytest.raises(ValueError, match=r"draw.targets holds id \d+, but weight \[1, 4\]"):
        bk.bgpo_head_loss(torch.randn(72, H), weight[:1], draw, advantages)
    with pytest.raises(ValueError, match="draw is on cpu but hidden is on meta"):
        bk.bgpo_head_loss(torch.randn(72, H, device="meta"), weight.to("meta"), draw, advantages)
    with pytest.raises(ValueError, match=r"\[72, 5\] and \[11, 4\]"):
        bk.bgpo_head_loss(torch.randn(72, H + 1), weight, draw, advantages)
    with pytest.raises(ValueError, match="backend must be one of"):
        bk.bgpo_head_loss(torch.randn(72, H), weight, draw, advantages, backend="gpu")


def test_reduce() -> None:
    draw = make_draw([[1] * S] * B, vocab=V)
    with pytest.raises(ValueError, match=r"logp must have shape \[6\] \(one per masked row\), got \[7\]"):
        draw.reduce(torch.zeros(7))
    with pytest.raises(TypeError, match="logp must be float32 or float64, got bfloat16"):
        draw.reduce(torch.zeros(6).bfloat16())


def test_errors_come_before_any_work() -> None:
    """A wrong argument leaves .grad, the workspace and the inputs alone."""
    from bgpo_kernels import workspace

    bk.set_workspace_bytes(1 << 16)
    given = arguments() | {"targets": torch.tensor([0, 1, 2, 3, V])}
    given["weight"].requires_grad_()
    before = given["weight"].detach().clone()
    with pytest.raises(ValueError):
        bk.masked_logprob(**given)
    assert getattr(workspace._cpu, "buffer", None) is None and given["weight"].grad is None
    assert torch.equal(given["weight"], before)
