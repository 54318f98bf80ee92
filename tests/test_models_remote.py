"""Models with code of their own: run only when asked to, weights from safetensors only, causal ones refused."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from remote_zoo import MASK, LLaDA2MoeModelLM, LLaDAModelLM, SDARForCausalLM, TinyModel, tiny, write_folder

import bgpo_kernels as bk
from bgpo_kernels.models import find_head, heads
from bgpo_kernels.models.block_diffusion import block_row_logprob
from bgpo_kernels.models.remote import load_remote, padding_problem


@pytest.fixture(autouse=True)
def _modules_of_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies transformers makes of remote code stay in the test's folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def _change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", [SDARForCausalLM, LLaDA2MoeModelLM, LLaDAModelLM], ids=lambda k: k.__name__)
def test_a_folder_is_loaded_and_scores_like_the_model_that_was_saved(tmp_path: Path, kind: type[TinyModel]) -> None:
    saved = write_folder(tmp_path / "tiny", kind, mask_token_id=MASK, block_size=4)
    model = load_remote(tmp_path / "tiny", trust_remote_code=True)
    assert type(model).__name__ == kind.__name__ and type(model) is not kind
    assert not any(module.training for module in model.modules())
    assert next(model.parameters()).dtype == torch.float32
    clean = torch.randint(0, MASK, (2, 9), generator=torch.Generator().manual_seed(3))
    rows = torch.zeros(2, 9, dtype=torch.bool)
    rows[:, 5:8] = True
    noisy = clean.masked_fill(rows, MASK)
    for m in (model, saved):
        m.requires_grad_(False)
    if kind is LLaDAModelLM:
        response = torch.arange(9).expand(2, 9) >= 4
        ours, expected = (bk.elbo_logprob(m, clean, response, n_mc=4, seed=1) for m in (model, saved))
        assert bk.row_logprob(model, noisy, rows, clean).shape == (6,)
    else:
        ours, expected = (block_row_logprob(m, clean, noisy, rows, prompt_length=4) for m in (model, saved))
    assert torch.equal(ours, expected)


def test_dtype_and_how_it_is_saved_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", LLaDAModelLM)
    model = load_remote(str(tmp_path / "tiny"), trust_remote_code=True, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "again")
    assert {"configuration_tiny.py", "modeling_tiny.py"} <= {path.name for path in (tmp_path / "again").iterdir()}
    again = load_remote(tmp_path / "again", trust_remote_code=True)
    assert next(again.parameters()).dtype == torch.bfloat16, "dtype=None is the checkpoint's own"


def test_two_forks_with_one_configuration_keep_their_own_code(tmp_path: Path) -> None:
    """transformers' auto classes would load the second with the code of the first."""
    for kind in (LLaDA2MoeModelLM, LLaDAModelLM):
        write_folder(tmp_path / kind.__name__, kind, block_size=4)
        assert type(load_remote(tmp_path / kind.__name__, trust_remote_code=True)).__name__ == kind.__name__


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("trust", [False, None, 1, "yes"])
def test_no_code_runs_unless_asked_for(tmp_path: Path, trust: Any) -> None:
    folder = tmp_path / "tiny"
    write_folder(folder, LLaDAModelLM)
    bomb = "raise SystemExit('remote code was run')\n"
    for name in ("configuration_tiny", "modeling_tiny", "tokenization_tiny", "helper", "deeper"):
        (folder / f"{name}.py").write_text(bomb)
    (folder / "modeling_tiny.py").write_text("from .helper import x\nfrom . import configuration_tiny\n" + bomb)
    (folder / "helper.py").write_text("if True:\n    from .deeper import y\n    from .modeling_tiny import z\n" + bomb)
    with pytest.raises(ValueError, match="trust_remote_code=True") as caught:
        load_remote(folder, trust_remote_code=trust)
    message = str(caught.value)
    assert f"loading {folder} would run these Python files" in message
    assert ": configuration_tiny.py, modeling_tiny.py, helper.py, deeper.py. Read them" in message
    assert "LLaDA and Dream need none of it" in message and "load_native" in message
    with pytest.raises(SystemExit, match="remote code was run"):  # the bomb is one
        load_remote(folder, trust_remote_code=True)


def test_code_from_another_repository_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", LLaDAModelLM)
    auto_map = {"AutoConfig": "someone/else--configuration_x.X", "AutoModel": "someone/else--modeling_x.X"}
    _change_config(tmp_path / "tiny", auto_map=auto_map)
    with pytest.raises(ValueError, match=r"configuration_x\.py of someone/else, modeling_x\.py of someone/else\. Read"):
        load_remote(tmp_path / "tiny")


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoConfig": "configuration_tiny.TinyConfig"}])
def test_a_model_without_code_of_its_own_is_sent_elsewhere(tmp_path: Path, auto_map: Any) -> None:
    write_folder(tmp_path / "tiny", LLaDAModelLM)
    _change_config(tmp_path / "tiny", auto_map=auto_map)
    with pytest.raises(ValueError, match=r"has no auto_map with AutoConfig and one of .*load_native"):
        load_remote(tmp_path / "tiny", trust_remote_code=True)


