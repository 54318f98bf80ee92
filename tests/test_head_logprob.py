"""masked_logprob: values and every gradient against plain torch and fp64, at all options, layouts and subsets."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from head_cases import (
    BACKENDS,
    BACKENDS_WITH_OPTIONS,
    DTYPES,
    ENGINES,
    OPTIONS,
    Problem,
    assert_judged,
    assert_matches_torch,
    assert_same_bits,
    device_of,
    gemm_flops,
    interpreted,
    make_problem,
    ours,
    outcome,
    plain_logprob,
)
from torch import Tensor, nn

import bgpo_kernels as bk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
SUBSETS = [tuple(n for n, on in zip(("hidden", "weight", "bias"), flags, strict=True) if on)
           for flags in product((False, True), repeat=3)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "options"), BACKENDS_WITH_OPTIONS)
def test_values_and_gradients(backend: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    """Bias, entropy, rows that repeat, arbitrary upstream gradients of both outputs."""
    for got in assert_matches_torch(backend, lambda: make_problem(backend, dtype, spread=3.0, **options)):
        assert got["logp"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert bool((got["logp"] <= 0).all())


@pytest.mark.parametrize(("backend", "options"), BACKENDS_WITH_OPTIONS)
def test_larger_problem(backend: str, options: dict[str, float]) -> None:
    """Enough rows and columns that a wrong scale or a lost block cannot hide."""
    shape = {"n": 20, "r": 15, "h": 40, "v": 4100} if interpreted(backend) else {"n": 90, "r": 80, "h": 96, "v": 5003}
    for dtype in (torch.float32,) if interpreted(backend) else (torch.float32, torch.bfloat16):
        assert_matches_torch(backend, lambda d=dtype: make_problem(backend, d, spread=2.0, **shape, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary(backend: str, dtype: torch.dtype) -> None:
    """A bias of -inf removes ids: probability 0, no NaN anywhere, gradients of the others as if they were absent."""
    gone = torch.arange(3, 60, 2, device=device_of(backend))

    def make() -> Problem:
        problem = make_problem(backend, dtype, temperature=1.4)
        problem.bias[gone] = -torch.inf
        problem.targets[problem.targets % 2 == 1] = 2
        return problem

    for got in assert_matches_torch(backend, make):
        assert bool((got["d_bias"][gone] == 0).all()) and bool((got["d_weight"][gone] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_of_probability_zero(backend: str) -> None:
    problem = make_problem(backend, n=9, entropy=False)
    problem.bias[problem.targets[0]] = -torch.inf
    got = outcome(ours(backend), problem)
    exact = outcome(plain_logprob, problem.wide())
    assert torch.equal(got["logp"] == -torch.inf, problem.targets == problem.targets[0])
    for name in ("d_hidden", "d_weight", "d_bias"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grads", ["logp", "entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_either_output_alone(backend: str, grads: str) -> None:
    def make() -> Problem:
        problem = make_problem(backend, **OPTIONS["all"])
        zero = torch.zeros_like(problem.grad_logp)
        return replace(problem, grad_logp=zero) if grads == "entropy" else replace(problem, grad_entropy=None)

    assert_matches_torch(backend, make)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_is_optional(backend: str) -> None:
    """Asking for the entropy changes neither the log-probability nor its gradient."""
    problem = make_problem(backend, n=9, entropy=False)
    without = outcome(lambda *a, **k: (bk.masked_logprob(*a, **k, backend=backend),) * 2, problem)
    asked = outcome(ours(backend), problem)
    entropy = asked.pop("entropy")
    without.pop("entropy")
    assert_same_bits(without, asked)
    assert bool((entropy > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes_and_no_rows(backend: str, dtype: torch.dtype) -> None:
    def make() -> Problem:
        flat = make_problem(backend, dtype, rows=False)
        return replace(flat, hidden=flat.hidden.view(2, 4, -1, 24))

    assert assert_matches_torch(backend, make)[0]["d_hidden"].shape[:2] == (2, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row(backend: str) -> None:
    """hidden ``[H]``."""
    several = make_problem(backend, rows=False, **OPTIONS["all"])
    one = replace(several, hidden=several.hidden[0], targets=several.targets[:1], grad_logp=several.grad_logp[:1],
                  grad_entropy=several.grad_entropy[:1])  # fmt: skip
    exact = outcome(plain_logprob, one.wide())
    for name, value in outcome(ours(backend), one).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1.3e-6, atol=1e-5)


def _strided(x: Tensor) -> Tensor:
    """The same values, every other element of a larger storage."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def _misaligned(x: Tensor) -> Tensor:
    """The same values one element into a storage."""
    wide = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    wide[1:] = x.flatten()
    return wide[1:].view(x.shape)


