"""The same bits on every run, and for a row or a sequence whatever is computed beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_cases import Problem, assert_same_bits, ours, outcome, whole
from machine import CUDA, DEVICE, HEADS, KERNELS, TOKENS, new_draw, randn, size, weight_of
from mask_model import assert_same_draw, draw, make_batch
from models_zoo import MASK, Batch, Plain, llada, take_gradients
from models_zoo import make_batch as make_sequences
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bgpo_kernels as bk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy inside Triton's interpreter
HEAD = HEADS["llada"]


def three(run: Callable[[], dict[str, Tensor]]) -> None:
    """Three runs, bit for bit the same."""
    first = run()
    for _ in range(2):
        assert_same_bits(run(), first)


def few_rows(rows: int) -> None:
    """A workspace of that many rows, so that there are several chunks."""
    bk.set_workspace_bytes(max(1 << 16, rows * HEAD[1] * 4))


@pytest.mark.parametrize("law", ["exact-stratified", "bernoulli-uniform", "coupled-stratified"])
@pytest.mark.parametrize("backend", KERNELS)
def test_masks_repeat(law: str, backend: str) -> None:
    ids, response = (t.to(DEVICE) for t in make_batch(size([1000, 517, 64], [30, 17]), size(1100, 40)))
    first, *others = (draw(law, ids, response, n_mc=4, backend=backend) for _ in range(3))
    for other in others:
        assert_same_draw(other, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_logprob_and_gradients_repeat(backend: str, dtype: torch.dtype) -> None:
    """Rows occur several times, so that their gradients meet; several chunks."""
    few_rows(64)
    draw_ = new_draw()
    n, r = draw_.num_rows, size(100, 10)
    problem = Problem(
        randn(r, HEAD[0], dtype=dtype), weight_of(HEAD, dtype), draw_.targets, torch.randint(r, (n,), device=DEVICE),
        bias=randn(HEAD[1], dtype=dtype), grad_logp=randn(n), grad_entropy=randn(n),
    )  # fmt: skip
    three(lambda: outcome(ours(backend), problem))


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_head_loss_and_gradients_repeat(backend: str, dtype: torch.dtype, off_policy: bool) -> None:
    few_rows(48)  # fewer than the longest segment has
    draw_ = new_draw()
    hidden, weight = randn(draw_.noisy_ids.numel(), HEAD[0], dtype=dtype), weight_of(HEAD, dtype)
    advantages = torch.tensor([1.3, -0.8, 0.7], device=DEVICE)
    options: dict[str, Any] = {"length": torch.full((3,), float(TOKENS), device=DEVICE), "clip_range": 0.2}
    if off_policy:
        with torch.no_grad():
            old = bk.bgpo_head_loss(hidden, weight, draw_, advantages, backend=backend)[1]
        options["old_logprob"] = old + 0.3 * randn(*old.shape)

    def run() -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss, logprob, _ = bk.bgpo_head_loss(*leaves, draw_, advantages, backend=backend, **options)
        loss.backward()
        return {"loss": loss.detach(), "logprob": logprob, "d_hidden": leaves[0].grad, "d_weight": leaves[1].grad}

    three(run)


# ------------------------------------------------------------------------------------------------ batch invariance


@pytest.mark.parametrize("values", ["whole", "any"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_has_the_same_bits_in_any_company(backend: str, dtype: torch.dtype, values: str) -> None:
    """Alone, among others, in another order. Whole numbers make every GEMM exact, which leaves the row kernels; any
    others ask the same of the GEMM, which a CPU's does not promise."""
    if values == "any" and not CUDA:
        pytest.skip("only on a GPU: a CPU's GEMM adds up in an order that depends on the number of rows")
    rows = size(700, 40)
    hidden, weight = randn(rows, HEAD[0], dtype=dtype), weight_of(HEAD, dtype)
    if values == "whole":
        hidden, weight = whole(hidden), whole(weight) / 8
    targets = torch.randint(HEAD[1], (rows,), device=DEVICE)

    def run(index: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack(
                bk.masked_logprob(hidden[index], weight, targets[index], return_entropy=True, backend=backend)
            )

    everything = run(torch.arange(rows, device=DEVICE))
    shuffled = torch.randperm(rows, device=DEVICE)
    for index in (shuffled, shuffled[:1], shuffled[-1:], shuffled[: size(37, 7)], shuffled[3 : size(260, 20)]):
        differ = (run(index) != everything[:, index]).any(0)
        assert not bool(differ.any()), f"{int(differ.sum())} of {len(index)} rows differ"


# ------------------------------------------------------------------------------------------------ whole models

MODELS = {"plain": Plain, "llada": llada}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
N, SEED = 6, 41


def on_device(build: Callable[[], nn.Module], sequences: int = 3) -> tuple[nn.Module, Batch, dict[str, Any]]:
    """The model in evaluation mode, a batch, and the options of every call."""
    model = build().eval().to(DEVICE)
    bk.models.assume_bidirectional(model)
    options = {"n_mc": N, "seed": SEED, "mask_token_id": MASK}
    if isinstance(model, Plain):
        options["head"] = model.out
    return model, Batch(*(t.to(DEVICE) for t in make_sequences(sequences))), options


@pytest.fixture(autouse=True)
def attention_that_repeats():
    """Fused attention may add up its gradients atomically; that is the model's affair."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@every_model
@pytest.mark.parametrize("backend", KERNELS)
def test_bgpo_backward_repeats(build: Callable[[], nn.Module], backend: str) -> None:
    model, batch, options = on_device(build)

    def run() -> dict[str, Tensor]:
        step = bk.bgpo_backward(model, *batch, backend=backend, **options)
        return take_gradients(model) | {"loss": step.loss, "logprob": step.logprob}

    three(run)


@every_model
@pytest.mark.parametrize("backend", KERNELS)
def test_the_old_policy_at_equal_weights(build: Callable[[], nn.Module], backend: str) -> None:
    """Scored with the same micro-batches: d is exactly 0, and the step is the on-policy step."""
    model, batch, options = on_device(build)
    for micro_batch_tokens in size((1, 20, None), (20,)):
        options["micro_batch_tokens"] = micro_batch_tokens
        with torch.no_grad():
            old = bk.elbo_logprob(model, *batch[:2], per_sample=True, backend=backend, **options)
        step = bk.bgpo_backward(model, *batch, old_logprob=old, backend=backend, **options)
        gradients = take_gradients(model)
        assert float(step.stats.max_abs_log_ratio) == 0.0 and torch.equal(step.logprob, old)
        plain = bk.bgpo_backward(model, *batch, backend=backend, **options)
        assert torch.equal(plain.loss, step.loss)
        assert_same_bits(take_gradients(model), gradients)


@every_model
@pytest.mark.parametrize("backend", KERNELS)
def test_estimates_ignore_the_other_sequences(build: Callable[[], nn.Module], backend: str) -> None:
    model, batch, options = on_device(build, 5)

    def estimates(places: list[int]) -> Tensor:
        sample_ids = torch.tensor(places, device=DEVICE)
        with torch.no_grad():
            return bk.elbo_logprob(model, batch.ids[places], batch.response[places], per_sample=True,
                                   sample_ids=sample_ids, backend=backend, **options)  # fmt: skip

    everything = estimates([0, 1, 2, 3, 4])
    for places in ([3], [4, 0], [2, 4, 1]):
        assert torch.equal(estimates(places), everything[places])


@every_model
@pytest.mark.parametrize("backend", KERNELS)
def test_estimates_ignore_the_micro_batches(build: Callable[[], nn.Module], backend: str) -> None:
    """As far as the model's own forward does: its GEMMs may add up differently in batches of another size."""
    model, batch, options = on_device(build)
    tokens = batch.ids.shape[1]
    noisy = bk.random_mask(batch.ids, batch.response, mask_token_id=MASK, n_mc=N, seed=SEED).noisy_ids.flatten(0, 1)

    def logits(rows: Tensor) -> Tensor:
        output = model(input_ids=rows)
        return getattr(output, "logits", output)

    with torch.no_grad():
        several = [torch.cat([logits(rows) for rows in noisy.split(count)]) for count in (1, 2, N)]
        if not all(torch.equal(x, several[0]) for x in several[1:]):
            pytest.skip("this model's forward depends on the size of its batch; see the test of rows in any company")
        first, *others = (
            bk.elbo_logprob(model, *batch[:2], per_sample=True, micro_batch_tokens=count * tokens, backend=backend,
                            **options)
            for count in (1, 2, N)
        )  # fmt: skip
    for other in others:
        assert torch.equal(other, first)
