"""VRPO and TRL's DPO trainer on ELBO estimates, against restatements from all logits."""

from __future__ import annotations

import copy
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import models_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.integrations import vrpo
from bgpo_kernels.integrations._common import content_ids
from bgpo_kernels.models import HeadSpec

N, SEED = 6, 31
LENGTHS = torch.tensor([[4, 6], [5, 3]])  # completion lengths of two pairs: chosen, rejected
P = 3
DRAW: dict[str, Any] = {"n_mc": N, "seed": SEED}


def side(which: int, width: int = 9) -> dict[str, Tensor]:
    """Chosen (0) or rejected (1) sequences, padded on the right."""
    prompt = torch.randint(5, zoo.MASK, (2, P), generator=torch.Generator().manual_seed(1))
    answer = torch.randint(5, zoo.MASK, (2, width - P), generator=torch.Generator().manual_seed(2 + which))
    place, end = torch.arange(width), P + LENGTHS[:, which, None]
    ids = torch.where(place < end, torch.cat([prompt, answer], 1), 0)
    return {"ids": ids, "completion": ((place >= P) & (place < end)).long(), "attention": (place < end).long()}


def both() -> dict[str, Tensor]:
    """TRL 0.29's batch: chosen first."""
    one, two = side(0), side(1)
    return {name: torch.cat([one[name], two[name]]) for name in one}


def inputs() -> dict[str, Tensor]:
    data = both()
    return {
        "input_ids": data["ids"],
        "attention_mask": data["attention"],
        "completion_mask": data["completion"],
    }


def plain_elbos(model: torch.nn.Module, ids: Tensor, completion: Tensor, attention: Tensor, shift: int = 0) -> Tensor:
    """Mean estimates ``[B]`` from all logits, sequence by sequence without padding, on the masks of the seed."""
    found = []
    for b in range(len(ids)):
        real = attention[b].bool()
        clean, response = ids[b : b + 1, real], completion[b : b + 1, real].bool()
        draw = bk.random_mask(clean, response, mask_token_id=zoo.MASK, n_mc=N, seed=SEED, sample_ids=content_ids(clean))
        found.append(zoo.plain_scores(model, clean, response, draw, shift=shift).mean())
    return torch.stack(found)


