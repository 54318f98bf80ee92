"""What is compared: the bare GEMMs, which are the ceiling, `bgpo_kernels`, and the peers; the catalogue of a case.

Bare GEMMs are the 1, 2 or 3 products that a mode cannot avoid, over all N masked rows at once, into buffers that exist
already; the gradient operand is random numbers of a gradient's size, since multiplying zeros draws less power and runs
faster. Logits come out in the inputs' dtype and, where torch can, in fp32. The faster is the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _measure import readable
from torch import Tensor

import bgpo_kernels as bk
from _head import peers
from _head.peers import Call, Unavailable
from _head.problem import Problem, Rows
from _head.truth import Result
from bgpo_kernels import backends

GEMM = "gemm"


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. `prepare` gives the call to check and time, or raises `Unavailable` with a reason."""

    name: str
    family: str  # what --variants selects
    computes: str
    prepare: Callable[[Problem, Rows], Call]
    weighted: bool = True  # False: the plain sum of -logp instead of the weighted loss
    recomputes: bool = False  # the logits in its backward: 2NHV more
    approximate: bool = False  # by design: judged on the largest entries alone
    full: bool = False  # on every position instead of the masked rows
    workspace: int | None = None  # bytes; ours only

    @property
    def ours(self) -> bool:
        """Whether it is this package."""
        return self.family.startswith("ours")

    def rows(self, problem: Problem) -> Rows:
        """What it is given. Ours takes the hidden states of all positions and gathers the masked ones."""
        return problem.full if self.full or self.ours else problem.packed


def bare_gemms(dtype: torch.dtype | None) -> Callable[[Problem, Rows], Call]:
    """The products with logits in `dtype` (None: that of the inputs)."""

    def prepare(problem: Problem, rows: Rows) -> Call:
        x, weight = rows.hidden.detach(), problem.weight.detach()
        wide = dtype is not None and dtype != x.dtype
        if wide and not (x.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out")):
            raise Unavailable(f"torch {torch.__version__} on {x.device.type} has no torch.mm(out_dtype=)")
        logits = _scratch(problem, "logits", dtype or x.dtype)
        d_hidden, d_weight, d_logits = torch.empty_like(x), None, None
        if problem.size.mode != "forward":
            d_logits = _scratch(problem, "d_logits", x.dtype)
            d_logits.normal_(std=1e-3)
        if problem.size.mode == "trained":
            d_weight = torch.empty_like(weight)

        def run() -> Result:
            with torch.no_grad():
                if wide:
                    torch.mm(x, weight.T, out_dtype=dtype, out=logits)
                else:
                    torch.mm(x, weight.T, out=logits)
                if d_logits is not None:
                    torch.mm(d_logits, weight, out=d_hidden)
                if d_weight is not None:
                    torch.mm(d_logits.T, x, out=d_weight)
            return Result()

        return run

    return prepare


def _scratch(problem: Problem, name: str, dtype: torch.dtype) -> Tensor:
    """``[N, V]`` over memory that both products use, so that they leave room for the others at large N."""
    shape = (problem.size.N, problem.size.V)
    if name not in problem.scratch or problem.scratch[name].dtype.itemsize < dtype.itemsize:
        problem.scratch[name] = torch.empty(shape, dtype=dtype, device=problem.device)
    raw = problem.scratch[name].view(-1).view(dtype)
    return raw[: shape[0] * shape[1]].view(shape)


def ours(backend: str, workspace: int) -> Callable[[Problem, Rows], Call]:
    """`bgpo_head_loss` with its backward, or `masked_logprob` under no_grad, from every position's hidden states."""

    def prepare(problem: Problem, _rows: Rows) -> Call:
        if (reason := backends.why_not(backend, problem.device)) is not None:
            raise Unavailable(reason)
        hidden, draw = problem.full.hidden, problem.draw

        def loss() -> Result:
            value, logprob, _ = bk.bgpo_head_loss(
                hidden, problem.weight, draw, problem.advantages, length=problem.length, backend=backend
            )
            gradients = torch.autograd.grad(value, problem.wanted(problem.full))
            return Result(None, logprob, value.detach(), *gradients)

        @torch.no_grad()
        def forward() -> Result:
            found = bk.masked_logprob(hidden, problem.weight, draw.targets, rows=draw.rows, backend=backend)
            assert isinstance(found, Tensor)
            return Result(found)

        def run() -> Result:
            # Setting a size gives the buffer back to torch's allocator, so only when another variant had changed it.
            if bk.workspace_bytes(problem.device) != workspace:
                bk.set_workspace_bytes(workspace)
            return forward() if problem.size.mode == "forward" else loss()

        return run

    return prepare


def catalogue(
    device: torch.device, workspaces: list[int], full: bool, compiled: bool, families: list[str] | None = None
) -> list[Variant]:
    """All variants of a case in the order of the table; `workspaces` has the default first.

    full: peers get every position, ours (on the masked rows) runs with the default workspace only.
    compiled: with torch.compile, which takes its time.
    """
    found = [
        Variant("bare GEMMs, fp32 logits", GEMM, "the products alone, logits in fp32", bare_gemms(torch.float32)),
        Variant("bare GEMMs", GEMM, "the products alone, logits in the inputs' dtype", bare_gemms(None)),
    ]
    for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu", "triton"):
        found += [
            Variant(f"ours {backend}, {readable(size)}", f"ours-{backend}", "the bound's loss and gradients, or "
                    "log-probabilities; gathers the masked rows from all positions itself", ours(backend, size),
                    workspace=size)
            for size in (workspaces[:1] if full else workspaces)
        ]  # fmt: skip
    found += [
        Variant(peer.name + (", all positions" if full else ""), peer.family, peer.computes, peer.prepare,
                peer.weighted, peer.recomputes, peer.approximate, full)
        for peer in peers.PEERS
        if compiled or peer.family != peers.COMPILED
    ]  # fmt: skip
    return [variant for variant in found if families is None or variant.family in (GEMM, *families)]


def families(device: torch.device) -> list[str]:
    """What --variants may name, the ceiling aside, which is always there."""
    names = [variant.family for variant in catalogue(device, [1 << 30], full=False, compiled=True)]
    return [name for name in dict.fromkeys(names) if name != GEMM]
