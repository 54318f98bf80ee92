"""FSDP2, FSDP1 and an imitation of ZeRO-3: weights that exist only inside the forward of their owner.

Every micro-batch is a collective operation, so a rank that walked further than the other would hang here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import zero3
from launch import Skipped, check, variants
from models_zoo import DRAWING, assert_same_gradients, bert, llada, take_gradients
from torch import Tensor, nn
from two_ranks import (
    CALLS,
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


def fsdp2() -> Any:
    if not hasattr(torch.cpu.Stream, "record_event"):
        raise Skipped(f"torch {torch.__version__} has no FSDP2 on CPUs")
    from torch.distributed.fsdp import fully_shard

    return fully_shard


def fsdp(model: Any, layout: str, **options: Any) -> Any:
    """A unit per layer, and then: the head too; the root sharded again after its forward; nothing but the root."""
    fully_shard = fsdp2()
    options["mesh"] = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers if layout != "root_alone" else ():
        fully_shard(layer, **options)
    if layout == "head_apart":
        fully_shard(model.lm_head, **options)
    more = {"reshard_after_forward": True} if layout == "resharded_root" else {}
    return fully_shard(model, **options, **more)


LAYOUTS = ["layers", "head_apart", "resharded_root", "root_alone"]


@variants(*((call, layout) for call in CALLS for layout in LAYOUTS))
def fsdp_gradients(call: Call, layout: str) -> None:
    """Two steps with different numbers of micro-batches on the ranks."""
    want = expected(call)
    model = fsdp(llada(torch.float64), layout)
    for _ in range(2):
        call(model, *mine(everything()), micro_batch_tokens=40 if rank() else 20)
        assert_expected(model, want)


@variants(*CALLS)
def fsdp_tied_head_with_bias(call: Call) -> None:
    fully_shard = fsdp2()
    model = bert(torch.float64)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    call(model, *mine(everything()), micro_batch_tokens=20 + 20 * rank())
    assert_expected(model, expected(call, bert(torch.float64)))


@variants(*((call, layout) for call in CALLS for layout in ("head_apart", "layers")))
def fsdp_micro_batches_without_a_masked_row(call: Call, layout: str) -> None:
    """The empty side of a pair, alone in its micro-batch: gradients are reduced there as anywhere."""
    options = {"scheme": "coupled", "n_mc": 8, "seed": 2}
    batch = everything()
    batch = batch._replace(response=torch.arange(10).expand(4, 10) >= 8)  # l is 0, 1 or 2
    draw = bk.random_mask(batch.ids, batch.response, mask_token_id=DRAWING["mask_token_id"], **options)
    assert not bool(draw.count.all())
    if call is rows:
        return
    want = expected(lambda m, b, i, **o: call(m, b, i, **o | options), batch=batch)
    model = fsdp(llada(torch.float64), layout)
    call(model, *mine(batch), micro_batch_tokens=10, **options)
    assert_expected(model, want)


@variants(bgpo, replay, elbo)
def fsdp_a_rank_with_nothing_to_do(call: Call) -> None:
    batch = everything()
    batch = batch._replace(advantages=batch.advantages.clone())
    batch.advantages[2:] = 0
    model = fsdp(llada(torch.float64), "layers")
    call(model, *mine(batch))
    assert_expected(model, expected(call, batch=batch))


@variants(*CALLS)
def fsdp_frozen_backbone_or_head(call: Call) -> None:
    for frozen in ("lm_head", "model"):
        module, one = llada(torch.float64), llada(torch.float64)
        for m in (module, one):
            getattr(m, frozen).requires_grad_(False)
        model = fsdp(module, "head_apart")
        call(model, *mine(everything()), micro_batch_tokens=20)
        assert_expected(model, expected(call, one))


@variants(*CALLS)
def fsdp_mixed_precision(call: Call) -> None:
    """bf16 weights and activations, fp32 sums: within the rounding of bf16, and the head saw bf16."""
    fsdp2()
    from torch.distributed.fsdp import MixedPrecisionPolicy

    want = expected(call, llada(torch.float64))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    model = fsdp(llada(), "head_apart", mp_policy=policy)
    seen: list[torch.dtype] = []
    model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    call(model, *mine(everything()))
    found = gradients(model)
    assert set(seen) == {torch.bfloat16}
    for name, g in found.items():
        assert g.dtype == torch.float32
        error = (g.double() - want[name]).norm() / want[name].norm()
        assert float(error) < 0.05, (name, float(error))


@variants(*CALLS)
def fsdp_without_gradient_sync(call: Call) -> None:
    """set_requires_gradient_sync(False), as trainers accumulate: reduced at once all the same, and added."""
    want = expected(call)
    model = fsdp(llada(torch.float64), "layers")
    model.set_requires_gradient_sync(False)
    call(model, *mine(everything()))
    model.set_requires_gradient_sync(True)
    call(model, *mine(everything()))
    assert_expected(model, {name: 2 * g for name, g in want.items()})


@variants(*CALLS)
def fsdp_optimizer_steps_reach_every_weight(call: Call) -> None:
    """After scoring without gradient the root stays gathered unless told otherwise, and would miss the step."""
    model, one = fsdp(llada(torch.float64), "layers"), llada(torch.float64)
    batch, ids = mine(everything())
    for step in range(2):
        with torch.no_grad():
            scores = bk.elbo_logprob(model, batch.ids, batch.response, sample_ids=ids, **DRAWING)
            want = bk.elbo_logprob(one, batch.ids, batch.response, sample_ids=ids, **DRAWING)
        torch.testing.assert_close(scores, want, rtol=1e-12, atol=1e-12)
        if step == 0:
            call(model, batch, ids)
            call(one, everything(), torch.arange(4))
            with torch.no_grad():
                bk.elbo_logprob(model, batch.ids, batch.response, sample_ids=ids, **DRAWING)
            for m in (model, one):
                torch.optim.SGD(m.parameters(), lr=0.1).step()
                m.zero_grad()


@variants(*CALLS)
def fsdp_gradients_add_up(call: Call) -> None:
    want = expected(call)
    model = fsdp(llada(torch.float64), "layers")
    for zeros in (True, False):
        model.zero_grad(set_to_none=zeros)
        for _ in range(2):
            call(model, *mine(everything()))
        assert all(type(p.grad).__name__ == "DTensor" for p in model.parameters())
        assert_same_gradients(
            {name: p.grad.full_tensor() for name, p in model.named_parameters()}, {n: 2 * g for n, g in want.items()}
        )


@variants(bgpo, replay, elbo)
def fsdp_nan_in_a_backward_of_one_rank(call: Call) -> None:
    """It spreads to a shard of one rank or both; both raise, and .grad is as before."""
    module = llada(torch.float64)
    poison: list[bool] = [bool(rank())]
    module.model.layers[0].mlp.register_forward_hook(lambda _m, _a, y: y * 1 if not poison[0] else _spoil(y))
    model = fsdp(module, "layers")
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    raises(FloatingPointError, call, model, *mine(everything()))
    for p in model.parameters():
        assert bool((p.grad.to_local() == 0.25).all())
    poison[0] = False
    model.zero_grad()
    call(model, *mine(everything()))
    assert_expected(model, expected(call))


class _NaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.nan


def _spoil(x: Tensor) -> Tensor:
    return _NaN.apply(x)


@variants(bgpo, replay)
def fsdp_nan_scores_of_one_rank(call: Call) -> None:
    module = llada(torch.float64)
    on = [bool(rank())]
    bk.models.assume_bidirectional(module)
    module.model.norm.register_forward_hook(lambda _m, _a, x: x * torch.inf if on[0] else None)
    model = fsdp(module, "layers")
    said = raises(FloatingPointError, call, model, *mine(everything()))
    assert ("sample id" in said) == bool(rank()), said
    assert gradients(model) == {}
    on[0] = False
    call(model, *mine(everything()))
    assert_expected(model, expected(call))


@check
def fsdp_an_objective_that_fails_on_one_rank() -> None:
    model, (batch, ids) = fsdp(llada(torch.float64), "layers"), mine(everything())

    def objective(scores: Tensor) -> Tensor:
        return loss_of(batch)(scores) if rank() else scores

    def call(model: nn.Module) -> None:
        bk.replay_backward(model, batch.ids, batch.response, objective, sample_ids=ids, **DRAWING)

    raises(ValueError if rank() == 0 else RuntimeError, call, model)


@variants(*CALLS)
def fsdp_checkpointed_layers(call: Call) -> None:
    module = llada(torch.float64)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    model = fsdp(module, "layers")
    call(model, *mine(everything()), micro_batch_tokens=20 + 20 * rank())
    assert_expected(model, expected(call))


@variants(bgpo, elbo)
def fsdp_compiled_layers(call: Call) -> None:
    module = llada(torch.float64)
    for layer in module.model.layers:
        layer.compile(backend="eager")
    model = fsdp(module, "layers")
    call(model, *mine(everything()))
    assert_expected(model, expected(call))


@check
def fsdp_two_estimates_in_one_backward() -> None:
    """Two calls before one backward, as in DPO, whose replays gather and reduce one after the other."""
    batch, (part, ids) = everything(), mine(everything())
    model, one = fsdp(llada(torch.float64), "layers"), llada(torch.float64)

    def loss(m: nn.Module, b: Any, i: Tensor) -> Tensor:
        first = bk.elbo_logprob(m, b.ids, b.response, sample_ids=i, **DRAWING)
        second = bk.elbo_logprob(m, b.ids, b.response, sample_ids=i + 10, **DRAWING)
        return -nn.functional.logsigmoid(0.1 * (first - second)).mean()

    loss(one, batch, torch.arange(4)).backward()
    loss(model, part, ids).backward()
    assert_expected(model, take_gradients(one))


@variants(True, False)
def fsdp_with_another_loss_in_one_backward(estimate_first: bool) -> None:
    batch, (part, ids) = everything(), mine(everything())
    model, one = fsdp(llada(torch.float64), "layers"), llada(torch.float64)

    def loss(m: nn.Module, b: Any, i: Tensor) -> Tensor:
        parts: list[Callable[[], Tensor]] = [
            lambda: bk.elbo_logprob(m, b.ids, b.response, sample_ids=i, **DRAWING).mean(),
            lambda: m(input_ids=b.ids).logits.square().mean(),
        ]
        found = [f() for f in (parts if estimate_first else parts[::-1])]
        return found[0] + 0.5 * found[1]

    def both(m: nn.Module, b: Any, i: Tensor) -> dict[str, Tensor]:
        loss(m, b, i).backward()
        return gradients(m)

    assert_same_gradients(both(model, part, ids), both(one, batch, torch.arange(4)))


# --------------------------------------------------------------------------------------------------- ZeRO-3, FSDP1


@variants(*CALLS)
def zero3_imitated(call: Call) -> None:
    """The head's gradient arrives while its weight is there again; the ranks keep step."""
    want = expected(call)
    model = zero3.shard(llada(torch.float64))
    for _ in range(2):
        call(model, *mine(everything()), micro_batch_tokens=20 + 20 * rank())
        assert_same_gradients(zero3.gradients(model), want)


