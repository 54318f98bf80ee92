"""Head problems for the tests of `head/`, and the plain torch that judges every backend: all logits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.backends import why_not

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 1.5},
    "scale": {"logit_scale": -0.6},
    "all": {"temperature": 1.7, "softcap": 2.0, "logit_scale": 1.3},
}


def device_of(backend: str) -> torch.device:
    """Where a backend is tested: Triton runs in its interpreter when there is no GPU."""
    return torch.device("cuda" if CUDA and backend in ("triton", "cuda") else "cpu")


def interpreted(backend: str) -> bool:
    """Whether the backend takes milliseconds per row here."""
    return backend == "triton" and not CUDA


def _param(name: str, *more: object, id: str | None = None):
    reason = why_not(name, device_of(name))
    return pytest.param(name, *more, marks=[pytest.mark.skipif(reason is not None, reason=str(reason))], id=id)


_NAMES = ["reference", "cpu", "triton", *(["cuda"] if CUDA else [])]
BACKENDS = [_param(name) for name in _NAMES]
ENGINES = BACKENDS[1:]  # those that work chunk by chunk
#: every backend with every set of options; the interpreter with the two that cover all code
BACKENDS_WITH_OPTIONS = [
    _param(name, options, id=f"{name}-{label}")
    for name in _NAMES
    for label, options in OPTIONS.items()
    if label in ("plain", "all") or not interpreted(name)
]


@dataclass(frozen=True)
class Problem:
    """Arguments of masked_logprob, and an upstream gradient for each output."""

    hidden: Tensor  # [.., H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    rows: Tensor | None = None  # [N]
    bias: Tensor | None = None  # [V]
    support: Tensor | None = None  # [N, K]
    options: dict[str, float] = field(default_factory=dict)
    grad_logp: Tensor | None = None  # [N], ones by default
    grad_entropy: Tensor | None = None  # [N]; None: entropy is not asked for

    @property
    def flops(self) -> int:
        """One GEMM of the head: 2NHV."""
        return 2 * self.targets.shape[0] * self.weight.numel()

    def wide(self) -> Problem:
        """The same values in fp64."""
        return replace(self, hidden=self.hidden.double(), weight=self.weight.double(),
                       bias=None if self.bias is None else self.bias.double())  # fmt: skip


def make_problem(
    backend: str = "cpu", dtype: torch.dtype = torch.float32, n: int = 0, r: int = 30, h: int = 24, v: int = 67,
    *, bias: bool = True, rows: bool = True, entropy: bool = True, spread: float = 1.0, **options: float,
) -> Problem:  # fmt: skip
    """Random; rows repeat and are in no order, targets hit the first and last id, one upstream gradient is 0."""
    device = device_of(backend)
    n = n or (32 if interpreted(backend) else 96)
    targets = torch.randint(0, v, (n,))
    targets[:2] = torch.tensor([0, v - 1])[:n]
    grad_logp, grad_entropy = torch.randn(n, device=device), torch.randn(n, device=device)
    grad_logp[-1] = 0.0
    return Problem(
        hidden=(torch.randn(r if rows else n, h) * spread).to(device, dtype),
        weight=(torch.randn(v, h) * h**-0.5).to(device, dtype),
        targets=targets.to(device),
        rows=torch.randint(0, r, (n,), device=device) if rows else None,
        bias=torch.randn(v).to(device, dtype) if bias else None,
        options=options,
        grad_logp=grad_logp,
        grad_entropy=grad_entropy if entropy else None,
    )


def plain_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None = None, bias: Tensor | None = None,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0, support: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability and entropy as anybody would write them; logits in the inputs' dtype, softmax in fp32 or fp64."""
    x = hidden.reshape(-1, hidden.shape[-1])
    x = x if rows is None else x[rows]
    z = x @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    z = z if bias is None else z + bias.to(z.dtype)
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    if support is not None:
        columns = torch.where(support < 0, z.shape[1], support)
        allowed = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool, device=z.device).scatter_(1, columns, True)
        z = z.masked_fill(~allowed[:, :-1], -torch.inf)
    logp = torch.log_softmax(z, -1)
    entropy = -(logp.masked_fill(logp == -torch.inf, 0.0) * logp.exp()).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


