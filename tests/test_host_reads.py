"""Hot paths never wait for the GPU: `host_reads` finds every such read on the CPU, and there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cuda_emulator
import pytest
import torch
from head_cases import interpreted, make_draw
from host_reads import HostRead, forbid_host_reads
from models_zoo import MASK, Plain, make_batch, untouchable
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.backends import engine, why_not
from bgpo_kernels.bound import ops as bound_ops
from bgpo_kernels.bound import segments as bound_segments
from bgpo_kernels.estimators.micro_batch import MicroBatches
from bgpo_kernels.head import engine as head_engine
from bgpo_kernels.masks import ops as mask_ops
from bgpo_kernels.workspace import MIN_BYTES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter


def _on_the_cpu(name: str):
    reason = why_not(name, torch.device("cpu"))
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


KERNELS = [_on_the_cpu("cpu"), _on_the_cpu("triton")]  # the references read sizes: they are no hot path

# ------------------------------------------------------------------------------------------------ the finder

READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x.sum()),
    "index": lambda x: range(9)[x[0].long() * 0],
    "slice by a tensor": lambda x: x[: (x[0] * 0).long()],
    "f-string": lambda x: f"{x[0]}",
    "in": lambda x: 3.0 in x,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to cpu by name": lambda x: x.to(device="cpu", dtype=torch.float64),
    "from another device": lambda x: torch.empty(3, device="meta").cpu(),
    "is_nonzero": lambda x: x[0].is_nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "argwhere": torch.argwhere,
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_dim": lambda x: x[None].unique(dim=1),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().abs().bincount(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long().abs()),
    "index by a mask": lambda x: x[x > 0],
    "assign by a mask": lambda x: x.__setitem__(x > 0, x[:1]),
    "index by a list": lambda x: x[[0, 1]],
    "assign by a list": lambda x: x.__setitem__([0, 1], 1.0),
    "index from the host": lambda x: x[torch.tensor([0, 1])],
    "list to the device": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "host to the device": lambda x: torch.arange(5).to(x.device),
    "host into the device": lambda x: x.copy_(torch.arange(5.0)),
    "device into the host": lambda x: torch.zeros(5).copy_(x),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "of what came from the host": lambda x: torch.arange(5).to(x.device, non_blocking=True).tolist(),
    "of what was made on the device": lambda x: torch.arange(5, device=x.device).tolist(),
    "of what mixes both": lambda x: (x + torch.arange(5)).tolist(),
}

FREE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1).sum(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, torch.ones_like(x, dtype=torch.int64), output_size=5),
    "index": lambda x: x[x.argsort()],
    "index by a number": lambda x: x[2] + x[1:3].sum(),
    "assign a number": lambda x: x.__setitem__(0, 3.0),
    "assign a number by a mask": lambda x: x.__setitem__(x > 0, 3.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "where with values": lambda x: torch.where(x > 0, x, 0.0),
    "nonzero_static": lambda x: x.nonzero_static(size=3),
    "index_put": lambda x: x.index_put_((x.argsort(),), x + 1, accumulate=True),
    "to a dtype": lambda x: x.to(torch.float64).to(device=x.device, dtype=torch.float32),
    "host": lambda x: [torch.tensor([2, 3]).tolist(), int(torch.arange(4).sum()), torch.zeros(3).numpy()],
    "host, by value": lambda x: torch.arange(4)[torch.arange(4) > 1].cpu(),
    "host to the device": lambda x: torch.arange(5).to(x.device, non_blocking=True) + x,
    "shapes": lambda x: x.view(-1, 1).expand(5, 3).shape[0] + len(x),
}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_reads_are_found(read: Callable[[Tensor], Any]) -> None:
    x = torch.randn(5)
    with forbid_host_reads(), pytest.raises(HostRead, match=r"makes the host wait for the device: .*\.py:\d+"):
        read(x)
    assert torch.ones(2).tolist() == [1.0, 1.0], "everything is as it was"


@pytest.mark.parametrize("call", FREE.values(), ids=list(FREE))
def test_other_calls_are_let_through(call: Callable[[Tensor], Any]) -> None:
    x = torch.randn(5)
    with forbid_host_reads():
        call(x)


def test_the_line_at_fault_is_named() -> None:
    x = torch.randn(5)
    with forbid_host_reads(), pytest.raises(HostRead, match=rf"^_local_scalar_dense .*{__file__}:\d+$"):
        x.sum().item()


def test_tensors_declared_to_be_on_the_host() -> None:
    table, x = torch.arange(5), torch.randn(5)
    with forbid_host_reads(host=[table]):
        assert table[1:].tolist() == [1, 2, 3, 4]
        with pytest.raises(HostRead):
            (table + x).tolist()


# ------------------------------------------------------------------------------------------------ the head


def head_calls(backend: str) -> dict[str, Callable[[], object]]:
    """Forward and backward with every optional tensor; several chunks, and a segment larger than one."""
    vocab, options = MIN_BYTES // 12, {"softcap": 5.0, "temperature": 0.9, "backend": backend}  # chunks of 3 rows
    bk.set_workspace_bytes(MIN_BYTES)
    draw = make_draw([[3, 0, 2], [5, 1, 1]], vocab=vocab)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((draw.noisy_ids.numel(), 8), (vocab, 8), (vocab,))]
    options["bias"] = leaves.pop()
    advantages, length, old = torch.tensor([1.0, -0.5]), torch.tensor([7.0, 9.0]), torch.full((2, 3), -20.0)

    def logprob() -> None:
        logp, entropy = bk.masked_logprob(*leaves, draw.targets, rows=draw.rows, return_entropy=True, **options)
        (draw.reduce(logp).sum() + entropy.sum()).backward()

    def loss(old: Tensor | None) -> None:
        more = {"old_logprob": old, "length": length, "clip_range": 0.2, "dual_clip": 3.0}
        bk.bgpo_head_loss(*leaves, draw, advantages, **options, **more)[0].backward()

    return {"log-prob": logprob, "on-policy": lambda: loss(None), "off-policy": lambda: loss(old)}


every_head_call = pytest.mark.parametrize("call", ["log-prob", "on-policy", "off-policy"])


@every_head_call
@pytest.mark.parametrize("backend", KERNELS)
def test_the_head_reads_nothing(backend: str, call: str) -> None:
    run = head_calls(backend)[call]
    run()  # lazy imports and compilation may read
    with bk.check_values(False), forbid_host_reads():
        run()


@pytest.mark.parametrize("kernel", ["row_statistics", "dlogits_"])
@every_head_call
def test_a_read_in_a_row_kernel_is_found(call: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = engine("head", "cpu")
    plain = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda logits, *rest: [logits.sum().item(), plain(logits, *rest)][1])
    run = head_calls("cpu")[call]
    run()
    with bk.check_values(False), forbid_host_reads(), pytest.raises(HostRead, match=__file__):
        run()


@every_head_call
def test_the_checks_do_read(call: str) -> None:
    """So the first test would see a check that is not switched off."""
    run = head_calls("cpu")[call]
    with forbid_host_reads(), pytest.raises(HostRead, match=r"validation\.py"):
        run()


# ------------------------------------------------------------------------------------------- the estimators' loop


@contextmanager
def reads_forbidden_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Between the checks of a call and its last look at the result; counts the loops."""
    loops: list[int] = []
    plain = MicroBatches.run

    def run(self: MicroBatches, *args: Any, **kwargs: Any) -> None:
        loops.append(1)
        with forbid_host_reads():
            plain(self, *args, **kwargs)

    monkeypatch.setattr(MicroBatches, "run", run)
    yield loops


