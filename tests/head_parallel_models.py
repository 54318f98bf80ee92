"""Checks of whole models whose head is cut over two ranks; run by head_parallel_worker.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_zoo as zoo
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from head_parallel_common import assert_same_on_every_rank, checks, cut, mesh, rank
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleOutput, parallelize_module
from transformers import LlamaForCausalLM

import bgpo_kernels as bk
from bgpo_kernels.estimators import micro_batch
from bgpo_kernels.head.parallel import shard_of


def full(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def assert_model_matches(make: Callable[[], nn.Module], parallelize: Callable[[nn.Module], Any], **options) -> None:
    """All three calls, against the same calls on the model in one piece."""

    batch = zoo.make_batch()
    for call in (zoo.by_elbo, zoo.by_bgpo, zoo.by_replay):
        plain, parallel = make(), make()
        parallelize(parallel)
        heads = [{"head": m.out} if isinstance(m, zoo.Plain) else {} for m in (plain, parallel)]
        expected = zoo.gradients_of(call, plain, batch, micro_batch_tokens=40, **options, **heads[0])
        got = full(zoo.gradients_of(call, parallel, batch, micro_batch_tokens=40, **options, **heads[1]))
        zoo.assert_same_gradients(got, expected)


def colwise(name: str, **layouts: Any) -> Callable[[nn.Module], Any]:

    return lambda model: parallelize_module(model, mesh(), {name: ColwiseParallel(**layouts)})


@checks("replicated output", "sharded output", "DTensor output")
def a_model_whose_head_is_column_parallel(label: str) -> None:

    layouts = {"output_layouts": Shard(-1) if label == "sharded output" else Replicate()}
    layouts |= {"use_local_output": False} if label == "DTensor output" else {}
    assert_model_matches(lambda: zoo.llada(torch.float64), colwise("lm_head", **layouts))


@checks()
def a_head_with_bias() -> None:

    def frozen() -> nn.Module:
        model = zoo.Plain(torch.float64)
        model.out.weight.requires_grad_(False)
        return model

    for make in (lambda: zoo.Plain(torch.float64), frozen):
        assert_model_matches(make, colwise("out", output_layouts=Replicate()))


@checks()
def sequence_parallel_hidden_states() -> None:
    """The plan of the head gathers them; the gradient goes back to each rank's part."""

    class Mixed(zoo.Plain):
        def __init__(self) -> None:
            super().__init__(torch.float64)
            self.last = nn.Identity()
            self.after = lambda logits: logits

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            neighbours = x.roll(1, dims=1) - 0.5 * x.roll(-1, dims=1)
            x = torch.tanh(self.mix(x + neighbours) + x.mean(dim=1, keepdim=True))
            return self.out(self.last(x))

    def plan(model: nn.Module) -> None:
        shard = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=True)
        parallelize_module(model, mesh(), {"last": shard})
        colwise("out", input_layouts=Shard(1), output_layouts=Replicate())(model)

    assert_model_matches(Mixed, plan)


@checks()
def scores_agree_to_the_bit() -> None:
    """Old policy, new policy and every rank: the same bits, so the ratio is exactly 1."""

    batch, model = zoo.make_batch(), zoo.llada()
    colwise("lm_head", output_layouts=Replicate())(model)
    options = zoo.DRAWING | {"micro_batch_tokens": 40}
    with torch.no_grad():
        old = bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **options)
    assert_same_on_every_rank(old)
    step = bk.bgpo_backward(model, batch.ids, batch.response, batch.advantages, old_logprob=old, **options)
    assert torch.equal(step.logprob, old) and step.stats.max_abs_log_ratio == 0


@checks()
def a_head_of_local_shards() -> None:
    """A module that holds this rank's rows and says so by HeadSpec alone, as Megatron's does."""
    group, batch = dist.group.WORLD, zoo.make_batch()
    for call in (zoo.by_elbo, zoo.by_bgpo, zoo.by_replay, _by_rows):
        plain, local = zoo.Plain(torch.float64, vocabulary=62), zoo.Plain(torch.float64, vocabulary=62)
        for name, parameter in list(local.out.named_parameters()):
            local.out.register_parameter(name, nn.Parameter(parameter.detach().chunk(2)[rank()].clone()))
        expected = zoo.gradients_of(call, plain, batch, head=plain.out)
        got = zoo.gradients_of(call, local, batch, head=bk.models.HeadSpec(local.out, tp_group=group))
        mine = {name: g.chunk(2)[rank()] if name.startswith("out.") else g for name, g in expected.items()}
        zoo.assert_same_gradients(got, mine)


def _by_rows(model: nn.Module, batch: zoo.Batch, head: Any) -> None:
    logp, entropy = bk.row_logprob(model, batch.ids, batch.response, batch.ids, return_entropy=True, head=head)
    (logp.sum() + entropy.square().sum()).backward()


