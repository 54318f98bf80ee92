"""The LLaDA- and Dream-shaped models: bidirectional with and without padding, right dimensions, seeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers import AutoModelForCausalLM, BertConfig, PretrainedConfig

from bgpo_kernels.models import make_bidirectional
from bgpo_kernels.models.llada import SHAPES, build_llada, llada_config

TINY_DREAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 500,
    "mask_token_id": 499,
    "eos_token_id": 498,
}
both_families = pytest.mark.parametrize(
    "config", [llada_config("tiny"), llada_config("dream-7b", **TINY_DREAM)], ids=["llada", "dream"]
)


@both_families
@pytest.mark.parametrize("padding", [None, 0, 3], ids=["no mask", "mask of ones", "left padding"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_early_logits_see_a_late_token(config: PretrainedConfig, padding: int | None, attention: str) -> None:
    model = build_llada(config)
    model.set_attn_implementation(attention)
    ids = torch.arange(10).repeat(2, 1)
    edited = ids.clone()
    edited[:, -1] = 77
    mask = None if padding is None else (torch.arange(10) >= padding).long().repeat(2, 1)
    with torch.no_grad():
        before, after = (model(input_ids=x, attention_mask=mask).logits[:, padding or 0] for x in (ids, edited))
    assert (before - after).abs().max() > 1e-4


@both_families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_reach_the_real_tokens(config: PretrainedConfig, attention: str) -> None:
    model = build_llada(config)
    model.set_attn_implementation(attention)
    ids = torch.arange(8)[None]
    padded = torch.cat([torch.full((1, 3), 99), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    positions = torch.arange(-3, 8).clamp(min=0)[None]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        together = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_attention_gets_no_mask_without_padding() -> None:
    """None is what the fast kernels of scaled-dot-product attention want, whoever made the mask."""
    model = make_bidirectional(build_llada(llada_config("tiny")))  # a second time changes nothing
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    with torch.no_grad():
        model(torch.arange(10).repeat(2, 1))
        assert seen == [None, None]
        model(torch.arange(10).repeat(2, 1), attention_mask=(torch.arange(10) >= 3).repeat(2, 1))
    assert seen[2] is not None and seen[2].shape[-1] == 10


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) >= 5, reason="transformers 5 turns every attention")
def test_attention_that_would_stay_causal_is_refused() -> None:
    model = build_llada(llada_config("tiny"))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' stays causal with transformers 4"):
        model(torch.arange(10)[None])


def test_causal_twin_is_caught_by_the_same_edit() -> None:
    """The bidirectionality test above can fail: with both switches undone the model is causal."""
    model = build_llada(llada_config("tiny"))
    model.config.is_causal = True
    for layer in model.model.layers:
        layer.self_attn.is_causal = True
    ids = torch.arange(10)[None]
    edited = ids.clone()
    edited[:, -1] = 77
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, 0], model(edited).logits[:, 0])


def test_published_dimensions() -> None:
    llada, dream = llada_config("llada-8b"), llada_config("dream-7b")
    assert (llada.hidden_size, llada.num_hidden_layers, llada.vocab_size) == (4096, 32, 126464)
    assert (dream.hidden_size, dream.num_hidden_layers, dream.vocab_size) == (3584, 28, 152064)
    assert (llada.mask_token_id, dream.mask_token_id) == (126336, 151666)
    with torch.device("meta"):
        parameters = {shape: build_llada_on_meta(shape) for shape in ("llada-8b", "dream-7b")}
    assert parameters == {"llada-8b": 8_015_581_184, "dream-7b": 7_615_616_512}


def build_llada_on_meta(shape: str) -> int:
    return sum(p.numel() for p in build_llada(llada_config(shape), device="meta").parameters())


def test_head_is_separate_and_llada_has_no_bias() -> None:
    model = build_llada(llada_config("tiny"))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert not model.training


def test_seed_decides_the_weights_and_global_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_llada(llada_config("tiny"), seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def test_dtype_and_overrides_are_followed() -> None:
    model = build_llada(llada_config("tiny", vocab_size=200, mask_token_id=199), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(4)[None]).logits.shape == (1, 4, 200)


def test_every_embedding_row_can_learn() -> None:
    model = build_llada(llada_config("tiny"))
    eos = model.config.eos_token_id
    model(torch.tensor([[5, eos]])).logits.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[eos].abs().sum() > 0


def test_saved_checkpoint_is_bidirectional_again(tmp_path: Path) -> None:
    model = build_llada(llada_config("tiny", vocab_size=200, mask_token_id=199, eos_token_id=198))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.is_causal is False and loaded.config.mask_token_id == 199
    ids = torch.arange(10)[None]
    make_bidirectional(loaded)
    assert not any(layer.self_attn.is_causal for layer in loaded.model.layers)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="shape must be one of " + ", ".join(SHAPES)):
        llada_config("llada-9b")
    with pytest.raises(ValueError, match=r"mask_token_id 126336 is outside 0\.\.99"):
        llada_config("tiny", vocab_size=100)
    with pytest.raises(ValueError, match="config must come from llada_config, got BertConfig"):
        build_llada(BertConfig())
    with pytest.raises(ValueError, match="no attention layer"):
        make_bidirectional(torch.nn.Linear(2, 2))