def small_model() -> tuple[nn.Module, dict[str, Any]]:
    """A model that reads nothing itself, and the options of a call on it: several micro-batches per sequence."""
    model = Plain()
    bk.models.assume_bidirectional(model)
    head = untouchable(model.out)
    return model, {"head": head, "mask_token_id": MASK, "n_mc": 6, "micro_batch_tokens": 20}


def estimators(backend: str) -> dict[str, Callable[[dict[str, Any]], object]]:
    model, options = small_model()
    options["backend"] = backend
    batch = make_batch(2 if interpreted(backend) else 3)
    ids, response, advantages = batch
    old = torch.full((len(ids), 6), -20.0)
    return {
        "bgpo": lambda more: bk.bgpo_backward(model, ids, response, advantages, **options | more),
        "bgpo, off-policy": lambda more: bk.bgpo_backward(
            model, ids, response, advantages, old_logprob=old, clip_range=0.2, **options | more
        ),
        "elbo": lambda more: bk.elbo_logprob(model, ids, response, **options | more).sum().backward(),
        "replay": lambda more: bk.replay_backward(model, ids, response, Tensor.sum, **options | more),
    }


@pytest.mark.parametrize("entropy", [False, True])
def test_no_read_between_micro_batches_of_rows(entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = small_model()
    ids, response, _ = make_batch(3)
    options = {"head": options["head"], "micro_batch_tokens": 20, "replay": True, "return_entropy": entropy}
    bk.row_logprob(model, ids, response, ids, **options)  # warms up
    with reads_forbidden_in_the_loop(monkeypatch) as loops:
        found = bk.row_logprob(model, ids, response, ids, **options)
        (sum(found) if entropy else found).sum().backward()
    assert len(loops) == 2


@pytest.mark.parametrize("law", [("exact", "stratified"), ("exact", "harmonic"), ("bernoulli", "uniform"),
                                 ("coupled", "uniform"), ("full", "stratified")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("call", ["bgpo", "bgpo, off-policy", "elbo", "replay"])
@pytest.mark.parametrize("backend", KERNELS)
def test_no_read_between_micro_batches(
    backend: str, call: str, law: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if interpreted(backend) and (call in ("elbo", "replay") or law != ("exact", "stratified")):
        pytest.skip("the interpreter takes its time; the loop is the same")
    run = estimators(backend)[call]
    law = {"scheme": law[0], "schedule": law[1]}
    run(law)
    with reads_forbidden_in_the_loop(monkeypatch) as loops:
        run(law)
    assert len(loops) == (1 if call.startswith("bgpo") else 2)


@pytest.mark.parametrize("call", ["bgpo", "elbo", "replay"])
def test_no_read_between_micro_batches_of_an_explicit_draw(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    draw = bk.random_mask(batch.ids, batch.response, mask_token_id=MASK, n_mc=6, seed=3)
    run = estimators("cpu")[call]
    with reads_forbidden_in_the_loop(monkeypatch):
        run({"draw": draw})


@pytest.mark.parametrize("call", ["bgpo", "elbo", "replay"])
def test_a_read_in_the_loop_is_found(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the head's forward, and in the draw of the masks."""
    for owner, name in ((engine("head", "cpu"), "row_statistics"), (engine("masks", "cpu"), "draw")):
        with monkeypatch.context() as patch:
            plain = getattr(owner, name)
            patch.setattr(owner, name, lambda x, *rest, plain=plain: [x.sum().item(), plain(x, *rest)][1])
            run = estimators("cpu")[call]
            with reads_forbidden_in_the_loop(patch), pytest.raises(HostRead, match=__file__):
                run({})


# ------------------------------------------------------------------------------------------------ the CUDA wrappers


@pytest.fixture
def on_emulated_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the cpu backend go to the wrappers of the CUDA kernels, these to kernels compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated kernels")
    cuda = cuda_emulator.emulated(request.config.cache.mkdir("cuda_emulator"))
    for module in (head_engine, bound_ops, bound_segments, mask_ops):
        monkeypatch.setattr(module, "engine", lambda package, _backend: getattr(cuda, package))


@pytest.mark.usefixtures("on_emulated_cuda")
@pytest.mark.parametrize("call", ["bgpo", "bgpo, off-policy", "elbo", "replay"])
def test_the_cuda_wrappers_read_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they wait for a copy; the count tables of the harmonic schedule included."""
    run = estimators("cpu")[call]
    with reads_forbidden_in_the_loop(monkeypatch) as loops:
        run({"schedule": "harmonic"})
    assert loops


@pytest.mark.usefixtures("on_emulated_cuda")
def test_a_read_in_a_cuda_wrapper_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = mask_ops.engine("masks", "cpu")
    plain = kernels.draw
    monkeypatch.setattr(kernels, "draw", lambda ids, *rest: [ids.max().item(), plain(ids, *rest)][1])
    run = estimators("cpu")["bgpo"]
    with reads_forbidden_in_the_loop(monkeypatch), pytest.raises(HostRead, match=__file__):
        run({})
