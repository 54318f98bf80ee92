"""DistributedDataParallel: one averaging per call, whatever the ranks had to do for it; all ranks succeed or none."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from launch import Skipped, check, variants
from models_zoo import DRAWING, N, bert, llada, make_batch, take_gradients
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP
from two_ranks import (
    CALLS,
    B,
    Call,
    assert_expected,
    bgpo,
    elbo,
    everything,
    expected,
    gradients,
    loss_of,
    mine,
    raises,
    rank,
    replay,
    rows,
)

import bgpo_kernels as bk


class Counted(DDP):
    """Counts the gradient averagings (buckets; these models fit into one)."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self.averagings = 0
        self.register_comm_hook(None, self._count)

    def _count(self, _state, bucket):  # DDP looks at annotations, and not at strings
        self.averagings += 1
        return allreduce_hook(dist.group.WORLD, bucket)


@variants(*CALLS)
def ddp_one_averaging(call: Call) -> None:
    """Three steps, micro-batches of one sample on one rank and of four on the other."""
    want = expected(call)
    model = Counted(llada(torch.float64))
    for step in range(3):
        call(model, *mine(everything()), micro_batch_tokens=40 if rank() else 10)
        assert model.averagings == step + 1, model.averagings
        assert_expected(model, want)


@variants(
    *(
        (call, option)
        for call in CALLS
        for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers")
    )
)
def ddp_option(call: Call, option: str) -> None:
    want = expected(call, bert(torch.float64))
    model = Counted(bert(torch.float64), **{option: option != "broadcast_buffers"})
    for step in range(3):
        call(model, *mine(everything()), micro_batch_tokens=20)
        assert model.averagings == step + 1, model.averagings
        assert_expected(model, want)


@variants(bgpo, replay, elbo, rows)
def ddp_unused_parameters(call: Call) -> None:
    """A parameter no rank uses: its .grad stays None where DDP looks for such, and no call stumbles over it."""
    for looks in (True, False):
        module = llada(torch.float64)
        module.unused = nn.Linear(2, 2, dtype=torch.float64)
        model = DDP(module, find_unused_parameters=looks)
        for _ in range(2):
            call(model, *mine(everything()), micro_batch_tokens=20)
            found = gradients(model)
            unused = [found.pop(f"unused.{name}", None) for name in ("weight", "bias")]
            assert all(g is None if looks else g is None or not g.any() for g in unused)


@variants(*CALLS)
def ddp_no_sync(call: Call) -> None:
    """Accumulation: calls inside no_sync send nothing (rank 1 does not even make the second), the last one all."""
    batch = everything()
    model, one = Counted(llada(torch.float64)), llada(torch.float64)
    for part in (mine(batch), *([mine(batch)] if rank() == 0 else [])):
        with model.no_sync():
            call(model, *part)
    assert model.averagings == 0
    call(model, *mine(batch))
    assert model.averagings == 1
    half = (batch.ids[:2], batch.response[:2], batch.advantages[:2])
    call(one, type(batch)(*half), torch.arange(2))
    extra = {name: g / 2 for name, g in take_gradients(one).items()}
    want = {name: 2 * g + extra[name] for name, g in expected(call).items()}
    assert_expected(model, want)


@check
def ddp_earlier_gradients_take_part_as_ever() -> None:
    """Equal ones stay as they are, whether they were tensors, zeros or views of DDP's buckets."""
    want = expected()
    for views in (False, True):
        model = DDP(llada(torch.float64), gradient_as_bucket_view=views)
        bgpo(model, *mine(everything()))
        bgpo(model, *mine(everything()))
        assert_expected(model, {name: 2 * g for name, g in want.items()})
        bgpo(model, *mine(everything()))
        model.zero_grad(set_to_none=False)
        bgpo(model, *mine(everything()))
        assert_expected(model, want)


@variants(bgpo, replay, elbo)
def ddp_a_rank_with_nothing_to_do(call: Call) -> None:
    batch = everything()
    batch = batch._replace(advantages=batch.advantages.clone())
    batch.advantages[2:] = 0
    model = DDP(bert(torch.float64))  # bert has buffers, which DDP sends around
    for _ in range(2):
        call(model, *mine(batch))
        assert_expected(model, expected(call, bert(torch.float64), batch))


