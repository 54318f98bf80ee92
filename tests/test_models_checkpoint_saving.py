"""Native models back in official files: the same files, trained, adapted, resized, given as a state dict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_checkpoints import (
    INDEX,
    KINDS,
    assert_is_plain,
    both,
    every_kind,
    plain_logits,
    some_ids,
    weights_of,
    write,
)

import bgpo_kernels as bk
from bgpo_kernels.models.checkpoint import load_native


@every_kind
@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_saving_writes_the_files_back(kind: str, size: str, tmp_path: Path) -> None:
    source, folder = write(tmp_path / "source", kind, shards=2), tmp_path / "saved"
    load_native(source).save_pretrained(folder, max_shard_size=size)
    before, after = weights_of(source), weights_of(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder / "config.json").read_text()) == KINDS[kind][1]
    assert (folder / INDEX).exists() == (size == "4KB") == (len(list(folder.glob("*.safetensors"))) > 1)
    assert (folder / "modeling.py").read_text() == (source / "modeling.py").read_text()
    assert (folder / "generation_config.json").exists()
    assert_is_plain(load_native(folder), kind, before)


@both
def test_saving_over_the_folder_it_came_from(kind: str, tmp_path: Path) -> None:
    before = weights_of(write(tmp_path, kind, shards=3))
    model = load_native(tmp_path)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("model*safetensors*")) == ["model.safetensors"]  # no old shard
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(tmp_path).items())
    assert_is_plain(model, kind, before)


@every_kind
def test_a_trained_model_is_saved_as_trained(kind: str, tmp_path: Path) -> None:
    model = load_native(write(tmp_path / "a", kind)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(some_ids()).logits.square().mean().backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "b")
    before, after = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert_is_plain(model, kind, after)


@both
def test_lora_trains_and_is_saved_merged(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_native(write(tmp_path / "a", kind))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    ids, response = some_ids(2), (torch.arange(12) >= 4).expand(2, 12)
    bk.elbo_logprob(model, ids, response, n_mc=2, seed=3).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 8 and all("lora" in name for name in trained)
    with pytest.raises(ValueError, match=r"lora_A.*merge adapters first"):
        base.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with torch.no_grad():
        logits = model(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "b")
    merged = weights_of(tmp_path / "b")
    changed = {
        name.split(".")[-2] for name, t in weights_of(tmp_path / "a").items() if not torch.equal(t, merged[name])
    }
    assert changed == {"q_proj", "v_proj"}
    torch.testing.assert_close(logits, plain_logits(kind, merged, ids).float(), rtol=1e-4, atol=1e-4)


@every_kind
def test_a_given_state_dict_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = load_native(write(tmp_path / "a", kind))
    native = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b", state_dict=native, safe_serialization=True, save_function=torch.save)
    official = weights_of(tmp_path / "b")
    assert all(torch.equal(official[name], tensor + 1) for name, tensor in weights_of(tmp_path / "a").items())
    model.save_pretrained(tmp_path / "c", state_dict=official)
    assert weights_of(tmp_path / "c").keys() == official.keys()
    result = model.load_state_dict(official, strict="tied" not in kind)  # what a Trainer does to resume
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    assert all(torch.equal(tensor, native[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "empty", state_dict={})
    assert not list((tmp_path / "empty").glob("*.safetensors"))
    model.save_pretrained(tmp_path / "b", state_dict={})  # a rank that holds nothing does not remove what another wrote
    assert weights_of(tmp_path / "b").keys() == official.keys()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = load_native(write(tmp_path / "a", "llada"))
    state = model.state_dict()
    norm = "model.norm.weight"
    wrong: dict[str, dict[str, Any]] = {
        "would write pickles": {"safe_serialization": False},
        "push_to_hub and variant are not served": {"push_to_hub": True},
        r"model\.transformer\.ln_f\.weight not in the state dict": {
            "state_dict": {n: state[n] for n in state if n != norm}
        },
        r"module\.a is no part of a NativeLLaDA": {"state_dict": state | {"module.a": state[norm]}},
        r"cannot save model\.norm\.weight, a Tensor \[0\] on cpu": {"state_dict": state | {norm: torch.zeros(0)}},
        r"Tensor \[24\] on meta": {"state_dict": state | {norm: torch.zeros(24, device="meta")}},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


@both
def test_a_resized_vocabulary_is_saved(kind: str, tmp_path: Path) -> None:
    model = load_native(write(tmp_path / "a", kind))
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["vocab_size"] == 70 and config.get("embedding_size", 70) == 70
    assert load_native(tmp_path / "b")(torch.tensor([[69]])).logits.shape == (1, 1, 70)
