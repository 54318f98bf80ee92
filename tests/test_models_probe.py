"""The causality probe against real architectures: right verdicts, nothing disturbed, asked once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgpo_kernels.head.options import LogitTransform
from bgpo_kernels.models import (
    HeadSpec,
    assert_bidirectional,
    assume_bidirectional,
    capture_head,
    find_head,
    forward_kwargs,
    make_bidirectional,
)
from bgpo_kernels.models import probe as probe_module

V, H = 40, 8


class Mixer(nn.Module):
    """The smallest model that looks both ways, or only back; every flaw the probe names can be switched on."""

    def __init__(self, causal: bool = False, masks: bool = True, flaw: str = "") -> None:
        super().__init__()
        self.embed, self.drop, self.out = nn.Embedding(V, H), nn.Dropout(0.5), nn.Linear(H, V)
        self.causal, self.masks, self.flaw = causal, masks, flaw
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.calls += 1
        x = self.drop(self.embed(input_ids))
        if attention_mask is not None and self.masks:
            x = x * attention_mask[..., None]
        if self.causal or (self.flaw == "causal when padded" and attention_mask is not None):
            mixed = x.cumsum(dim=1)
        else:
            mixed = x.sum(dim=1, keepdim=True).expand_as(x)
        hidden = x + mixed
        if self.flaw == "nan":
            hidden = hidden / 0.0 - hidden / 0.0
        if self.flaw == "unpads":
            hidden = hidden.flatten(0, 1)[1:]
        logits = self.out(hidden)
        if self.flaw == "scales":
            logits = logits * 0.5
        return SimpleNamespace(logits=logits.log_softmax(dim=-1) if self.flaw == "normalises" else logits)


def _probe(model: nn.Module, padded: bool = False, **spec: Any) -> None:
    assert_bidirectional(model, HeadSpec(model.out, **spec), padded=padded)


# ---------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("padded", [False, True])
def test_both_verdicts_on_the_smallest_model(padded: bool) -> None:
    _probe(Mixer(), padded)
    with pytest.raises(ValueError, match=r"Mixer is causal.*make_bidirectional\(model\).*assume_bidirectional"):
        _probe(Mixer(causal=True), padded)


def test_a_model_that_turns_causal_only_when_padded() -> None:
    model = Mixer(flaw="causal when padded")
    _probe(model)
    with pytest.raises(ValueError, match="Mixer is causal when attention_mask has a zero"):
        _probe(model, padded=True)


def test_padding_that_is_attended_to() -> None:
    model = Mixer(masks=False)
    _probe(model)
    with pytest.raises(ValueError, match="Mixer attends to padding: a token where attention_mask is 0"):
        _probe(model, padded=True)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("nan", "Mixer gives hidden states that are not finite"),
        ("unpads", r"receives hidden states \[31, 8\] for input ids \[4, 8\]: it must see one row per token"),
        ("scales", r"turns a head output of 100 into the logit 50, but logit_scale=1 and softcap=None give 100"),
    ],
)
def test_flaws_are_named(flaw: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _probe(Mixer(flaw=flaw))


def test_scale_and_cap_are_compared_with_what_the_model_does() -> None:
    _probe(Mixer(flaw="scales"), logit_scale=0.5)
    _probe(Mixer(flaw="normalises"))  # log-probabilities say nothing about the scale, so they pass
    with pytest.raises(ValueError, match=r"but logit_scale=1 and softcap=30\.0 give 29\.92"):
        _probe(Mixer(), softcap=30.0)


def test_rounding_of_expert_loads_does_not_pass_for_sight() -> None:
    """A causal model whose every row depends, in the last bits, on the whole batch, as mixtures of experts do."""

    class Experts(Mixer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            hidden = self.embed(input_ids).cumsum(dim=1)
            return self.out(hidden * (1 + 1e-4 * torch.sin(self.embed(input_ids).sum())))

    with pytest.raises(ValueError, match="Experts is causal"):
        _probe(Experts())


def test_escape_hatch_switches_the_probe_off() -> None:
    model = Mixer(causal=True)
    assume_bidirectional(nn.DataParallel(model))
    _probe(model)
    _probe(model, padded=True)
    assert model.calls == 0


# ---------------------------------------------------------------------------------------------------- manners


def test_modes_gradients_and_random_state_are_left_alone() -> None:
    model = Mixer().train()
    model.out.eval()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    flags = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    for check in (lambda: _probe(model), lambda: _probe(model, logit_scale=2.0)):
        try:
            check()
        except ValueError as error:
            assert "logit_scale=2" in str(error)
        assert {name: module.training for name, module in model.named_modules()} == flags
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model.embed.weight.grad, torch.ones_like(model.embed.weight))
        assert model.out.weight.grad is None
        assert torch.is_grad_enabled() and "forward" not in vars(model.out)


def test_random_state_is_restored_when_the_model_draws() -> None:
    class Draws(Mixer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            torch.rand(3)
            return super().forward(input_ids, attention_mask)

    model = Draws()
    state = torch.get_rng_state()
    _probe(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_runs_in_evaluation_mode_without_gradients_or_cache() -> None:
    seen = []

    class Watches(Mixer):
        def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:  # type: ignore[override]
            seen.append((torch.is_grad_enabled(), self.training, self.drop.training, use_cache))
            return super().forward(input_ids)

    _probe(Watches().train())
    assert set(seen) == {(False, False, False, False)}


def test_it_costs_once_per_model_and_question() -> None:
    model = Mixer()
    counts = []
    for padded in (False, False, True, True, False):
        _probe(model, padded)
        counts.append(model.calls)
    assert counts == [9, 9, 21, 21, 21]
    _probe(nn.DataParallel(model).module)
    assert model.calls == 21
    model.config = SimpleNamespace(is_causal=False)  # the attention was changed: ask again
    _probe(model)
    assert model.calls == 30


def test_a_failure_is_not_remembered_and_a_model_is_not_kept_alive() -> None:
    model = Mixer(causal=True)
    with pytest.raises(ValueError, match="causal"):
        _probe(model)
    model.causal = False
    _probe(model)
    gone = weakref.ref(model)
    assert model in probe_module._passed
    del model
    gc.collect()
    assert gone() is None


def test_special_ids_and_small_vocabularies_are_respected() -> None:
    seen: list[Tensor] = []

    class Watches(Mixer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            seen.append(input_ids)
            return super().forward(input_ids, attention_mask)

    model = Watches()
    model.config = SimpleNamespace(pad_token_id=0, mask_token_id=3, eos_token_id=[1, 2], vocab_size=6)
    _probe(model)
    assert set(torch.cat(seen).flatten().tolist()) == {1, 2, 4, 5}


# ---------------------------------------------------------------------------------------------------- transformers

WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = WIDTH | {"num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (class prefix and suffix, config)
    "bert": ("Bert ForMaskedLM", WIDTH),
    "roberta": ("Roberta ForMaskedLM", WIDTH),
    "modernbert": ("ModernBert ForMaskedLM", WIDTH | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    "llama": ("Llama ForCausalLM", DECODER),
    "llama, tied": ("Llama ForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2 ForCausalLM", DECODER | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "cohere": ("Cohere ForCausalLM", DECODER | {"logit_scale": 0.25}),
    "granite": ("Granite ForCausalLM", DECODER | {"logits_scaling": 4.0}),
    "granite moe": ("GraniteMoe ForCausalLM", DECODER | {"logits_scaling": 4.0, "num_local_experts": 4}),
}


def _build(name: str, attention: str | None = None, **overrides: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    prefix, suffix = FAMILIES[name][0].split()
    if not hasattr(transformers, prefix + suffix):
        pytest.skip(f"this transformers has no {prefix}{suffix}")
    config = getattr(transformers, prefix + "Config")(**FAMILIES[name][1] | overrides)
    if attention is not None:
        config._attn_implementation = attention
    return getattr(transformers, prefix + suffix)(config).eval()


def _turn_around(model: nn.Module, config: bool, modules: bool) -> nn.Module:
    """One half of what `make_bidirectional` does."""
    if config:
        model.config.is_causal = False
    for module in model.modules():
        if modules and hasattr(module, "is_causal"):
            module.is_causal = False
    return model


def _is_bidirectional(model: nn.Module, padded: bool) -> bool:
    """The truth, from the logits of the untouched model on other ids than the probe's."""
    ids = torch.arange(10, 22)[None]
    edited = ids.clone()
    edited[0, -1] = 40
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    kwargs = forward_kwargs(model) | ({"attention_mask": mask} if padded else {})
    with torch.no_grad():
        before, after = (model(input_ids=x, **kwargs).logits[0, 2:-1] for x in (ids, edited))
    return not torch.allclose(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_head_and_conventions_give_the_logits_of_the_model(name: str) -> None:
    model = _build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # logits of order 1, so that a cap of 2 bends them
    spec = find_head(model)
    ids = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        with capture_head(model, spec, spec.module) as capture:
            model(input_ids=ids, **forward_kwargs(model))
        dense = model(input_ids=ids, **forward_kwargs(model)).logits
    mine = LogitTransform(spec.logit_scale, spec.softcap).apply(capture.value)
    torch.testing.assert_close(mine, dense)
    if name in ("gemma2", "cohere", "granite", "granite moe"):
        assert not torch.allclose(capture.value, dense, rtol=0.01), "the convention of this family matters here"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_verdicts_on_real_architectures(name: str, padded: bool) -> None:
    model = _build(name)
    spec = find_head(model)
    if "Masked" not in type(model).__name__:
        with pytest.raises(ValueError, match="ForCausalLM is causal"):
            assert_bidirectional(model, spec, padded=padded)
        make_bidirectional(model)
    assert _is_bidirectional(model, padded)
    assert_bidirectional(model, spec, padded=padded)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("config", "modules"), [(True, False), (False, True)], ids=["config only", "modules only"])