@checks("a DTensor", "local shards")
def ranks_that_would_choose_other_sizes(kind: str) -> None:
    """Free memory differs by GPU: all take the smallest guess, and what fails on one rank fails on both."""

    batch = zoo.make_batch()
    plain, model = (zoo.Plain(torch.float64, vocabulary=62) for _ in range(2))
    if kind == "a DTensor":
        colwise("out", output_layouts=Replicate())(model)
        head: Any = model.out
    else:
        for name, parameter in list(model.out.named_parameters()):
            model.out.register_parameter(name, nn.Parameter(parameter.detach().chunk(2)[rank()].clone()))
        head = bk.models.HeadSpec(model.out, tp_group=dist.group.WORLD)
    guesses = pytest.MonkeyPatch()
    guesses.setattr(micro_batch, "_first_guess", lambda _: (20, 60)[rank()])
    try:
        for call in (zoo.by_elbo, zoo.by_bgpo, zoo.by_replay):
            expected = zoo.gradients_of(call, plain, batch, head=plain.out)
            micro_batch._learned.clear()
            got = zoo.gradients_of(call, model, batch, head=head)
            assert_same_on_every_rank(got["mix.weight"])
            torch.testing.assert_close(got["mix.weight"], expected["mix.weight"], rtol=1e-9, atol=1e-12)
        if rank() == 1:
            guesses.setattr(micro_batch, "_assert_finite", _raise)
        model.zero_grad(set_to_none=True)
        with pytest.raises(FloatingPointError, match="on this rank alone" if rank() == 1 else "rank 1 failed"):
            zoo.by_bgpo(model, batch, head=head)
        assert all(p.grad is None for p in model.parameters())
    finally:
        guesses.undo()


def _raise(_: Any) -> None:
    raise FloatingPointError("on this rank alone")


@checks()
def sixteen_bit_parameters() -> None:
    """dW of a bf16 head goes through one fp32 accumulator, here of this rank's rows."""

    batch = zoo.make_batch()
    found = []
    for model in (zoo.Plain(torch.bfloat16), zoo.Plain(torch.bfloat16), zoo.Plain(torch.float64)):
        if not found:
            colwise("out", output_layouts=Replicate())(model)
        found.append(zoo.as_one(full(zoo.gradients_of(zoo.by_bgpo, model, batch, head=model.out))))
    assert_as_good_as_torch(*found)


@checks()
def transformers_own_plan() -> None:
    """from_pretrained(tp_plan="auto"): every layer parallel, the head's forward wrapped by transformers."""

    folder = Path(sys.argv[2]) / "checkpoint"
    if rank() == 0:
        zoo.llada(torch.float64).save_pretrained(folder)
    dist.barrier()

    parallel = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    for module in parallel.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # computes in fp32 whatever the model's dtype
            module.forward = lambda x, m=module: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    parallel = bk.models.make_bidirectional(parallel).eval()
    batch, plain = zoo.make_batch(), zoo.llada(torch.float64)
    assert isinstance(parallel.model.layers[0].mlp.up_proj.weight, DTensor)
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4.57 leaves the head whole
        assert isinstance(parallel.lm_head.weight, DTensor)
    for call in (zoo.by_elbo, zoo.by_bgpo, zoo.by_replay):
        expected = zoo.gradients_of(call, plain, batch, micro_batch_tokens=40)
        zoo.assert_same_gradients(full(zoo.gradients_of(call, parallel, batch, micro_batch_tokens=40)), expected)


@checks()
def chosen_rows_of_a_model() -> None:

    batch, plain, parallel = zoo.make_batch(), zoo.llada(torch.float64), zoo.llada(torch.float64)
    colwise("lm_head", output_layouts=Replicate())(parallel)
    found = []
    for model in (plain, parallel):
        logp, entropy = bk.row_logprob(model, batch.ids, batch.response, batch.ids, return_entropy=True)
        (logp.sum() + entropy.square().sum()).backward()
        found.append((logp.detach(), entropy.detach(), full(zoo.take_gradients(model))))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-11, atol=1e-12)
    zoo.assert_same_gradients(found[1][2], found[0][2])


@checks()
def a_patched_model() -> None:
    """The plan's output hooks would gather log-probabilities as if they were logits, so patch refuses such a head."""

    batch, model = zoo.make_batch(), zoo.llada(torch.float64)
    colwise("lm_head", output_layouts=Replicate())(model)
    with pytest.raises(ValueError, match=r"tensor-parallel head.*use row_logprob"), bk.patch(model, batch.ids):
        model(batch.ids)


@checks()
def models_that_are_refused() -> None:

    for placement in (Shard(1), Replicate()):
        model = zoo.Plain()
        model.out.weight = nn.Parameter(distribute_tensor(model.out.weight.data, mesh(), [placement]))
        with pytest.raises(ValueError, match=r"the weight of the head of Plain, .* is a DTensor with"):
            bk.models.find_head(model, model.out)
    assert shard_of("weight", cut(torch.zeros(5, 2))).largest == 3
