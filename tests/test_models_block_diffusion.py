"""Block diffusion: who sees whom, the layout, and scores equal to the slow definition, one forward per block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from remote_zoo import MASK, LLaDA2MoeModelLM, LLaDAModelLM, SDARForCausalLM, TinyModel, V, tiny

import bgpo_kernels as bk
from bgpo_kernels.models import HeadSpec, assume_bidirectional, find_head, heads
from bgpo_kernels.models import known_models as table
from bgpo_kernels.models.block_diffusion import block_row_logprob
from bgpo_kernels.models.block_masks import block_diffusion_inputs, block_layout, block_mask
from bgpo_kernels.models.block_probe import assert_block_semantics, resolve_flavour
from bgpo_kernels.models.known_models import ModelSpec

MODELS = pytest.mark.parametrize("kind", [SDARForCausalLM, LLaDA2MoeModelLM], ids=["sdar", "llada2"])
ORIGINS = pytest.mark.parametrize("origin", ["sequence", "response"])


@pytest.fixture(autouse=True)
def _adapters_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_adapters", dict(heads._adapters))
    monkeypatch.setattr(table, "_models", dict(table._models))


def _batch(tokens: int = 13, prompt: int = 5, sequences: int = 2, copies: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Clean [B, T], noisy [P, T], rows [P, T]; every noisy copy has a masked and an unmasked response token."""
    generator = torch.Generator().manual_seed(7)
    clean = torch.randint(0, MASK, (sequences, tokens), generator=generator)
    rows = torch.rand(sequences * copies, tokens, generator=generator) < 0.5
    rows[:, :prompt], rows[:, -1], rows[:, -2] = False, True, False
    noisy = clean.repeat_interleave(copies, 0).masked_fill(rows, MASK)
    return clean, noisy, rows


def _block(place: int, prompt: int, length: int, origin: str) -> int:
    first = 0 if origin == "sequence" else prompt
    return (place - first) // length


def _slow(
    model: TinyModel, clean: Tensor, noisy: Tensor, rows: Tensor, targets: Tensor, prompt: int, length: int, origin: str
) -> Tensor:
    """By definition: for every block one forward of [clean text before it | the noisy block], every block of which sees
    itself and what is before it. All logits, torch's log_softmax."""
    tokens = clean.shape[1]
    block = torch.tensor([_block(i, prompt, length, origin) for i in range(tokens)])
    found = torch.zeros(noisy.shape, dtype=torch.float64)
    for k in sorted({int(block[i]) for i in range(prompt, tokens)}):
        inside, before = (block == k).nonzero()[:, 0], (block < k).nonzero()[:, 0]
        ids = torch.cat([clean[:, before], noisy[:, inside]], 1)
        own = block[: ids.shape[1]]
        see = (own[None] <= own[:, None]).expand(len(ids), 1, -1, -1)
        mask = see if model.takes == "bool" else torch.zeros(see.shape).double().masked_fill(~see, -torch.inf)
        logp = model(ids, attention_mask=mask).logits.log_softmax(-1)[:, len(before) :]
        found[:, inside] = logp.gather(-1, targets[:, inside, None])[..., 0]
    return found[rows]


# ---------------------------------------------------------------------------------------------------- the mask


@ORIGINS
@pytest.mark.parametrize(("tokens", "prompt", "length"), [(13, 5, 4), (8, 0, 4), (9, 4, 4), (7, 6, 1), (6, 3, 8)])
def test_masks_by_brute_force(tokens: int, prompt: int, length: int, origin: str) -> None:
    block = [_block(i, prompt, length, origin) for i in range(tokens)]
    start = min(i for i in range(tokens) if block[i] == block[prompt])
    places = [(i, False) for i in range(tokens)] + [(i, True) for i in range(start, tokens)]
    expected = torch.zeros(len(places), len(places), dtype=torch.bool)
    for q, (i, noisy) in enumerate(places):
        for k, (j, other_noisy) in enumerate(places):
            if noisy:
                expected[q, k] = block[j] == block[i] if other_noisy else block[j] < block[i]
            else:
                expected[q, k] = not other_noisy and block[j] <= block[i]
    layout = block_layout(tokens, prompt, length, origin)
    assert (layout.start, layout.tokens) == (start, tokens)
    assert list(zip(layout.place.tolist(), layout.noisy.tolist(), strict=True)) == places
    assert torch.equal(block_mask(layout, "bool")[0, 0], expected)
    additive = block_mask(layout, "additive", torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive[0, 0], torch.where(expected, 0.0, -torch.inf).bfloat16())
    assert bool(expected.any(-1).all()), "a row that sees nothing would be NaN"