@pytest.mark.parametrize("layout", [_strided, _transposed, _misaligned], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, dtype: torch.dtype, layout) -> None:
    vector = _misaligned if layout is _transposed else layout

    def make() -> Problem:
        p = make_problem(backend, dtype)
        vectors = [vector(x) for x in (p.targets, p.rows, p.bias, p.grad_logp, p.grad_entropy)]
        odd = Problem(layout(p.hidden), layout(p.weight), *vectors[:3], None, {}, *vectors[3:])
        assert odd.weight.storage_offset() == 1 or not odd.weight.is_contiguous()
        return odd

    assert_matches_torch(backend, make)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_gradient(backend: str) -> None:
    """``logp.sum()`` sends a gradient with stride 0."""
    problem = replace(make_problem(backend, n=9, entropy=False), grad_logp=torch.ones((), device=device_of(backend)))
    hidden = problem.hidden.requires_grad_()
    bk.masked_logprob(hidden, problem.weight, problem.targets, rows=problem.rows, backend=backend).sum().backward()
    expected = outcome(ours(backend), replace(problem, bias=None, hidden=hidden.detach()), ("hidden",))
    assert torch.equal(hidden.grad, expected["d_hidden"])


@pytest.mark.parametrize("need", SUBSETS, ids=lambda s: "+".join(s) or "none")
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_required_gradients(backend: str, need: tuple[str, ...]) -> None:
    """What is asked for has the bits of the full backward; what is not stays None."""
    problem = make_problem(backend, n=9, **OPTIONS["all"])
    full = outcome(ours(backend), problem)
    got = outcome(ours(backend), problem, need)
    assert got.keys() == {"logp", "entropy", *(f"d_{name}" for name in need)}
    assert_same_bits(got, {name: full[name] for name in got})


@pytest.mark.parametrize(
    ("need", "gemms"),
    [((), 1), (("hidden", "weight", "bias"), 4), (("hidden",), 3), (("weight",), 3), (("bias",), 2)],
    ids=str,
)
@pytest.mark.parametrize("backend", ENGINES)
def test_flops(backend: str, need: tuple[str, ...], gemms: int) -> None:
    """2NHV forward; backward 2NHV for the logits and 2NHV for each of dX and dW that is required."""
    problem = make_problem(backend, n=17, h=5, v=2111)
    bk.set_workspace_bytes(1 << 16)  # 7 rows
    with gemm_flops() as counted:
        outcome(ours(backend), problem, need)
    assert counted[0] == gemms * problem.flops


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_tied_to_the_embedding(backend: str) -> None:
    """The same parameter at both ends of a model, and a hidden tensor that feeds another loss too."""
    device = device_of(backend)
    ids = torch.randint(0, 50, (9,), device=device)
    start = torch.randn(50, 16, device=device)

    def gradient(call, dtype: torch.dtype) -> Tensor:
        embedding = nn.Parameter(start.to(dtype))
        hidden = torch.tanh(embedding[ids])
        (call(hidden, embedding, ids.flip(0))[0].sum() + (hidden**2).sum()).backward()
        return embedding.grad

    got, plain = gradient(ours(backend), torch.float32), gradient(plain_logprob, torch.float32)
    assert_judged({"g": got}, {"g": plain}, {"g": gradient(plain_logprob, torch.float64)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_and_detached(backend: str) -> None:
    problem = make_problem(backend, n=9)
    arguments = (problem.hidden.requires_grad_(), problem.weight, problem.targets)
    with torch.no_grad():
        logp = bk.masked_logprob(*arguments, rows=problem.rows, backend=backend)
    assert not logp.requires_grad
    assert torch.equal(logp, bk.masked_logprob(*arguments, rows=problem.rows, backend=backend).detach())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_have_the_same_bits(backend: str, threads: int) -> None:
    """Rows that occur dozens of times, over several chunks and threads."""
    size = {"n": 12, "r": 2} if interpreted(backend) else {"n": 600, "r": 5}
    problem = make_problem(backend, h=64, v=257, **size, **OPTIONS["all"])
    bk.set_workspace_bytes(1 << 17)  # 127 rows
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = outcome(ours(backend), problem)
        for _ in range(4):
            assert_same_bits(first, outcome(ours(backend), problem))
    finally:
        torch.set_num_threads(before)


def test_backends_agree() -> None:
    """The engine with torch's row kernels, with ours, and plain autograd: three roads to the same numbers."""
    problem = make_problem("cpu", torch.float64, n=40, **OPTIONS["all"])
    reference, cpu = outcome(ours("reference"), problem), outcome(ours("cpu"), problem)
    for name in reference:
        torch.testing.assert_close(cpu[name], reference[name], rtol=1e-12, atol=1e-14)