def models(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Policy and reference."""
    policy = zoo.llada(dtype)
    return zoo.perturbed(copy.deepcopy(policy)), policy.requires_grad_(False)


def pair(model: torch.nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    chosen, rejected = side(0), side(1)
    return vrpo.pair_elbos(
        model, chosen["ids"], rejected["ids"], chosen["completion"], rejected["completion"],
        chosen_attention_mask=chosen["attention"], rejected_attention_mask=rejected["attention"], **DRAW | options,
    )  # fmt: skip


def logit(policy: torch.nn.Module, reference: torch.nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        old = pair(reference, **options)
    return vrpo.dpo_logit(*pair(policy, **options), *old)


def plain_logit(policy: torch.nn.Module, reference: torch.nn.Module, shift: int = 0) -> Tensor:
    data = both()
    sums = [plain_elbos(m, data["ids"], data["completion"], data["attention"], shift) for m in (policy, reference)]
    chosen, rejected = (sums[0] - sums[1]).chunk(2)
    return chosen - rejected


@pytest.mark.parametrize("shift", [0, 1])
def test_the_loss_and_its_gradients_are_those_of_all_logits(shift):
    policy, reference = models()
    heads = [HeadSpec(m.get_output_embeddings(), shift=shift) for m in (policy, reference)]
    with torch.no_grad():
        old = pair(reference, head=heads[1])
    ours = vrpo.dpo_logit(*pair(policy, head=heads[0]), *old)
    expected = plain_logit(policy, reference, shift)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)  # weights L/l are fp32
    found = []
    for value in (ours, expected):
        (-F.logsigmoid(0.2 * value)).mean().backward()
        found.append(zoo.take_gradients(policy))
    zoo.assert_same_gradients(*found, rtol=1e-5)


def test_fp32_is_as_good_as_torch():
    data = both()
    ours = torch.cat(pair(zoo.llada())).detach()
    args = data["ids"], data["completion"], data["attention"]
    plain = plain_elbos(zoo.llada(), *args).detach()
    assert_as_good_as_torch(ours, plain, plain_elbos(zoo.llada(torch.float64), *args).detach())


def test_policy_and_reference_meet_the_same_masks():
    """At equal weights the logit is exactly 0: every mask is shared, in training and under no_grad alike."""
    model = zoo.llada()
    assert torch.equal(logit(model, copy.deepcopy(model)), torch.zeros(2))
    assert not torch.equal(pair(model)[0], pair(model, seed=SEED + 1)[0])


def test_masks_do_not_depend_on_the_batch_its_order_or_the_global_state():
    model, chosen, state = zoo.llada(), side(0), torch.get_rng_state()
    whole = pair(model)[0]
    for order in ([1, 0], [1]):
        part = vrpo.sequence_elbos(
            model, chosen["ids"][order], chosen["completion"][order], attention_mask=chosen["attention"][order], **DRAW
        )
        torch.testing.assert_close(part, whole[order])
    wide = side(0, width=14)
    wide["ids"] = torch.where(wide["attention"].bool(), F.pad(side(0)["ids"], (0, 5)), 0)
    padded = vrpo.sequence_elbos(model, wide["ids"], wide["completion"], attention_mask=wide["attention"], **DRAW)
    torch.testing.assert_close(padded, whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_budget_goes_to_different_noise_levels():
    ids, response = side(0)["ids"][:1, :7], side(0)["completion"][:1, :7].bool()
    draw = bk.random_mask(ids, response, mask_token_id=zoo.MASK, n_mc=4, seed=0, sample_ids=content_ids(ids))
    assert draw.count.tolist() == [[1, 2, 3, 4]]


def test_explicit_masks_are_used_as_they_are():
    model, data = zoo.llada(), side(0)
    draw = bk.random_mask(data["ids"], data["completion"].bool(), mask_token_id=zoo.MASK, n_mc=3, seed=5)
    ours = vrpo.sequence_elbos(model, data["ids"], data["completion"], attention_mask=data["attention"], draw=draw)
    expected = bk.elbo_logprob(
        model, data["ids"], data["completion"].bool(), attention_mask=data["attention"], draw=draw
    )
    assert torch.equal(ours, expected)


def test_no_logits_are_made_and_the_graph_holds_numbers_only():
    model = zoo.llada()
    head = zoo.untouchable(model.get_output_embeddings())
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chosen, rejected = pair(model, head=head)
    assert max(kept, default=0) <= 4
    (chosen - rejected).sum().backward()
    assert zoo.take_gradients(model)


# TRL


def trainer(policy: torch.nn.Module, reference: torch.nn.Module | None, **changes: Any) -> SimpleNamespace:
    accelerator = SimpleNamespace(gather=lambda t: t, unwrap_model=lambda m: m)
    fields = {
        "model": policy, "ref_model": reference, "beta": 0.2, "loss_types": ["sigmoid"], "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl", "ld_alpha": None, "precompute_ref_logps": False, "pad_token_id": 0,
        "max_length": None, "truncation_mode": "keep_end", "accelerator": accelerator, "loss_type": ["sigmoid"],
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "args": SimpleNamespace(seed=SEED, rpo_alpha=None, ld_alpha=None, precompute_ref_log_probs=False),
        "state": SimpleNamespace(global_step=0),
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


def test_trl_loss_is_that_of_all_logits():
    policy, reference = models()
    self = trainer(policy, reference)
    ours = vrpo.compute_loss(self, policy, inputs(), False, n_mc=N)
    expected = -F.logsigmoid(0.2 * plain_logit(policy, reference)).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)
    found = []
    for value in (ours, expected):
        value.backward()
        found.append(zoo.take_gradients(policy))
    zoo.assert_same_gradients(*found, rtol=1e-4)
    logged = self._metrics["eval" if not policy.training else "train"]
    margin = logged["rewards/margins"][0]
    assert margin == pytest.approx(0.2 * float(plain_logit(policy, reference).detach().mean()), rel=1e-4)
    assert 0 <= logged["rewards/accuracies"][0] <= 1
    assert logged["rewards/chosen"][0] - logged["rewards/rejected"][0] == pytest.approx(margin, rel=1e-4)


def test_trl_ipo_divides_by_completion_lengths():
    policy, reference = models()
    data = both()
    ours = vrpo.compute_loss(trainer(policy, reference, loss_types=["ipo"]), policy, inputs(), False, n_mc=N)
    args = data["ids"], data["completion"], data["attention"]
    per_token = (plain_elbos(policy, *args) - plain_elbos(reference, *args)) / data["completion"].sum(-1)
    chosen, rejected = per_token.chunk(2)
    torch.testing.assert_close(ours, ((chosen - rejected - 1 / 0.4) ** 2).mean(), rtol=1e-5, atol=1e-8)


def test_trl_step_changes_the_masks_of_policy_and_reference_together():
    model = zoo.llada()
    first = trainer(model, copy.deepcopy(model))
    later = trainer(model, copy.deepcopy(model), state=SimpleNamespace(global_step=1))
    losses = [vrpo.compute_loss(self, model, inputs(), False, n_mc=N).detach() for self in (first, later)]
    half = torch.tensor(0.5).log().neg()
    for loss in losses:  # sigmoid(0) to the bit: shared masks
        torch.testing.assert_close(loss, half, rtol=1e-6, atol=0)
    assert first._metrics["eval"]["logps/chosen"] != later._metrics["eval"]["logps/chosen"]


def test_trl_reference_by_adapters_that_are_switched_off():
    policy, reference = models()
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    original = dict(reference.named_parameters())

    @contextmanager
    def disable_adapter():
        with torch.no_grad():
            for name, p in policy.named_parameters():
                p.copy_(original[name])
            yield
            for name, p in policy.named_parameters():
                p.copy_(weights[name])

    policy.disable_adapter = disable_adapter  # type: ignore[attr-defined]
    with torch.no_grad():
        ours = vrpo.compute_loss(trainer(policy, None), policy, inputs(), False, n_mc=N)
        expected = vrpo.compute_loss(trainer(policy, reference), policy, inputs(), False, n_mc=N)
    torch.testing.assert_close(ours, expected)


def test_trl_reference_by_an_adapter_of_its_own():
    policy, _ = models()
    active = []
    policy.peft_config = {"default": None, "ref": None}  # type: ignore[attr-defined]
    policy.active_adapter = "default"  # type: ignore[attr-defined]
    policy.set_adapter = active.append  # type: ignore[attr-defined]
    policy.disable_adapter = None  # type: ignore[attr-defined]
    with torch.no_grad():
        vrpo.compute_loss(trainer(policy, None), policy, inputs(), False, n_mc=N)
    assert active == ["ref", "default"]
    del policy.disable_adapter
    with pytest.raises(ValueError, match="no adapters to switch off: pass a ref_model"):
        vrpo.compute_loss(trainer(policy, None), policy, inputs(), False, n_mc=N)


def test_trl_precomputed_references_need_masks_that_stay():
    policy, reference = models()
    data, batch = both(), inputs()
    with torch.no_grad():
        known = vrpo.sequence_elbos(
            reference, data["ids"], data["completion"], attention_mask=data["attention"], **DRAW
        )
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = known.chunk(2)
    self = trainer(policy, None, precompute_ref_logps=True)
    ours = vrpo.compute_loss(self, policy, batch, False, **DRAW)
    expected = vrpo.compute_loss(trainer(policy, reference), policy, inputs(), False, **DRAW)
    torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="pass seed=, or switch precomputing off"):
        vrpo.compute_loss(self, policy, batch, False, n_mc=N)


def old_batch() -> dict[str, Tensor]:
    """TRL 0.24's batch: prompts padded on the left, completions on the right."""
    found = {}
    for name, which in (("chosen", 0), ("rejected", 1)):
        data = side(which)
        found[f"{name}_input_ids"] = data["ids"][:, P:]
        found[f"{name}_attention_mask"] = data["completion"][:, P:]
    found["prompt_input_ids"] = F.pad(side(0)["ids"][:, :P], (2, 0))
    found["prompt_attention_mask"] = (torch.arange(P + 2) >= 2).long().expand(2, -1)
    return found


def test_trl_concatenated_forward_gives_elbos():
    model = zoo.llada()
    found = vrpo.concatenated_forward(trainer(model, None), model, old_batch(), n_mc=N)
    chosen, rejected = pair(model)
    torch.testing.assert_close(found["chosen_logps"], chosen)
    torch.testing.assert_close(found["rejected_logps"], rejected)
    assert all(bool(found[f"mean_{name}_logits"].isnan()) for name in ("chosen", "rejected"))
    with torch.no_grad():
        again = vrpo.concatenated_forward(trainer(model, None), model, old_batch(), True, n_mc=N)
    assert torch.equal(again["chosen_logps"], found["chosen_logps"])


@pytest.mark.parametrize(("mode", "kept"), [("keep_end", slice(-7, None)), ("keep_start", slice(7))])
def test_trl_concatenated_forward_truncates_as_told(mode, kept):
    model = zoo.llada()
    self = trainer(model, None, max_length=7, truncation_mode=mode)
    found = vrpo.concatenated_forward(self, model, old_batch(), n_mc=N)["rejected_logps"][0]
    data = side(1)
    ids, completion = data["ids"][:1, : P + 6][:, kept], data["completion"][:1, : P + 6][:, kept]
    torch.testing.assert_close(found, vrpo.sequence_elbos(model, ids, completion, **DRAW)[0])


# Mistakes


def test_mistakes():
    model, data = zoo.llada(), side(0)
    with pytest.raises(ValueError, match=r"chosen_ids and rejected_ids must pair up, got 2 and 1"):
        vrpo.pair_elbos(model, data["ids"], data["ids"][:1], data["completion"], data["completion"][:1])
    with pytest.raises(TypeError, match=r"draw belong to one batch: call sequence_elbos"):
        pair(model, draw=None)
    with pytest.raises(ValueError, match=r"completion_mask must have shape \[2, 9\]"):
        vrpo.sequence_elbos(model, data["ids"], data["completion"][:, 1:])
    with pytest.raises(ValueError, match=r"ref_chosen must have shape \[2\] \(as chosen\), got \[3\]"):
        vrpo.dpo_logit(torch.zeros(2), torch.zeros(2), torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_types": ["hinge"]}, r"loss_type \['hinge'\] is not served here, but sigmoid, ipo"),
        ({"f_divergence_type": "forward_kl"}, r"f_divergence_type must be 'reverse_kl', got 'forward_kl'"),
        ({"ld_alpha": 0.5}, r"ld_alpha needs autoregressive log-probs"),
    ],
)
def test_trl_settings_that_are_refused(changes, message):
    model = zoo.llada()
    with pytest.raises(ValueError, match=message):
        vrpo.compute_loss(trainer(model, model, **changes), model, inputs(), False)
    with pytest.raises(ValueError, match=r"return_outputs=True is not served"):
        vrpo.compute_loss(trainer(model, model), model, inputs(), True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": SimpleNamespace(seed=0, rpo_alpha=1.0)}, r"rpo_alpha needs autoregressive log-probs"),
        ({"loss_type": ["sft"]}, r"loss_type 'sft' needs"),
        ({"use_weighting": True}, r"use_weighting needs logits"),
        ({"args": SimpleNamespace(seed=0, precompute_ref_log_probs=True)}, r"pass seed="),
    ],
)
def test_older_trl_settings_that_are_refused(changes, message):
    model = zoo.llada()
    with pytest.raises(ValueError, match=message):
        vrpo.concatenated_forward(trainer(model, model, **changes), model, old_batch())