def test_half_turned_llama_is_judged_by_what_it_does(attention: str, config: bool, modules: bool, padded: bool) -> None:
    """transformers 5: the config alone turns everything around; the modules alone only sdpa, and only while there is no
    attention mask. Other releases differ, so the verdict is compared with the logits and not with a table."""
    model = _turn_around(_build("llama", attention), config, modules)
    truth = _is_bidirectional(model, padded)
    if modules and attention == "eager":
        assert not truth, "eager attention takes its mask from the config"
    if truth:
        assert_bidirectional(model, find_head(model), padded=padded)
    else:
        with pytest.raises(ValueError, match="causal when" if padded else "is causal: "):
            assert_bidirectional(model, find_head(model), padded=padded)


def test_a_config_option_that_means_something_else_is_caught() -> None:
    """HyperCLOVA X multiplies by the `logits_scaling` that Granite divides by."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "HyperCLOVAXForCausalLM"):
        pytest.skip("this transformers has no HyperCLOVAXForCausalLM")
    config = transformers.HyperCLOVAXConfig(**DECODER, logits_scaling=8.0)
    model = make_bidirectional(transformers.HyperCLOVAXForCausalLM(config))
    with pytest.raises(ValueError, match=r"head output of 100 into the logit 800, but logit_scale=0.125"):
        assert_bidirectional(model, find_head(model))
    assert_bidirectional(model, find_head(model, HeadSpec(model.lm_head, logit_scale=8.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [lambda model: model, make_bidirectional], ids=["causal", "turned"])
def test_half_precision_gives_the_same_verdicts(dtype: torch.dtype, change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(_build("gemma2").to(dtype))
    if change is make_bidirectional:
        assert_bidirectional(model, find_head(model))
    else:
        with pytest.raises(ValueError, match="is causal"):
            assert_bidirectional(model, find_head(model))


def test_no_cache_is_built() -> None:
    for name in ("llama", "granite moe"):
        model = _build(name, use_cache=True)
        ids = torch.arange(10, 16)[None]
        assert model(input_ids=ids).past_key_values is not None
        assert model(input_ids=ids, **forward_kwargs(model)).past_key_values is None
    assert forward_kwargs(_build("modernbert")) == {}
