"""How work is queued: no waiting for the device, CUDA graphs, streams, and the device that tensors are on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from machine import CUDA, DEVICE, HEADS, KERNELS, capture, new_draw, no_host_wait, only_rehearsed, randn, size
from mask_model import LAWS, MASK_ID
from mask_model import make_batch as make_ids
from models_zoo import MASK, Batch, Plain, make_batch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.estimators.micro_batch import MicroBatches
from bgpo_kernels.masks.functional import check_response, draw_unchecked, make_spec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
VOCAB, WIDTH = HEADS["llada"][1], size(256, 16)
TensorList = list[Tensor]


class HeadCalls:
    """The two calls on the head over inputs that can be overwritten; each gives outputs and gradients as a list."""

    def __init__(self, backend: str, device: torch.device = DEVICE) -> None:
        self.backend, self.draw = backend, new_draw()
        if device != DEVICE:
            fields = ("noisy_ids", "rows", "targets", "segment_offsets", "segment_weight", "count")
            self.draw = bk.MaskDraw(*(getattr(self.draw, name).to(device) for name in fields))
        rows = self.draw.noisy_ids.numel()
        inputs = randn(rows, WIDTH, dtype=torch.bfloat16), randn(VOCAB, WIDTH, dtype=torch.bfloat16, scale=WIDTH**-0.5)
        self.hidden, self.weight = (x.to(device).requires_grad_() for x in inputs)
        self.advantages = torch.tensor([1.0, -0.5, 0.3], device=device)
        self.old = torch.full((3, 3), -100.0, device=device)
        self.length = torch.full((3,), float(size(64, 6)), device=device)

    def others(self) -> HeadCalls:
        """Other numbers and targets for the same places."""
        found = HeadCalls(self.backend)
        found.draw = replace(self.draw, targets=self.draw.targets.flip(0))
        return found

    def overwrite(self, other: HeadCalls) -> None:
        """The numbers and targets of ``other``, in the memory of these."""
        with torch.no_grad():
            for name in ("hidden", "weight", "advantages", "old"):
                getattr(self, name).copy_(getattr(other, name))
            self.draw.targets.copy_(other.draw.targets)

    def score(self) -> TensorList:
        with torch.no_grad():
            return list(self._logprob())

    def logprob(self) -> TensorList:
        logp, entropy = self._logprob()
        value = self.draw.reduce(logp).sum() + entropy.sum()
        return [logp.detach(), entropy.detach(), *torch.autograd.grad(value, (self.hidden, self.weight))]

    def _logprob(self) -> tuple[Tensor, Tensor]:
        return bk.masked_logprob(
            self.hidden, self.weight, self.draw.targets, rows=self.draw.rows, return_entropy=True, backend=self.backend
        )

    def loss(self) -> TensorList:
        return self._loss(self.hidden)

    def loss_of_a_model(self) -> TensorList:
        """What a policy update does with one micro-batch: layers, the head in one pass, all gradients."""
        return self._loss(torch.tanh(self.hidden * 1.5) * 2)

    def _loss(self, hidden: Tensor) -> TensorList:
        loss, logprob, _ = bk.bgpo_head_loss(
            hidden, self.weight, self.draw, self.advantages, old_logprob=self.old, length=self.length, clip_range=0.2,
            backend=self.backend,
        )  # fmt: skip
        return [loss.detach(), logprob, *torch.autograd.grad(loss, (self.hidden, self.weight))]


CALLS = ("score", "logprob", "loss", "loss_of_a_model")
every_call = pytest.mark.parametrize("name", CALLS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)


def assert_same(got: TensorList, want: TensorList, what: str = "") -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(g, w.to(g.device)), f"{what} output {i} differs by {float((g - w).abs().max()):.3e}"


# ------------------------------------------------------------------------------------------------ no waiting


@every_call
@every_kernel
def test_the_head_does_not_wait(backend: str, name: str) -> None:
    call = getattr(HeadCalls(backend), name)
    call()  # compiles, allocates
    with bk.check_values(False), no_host_wait():
        call()


@pytest.mark.parametrize("law", ["exact-stratified", "exact-harmonic", "bernoulli-uniform", "coupled-uniform"])
@pytest.mark.parametrize("call", ["bgpo", "elbo", "replay"])
@every_kernel
def test_no_wait_between_micro_batches(backend: str, call: str, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first draw to the last gradient; checks come before, the look at the result after."""
    if not CUDA and backend == "triton" and (call, law) != ("bgpo", "exact-stratified"):
        pytest.skip("the interpreter takes the one that covers all code")
    model, batch = Plain().to(DEVICE), Batch(*(t.to(DEVICE) for t in make_batch()))
    bk.models.assume_bidirectional(model)
    scheme, schedule, _ = LAWS[law]
    options: dict[str, Any] = {"head": model.out, "mask_token_id": MASK, "n_mc": 6, "micro_batch_tokens": 20}
    options |= {"scheme": scheme, "schedule": schedule, "backend": backend}
    calls: dict[str, Callable[[], object]] = {
        "bgpo": lambda: bk.bgpo_backward(model, *batch, **options),
        "elbo": lambda: bk.elbo_logprob(model, *batch[:2], **options).sum().backward(),
        "replay": lambda: bk.replay_backward(model, *batch[:2], Tensor.sum, **options),
    }
    calls[call]()
    plain, loops = MicroBatches.run, []

    def run(self: MicroBatches, *args: Any, **kwargs: Any) -> None:
        loops.append(1)
        with no_host_wait():
            plain(self, *args, **kwargs)

    monkeypatch.setattr(MicroBatches, "run", run)
    calls[call]()
    assert len(loops) == (1 if call == "bgpo" else 2)


