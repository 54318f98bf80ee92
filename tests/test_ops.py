"""The registered ops as torch sees them: opcheck, gradcheck, torch.compile, checkpointing, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from head_cases import BACKENDS, device_of, make_draw
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import bgpo_kernels as bk
from bgpo_kernels.bound import ops as bound_ops
from bgpo_kernels.head import ops as head_ops
from bgpo_kernels.head import support as support_ops

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy inside Triton's interpreter
    pytest.mark.no_poison,  # tracing calls torch.empty too
]
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
R, H, V = 24, 5, 13


def head_inputs(backend: str, dtype: torch.dtype = torch.float32, needs: tuple[bool, ...] = (True, True, True)):
    """hidden [R, H], weight, bias, and six rows with targets (one row twice)."""
    device = device_of(backend)
    shapes = ((R, H), (V, H), (V,))
    tensors = [torch.randn(s, dtype=dtype, device=device).requires_grad_(n) for s, n in zip(shapes, needs, strict=True)]
    rows = torch.tensor([3, 0, 3, 17, 9, 23], device=device)
    return *tensors, rows, torch.randint(0, V, (6,), device=device)


def draw_inputs(backend: str) -> tuple[bk.MaskDraw, Tensor, Tensor]:
    """2 x 2 segments over 24 rows; advantages of both signs; an old policy near the new one."""
    device = device_of(backend)
    draw = make_draw([[3, 0], [1, 2]], tokens=6, vocab=V, device=device)
    return draw, torch.tensor([0.7, -1.2], device=device), torch.full((2, 2), -6.0, device=device)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_head_statistics(backend: str, entropy: bool) -> None:
    hidden, weight, bias, rows, targets = head_inputs(backend)
    for h, b, r, t in ((hidden, bias, rows, targets), (hidden[:6].detach().requires_grad_(), None, None, targets)):
        opcheck(head_ops.head_statistics, (h, weight, b, r, t, 1.3, 2.5, 0.8, entropy, backend), test_utils=TESTS)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_head_statistics_backward(backend: str, needs: tuple[bool, ...]) -> None:
    hidden, weight, bias, rows, targets = head_inputs(backend, needs=(False,) * 3)
    stats = head_ops.head_statistics(hidden, weight, bias, rows, targets, 1.0, 0.0, 1.0, True, backend)
    arguments = (torch.randn_like(stats), stats, hidden, weight, bias, rows, targets, 1.0, 0.0, 1.0, True, backend)
    opcheck(head_ops.head_statistics_backward, (*arguments, *needs), test_utils=TESTS)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_head_loss(backend: str, old: bool, needs: tuple[bool, ...]) -> None:
    hidden, weight, bias, *_ = head_inputs(backend, needs=needs)
    draw, advantages, before = draw_inputs(backend)
    arguments = (
        hidden, weight, bias, draw.rows, draw.targets, draw.segment_offsets, list(draw.host_offsets),
        draw.segment_weight, advantages, before if old else None, torch.tensor([3.0, 2.0], device=hidden.device),
        0.2, 0.2, 3.0, 2.0, 1.0, 0.0, 0.9, backend, *needs,
    )  # fmt: skip
    opcheck(head_ops.head_loss, (*arguments, False), test_utils=TESTS)
    if needs[1]:
        opcheck(head_ops.head_loss, (*arguments, True), test_utils=TESTS)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck_support(with_rows: bool, with_bias: bool) -> None:
    hidden, weight, bias, rows, _ = head_inputs("cpu")
    h = hidden if with_rows else hidden[:6].detach().requires_grad_()
    support = torch.stack([torch.randperm(V)[:4] for _ in range(6)])
    support[1, 2:] = -1
    arguments = (h, weight, bias if with_bias else None, rows if with_rows else None, support)
    opcheck(support_ops.support_logits, arguments, test_utils=TESTS)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    for needs in ((True, True, True), (False, False, True), (True, False, False)):
        opcheck(support_ops.support_logits_backward, (torch.randn(6, 4), *plain, *needs), test_utils=TESTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_bound(backend: str) -> None:
    device = device_of(backend)
    logprob = torch.randn(3, 4, device=device, requires_grad=True)
    a = torch.tensor([1.0, -1.0, 0.0], device=device)
    for old, length in ((None, None), (logprob.detach() + 0.1, torch.ones(3, device=device))):
        opcheck(bound_ops.bound, (logprob, a, old, length, 0.2, 0.2, 3.0, backend), test_utils=TESTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_segment_sum(backend: str) -> None:
    device = device_of(backend)
    values = torch.randn(9, device=device, requires_grad=True)
    offsets, weight = torch.tensor([0, 0, 4, 9], device=device), torch.rand(3, device=device)
    opcheck(bound_ops.segment_sum, (values, offsets, weight, backend), test_utils=TESTS)


def check_gradients(call: Callable[..., object], inputs: tuple[Tensor, ...]) -> None:
    """Tier 2: against finite differences in fp64; repeated backwards must agree to the bit."""
    assert gradcheck(call, inputs, eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=0.0, fast_mode=True)


OPTIONS = [{}, {"temperature": 0.7, "softcap": 2.0, "logit_scale": -1.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_masked_logprob(backend: str, options: dict[str, float]) -> None:
    """Both outputs, repeated rows."""
    hidden, weight, bias, rows, targets = head_inputs(backend, torch.float64)
    check_gradients(
        lambda h, w, b: bk.masked_logprob(
            h, w, targets, rows=rows, bias=b, return_entropy=True, backend=backend, **options
        ),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
def test_gradcheck_support(options: dict[str, float]) -> None:
    hidden, weight, bias, rows, targets = head_inputs("cpu", torch.float64)
    support = torch.stack([(t + torch.arange(5)) % V for t in targets])
    support[::2, 3:] = -1
    check_gradients(
        lambda h, w, b: bk.masked_logprob(
            h, w, targets, rows=rows, bias=b, support=support, return_entropy=True, **options
        ),
        (hidden, weight, bias),
    )


BOUNDS = {
    "on-policy": None,
    "off-policy": {},
    "clip": {"clip_range": 0.2, "dual_clip": 3.0},
}


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_head_loss(backend: str, bound: dict[str, object] | None) -> None:
    """On-policy, finite differences see the old policy held at the starting point, as autograd does."""
    hidden, weight, bias, *_ = head_inputs(backend, torch.float64)
    draw, advantages, _ = draw_inputs(backend)
    with torch.no_grad():
        now = bk.bgpo_head_loss(hidden, weight, draw, advantages, bias=bias, backend=backend)[1]
    old = now if bound is None else now + torch.tensor([[0.3, -0.2], [0.05, -0.15]], dtype=now.dtype, device=now.device)
    check_gradients(
        lambda h, w, b: bk.bgpo_head_loss(
            h, w, draw, advantages, bias=b, old_logprob=old, length=torch.tensor([4, 3], device=h.device),
            normalizer=5, backend=backend, temperature=0.9, **(bound or {}),
        )[0],
        (hidden, weight, bias),
    )  # fmt: skip


@pytest.mark.parametrize("bound", [b for b in BOUNDS.values() if b is not None], ids=["off-policy", "clip"])
def test_gradcheck_bgpo_loss(bound: dict[str, object]) -> None:
    logprob = (-5 + torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    old = logprob.detach() + 0.3 * torch.randn(4, 3, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 2.0, -2.0])
    check_gradients(lambda x: bk.bgpo_loss(x, advantages, old_logprob=old, **bound)[0], (logprob,))


def test_gradcheck_reduce() -> None:
    draw = make_draw([[3, 0], [1, 2]], tokens=6, vocab=V)
    check_gradients(draw.reduce, (torch.randn(6, dtype=torch.float64, requires_grad=True),))


def gradients(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = call(*leaves)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.dtype == y.dtype and torch.equal(x, y), f"{i} differs by {float((x - y).abs().max()):.3e}"


def test_compile_ops_without_a_graph_break() -> None:
    """Statistics, segment sums and bound as one graph, forward and backward."""
    hidden, weight, bias, rows, targets = head_inputs("cpu")
    offsets, token_weight = torch.tensor([0, 2, 2, 6]), torch.rand(3)
    a, old = torch.tensor([1.0, -1.0, 0.5]), torch.full((3, 1), -5.0)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        stats = head_ops.head_statistics(h, w, b, rows, targets, 1.0, 0.0, 0.8, True, "cpu")
        sums = bound_ops.segment_sum(stats[2], offsets, token_weight, "cpu")
        term, _ = bound_ops.bound(sums[:, None], a, old, None, 0.2, 0.2, 3.0, "cpu")
        return term.sum() + 0.1 * stats[3].sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_equal(gradients(compiled, hidden, weight, bias), gradients(loss, hidden, weight, bias))


def test_compile_head_loss_op_without_a_graph_break() -> None:
    hidden, weight, *_ = head_inputs("cpu")
    draw, advantages, before = draw_inputs("cpu")

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return 3 * head_ops.head_loss(
            torch.tanh(h), w, None, draw.rows, draw.targets, draw.segment_offsets, list(draw.host_offsets),
            draw.segment_weight, advantages, before, None, 0.2, 0.2, 3.0, 2.0, 1.0, 0.0, 1.0, "cpu", True, True, False,
            False,
        )[0]  # fmt: skip

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_equal(gradients(compiled, hidden, weight), gradients(loss, hidden, weight))


@pytest.mark.parametrize("function", ["masked_logprob", "bgpo_head_loss"])
def test_compile_around_public_functions(function: str) -> None:
    """Argument checks read values, so torch.compile breaks the graph there; results stay the same."""
    hidden, weight, bias, rows, targets = head_inputs("cpu")
    draw, advantages, before = draw_inputs("cpu")

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = torch.tanh(h) * 2
        if function == "masked_logprob":
            return bk.masked_logprob(h, w, targets, rows=rows, bias=b).sum() * 0.5
        return 2 * bk.bgpo_head_loss(h, w, draw, advantages, bias=b, old_logprob=before)[0]

    torch._dynamo.reset()
    assert_equal(gradients(torch.compile(loss, backend="aot_eager"), hidden, weight, bias),
                 gradients(loss, hidden, weight, bias))  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend: str, reentrant: bool) -> None:
    """Recomputation in backward changes nothing."""
    hidden, weight, bias, rows, targets = head_inputs(backend)
    draw, advantages, before = draw_inputs(backend)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logp = bk.masked_logprob(h, w, targets, rows=rows, bias=b, backend=backend)
        return logp.sum() + bk.bgpo_head_loss(h, w, draw, advantages, bias=b, old_logprob=before, backend=backend)[0]

    def recomputed(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return checkpoint(loss, h, w, b, use_reentrant=reentrant)

    assert_equal(gradients(recomputed, hidden, weight, bias), gradients(loss, hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", ["masked_logprob", "support", "bgpo_head_loss"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, function: str, dtype: torch.dtype) -> None:
    """fp32 parameters under autocast: GEMMs take 16-bit inputs, results and the gradients of parameters are fp32."""
    hidden, weight, bias, rows, targets = head_inputs(backend)
    draw, advantages, before = draw_inputs(backend)
    support = torch.arange(V, device=hidden.device).expand(6, V)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if function == "bgpo_head_loss":
            return bk.bgpo_head_loss(h, w, draw, advantages, bias=b, old_logprob=before, backend=backend)[0]
        extra = {"support": support} if function == "support" else {}
        return bk.masked_logprob(h, w, targets, rows=rows, bias=b, backend=backend, **extra).sum()

    def under_autocast(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, dtype):
            return loss(h, w, b)

    got = gradients(under_autocast, hidden, weight, bias)
    assert all(x.dtype == torch.float32 for x in got)
    rounded = [x.detach().to(dtype) for x in (hidden, weight, bias)]
    exact = gradients(loss, *(x.double() for x in rounded))
    eps = torch.finfo(dtype).eps
    for name, g, e in zip(("loss", "hidden", "weight", "bias"), got, exact, strict=True):
        scale = float(e.abs().max())
        assert float((g.double() - e).abs().max()) <= 4 * eps * max(scale, 1.0), name


def test_double_backward_is_refused() -> None:
    """Second derivatives do not exist here; asking for them is an error, not a wrong number."""
    hidden, weight, bias, rows, targets = head_inputs("cpu")
    draw, advantages, _ = draw_inputs("cpu")
    for value in (
        bk.masked_logprob(hidden, weight, targets, rows=rows, bias=bias).sum(),
        bk.bgpo_head_loss(hidden, weight, draw, advantages, bias=bias)[0],
    ):
        (first,) = torch.autograd.grad(value, hidden, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(first.square().sum(), hidden)
