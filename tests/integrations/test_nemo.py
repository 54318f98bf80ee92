"""NeMo: Automodel's masked diffusion loss and GDPO's quadrature, against restatements from all logits."""

from __future__ import annotations

from typing import Any

import models_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.integrations import nemo
from bgpo_kernels.integrations._common import content_ids
from bgpo_kernels.models import HeadSpec

B, T, P = 3, 10, 3


def batch(seed: int = 6) -> dict[str, Tensor]:
    """What the recipe has after corruption: per-token probabilities, some noise outside the supervised part."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, zoo.MASK, (B, T), generator=generator)
    loss_mask = (torch.arange(T) >= P).long().expand(B, -1)
    p_mask = (0.1 + 0.9 * torch.rand(B, 1, generator=generator)).expand(B, T)
    noise = torch.rand(B, T, generator=generator) < p_mask
    noise[:, 0] = False
    return {"target_ids": clean, "noise_mask": noise, "p_mask": p_mask, "loss_mask": loss_mask}


def noisy(data: dict[str, Tensor]) -> Tensor:
    return torch.where(data["noise_mask"], zoo.MASK, data["target_ids"])


def logits_of(model: torch.nn.Module, data: dict[str, Tensor]) -> Tensor:
    output = model(input_ids=noisy(data))
    return getattr(output, "logits", output)


def plain_loss(logits: Tensor, data: dict[str, Tensor], count: int | None = None) -> Tensor:
    """Cross-entropy of every token, then mask and weight."""
    nll = F.cross_entropy(logits.flatten(0, 1), data["target_ids"].flatten(), reduction="none").view(B, T)
    mask = data["noise_mask"] & data["loss_mask"].bool()
    loss = (nll * mask * (1 / data["p_mask"].clamp(min=1e-8))).sum()
    return loss if count is None else loss / max(count, 1)


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return zoo.take_gradients(model)


@pytest.mark.parametrize("count", [None, 40, 0])
def test_the_loss_of_logits_is_that_of_all_tokens(count):
    model, data = zoo.llada(torch.float64), batch()
    ours = nemo.mdlm_loss(None, logits_of(model, data), **data, num_diffusion_tokens=count)
    expected = plain_loss(logits_of(model, data), data, count)
    torch.testing.assert_close(ours.total_loss, expected, rtol=1e-10, atol=0)
    assert torch.equal(ours.dllm_loss, ours.total_loss.detach()) and not ours.dllm_loss.requires_grad
    zoo.assert_same_gradients(gradients(model, ours.total_loss), gradients(model, expected), rtol=1e-8)


@pytest.mark.parametrize(("build", "shift"), [(zoo.llada, 0), (zoo.llada, 1), (zoo.bert, 0)])
def test_the_forward_and_its_loss_without_logits(build, shift):
    model, data = build(torch.float64), batch()
    head = HeadSpec(model.get_output_embeddings(), shift=shift)
    ours = nemo.mdlm_forward_loss(model, {"input_ids": noisy(data)}, **data, num_diffusion_tokens=40, head=head)
    expected = plain_loss(logits_of(model, data).roll(shift, 1), data, 40)
    torch.testing.assert_close(ours.total_loss, expected, rtol=1e-10, atol=0)
    zoo.assert_same_gradients(gradients(model, ours.total_loss), gradients(model, expected), rtol=1e-8)


def test_hidden_states_in_place_of_logits():
    model, data = zoo.llada(torch.float64), batch()
    hidden = model(input_ids=noisy(data), output_hidden_states=True).hidden_states[-1]
    module = model.get_output_embeddings()
    for head in (module, HeadSpec(module)):
        ours = nemo.mdlm_loss(None, hidden, **data, num_diffusion_tokens=40, head=head)
        torch.testing.assert_close(ours.total_loss, plain_loss(logits_of(model, data), data, 40), rtol=1e-10, atol=0)


def test_fp32_is_as_good_as_torch():
    batches, single, double = [batch(seed) for seed in range(30)], zoo.llada(), zoo.llada(torch.float64)
    ours = [nemo.mdlm_forward_loss(single, {"input_ids": noisy(x)}, **x).dllm_loss for x in batches]
    plain, exact = ([plain_loss(logits_of(m, x), x).detach() for x in batches] for m in (single, double))
    assert_as_good_as_torch(torch.stack(ours), torch.stack(plain), torch.stack(exact))


def test_logits_of_16_bits_are_scored_in_fp32():
    data = batch()
    half = torch.randn(B, T, zoo.V, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = nemo.mdlm_loss(None, half, **data).total_loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss(half.float(), data))


def test_no_logits_are_made_and_the_graph_has_rows_of_the_head_only():
    model, data = zoo.llada(vocab_size=997), batch()
    kept: list[int] = []
    head = zoo.untouchable(model.get_output_embeddings())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = nemo.mdlm_forward_loss(model, {"input_ids": noisy(data)}, **data, head=head).total_loss
    assert gradients(model, loss)
    weights = {p.numel() for p in model.parameters()}
    rows = int((data["noise_mask"] & data["loss_mask"].bool()).sum())
    assert max(n for n in kept if n not in weights) < rows * 997


def test_probabilities_near_zero_are_clamped_and_no_row_is_a_zero_with_gradients():
    model, data = zoo.llada(torch.float64), batch()
    data["p_mask"] = torch.zeros(B, T)
    ours = nemo.mdlm_loss(None, logits_of(model, data), **data).total_loss
    torch.testing.assert_close(ours, plain_loss(logits_of(model, data), data), rtol=1e-6, atol=0)
    data["noise_mask"] = torch.zeros(B, T, dtype=torch.bool)
    for loss in (
        nemo.mdlm_loss(None, logits_of(model, data), **data).total_loss,
        nemo.mdlm_forward_loss(model, {"input_ids": noisy(data)}, **data, num_diffusion_tokens=0).total_loss,
    ):
        assert float(loss.detach()) == 0.0
        found = gradients(model, loss)
        assert found and all(float(g.abs().max()) == 0.0 for g in found.values())


def test_a_clean_token_that_is_the_mask_token_is_not_scored():
    model, data = zoo.llada(torch.float64), batch()
    data["target_ids"] = torch.where(data["noise_mask"], data["target_ids"], zoo.MASK)
    ours = nemo.mdlm_forward_loss(model, {"input_ids": noisy(data)}, **data).total_loss
    torch.testing.assert_close(ours, plain_loss(logits_of(model, data), data), rtol=1e-10, atol=0)


def test_a_dtensor_of_logits_is_gathered():
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    if distributed.is_initialized():
        pytest.skip("a process group of another test is alive")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        data = batch()
        logits = torch.randn(B, T, zoo.V, generator=torch.Generator().manual_seed(0))
        sharded = tensor.distribute_tensor(logits, mesh, [tensor.Shard(2)])
        ours = nemo.mdlm_loss(None, sharded, **data).total_loss
        torch.testing.assert_close(ours, plain_loss(logits, data))
    finally:
        distributed.destroy_process_group()


# GDPO


def sequences() -> tuple[Tensor, Tensor]:
    return zoo.make_batch(3, T).ids, zoo.make_batch(3, T).response


OPTIONS: dict[str, Any] = {"mask_token_id": zoo.MASK, "seed": 4}


def gdpo_draw(nodes: int = 3, weight: str = "nominal", each: int = 1, order: Any = slice(None)) -> bk.MaskDraw:
    ids, response = (x[order] for x in sequences())
    t, w = nemo.gauss_legendre(nodes)
    return nemo.draw_masks(ids, response, t, w, zoo.MASK, 4, content_ids(ids), weight=weight, masks_per_node=each)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_quadrature_integrates_polynomials_exactly(nodes):
    t, w = nemo.gauss_legendre(nodes)
    assert bool(((t > 0) & (t < 1)).all()) and bool((t.diff() > 0).all())
    for power in range(2 * nodes):
        assert float((w * t**power).sum()) == pytest.approx(1 / (power + 1), rel=1e-12)


@pytest.mark.parametrize("weight", ["nominal", "realised"])
@pytest.mark.parametrize("shift", [0, 1])
def test_gdpo_is_the_quadrature_of_all_logits(weight, shift):
    model, (ids, response) = zoo.llada(torch.float64), sequences()
    head = HeadSpec(model.get_output_embeddings(), shift=shift)
    ours = nemo.gdpo_elbo(model, ids, response, weight=weight, masks_per_node=2, head=head, **OPTIONS)
    drawn, (t, w) = gdpo_draw(weight=weight, each=2), nemo.gauss_legendre(3)
    scores = zoo.plain_scores(model, ids, response, drawn, shift=shift) / drawn.segment_weight
    length, count = response.sum(-1, keepdim=True), drawn.count
    t, w = t.repeat_interleave(2), w.repeat_interleave(2) / 2
    assert torch.equal(count.long(), (t * length).floor().long().clamp(min=1))
    per_token = (w / t).expand(3, -1) if weight == "nominal" else w * length / count
    expected = (scores * per_token.float()).sum(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    found = [gradients(model, (x * torch.tensor([1.0, -2.0, 0.5])).sum()) for x in (ours, expected)]
    zoo.assert_same_gradients(*found, rtol=1e-7)


def test_gdpo_nodes_of_your_own():
    model, (ids, response) = zoo.llada(), sequences()
    ours = nemo.gdpo_elbo(model, ids, response, nodes=[0.5, 1.0], weights=torch.tensor([0.75, 0.25]), **OPTIONS)
    half, whole = (
        nemo.gdpo_elbo(model, ids, response, nodes=[t], weights=[w], sample_ids=content_ids(ids), **OPTIONS)
        for t, w in ((0.5, 0.75), (1.0, 0.25))
    )
    assert bool((half != whole).all())
    full = bk.elbo_logprob(model, ids, response, scheme="full", n_mc=1, seed=0, mask_token_id=zoo.MASK)
    torch.testing.assert_close(whole, 0.25 * full)
    drawn = nemo.draw_masks(ids, response, torch.tensor([0.5, 1.0]), torch.ones(2), zoo.MASK, 4, content_ids(ids))
    lengths = response.sum(-1)
    assert drawn.count.tolist() == [[int(n) // 2, int(n)] for n in lengths]
    assert ours.shape == (3,)


def test_gdpo_masks_are_those_of_random_mask_at_equal_counts():
    """Same stream: a law that always gives the same count draws the same subsets."""
    ids, response = sequences()
    drawn = nemo.draw_masks(ids, response, torch.tensor([1.0]), torch.ones(1), zoo.MASK, 4, torch.arange(3))
    full = bk.random_mask(ids, response, mask_token_id=zoo.MASK, n_mc=1, seed=4, scheme="full")
    assert torch.equal(drawn.noisy_ids, full.noisy_ids)
    uniform = bk.random_mask(ids, response, mask_token_id=zoo.MASK, n_mc=7, seed=4)
    for b in range(3):
        for j in range(7):
            share = (float(uniform.count[b, j]) + 0.5) / float(response[b].sum())
            nodes = torch.full((7,), min(share, 1.0))
            mine = nemo.draw_masks(ids, response, nodes, torch.ones(7), zoo.MASK, 4, torch.arange(3))
            assert torch.equal(mine.noisy_ids[b, j], uniform.noisy_ids[b, j])


def test_gdpo_masks_are_shared_and_do_not_depend_on_the_batch():
    model, (ids, response), state = zoo.llada(), sequences(), torch.get_rng_state()
    with torch.no_grad():
        old = nemo.gdpo_elbo(model, ids, response, **OPTIONS)
    assert torch.equal(nemo.gdpo_elbo(model, ids, response, **OPTIONS).detach(), old)
    for order in ([2, 0, 1], [1]):
        assert torch.equal(gdpo_draw(order=order).noisy_ids, gdpo_draw().noisy_ids[order])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(nemo.gdpo_elbo(model, ids, response, mask_token_id=zoo.MASK, seed=5).detach(), old)
    explicit = nemo.gdpo_elbo(model, ids, response, draw=gdpo_draw())
    torch.testing.assert_close(explicit.detach(), old)


def test_gdpo_graph_holds_numbers_only_and_makes_no_logits():
    model, (ids, response) = zoo.llada(), sequences()
    head = zoo.untouchable(model.get_output_embeddings())
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        value = nemo.gdpo_elbo(model, ids, response, nodes=9, head=head, **OPTIONS)
    assert max(kept, default=0) <= 3 * 9
    assert gradients(model, value.sum())


# Mistakes


def test_mistakes_in_the_loss():
    model, data = zoo.llada(), batch()
    logits = torch.zeros(B, T, zoo.V)
    with pytest.raises(ValueError, match=r"causal_logits, the autoregressive term"):
        nemo.mdlm_loss(None, logits, **data, causal_logits=logits)
    with pytest.raises(ValueError, match=r"p_mask must have shape \[3, 10\] \(B, T\), got \[3, 9\]"):
        nemo.mdlm_loss(None, logits, **data | {"p_mask": data["p_mask"][:, 1:]})
    with pytest.raises(ValueError, match=r"logits must have shape \[B, T, V\], got \[30, 61\]"):
        nemo.mdlm_loss(None, logits.flatten(0, 1), **data)
    with pytest.raises(ValueError, match=r"target_ids must be in \[0, 7\)"):
        nemo.mdlm_loss(None, logits[..., :7], **data)
    with pytest.raises(ValueError, match=r"batch must hold input_ids, the noisy ones; got labels"):
        nemo.mdlm_forward_loss(model, {"labels": noisy(data)}, **data)
    first = data["noise_mask"].clone()
    first[:, 0] = True
    everything = torch.ones(B, T, dtype=torch.int64)
    head = HeadSpec(model.get_output_embeddings(), shift=1)
    with pytest.raises(ValueError, match=r"row i-1 predicts token i"):
        nemo.mdlm_forward_loss(
            model, {"input_ids": noisy(data)}, **data | {"noise_mask": first, "loss_mask": everything}, head=head
        )


def test_mistakes_in_the_quadrature():
    model, (ids, response) = zoo.Plain(), sequences()
    options = {"head": model.out}
    for given, message in (
        ({"nodes": 0}, r"nodes must be at least 1, got 0"),
        ({"nodes": 3, "weights": [1.0]}, r"weights need the nodes they belong to"),
        ({"nodes": [0.5]}, r"weights are missing"),
        ({"nodes": [0.5, 0.6], "weights": [1.0]}, r"nodes and weights must be as many, got 2 and 1"),
        ({"nodes": [0.0], "weights": [1.0]}, r"nodes must be in \(0, 1\]"),
        ({"weight": "no"}, r"weight must be 'nominal' \(w/t\) or 'realised'"),
        ({"masks_per_node": 0}, r"masks_per_node must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            nemo.gdpo_elbo(model, ids, response, **OPTIONS | options | given)
    with pytest.raises(ValueError, match=r"mask_token_id is missing"):
        nemo.gdpo_elbo(model, ids, response, **options)