def test_weights_are_never_read_from_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    model = write_folder(folder, LLaDAModelLM)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tiny has no \*\.safetensors$"):
        load_remote(folder, trust_remote_code=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors, only pytorch_model\.bin: pickles can run code"):
        load_remote(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        load_remote(folder, trust_remote_code=True, use_safetensors=False)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", SDARForCausalLM, block_size=4)
    write_folder(tmp_path / "other", LLaDAModelLM, block_size=4)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"lack 1 of the tensors of SDARForCausalLM, .* at random: lm_head\.weight"):
        load_remote(tmp_path / "tiny", trust_remote_code=True)


def test_code_for_another_transformers_is_said_to_be(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_folder(folder, LLaDAModelLM)
    _change_config(folder, transformers_version="4.38.2")
    code = folder / "modeling_tiny.py"
    code.write_text(code.read_text().replace("import PretrainedConfig, ", "import PretrainedConfig, GoneSince, "))
    with pytest.raises(
        RuntimeError, match=r"written for transformers 4\.38\.2, does not run with transformers \d.*Gone"
    ):
        load_remote(folder, trust_remote_code=True)


# ---------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize(
    ("kind", "message"),
    [(LLaDAModelLM, "LLaDAModelLM is causal: its last token"), (SDARForCausalLM, "is causal within blocks of 4")],
    ids=["bidirectional", "block"],
)
def test_a_causal_model_is_refused(tmp_path: Path, kind: type[TinyModel], message: str) -> None:
    write_folder(tmp_path / "tiny", kind, causal=True, block_size=4)
    with pytest.raises(ValueError, match=message):
        load_remote(tmp_path / "tiny", trust_remote_code=True)


@pytest.mark.parametrize(
    ("flaw", "said"), [("causal", "is causal when attention_mask has a zero"), ("attends", "attends to padding")]
)
def test_what_a_padding_mask_breaks_is_accepted_and_remembered(tmp_path: Path, flaw: str, said: str) -> None:
    write_folder(tmp_path / "tiny", LLaDAModelLM, when_padded=flaw, mask_token_id=MASK)
    with pytest.warns(UserWarning, match=f"{said}.*never passes a padding mask"):
        model = load_remote(tmp_path / "tiny", trust_remote_code=True)
    assert said in str(padding_problem(nn.DataParallel(model)))
    ids = torch.randint(0, MASK, (2, 9), generator=torch.Generator().manual_seed(3))
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    response = torch.arange(9).expand(2, 9) >= 5
    padded = bk.elbo_logprob(model, ids, response, n_mc=4, attention_mask=attention)
    cut = bk.elbo_logprob(model, ids[:1, 3:], response[:1, 3:], n_mc=4)
    assert torch.equal(padded[:1], cut), "the padding is cut away, so the flaw is not met"


def test_a_model_without_flaws_says_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", LLaDAModelLM)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*padding mask")
        assert padding_problem(load_remote(tmp_path / "tiny", trust_remote_code=True)) is None


def test_code_that_fails_under_a_padding_mask_is_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_folder(folder, LLaDAModelLM)
    code = folder / "modeling_tiny.py"
    old = "        if attention_mask is not None and not bool(attention_mask.all()):\n"
    assert code.read_text().count(old) == 1
    code.write_text(code.read_text().replace(old, old + "            raise RuntimeError('no [B, T] masks here')\n"))
    with pytest.warns(UserWarning, match=r"fails under a padding mask: RuntimeError: no \[B, T\] masks here"):
        load_remote(folder, trust_remote_code=True)


# ---------------------------------------------------------------------------------------------------- LLaDA's head


def test_a_head_tied_by_linear_is_refused_with_the_reason() -> None:
    model = tiny(LLaDAModelLM)
    model.config.weight_tying = True
    with pytest.raises(
        ValueError, match=r"LLaDAModelLM ties its head to the embedding .*F\.linear.*untie.*load_native"
    ):
        find_head(model)
    model.config.weight_tying = False
    assert find_head(model).module is model.model.transformer["ff_out"]


def test_the_table_knows_the_mask_ids() -> None:
    ids = {"LLaDAModelLM": 126336, "LLaDAMoEModelLM": 156895, "DreamModel": 151666}
    blocks = {"LLaDA2MoeModelLM": 156895, "SDARForCausalLM": 151669, "SDARMoeForCausalLM": 151669}
    for name, mask in (ids | blocks).items():
        model = type(name, (nn.Module,), {})()
        assert heads.default_mask_token_id(model) == mask
        fork = type("Fork", (type(model),), {})()
        assert heads.default_mask_token_id(fork) == mask
        assert (heads.model_spec(fork).attention == "block") == (name in blocks)
