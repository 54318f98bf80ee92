"""The lm-evaluation-harness adapter: what it asks of the likelihood, and what it answers."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import models_zoo as zoo
import pytest
import torch

from bgpo_kernels.integrations import lm_eval as adapter
from bgpo_kernels.integrations.llada_eval import get_log_likelihood, is_greedy


class Letters:
    """A tokenizer of letters; a space joins the word after it, as in tokenizers with byte-level BPE."""

    bos_token_id = 1
    eos_token_id = 2
    name_or_path = "some/letters"

    def __init__(self, special: bool = False) -> None:
        self.special = special

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.replace(" ", "\n ").split("\n")
        ids = [5 + sum(map(ord, word)) % 50 for word in words if word]
        return {"input_ids": [self.bos_token_id] * (self.special and add_special_tokens) + ids}


def requests(*pairs: tuple[str, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def harness(model: torch.nn.Module | None = None, **options: Any) -> adapter.MaskedDiffusionLM:
    fields = {"tokenizer": Letters(), "mc_num": 6, "batch_size": 3} | options
    return adapter.MaskedDiffusionLM(zoo.llada() if model is None else model, **fields)


def likelihood(context: list[int], continuation: list[int], **options: Any) -> float:
    fields = {"mc_num": 6, "batch_size": 3, "mask_id": zoo.MASK} | options
    return get_log_likelihood(zoo.llada(), torch.tensor(context), torch.tensor(continuation), **fields)


def ids(text: str) -> list[int]:
    return Letters()(text)["input_ids"]


def test_answers_are_likelihood_and_greediness_in_order():
    found = harness().loglikelihood(requests(("a b c", " d e"), ("x", " y")))
    assert [type(x) for x in found[0]] == [float, bool]
    assert found[0][0] == likelihood(ids("a b c"), ids(" d e"))
    assert found[1][0] == likelihood(ids("x"), ids(" y"))
    assert found[0][1] == is_greedy(
        zoo.llada(), torch.tensor(ids("a b c")), torch.tensor(ids(" d e")), mask_id=zoo.MASK
    )


def test_answers_do_not_depend_on_order_or_sharding():
    pairs = requests(("a b c", " d e"), ("x y", " z"), ("p", " q r s"))
    whole = harness().loglikelihood(pairs)
    assert harness().loglikelihood(pairs[::-1]) == whole[::-1]
    assert harness().loglikelihood(pairs[1:]) == whole[1:]
    assert harness(seed=1).loglikelihood(pairs) != whole


def test_a_greedy_continuation_is_found():
    lm = harness()
    context = "a b"
    for word in (chr(c) for c in range(33, 127)):
        ((_, greedy),) = lm.loglikelihood(requests((context, " " + word)))
        answer = torch.tensor(ids(" " + word))
        assert greedy == is_greedy(lm.model, torch.tensor(ids(context)), answer, mask_id=zoo.MASK)
    assert harness(is_check_greedy=False).loglikelihood(requests((context, " c")))[0][1] is False


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation():
    assert harness().loglikelihood(requests(("a b ", "c"))) == harness().loglikelihood(requests(("a b", " c")))


def test_an_empty_context_starts_from_the_first_special_token():
    for special in (False, True):
        found = harness(tokenizer=Letters(special)).loglikelihood(requests(("", "a b")))
        assert found[0][0] == likelihood([1], ids("a b"))


def test_long_contexts_lose_their_beginning_and_long_continuations_are_refused():
    lm = harness(max_length=4)
    assert lm.loglikelihood(requests(("a b c d e", " f g")))[0][0] == likelihood(ids(" d e"), ids(" f g"))
    with pytest.raises(ValueError, match=r"continuation of 4 tokens leaves no room for a context in max_length=4"):
        lm.loglikelihood(requests(("a", " b c d e")))


def test_rolling_scores_every_token_once_in_pieces():
    text = "a b c d e"
    (whole,) = harness().loglikelihood_rolling(requests((text,)))
    assert whole == likelihood([1], ids(text))
    (pieces,) = harness(max_length=3).loglikelihood_rolling(requests((text,)))
    t = ids(text)
    assert pieces == pytest.approx(
        likelihood([1], t[:2]) + likelihood(t[1:2], t[2:4]) + likelihood(t[3:4], t[4:]), rel=1e-12
    )


def test_guidance_reaches_the_likelihood():
    found = harness(cfg=1.0).loglikelihood(requests(("a b", " c d")))[0][0]
    assert found == likelihood(ids("a b"), ids(" c d"), cfg_scale=1.0)


def test_generation_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="likelihood tasks only"):
        harness().generate_until(requests(("a", "b")))


def test_settings():
    assert harness(batch_size="auto").batch_size == 32
    assert harness(max_batch_size=64).tokenizer_name == "some__letters"
    assert harness().device == torch.device("cpu")
    with pytest.raises(ValueError, match="tokenizer is missing"):
        adapter.MaskedDiffusionLM(zoo.llada())
    model = zoo.Plain()
    with pytest.raises(ValueError, match="mask_id is missing"):
        harness(model)
    assert harness(model, mask_id=7, head=model.out).mask_id == 7
    with pytest.raises(TypeError, match=r"pretrained must be a name or a torch\.nn\.Module, got int"):
        adapter.MaskedDiffusionLM(3, tokenizer=Letters())  # type: ignore[arg-type]


def test_a_checkpoint_is_loaded_into_native_layers(tmp_path, monkeypatch):
    """Both ways of loading are told device and dtype, and remote code runs only when asked for."""
    asked: dict[str, Any] = {}
    for name in ("load_native", "load_remote"):
        monkeypatch.setattr(adapter, name, lambda path, name=name, **o: asked.update({name: o}) or zoo.llada())
    lm = adapter.MaskedDiffusionLM("some/model", tokenizer=Letters(), device="cpu", dtype="float32")
    assert asked == {"load_native": {"dtype": torch.float32, "device": "cpu"}}
    assert lm.mask_id == zoo.MASK and not lm.model.training
    adapter.MaskedDiffusionLM("some/model", tokenizer=Letters(), device="cpu", trust_remote_code=True)
    assert asked["load_remote"] == {"dtype": torch.bfloat16, "device": "cpu", "trust_remote_code": True}


def test_it_works_without_lm_eval():
    """In a fresh process in which lm_eval cannot be imported."""
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from bgpo_kernels.integrations.lm_eval import LM, MaskedDiffusionLM, register_model\n"
        "assert LM is object and register_model is None\n"
        "assert MaskedDiffusionLM.__mro__[1] is object\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_it_is_registered_where_lm_eval_is():
    registry = pytest.importorskip("lm_eval.api.registry")
    assert registry.get_model("bgpo_mdlm") is adapter.MaskedDiffusionLM
    assert isinstance(harness(), pytest.importorskip("lm_eval.api.model").LM)
