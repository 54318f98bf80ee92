"""Every mistake is refused before a forward runs, by an error that names the argument and shows what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_zoo import (
    MASK,
    Plain,
    V,
    bert,
    llada,
    make_batch,
    seed,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import bgpo_kernels as bk
from bgpo_kernels.models import HeadSpec

BATCH = make_batch()
IDS, RESPONSE, ADVANTAGES = BATCH
B, T, N = 3, 10, 4


def by_bgpo(model: Any, input_ids: Any = IDS, response_mask: Any = RESPONSE, **options: Any) -> None:
    advantages = options.pop("advantages", ADVANTAGES)
    bk.bgpo_backward(model, input_ids, response_mask, advantages, **{"n_mc": N} | options)


def by_replay(model: Any, input_ids: Any = IDS, response_mask: Any = RESPONSE, **options: Any) -> None:
    bk.replay_backward(model, input_ids, response_mask, Tensor.sum, **{"n_mc": N} | options)


def by_elbo(model: Any, input_ids: Any = IDS, response_mask: Any = RESPONSE, **options: Any) -> None:
    bk.elbo_logprob(model, input_ids, response_mask, **{"n_mc": N} | options)


Call = Callable[..., None]
every_call = pytest.mark.parametrize("call", [by_bgpo, by_replay, by_elbo], ids=["bgpo", "replay", "elbo"])


def never_run(model: nn.Module) -> nn.Module:
    """The model, which fails the test when its forward is called."""

    def fail(*_: Any) -> None:
        raise AssertionError("a forward ran")

    bk.models.assume_bidirectional(model)
    model.register_forward_pre_hook(fail)
    return model


def edited(tensor: Tensor, place: tuple[int, ...], value: Any) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def causal(model: nn.Module) -> nn.Module:
    """A Llama as transformers makes it."""
    with seed(0):
        return LlamaForCausalLM(type(model.config)(**model.config.to_dict() | {"is_causal": True}))


# ------------------------------------------------------------------------------- what all three calls have in common

ATTENDED = torch.ones(B, T, dtype=torch.int64)
DRAW = bk.random_mask(IDS, RESPONSE, mask_token_id=MASK, n_mc=N, seed=0)


def remade(**fields: Any) -> bk.MaskDraw:
    names = ("noisy_ids", "rows", "targets", "segment_offsets", "segment_weight", "count")
    return bk.MaskDraw(**{name: getattr(DRAW, name) for name in names} | fields)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ids are a list": ({"input_ids": IDS.tolist()}, TypeError, r"input_ids must be a torch\.Tensor, got list"),
    "ids of int32": ({"input_ids": IDS.int()}, TypeError, "input_ids must be int64, got int32"),
    "ids of one dimension": ({"input_ids": IDS[0]}, ValueError, r"input_ids must have shape \[B, T\], got \[10\]"),
    "no sequence": ({"input_ids": IDS[:0], "response_mask": RESPONSE[:0]}, ValueError, r"holds no .*\[0, 10\]"),
    "mask of int": ({"response_mask": RESPONSE.long()}, TypeError, "response_mask must be bool, got int64"),
    "mask of other shape": ({"response_mask": RESPONSE[:, 1:]}, ValueError, r"response_mask must have .*\[3, 9\]"),
    "no response": ({"response_mask": edited(RESPONSE, (1,), False)}, ValueError, r"no True in row\(s\) \[1\]"),
    "response holds the mask": ({"input_ids": edited(IDS, (2, 7), MASK)}, ValueError, r"\(s\) \[2\] .*mask token 60"),
    "response id outside V": ({"input_ids": edited(IDS, (0, 5), V + 2)}, ValueError, "id 63 .*vocabulary of 61"),
    "prompt id outside V": ({"input_ids": edited(IDS, (0, 1), V)}, ValueError, r"input_ids must be in \[0, 61\).*61"),
    "negative id": ({"input_ids": edited(IDS, (1, 0), -100)}, ValueError, r"input_ids must be in .*\[-100\] at"),
    "sample ids of int32": ({"sample_ids": torch.arange(3).int()}, TypeError, "sample_ids must be int64, got int32"),
    "too many sample ids": ({"sample_ids": torch.arange(4)}, ValueError, r"sample_ids must have shape \[3\].*\[4\]"),
    "attention mask is a list": ({"attention_mask": [1]}, TypeError, r"attention_mask must be a torch\.Tensor"),
    "attention mask of one row": ({"attention_mask": ATTENDED[0]}, ValueError, r"attention_mask .*\[3, 10\].*\[10\]"),
    "additive attention mask": (
        {"attention_mask": torch.zeros(B, T).fill_(-1e9)}, ValueError, "0 and 1 only; additive masks",
    ),
    "response on padding": (
        {"attention_mask": edited(ATTENDED, (1, 8), 0)}, ValueError, r"marks padding .* row\(s\) \[1\]",
    ),
    "no sample": ({"n_mc": 0}, ValueError, "n_mc must be at least 1, got 0"),
    "n_mc a string": ({"n_mc": "4"}, TypeError, "n_mc must be an int, got str"),
    "n_mc a bool": ({"n_mc": True}, TypeError, "n_mc must be an int, got bool"),
    "odd n for pairs": ({"n_mc": 3, "scheme": "coupled"}, ValueError, "n_mc must be even; got 3"),
    "negative seed": ({"seed": -1}, ValueError, "seed must be in"),
    "seed too large": ({"seed": 2**64}, ValueError, "seed must be in"),
    "unknown scheme": ({"scheme": "antithetic"}, ValueError, "scheme must be one of exact, .*got 'antithetic'"),
    "unknown schedule": ({"schedule": "linear"}, ValueError, "schedule must be one of .*got 'linear'"),
    "schedule does not fit": ({"scheme": "bernoulli", "schedule": "harmonic"}, ValueError, "not 'harmonic'"),
    "mask id a string": ({"mask_token_id": "[MASK]"}, TypeError, "mask_token_id must be an int, got str"),
    "negative mask id": ({"mask_token_id": -1}, ValueError, "mask_token_id must be .*got -1"),
    "mask id of another model": ({"mask_token_id": MASK - 1}, ValueError, "mask_token_id 59 disagrees with .* 60"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
    "temperature a tensor": ({"temperature": torch.ones(1)}, TypeError, "temperature must be a number, got Tensor"),
    "tokens 0": ({"micro_batch_tokens": 0}, ValueError, "micro_batch_tokens must be at least 1, got 0"),
    "tokens a float": ({"micro_batch_tokens": 64.0}, TypeError, "micro_batch_tokens must be an int, got float"),
    "unknown backend": ({"backend": "mps"}, ValueError, "backend must be one of auto.*got 'mps'"),
    "backend of another device": ({"backend": "cuda"}, ValueError, "serves CUDA tensors, not cpu"),
    "draw is no draw": ({"draw": DRAW.noisy_ids}, TypeError, "draw must be a MaskDraw, got Tensor"),
    "draw of another batch": (
        {"input_ids": IDS[:2], "response_mask": RESPONSE[:2], "advantages": ADVANTAGES[:2], "draw": DRAW},
        ValueError, r"draw\.noisy_ids must have shape \[2, n, 10\].*got \[3, 4, 10\]",
    ),
    "draw of a word outside V": (
        {"draw": remade(targets=edited(DRAW.targets, (4,), V))}, ValueError, "response id 61 .*vocabulary of 61",
    ),
    "draw of an input outside V": (
        {"draw": remade(noisy_ids=edited(DRAW.noisy_ids, (0, 0, 0), V))}, ValueError, r"draw\.noisy_ids must .*\[61\]",
    ),
    "draw outside the response": (
        {"response_mask": edited(RESPONSE, (0, 5), False), "draw": DRAW}, ValueError, r"draw\.rows .* not marked in",
    ),
}  # fmt: skip


@every_call
@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=list(WRONG))
def test_arguments(call: Call, options: dict[str, Any], error: type[Exception], message: str) -> None:
    if call is not by_bgpo:
        options = {name: value for name, value in options.items() if name != "advantages"}
    model = never_run(llada())
    with pytest.raises(error, match=message):
        call(model, **options)
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------- models


@every_call
def test_causal_models_are_refused(call: Call) -> None:
    model = causal(llada())
    with pytest.raises(ValueError, match="LlamaForCausalLM is causal"):
        call(model)
    assert "forward" not in vars(model.lm_head)


@every_call
def test_a_model_that_became_causal_is_refused(call: Call) -> None:
    model = llada()
    call(model)
    model.config.is_causal = True
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    with pytest.raises(ValueError, match="is causal"):
        call(model)


@every_call
def test_mask_token_must_be_known(call: Call) -> None:
    model = never_run(bert(mask_token_id=None))
    with pytest.raises(ValueError, match=r"mask_token_id 61 is outside .* 61 rows"):
        call(model, mask_token_id=V)
    with pytest.raises(ValueError, match="mask_token_id is missing: the model's config has none"):
        call(model)


@every_call
def test_things_that_are_no_model_or_have_no_head(call: Call) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        call("bert-base-uncased")
    with pytest.raises(ValueError, match=r"Plain has no get_output_embeddings\(\) .*pass head=HeadSpec"):
        call(never_run(Plain()), mask_token_id=MASK)
    model = never_run(Plain())
    with pytest.raises(TypeError, match=r"head must be a torch\.nn\.Module or a HeadSpec, got Parameter"):
        call(model, head=model.out.weight)
    with pytest.raises(ValueError, match=r"not a plain torch\.nn\.Linear"):
        call(model, head=model.embed)


@every_call
def test_heads_under_adapters_are_refused(call: Call) -> None:
    class LoraLinear(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

    model = never_run(llada())
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        call(model)


@every_call
def test_a_head_that_is_not_the_models(call: Call) -> None:
    other = nn.Linear(16, V)
    with pytest.raises(RuntimeError, match="did not call the head"):
        call(llada(), head=other)


@every_call
def test_conventions_that_are_not_the_models(call: Call) -> None:
    model = llada()
    with pytest.raises(ValueError, match=r"logit_scale=0\.5"):
        call(model, head=HeadSpec(model.lm_head, logit_scale=0.5))


@every_call
@pytest.mark.parametrize("padding", [0, 2])
def test_a_shifted_head_cannot_predict_the_first_token(call: Call, padding: int) -> None:
    """Nor the first real token behind padding, whose row would be the padding's, or the previous sample's last."""
    model = never_run(Plain())
    response = torch.zeros_like(RESPONSE)
    response[:, padding:] = True
    attended = torch.ones_like(IDS)
    attended[1, :padding] = 0
    with pytest.raises(ValueError, match=r"response cannot start at the first token.*row\(s\) \[(0, )?1"):
        call(
            model, response_mask=response, attention_mask=attended, head=HeadSpec(model.out, shift=1),
            mask_token_id=MASK,
        )  # fmt: skip


@every_call
def test_mixed_dtypes_need_autocast(call: Call) -> None:
    model = Plain()
    model.out.bfloat16()
    with pytest.raises(TypeError, match=r"hidden states are torch\.float32 but its head's weight is torch\.bfloat16"):
        call(model, head=model.out, mask_token_id=MASK)
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------- what belongs to one call alone

OLD = torch.zeros(B, N)
WRONG_BOUND: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "advantages are a list": ({"advantages": [1.0, 2.0, 3.0]}, TypeError, r"advantages must be .*Tensor, got list"),
    "advantages of int": ({"advantages": torch.ones(B).int()}, TypeError, "advantages must be float32 .*got int32"),
    "advantages per sample": ({"advantages": torch.ones(B, N)}, ValueError, r"advantages must have .*\[3, 4\]"),
    "NaN advantage": ({"advantages": edited(ADVANTAGES, (1,), torch.nan)}, ValueError, r"advantages .*at \[\[1\]\]"),
    "infinite advantage": ({"advantages": edited(ADVANTAGES, (0,), torch.inf)}, ValueError, "advantages .*inf"),
    "old of other shape": ({"old_logprob": OLD[:, 1:]}, ValueError, r"old_logprob must have shape \[3, 4\].*\[3, 3\]"),
    "old by sequence": ({"old_logprob": OLD[:, 0]}, ValueError, r"old_logprob must have shape \[3, 4\].*\[3\]"),
    "old of bf16": ({"old_logprob": OLD.bfloat16()}, TypeError, "old_logprob must be float32 or float64, got bfloat16"),
    "NaN in old": ({"old_logprob": edited(OLD, (2, 1), torch.nan)}, ValueError, r"old_logprob .*non-finite.*\[2, 1\]"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer must be finite and above 0"),
    "negative clip": ({"clip_range": -0.1}, ValueError, r"clip_range \(low\) must be"),
    "clip of three": ({"clip_range": (0.1, 0.2, 0.3)}, ValueError, "clip_range must be a number or a pair"),
    "clip a string": ({"clip_range": "0.2"}, TypeError, "clip_range .*must be a number, got str"),
    "dual clip below 1": ({"dual_clip": 0.5}, ValueError, "dual_clip must be finite and above 1"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG_BOUND.values(), ids=list(WRONG_BOUND))
def test_arguments_of_the_bound(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = never_run(llada())
    with pytest.raises(error, match=message):
        by_bgpo(model, **options)
    assert all(p.grad is None for p in model.parameters())


def test_old_values_without_advantage_are_not_looked_at() -> None:
    """elbo_logprob of a skipped sequence may be anything, such as the NaN that bgpo_backward reports for it."""
    old = torch.full((B, N), torch.nan)
    old[1] = -30.0
    advantages = torch.tensor([0.0, 1.0, 0.0])
    by_bgpo(llada(), advantages=advantages, old_logprob=old)
    with pytest.raises(ValueError, match="old_logprob holds non-finite"):
        by_bgpo(never_run(llada()), advantages=ADVANTAGES, old_logprob=old)


WRONG_OBJECTIVES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a vector": (lambda s: s.mean(-1), r"objective must return a scalar tensor, got \[3\]"),
    "a float": (lambda s: s.sum().item(), "objective must return a scalar tensor, got float"),
    "nothing": (lambda s: None, "objective must return a scalar tensor, got NoneType"),
    "detached": (lambda s: s.detach().sum(), "does not depend on its argument by a differentiable path"),
    "of something else": (lambda s: torch.ones((), requires_grad=True) * 2, "does not depend on its argument"),
}


@pytest.mark.parametrize(("objective", "message"), WRONG_OBJECTIVES.values(), ids=list(WRONG_OBJECTIVES))
def test_objectives(objective: Callable[[Tensor], Any], message: str) -> None:
    model = llada()
    with pytest.raises(ValueError, match=message):
        bk.replay_backward(model, IDS, RESPONSE, objective, n_mc=N)
    assert all(p.grad is None for p in model.parameters())
