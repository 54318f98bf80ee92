"""Official checkpoints in native layers: against plain forwards in the official names."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import plain_llada
import pytest
import torch
from plain_checkpoints import (
    KINDS,
    MASK,
    assert_is_plain,
    both,
    every_kind,
    plain_logits,
    some_ids,
    weights_of,
    write,
)
from tolerances import assert_as_good_as_torch
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.models import assert_bidirectional, find_head
from bgpo_kernels.models.checkpoint import load_native
from bgpo_kernels.models.native_layouts import llada_fields


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shards", [1, 3])
def test_logits_are_those_of_the_plain_forward(kind: str, attention: str, shards: int, tmp_path: Path) -> None:
    model = load_native(write(tmp_path, kind, shards=shards), attn_implementation=attention)
    assert model.config._attn_implementation == attention and not model.training
    assert model.config.mask_token_id == MASK
    assert not any(layer.self_attn.is_causal for layer in model.model.layers)
    assert_is_plain(model, kind, weights_of(tmp_path))


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_reach_the_tokens(kind: str, attention: str, left: bool, tmp_path: Path) -> None:
    model = load_native(write(tmp_path, kind), attn_implementation=attention)
    ids, padding = some_ids(2), torch.full((2, 5), 58)
    padded = torch.cat([padding, ids] if left else [ids, padding], dim=1)
    mask = torch.cat([padding * 0, ids * 0 + 1] if left else [ids * 0 + 1, padding * 0], dim=1)
    dense = mask.bool()[:, None, None, :].expand(2, 1, 17, 17)
    weights = weights_of(tmp_path)
    for given in (mask, dense):
        with torch.no_grad():
            ours = model(padded, attention_mask=given).logits
        ours = ours[:, 5:] if left else ours[:, :-5]
        assert_as_good_as_torch(ours, plain_logits(kind, weights, ids, torch.float32), plain_logits(kind, weights, ids))
    for is_padded in (False, True):
        assert_bidirectional(model, find_head(model), padded=is_padded)


@every_kind
def test_elbo_is_that_of_the_plain_forward(kind: str, tmp_path: Path) -> None:
    """Scale, tied head and Dream's shift by one, through a public call."""
    model = load_native(write(tmp_path, kind))
    ids = some_ids()
    response = (torch.arange(12) >= 4).expand(3, 12)
    ours = bk.elbo_logprob(model, ids, response, n_mc=6, seed=3, per_sample=True)
    draw = bk.random_mask(ids, response, mask_token_id=MASK, n_mc=6, seed=3)
    weights = weights_of(tmp_path)

    def plain(dtype: torch.dtype) -> Tensor:
        logp = plain_logits(kind, weights, draw.noisy_ids.flatten(0, 1), dtype).log_softmax(-1).view(3, 6, 12, -1)
        if kind.startswith("dream"):
            logp = logp.roll(1, dims=2)
        token = logp.gather(-1, ids[:, None, :, None].expand(3, 6, 12, 1))[..., 0]
        return draw.segment_weight.to(dtype) * (token * (draw.noisy_ids == MASK)).sum(-1)

    assert_as_good_as_torch(ours.detach(), plain(torch.float32), plain(torch.float64))
    ours.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_what_the_head_is(tmp_path: Path) -> None:
    heads = {kind: find_head(load_native(write(tmp_path / kind, kind))) for kind in KINDS}
    assert {kind: head.shift for kind, head in heads.items()} == {kind: int("dream" in kind) for kind in KINDS}
    assert heads["llada scaled"].logit_scale == pytest.approx(24**-0.5) and heads["llada"].logit_scale == 1.0
    assert heads["llada"].module.weight.shape == (64, 24)  # the padded vocabulary
    tied = load_native(tmp_path / "llada tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_a_file_that_is_overwritten_does_not_reach_the_model(tmp_path: Path) -> None:
    """safetensors maps files into memory, and a mapped weight would change with them."""
    model = load_native(write(tmp_path, "dream"))
    before = {name: tensor.clone() for name, tensor in weights_of(tmp_path).items()}
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert_is_plain(model, "dream", before)


@every_kind
def test_tuples_and_few_logits(kind: str, tmp_path: Path) -> None:
    model = load_native(write(tmp_path, kind))
    with torch.no_grad():
        logits = model(some_ids()).logits
        assert torch.equal(model(some_ids(), return_dict=False)[0], logits)
        torch.testing.assert_close(model(some_ids(), logits_to_keep=2).logits, logits[:, -2:])


def test_dtypes(tmp_path: Path) -> None:
    write(tmp_path, "dream", dtype=torch.bfloat16, torch_dtype="bfloat16")
    assert {p.dtype for p in load_native(tmp_path).parameters()} == {torch.bfloat16}
    model = load_native(tmp_path, dtype=torch.float32)
    assert model.dtype == model.config.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "float32"


def test_llada_rotates_in_fp32_and_rounds_once(tmp_path: Path) -> None:
    """In bfloat16, nearer to the exact forward than Llama's own rotation of bfloat16 by bfloat16 angles."""
    seen = {}
    for full in (True, False):
        model = load_native(write(tmp_path, "llada", rope_full_precision=full), dtype=torch.bfloat16)
        with torch.no_grad():
            seen[full] = model(some_ids(1, 100)).logits.double()
    exact = plain_logits("llada", {name: t.bfloat16() for name, t in weights_of(tmp_path).items()}, some_ids(1, 100))
    assert not torch.equal(seen[True], seen[False])
    assert (seen[True] - exact).square().mean() < (seen[False] - exact).square().mean()


def test_which_embeddings_learn(tmp_path: Path) -> None:
    """As with the remote code: LLaDA trains the embedding of its padding token, Dream does not."""
    for kind, learns in (("llada", True), ("dream", False)):
        model = load_native(write(tmp_path / kind, kind))
        model(torch.tensor([[5, 58]])).logits.square().sum().backward()
        assert bool(model.get_input_embeddings().weight.grad[58].any()) == learns


@both
def test_gradient_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    model = load_native(write(tmp_path, kind)).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs = []
        handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(some_ids()).logits.square().mean().backward()
        handle.remove()
        assert len(runs) == 1 + checkpointed
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.no_poison
@both
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_backbone(kind: str, backend: str, tmp_path: Path) -> None:
    model = load_native(write(tmp_path / "a", kind))
    ids, response = some_ids(2), (torch.arange(12) >= 4).expand(2, 12)
    plain = bk.elbo_logprob(model, ids, response, n_mc=2, seed=3)
    torch.compiler.reset()
    model.model = torch.compile(model.model, backend=backend, fullgraph=True)
    torch.testing.assert_close(bk.elbo_logprob(model, ids, response, n_mc=2, seed=3), plain, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    before, after = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_is_a_model_of_its_own(tmp_path: Path) -> None:
    model = load_native(write(tmp_path, "dream"))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert_is_plain(reference, "dream", weights_of(tmp_path))
    assert find_head(reference).shift == 1
    assert type(reference).from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(write(tmp_path, "llada"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_native("GSAI-ML/LLaDA-8B-Instruct", revision="abc")
    assert asked == [("GSAI-ML/LLaDA-8B-Instruct", "abc", ["*.safetensors", "*.json", "*.py"])]
    assert model.name_or_path == model.config._name_or_path == "GSAI-ML/LLaDA-8B-Instruct"
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/modeling.py").exists()


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"mlp_hidden_size": None}, "intermediate_size", 96),
        ({"embedding_size": None}, "vocab_size", 60),
        ({"n_kv_heads": None}, "num_key_value_heads", 4),
        ({"n_kv_heads": None, "multi_query_attention": True}, "num_key_value_heads", 1),
        ({"n_kv_heads": 4, "multi_query_attention": False}, "num_key_value_heads", 4),
        ({"bias_for_layer_norm": None}, "hidden_size", 24),
        ({"attention_dropout": 0.25}, "attention_dropout", 0.25),
    ],
)
def test_sizes_that_follow_from_others(change: dict[str, Any], field: str, value: float) -> None:
    assert llada_fields(plain_llada.CONFIG | change)[field] == value


def test_importing_it_imports_no_transformers() -> None:
    code = "import sys, bgpo_kernels.models.checkpoint; sys.exit(bool({'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