@ORIGINS
@pytest.mark.no_poison
def test_the_flex_mask_is_the_dense_one(origin: str) -> None:
    layout = block_layout(150, 37, 8, origin)  # 259 or 263 tokens: three blocks of 128, the last one partly used
    flex, dense = block_mask(layout, "flex"), block_mask(layout, "bool")[0, 0]
    size = dense.shape[0]
    q, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(flex.mask_mod(zero, zero, q, k), dense)
    padded = torch.zeros(384, 384, dtype=torch.bool)
    padded[:size, :size] = dense
    needed = padded.view(3, 128, 3, 128).any(3).any(1)
    assert torch.equal(flex.to_dense()[0, 0].bool(), needed)
    assert not bool(needed.all()), "some of the blocks are skipped, or the mask is no use"


# ---------------------------------------------------------------------------------------------------- the layout


def test_layout_of_ids_positions_and_rows() -> None:
    clean = torch.arange(7)[None]
    noisy = torch.tensor([[0, 1, 2, 3, 22, 5, 22], [0, 1, 2, 3, 4, 22, 6]])
    rows = noisy == MASK
    built = block_diffusion_inputs(clean, noisy, block_length=2, prompt_length=3, rows=rows)
    assert built.input_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 2, 3, 22, 5, 22],
        [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 22, 6],
    ]
    assert built.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6]] * 2
    assert built.rows is not None and built.rows.tolist() == [9, 11, 12 + 10]
    assert built.attention_mask.shape == (2, 1, 12, 12)
    assert built.attention_mask.untyped_storage().nbytes() == 144, "one mask, however many sequences"
    flat = block_diffusion_inputs(clean, noisy, block_length=2, prompt_length=3, rows=torch.tensor([12, 6]))
    assert flat.rows is not None and flat.rows.tolist() == [12 + 10, 11]
    aligned = block_diffusion_inputs(clean, noisy, block_length=2, prompt_length=3, origin="response")
    assert aligned.input_ids.shape == (2, 3 + 2 * 4) and aligned.rows is None


# ---------------------------------------------------------------------------------------------------- scores


@MODELS
@ORIGINS
@pytest.mark.parametrize(("prompt", "length"), [(5, 4), (4, 4), (1, 1), (5, 16)])
def test_scores_are_those_of_one_forward_per_block(
    kind: type[TinyModel], origin: str, prompt: int, length: int
) -> None:
    model = tiny(kind).train(kind is LLaDA2MoeModelLM)
    clean, noisy, rows = _batch(prompt=prompt)
    targets = (noisy + 3) % V  # any targets, not the clean tokens alone
    expected = _slow(model, clean.repeat_interleave(2, 0), noisy, rows, targets, prompt, length, origin)
    options: dict[str, Any] = {"prompt_length": prompt, "block_length": length, "origin": origin}
    ours = block_row_logprob(model, clean, noisy, rows, targets, **options)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert float(ours.detach().std()) > 0.1, "equal scores would prove little"