def test_a_wait_is_found() -> None:
    x = randn(3)
    with no_host_wait(), pytest.raises((RuntimeError, AssertionError), match=r"synchron|wait"):
        x.sum().item()


# ------------------------------------------------------------------------------------------------ CUDA graphs


@every_call
@every_kernel
def test_graph_of_the_head(backend: str, name: str) -> None:
    """Captured once, replayed over other inputs: the bits of the eager call on those."""
    calls = HeadCalls(backend)
    others = calls.others()
    with bk.check_values(False):
        replay, outputs = capture(getattr(calls, name))
        before = [x.clone() for x in outputs]
        calls.overwrite(others)
        replay()
        assert_same(outputs, getattr(others, name)(), name)
    assert not torch.equal(before[0], outputs[0]), "other inputs, other outputs"
    only_rehearsed("CUDA graphs exist on a GPU only")


@pytest.mark.parametrize(
    "law", ["exact-stratified", "exact-harmonic", "bernoulli-stratified", "coupled-uniform", "full"]
)
@every_kernel
def test_graph_of_a_draw(backend: str, law: str) -> None:
    """Once a batch has been looked at, its draw is captured; a replay masks whatever ids are there by then."""
    lengths = size([700, 33, 1024], [30, 9])
    ids, response = (t.to(DEVICE) for t in make_ids(lengths, max(lengths) + 6))
    sample_ids = torch.arange(len(lengths), device=DEVICE)
    facts = check_response(ids, response, None, sample_ids, MASK_ID, 4, backend)
    scheme, schedule, _ = LAWS[law]
    spec = make_spec(scheme, schedule, 4, 7, MASK_ID, facts.lengths, DEVICE)

    def draw() -> TensorList:
        drawn = draw_unchecked(ids, response, None, sample_ids, spec, backend, facts)
        return [drawn.noisy_ids, drawn.rows, drawn.targets, drawn.segment_offsets, drawn.segment_weight]

    replay, outputs = capture(draw)
    ids.copy_((ids + 17) % MASK_ID)
    replay()
    assert_same(outputs, draw(), law)
    only_rehearsed("CUDA graphs exist on a GPU only")


# ------------------------------------------------------------------------------------------------ streams, devices


@every_call
@every_kernel
def test_side_stream(backend: str, name: str) -> None:
    """Work goes to the current stream: it waits for what was queued there before, and no other stream needs to."""
    calls = HeadCalls(backend)
    expected = getattr(calls, name)()
    kept = calls.hidden.detach().clone()
    with torch.no_grad():
        calls.hidden.zero_()
    side = torch.cuda.Stream() if CUDA else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side) if side is not None else nullcontext():
        if side is not None:
            torch.cuda._sleep(50_000_000)  # tens of milliseconds: an eager kernel elsewhere would read the zeros
        with torch.no_grad():
            calls.hidden.copy_(kept)
        with bk.check_values(False):
            got = getattr(calls, name)()
    if side is not None:
        side.synchronize()
    assert_same(got, expected, name)
    only_rehearsed("streams exist on a GPU only")


@every_kernel
def test_two_streams_do_not_share_the_workspace(backend: str) -> None:
    pairs = [HeadCalls(backend), HeadCalls(backend)]
    expected = [calls.loss() for calls in pairs]
    streams = [torch.cuda.Stream() for _ in pairs] if CUDA else [None, None]
    results: list[list[TensorList]] = [[], []]
    if CUDA:
        torch.cuda.synchronize()
    with bk.check_values(False):
        for _ in range(size(10, 1)):
            for calls, stream, found in zip(pairs, streams, results, strict=True):
                with torch.cuda.stream(stream) if stream is not None else nullcontext():
                    found.append(calls.loss())
    if CUDA:
        torch.cuda.synchronize()
    for found, want in zip(results, expected, strict=True):
        for got in found:
            assert_same(got, want)
    only_rehearsed("streams exist on a GPU only")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_call
@every_kernel
def test_tensors_on_another_device_than_the_current_one(backend: str, name: str) -> None:
    torch.manual_seed(3)
    expected = getattr(HeadCalls(backend), name)()
    torch.manual_seed(3)
    there = HeadCalls(backend, torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    got = getattr(there, name)()
    assert all(x.device.index == 1 for x in got) and torch.cuda.current_device() == 0
    assert_same([x.to(DEVICE) for x in got], expected, name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_kernel
def test_masks_on_another_device_than_the_current_one(backend: str) -> None:
    ids, response = make_ids([64, 33], 70)
    options: dict[str, Any] = {"mask_token_id": MASK_ID, "n_mc": 4, "seed": 1}
    here = bk.random_mask(ids.to(DEVICE), response.to(DEVICE), backend=backend, **options)
    there = bk.random_mask(ids.to("cuda:1"), response.to("cuda:1"), backend=backend, **options)
    assert there.rows.device.index == 1
    assert torch.equal(there.noisy_ids.cpu(), here.noisy_ids.cpu()) and torch.equal(there.rows.cpu(), here.rows.cpu())