@check
def zero3_of_deepspeed() -> None:
    try:
        import deepspeed
        import deepspeed.comm.torch as backend
    except ImportError as error:
        raise Skipped("needs deepspeed") from error
    from deepspeed.utils import safe_get_full_grad

    backend.build_shm_op = lambda: None  # which would compile for a minute
    os.environ.update(LOCAL_RANK=str(rank()), LOCAL_SIZE="2", DS_ACCELERATOR="cpu")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    for call in CALLS:
        want = expected(call, llada())
        module = llada().train()
        engine = deepspeed.initialize(model=module, optimizer=torch.optim.SGD(module.parameters()), config=config)[0]
        call(engine, *mine(everything()), micro_batch_tokens=20 + 20 * rank())
        for name, p in module.named_parameters():
            torch.testing.assert_close(safe_get_full_grad(p), want[name], rtol=1e-4, atol=1e-5)


@variants(*CALLS)
def fsdp1_is_refused_but_for_scoring(call: Call) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    module, (batch, ids) = llada(torch.float64), mine(everything())
    policy = ModuleWrapPolicy({type(module.model.layers[0])})
    model = FSDP1(module, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    said = raises(ValueError, call, model, batch, ids)
    assert "Use FSDP2" in said, said
    options = {"sample_ids": ids, "per_sample": True} | DRAWING
    with torch.no_grad():
        found = bk.elbo_logprob(model, batch.ids, batch.response, micro_batch_tokens=20 + 20 * rank(), **options)
        want = bk.elbo_logprob(llada(torch.float64), batch.ids, batch.response, **options)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