def ours(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """masked_logprob with entropy on a backend, called like plain_logprob."""
    return lambda *args, **kwargs: bk.masked_logprob(*args, **kwargs, return_entropy=True, backend=backend)


def outcome(
    call: Callable[..., tuple[Tensor, Tensor]], problem: Problem, need: tuple[str, ...] = ("hidden", "weight", "bias")
) -> dict[str, Tensor]:
    """Outputs, and the gradient of every input in ``need`` for the problem's upstream gradients."""
    inputs = {name: getattr(problem, name) for name in ("hidden", "weight", "bias")}
    inputs = {
        name: None if x is None else x.detach().requires_grad_(name in need) for name, x in inputs.items()
    }  # detach keeps strides and offsets
    logp, entropy = call(
        inputs["hidden"], inputs["weight"], problem.targets, rows=problem.rows, bias=inputs["bias"],
        support=problem.support, **problem.options,
    )  # fmt: skip
    found = {"logp": logp.detach(), "entropy": entropy.detach()}
    if need:
        upstream = torch.ones_like(logp) if problem.grad_logp is None else problem.grad_logp.to(logp.dtype)
        loss = (logp * upstream).sum()
        if problem.grad_entropy is not None:
            loss = loss + (entropy * problem.grad_entropy.to(entropy.dtype)).sum()
        loss.backward()
    found |= {f"d_{name}": x.grad for name, x in inputs.items() if x is not None and x.grad is not None}
    return found


def assert_judged(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Tier 3 for every entry; fp64 results, which the reference cannot judge, to 1e-11."""
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, f"{name}: {value.dtype}, torch {plain[name].dtype}"
        if value.dtype == torch.float64:
            torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_as_good_as_torch(value, plain[name], exact[name], name)


def assert_matches_torch(backend: str, make: Callable[[], Problem]) -> list[dict[str, Tensor]]:
    """All outputs and gradients of a backend against torch in the same dtype and in fp64, pooled over a few draws.

    Pooled, because the largest error of one small tensor is luck: two equally good roundings differ by more than the
    rule's factor of 2 once in a few hundred tensors of 67 entries.
    """
    draws = [make() for _ in range(2 if interpreted(backend) else 4)]
    got = [outcome(ours(backend), problem) for problem in draws]
    plain = [outcome(plain_logprob, problem) for problem in draws]
    exact = [outcome(plain_logprob, problem.wide()) for problem in draws]
    pooled = ({name: torch.cat([d[name].flatten() for d in found]) for name in got[0]} for found in (got, plain, exact))
    assert_judged(*pooled)
    return got


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {float((a[name] - b[name]).abs().max()):.3e}"


def whole(x: Tensor) -> Tensor:
    """As many small integers: GEMMs over them are exact in any order and dtype."""
    return torch.randint(-2, 3, x.shape).to(x)


@contextmanager
def gemm_flops() -> Iterator[list[int]]:
    """Counts the FLOPs of every GEMM that the engine asks torch for."""
    counted = [0]

    def counting(plain, left: int):
        def call(*args, **kwargs):
            counted[0] += 2 * args[left].numel() * args[left + 1].shape[1]
            return plain(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", counting(torch.mm, 0))
        patch.setattr(torch, "addmm", counting(torch.addmm, 1))
        patch.setattr(torch.Tensor, "addmm_", counting(torch.Tensor.addmm_, 1))
        yield counted


def make_draw(
    counts: list[list[int]], tokens: int = 12, vocab: int = 67, device: torch.device | str = "cpu"
) -> bk.MaskDraw:
    """A draw with exactly these masked-token counts ``[B][n]``, at random places, with random weights."""
    batch, samples = len(counts), len(counts[0])
    flat = [count for sequence in counts for count in sequence]
    rows = [s * tokens + torch.randperm(tokens)[:count].sort().values for s, count in enumerate(flat)]
    offsets = torch.tensor([0, *flat]).cumsum(0)
    draw = (
        torch.zeros(batch, samples, tokens, dtype=torch.int64), torch.cat(rows), torch.randint(0, vocab, (sum(flat),)),
        offsets, 0.5 + 2 * torch.rand(batch, samples), torch.tensor(counts, dtype=torch.int32),
    )  # fmt: skip
    return bk.MaskDraw(*(x.to(device) for x in draw))