@MODELS
def test_gradients_and_replay(kind: type[TinyModel]) -> None:
    model = tiny(kind).train(kind is LLaDA2MoeModelLM)
    clean, noisy, rows = _batch()
    coefficients = torch.linspace(-1, 1, int(rows.sum()), dtype=torch.float64)

    def gradients(score: Callable[[], Tensor]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        (score() * coefficients).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    twice = clean.repeat_interleave(2, 0)
    slow = gradients(lambda: _slow(model, twice, noisy, rows, twice, 5, 4, "sequence"))
    options: dict[str, Any] = {"prompt_length": 5, "block_length": 4}
    for more in ({}, {"replay": True}, {"replay": True, "micro_batch_tokens": 30}):
        ours = gradients(lambda more=more: block_row_logprob(model, clean, noisy, rows, **options, **more))
        assert ours.keys() == slow.keys()
        for name, grad in slow.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@MODELS
def test_padding_and_prompts_of_several_lengths_change_nothing(kind: type[TinyModel]) -> None:
    model = tiny(kind)
    clean, noisy, rows = _batch(tokens=13, prompt=5, sequences=3)
    pads = [(3, 0), (0, 0), (2, 2)]  # left and right, where ids of any value stand
    attention = torch.ones_like(clean)
    for b, (left, right) in enumerate(pads):
        attention[b, :left], attention[b, 13 - right :] = 0, 0
        rows[2 * b : 2 * b + 2, 13 - right :] = False
    support = torch.stack([clean.repeat_interleave(2, 0)[rows], torch.full((int(rows.sum()),), MASK)], 1)
    options: dict[str, Any] = {"block_length": 4, "return_entropy": True}
    whole: Any = None
    with torch.no_grad():
        for extra in ({}, {"support": support}, {"temperature": 0.5}):
            whole = block_row_logprob(
                model, clean, noisy, rows, attention_mask=attention, prompt_length=5, **options, **extra
            )
            alone = []
            for b, (left, right) in enumerate(pads):
                keep = slice(left, 13 - right)
                part = rows[2 * b : 2 * b + 2]
                own = {k: v[rows.nonzero()[:, 0] // 2 == b] if k == "support" else v for k, v in extra.items()}
                alone.append(
                    block_row_logprob(
                        model,
                        clean[b : b + 1, keep],
                        noisy[2 * b : 2 * b + 2, keep],
                        part[:, keep],
                        prompt_length=5 - left,
                        **options,
                        **own,
                    )
                )
            for ours, parts in zip(whole, zip(*alone, strict=True), strict=True):
                assert torch.equal(ours, torch.cat(parts)), extra
    order = torch.randperm(int(rows.sum()), generator=torch.Generator().manual_seed(1))
    shuffled = rows.flatten().nonzero()[:, 0][order]
    lengths = torch.full((3,), 5)
    with torch.no_grad():
        again: Any = block_row_logprob(
            model, clean, noisy, shuffled, attention_mask=attention, prompt_length=lengths, temperature=0.5, **options
        )
    assert torch.equal(again[0], whole[0][order]) and torch.equal(again[1], whole[1][order])


def test_several_shapes_keep_no_graphs() -> None:
    model = tiny(SDARForCausalLM)
    clean, noisy, rows = _batch(sequences=3)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert_block_semantics(model, find_head(model), 4)
    lengths = torch.tensor([5, 4, 3])
    for replay, first in ((None, [False] * 3), (False, [True] * 3)):
        calls.clear()
        ell = block_row_logprob(model, clean, noisy, rows, prompt_length=lengths, block_length=4, replay=replay)
        assert calls == first
        ell.sum().backward()
        assert calls == first + ([True] * 3 if replay is None else [])


def test_sequences_without_rows_are_not_run() -> None:
    model = tiny(SDARForCausalLM)
    clean, noisy, rows = _batch(sequences=3)
    assert_block_semantics(model, find_head(model), 4)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    rows[2:] = False
    block_row_logprob(model, clean, noisy, rows, prompt_length=5, block_length=4)
    (kwargs,) = seen
    assert kwargs["input_ids"].shape == (2, 22)
    assert kwargs["attention_mask"].untyped_storage().nbytes() == 22 * 22, "still one mask for both"
    rows[:] = False
    assert block_row_logprob(model, clean, noisy, rows, prompt_length=5, block_length=4).shape == (0,)


# ---------------------------------------------------------------------------------------------------- modes of SDAR


@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_sdar_in_training_mode_calls_its_head_and_gets_a_flex_mask() -> None:
    model = tiny(SDARForCausalLM, torch.float32)
    clean, noisy, rows = _batch()
    options: dict[str, Any] = {"prompt_length": 5, "block_length": 4}
    with torch.no_grad():
        evaluated = block_row_logprob(model, clean, noisy, rows, **options)
        assert resolve_flavour(model, "auto") == "bool"
        model.train()
        assert resolve_flavour(model, "auto") == "flex"
        trained = block_row_logprob(model, clean, noisy, rows, **options)  # torch has no backward of flex on a CPU
        built = block_diffusion_inputs(clean, noisy, block_length=4, prompt_length=5, flavour="flex")
        assert model(built.input_ids, **built.model_kwargs).logits is None, "by itself it has none"
    torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-5)
    assert all(module.training for module in model.modules())


def test_a_failure_inside_leaves_the_mode_as_it_was() -> None:
    model = tiny(SDARForCausalLM).train()
    with pytest.raises(RuntimeError, match="seen"), heads.capture_head(model, find_head(model), Tensor.clone):
        assert not model.training and model.layers[0].training
        raise RuntimeError("seen")
    assert model.training


def test_llada2_learns_in_training_mode_only() -> None:
    model = tiny(LLaDA2MoeModelLM)
    clean, noisy, rows = _batch()
    options: dict[str, Any] = {"prompt_length": 5, "block_length": 4}
    with pytest.raises(ValueError, match=r"torch\.no_grad in evaluation mode.*model\.train\(\)"):
        block_row_logprob(model, clean, noisy, rows, **options)
    with torch.no_grad():
        block_row_logprob(model, clean, noisy, rows, **options)
    assert "forward" not in vars(model.lm_head)
    assert block_row_logprob(model.train(), clean, noisy, rows, **options).requires_grad
    model.eval().requires_grad_(False)
    assert not block_row_logprob(model, clean, noisy, rows, **options).requires_grad


# ---------------------------------------------------------------------------------------------------- the probe


@MODELS
def test_the_probe_passes_once_and_refuses_every_flaw(kind: type[TinyModel]) -> None:
    model = tiny(kind)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert_block_semantics(model, find_head(model), 4)
    first = len(calls)
    assert_block_semantics(nn.DataParallel(model), find_head(model), 4)
    assert len(calls) == first
    assert_block_semantics(model, find_head(model), 2)
    assert len(calls) == 2 * first
    causal = tiny(kind, causal=True)
    with pytest.raises(ValueError, match=rf"{kind.__name__} is causal within blocks of 4: the last token"):
        assert_block_semantics(causal, find_head(causal), 4)
    assert_block_semantics(causal, find_head(causal), 1)  # in blocks of one token there is no difference
    with pytest.raises(ValueError, match="is causal within blocks"):
        clean, noisy, rows = _batch()
        block_row_logprob(causal, clean, noisy, rows, prompt_length=5, block_length=4)
    assume_bidirectional(causal)
    assert_block_semantics(causal, find_head(causal), 4)


def test_a_mask_of_the_wrong_kind_is_found() -> None:
    sdar, llada2 = tiny(SDARForCausalLM), tiny(LLaDA2MoeModelLM)
    with pytest.raises(ValueError, match="does not obey a block mask of the kind 'additive': a token moves"):
        assert_block_semantics(sdar, find_head(sdar), 4, flavour="additive")
    with pytest.raises(ValueError, match="does not obey a block mask of the kind 'bool'"):
        assert_block_semantics(llada2, find_head(llada2), 4, flavour="bool")

    class Deaf(LLaDA2MoeModelLM):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids, None, **kwargs)

    class Blind(LLaDA2MoeModelLM):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
            blocks = torch.arange(input_ids.shape[1]) // 4
            return super().forward(input_ids, attention_mask.masked_fill(blocks != blocks[:, None], -torch.inf))

    deaf, blind = tiny(Deaf), tiny(Blind)
    with pytest.raises(ValueError, match="Deaf does not obey"):
        assert_block_semantics(deaf, find_head(deaf), 4)
    with pytest.raises(ValueError, match="Blind does not see earlier blocks of 4, so it cannot see a prompt"):
        assert_block_semantics(blind, find_head(blind), 4)


def test_the_probe_leaves_the_model_alone() -> None:
    model = tiny(SDARForCausalLM).train()
    model.layers[1].eval()
    state, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    assert_block_semantics(model, find_head(model), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_calls_for_bidirectional_models_say_what_to_use() -> None:
    model = tiny(SDARForCausalLM)
    ids = torch.randint(0, MASK, (1, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"SDARForCausalLM attends in blocks.*block_row_logprob"):
        bk.elbo_logprob(model, ids, torch.ones_like(ids, dtype=torch.bool), n_mc=2, mask_token_id=MASK)


# ---------------------------------------------------------------------------------------------------- table, errors


class Mine(nn.Module):
    """A block-diffusion model that no table knows, without config."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny(LLaDA2MoeModelLM)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        return self.inner(input_ids, attention_mask, position_ids).logits


def test_a_new_block_model_is_one_registration() -> None:
    model, (clean, noisy, rows) = Mine(), _batch()
    known = tiny(LLaDA2MoeModelLM)
    with torch.no_grad():
        expected = block_row_logprob(known, clean, noisy, rows, prompt_length=5, block_length=4)
        head = model.inner.lm_head
        with pytest.raises(ValueError, match="block_length is missing: neither the config of Mine nor our table"):
            block_row_logprob(model, clean, noisy, rows, prompt_length=5, head=head)
        with pytest.raises(
            ValueError, match=r"flavour is missing.*which kind of mask Mine takes.*bool, additive, flex"
        ):
            block_row_logprob(model, clean, noisy, rows, prompt_length=5, head=head, block_length=4)
        by_hand = block_row_logprob(
            model, clean, noisy, rows, prompt_length=5, head=head, block_length=4, flavour="additive"
        )
        spec = ModelSpec(mask_token_id=MASK, attention="block", block_length=4, block_mask="additive")
        heads.register("Mine", lambda m: HeadSpec(m.inner.lm_head), spec)
        assert heads.model_spec(nn.DataParallel(model)) == spec
        assert heads.default_mask_token_id(model) == MASK
        registered = block_row_logprob(model, clean, noisy, rows, prompt_length=5)
    assert torch.equal(by_hand, expected) and torch.equal(registered, expected)


def test_the_config_comes_before_the_table() -> None:
    assert heads.default_block_length(tiny(SDARForCausalLM)) == 4
    assert heads.default_block_length(tiny(SDARForCausalLM, block_size=8)) == 8
    assert heads.default_mask_token_id(tiny(SDARForCausalLM)) == 151669
    assert heads.default_mask_token_id(tiny(SDARForCausalLM, mask_token_id=5)) == 5
    assert heads.default_block_length(tiny(LLaDAModelLM)) is None
    assert heads.default_mask_token_id(nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"attention": "causal"}, "attention must be one of .*got 'causal'"),
        ({"block_mask": "dense"}, "block_mask must be None or one of .*got 'dense'"),
        ({"block_length": 0}, "block_length must be None or at least 1, got 0"),
    ],
)
def test_entries_of_the_table_are_checked(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec(**field)
    with pytest.raises(TypeError, match="model_spec must be a ModelSpec, got dict"):
        heads.register("Mine", HeadSpec, field)  # type: ignore[arg-type]


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"clean_ids": torch.zeros(2, 13)}, TypeError, "clean_ids must be int64, got float32"),
    ({"noisy_ids": torch.zeros(4, 12, dtype=torch.int64)}, ValueError, r"noisy_ids must have shape \[P, 13\]"),
    ({"noisy_ids": torch.zeros(3, 13, dtype=torch.int64)}, ValueError, "multiple of the 2 sequences .*got 3"),
    ({"rows": torch.zeros(4, 12, dtype=torch.bool)}, ValueError, r"rows must have shape \[4, 13\]"),
    ({"rows": torch.tensor([52])}, ValueError, r"rows must be in \[0, 52\)"),
    ({"rows": torch.tensor([3]), "targets": None}, ValueError, r"rows \[3\] .* before the first noisy block.* token 4"),
    ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "targets must have shape .*one per row"),
    ({"targets": torch.full((4, 13), V)}, ValueError, "targets must be in"),
    ({"prompt_length": 13}, ValueError, r"prompt_length must be in \[0, 12\], got 13"),
    ({"prompt_length": torch.tensor([5])}, ValueError, r"prompt_length must have shape \[2\]"),
    ({"prompt_length": torch.tensor([5, 13])}, ValueError, r"prompt_length must be in \[0, 13\)"),
    ({"prompt_length": 9}, ValueError, r"noisy_ids differ from clean_ids before token 8"),
    ({"attention_mask": torch.tensor([[0] * 13, [1] * 13])}, ValueError, r"rows \[.*\] are padding"),
    ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
    ({"origin": "prompt"}, ValueError, "origin must be one of sequence, response; got 'prompt'"),
    ({"flavour": "dense"}, ValueError, "flavour must be auto, bool, additive, flex; got 'dense'"),
    ({"model_kwargs": {}}, TypeError, "model_kwargs is made by block_row_logprob"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[f"{'/'.join(c)} {m[:24]}" for c, _, m in ERRORS])
def test_mistakes_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    clean, noisy, rows = _batch()
    noisy[:, 5] = MASK
    call = {
        "clean_ids": clean,
        "noisy_ids": noisy,
        "rows": rows,
        "targets": None,
        "prompt_length": 5,
        "block_length": 4,
    }
    with pytest.raises(error, match=message):
        block_row_logprob(tiny(SDARForCausalLM), **call | change)


def test_a_response_that_is_all_padding_is_named() -> None:
    clean, noisy, rows = _batch()
    rows[:2] = False
    attention = torch.ones_like(clean)
    attention[0, 5:] = 0
    with pytest.raises(ValueError, match=r"sequence\(s\) \[0\] have no response"):
        block_row_logprob(
            tiny(SDARForCausalLM), clean, noisy, rows, attention_mask=attention, prompt_length=5, block_length=4
        )