@check
def ddp_two_estimates_and_another_loss_in_one_backward() -> None:
    """As in DPO with an auxiliary loss: everything that the backward brings is averaged once."""
    chosen, rejected = everything(), make_batch(B)
    rejected = rejected._replace(ids=rejected.ids.flip(0), response=rejected.response.flip(0))

    def loss(model: nn.Module, deal: Any) -> Tensor:
        ids = [deal(x)[1] for x in (chosen, rejected)]
        estimates = [
            bk.elbo_logprob(model, x.ids, x.response, sample_ids=i, **DRAWING)
            for x, i in zip((deal(chosen)[0], deal(rejected)[0]), ids, strict=True)
        ]
        other = model(input_ids=deal(chosen)[0].ids).logits.square().mean()
        return -nn.functional.logsigmoid(estimates[0] - estimates[1]).mean() + 0.01 * other

    one, model = llada(torch.float64), Counted(llada(torch.float64))
    loss(one, lambda x: (x, torch.arange(B))).backward()
    want = take_gradients(one)
    for step in range(2):
        loss(model, mine).backward()
        assert model.averagings == step + 1, model.averagings
        assert_expected(model, want)


@variants(*CALLS)
def ddp_hooks_on_parameters_run_once(call: Call) -> None:
    """On this rank's sum, as they would in one backward; also on the head, and they come back after the call."""
    model = DDP(llada(torch.float64))
    seen: list[str] = []
    for name, p in model.module.named_parameters():
        p.register_hook(lambda g, name=name: seen.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    for _ in range(2):
        seen.clear()
        call(model, *mine(everything()), micro_batch_tokens=10)
        assert sorted(seen) == sorted(2 * [name for name, _ in model.module.named_parameters()])


@check
def ddp_compiled_from_outside() -> None:
    want = expected()
    model = torch.compile(DDP(llada(torch.float64)), backend="eager")
    for call in (bgpo, elbo):
        call(model, *mine(everything()))
        assert_expected(model._orig_mod, want)


@variants(*CALLS)
def ddp_by_accelerate_in_bf16(call: Call) -> None:
    """prepare() puts DDP around an autocast forward; accumulate() is no_sync on all steps but the last."""
    try:
        import accelerate
    except ImportError as error:
        raise Skipped("needs accelerate") from error
    os.environ.update(
        RANK=str(rank()), LOCAL_RANK=str(rank()), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"
    )
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    try:
        model = accelerator.prepare(llada())
        assert isinstance(model, DDP)
        for _ in range(2):
            with accelerator.accumulate(model):
                call(model, *mine(everything()))
        found, want = gradients(model), expected(call)
        for name, g in found.items():
            error = float((g.double() / 2 - want[name]).norm() / want[name].norm())
            assert 1e-5 < error < 0.05, (name, error)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


# ------------------------------------------------------------------------------------------------------ failures


def assert_a_failure_leaves_no_trace(call: Call, kinds: tuple[Any, Any], breaking: Any, **options: Any) -> None:
    """``breaking(module)`` on rank 1 only, once; then the same model goes on on both."""
    model = DDP(llada(torch.float64))
    before = {p: torch.full_like(p, 0.25) for p in model.parameters()}
    for p, g in before.items():
        p.grad = g.clone()
    handle = breaking(model.module) if rank() else None
    said = raises(kinds[rank()], call, model, *mine(everything()), **options)
    assert rank() or ("rank 1" in said and "nothing was added" in said), said
    for p, g in before.items():
        assert torch.equal(p.grad, g)
    if handle is not None:
        handle.remove()
    model.zero_grad()
    call(model, *mine(everything()), **options)
    assert_expected(model, expected(call))


@variants(bgpo, replay, elbo)
def ddp_nan_in_a_backward_of_one_rank(call: Call) -> None:
    def breaking(module: nn.Module) -> Any:
        return module.model.layers[0].mlp.register_full_backward_hook(lambda _m, g, _o: (g[0] * torch.nan,))

    assert_a_failure_leaves_no_trace(call, (FloatingPointError, FloatingPointError), breaking)


@variants(bgpo, replay, elbo)
def ddp_out_of_memory_on_one_rank(call: Call) -> None:
    def breaking(module: nn.Module) -> Any:
        def hook(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")

        return module.model.layers[0].mlp.register_full_backward_hook(hook)

    kinds = (torch.OutOfMemoryError, torch.OutOfMemoryError)
    assert_a_failure_leaves_no_trace(call, kinds, breaking, micro_batch_tokens=20)


@variants(bgpo, replay, elbo, rows)
def ddp_an_error_in_the_forward_of_one_rank(call: Call) -> None:
    def breaking(module: nn.Module) -> Any:
        bk.models.assume_bidirectional(module)  # the probe is no part of this

        def hook(*_: Any) -> None:
            raise KeyError("a bug")

        return module.model.layers[1].register_forward_pre_hook(hook)

    assert_a_failure_leaves_no_trace(call, (RuntimeError, KeyError), breaking, micro_batch_tokens=20)


@check
def ddp_an_objective_that_fails_on_one_rank() -> None:
    model, (batch, ids) = DDP(llada(torch.float64)), mine(everything())

    def objective(scores: Tensor) -> Tensor:
        return loss_of(batch)(scores) * (torch.nan if rank() else 1.0)

    def call(model: nn.Module) -> None:
        bk.replay_backward(model, batch.ids, batch.response, objective, sample_ids=ids, **DRAWING)

    raises(FloatingPointError, call, model)
    assert gradients(model) == {}


@variants(bgpo, elbo)
def ddp_halving_on_one_rank(call: Call) -> None:
    """Ranks are alone with their micro-batches, so what does not fit is halved as ever."""
    module = llada(torch.float64)
    bk.models.assume_bidirectional(module)
    sizes: list[int] = []

    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sizes.append(len(arguments[0]))
        if rank() and sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    module.model.layers[0].mlp.register_forward_pre_hook(hook)
    model = DDP(module)
    call(model, *mine(everything()))
    assert_expected(model, expected(call))
    assert max(sizes) == N and min(sizes) == (2 if rank() else N)


# ---------------------------------------------------------------------------------------------- scores and masks


@check
def masks_and_scores_do_not_depend_on_who_scores_them() -> None:
    """Masks to the bit, for any dealing of the sequences; scores to the bit where the micro-batches are the same."""
    batch, model = everything(), llada()
    draw = bk.random_mask(batch.ids, batch.response, **DRAWING)
    scores = bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **DRAWING).detach()
    for deal in ([[0, 1], [2, 3]], [[3, 0], [2, 1]], [[1], [3, 2, 0]]):
        ids = torch.tensor(deal[rank()])
        own = bk.random_mask(batch.ids[ids], batch.response[ids], sample_ids=ids, **DRAWING)
        assert torch.equal(own.noisy_ids, draw.noisy_ids[ids])
        assert torch.equal(own.segment_weight, draw.segment_weight[ids])
        with torch.no_grad():
            found = bk.elbo_logprob(
                DDP(model), batch.ids[ids], batch.response[ids], sample_ids=ids, per_sample=True, **DRAWING
            )
        assert torch.equal(found, scores[ids])


@check
def ddp_fp32_sums_agree_within_rounding() -> None:
    """World size 1 and 2, micro-batches and order, by the rule of tolerances.py: the error is that of torch itself."""
    from models_zoo import as_one, by_torch, gradients_of
    from tolerances import assert_as_good_as_torch

    batch = everything()
    exact = as_one(gradients_of(by_torch, llada(torch.float64), batch))
    plain = as_one(gradients_of(by_torch, llada(), batch))
    for tokens, order in ((10, [0, 1]), (40, [1, 0]), (None, [0, 1])):
        part, ids = mine(batch)
        part = type(part)(part.ids[order], part.response[order], part.advantages[order])
        model = DDP(llada())
        bgpo(model, part, ids[order], micro_batch_tokens=tokens)
        assert_as_good_as_torch(as_one(gradients(model)), plain, exact)


@check
def ddp_scoring_without_gradient_sends_nothing() -> None:
    """A reference or old policy may be scored on one rank alone."""
    model = DDP(bert())
    batch, ids = mine(everything())
    if rank() == 0:
        with torch.no_grad():
            bk.elbo_logprob(model, batch.ids, batch.response, sample_ids=ids, **DRAWING)
