"""row_logprob: what all logits would give, whatever is cut, padded, replayed, reordered or left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_zoo import MASK, Plain, V, bert, every_architecture, llada, untouchable
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.models import HeadSpec

P, T = 5, 9
IDS = torch.randint(5, MASK, (P, T), generator=torch.Generator().manual_seed(1))
SCORED = torch.rand(P, T, generator=torch.Generator().manual_seed(2)) < 0.4
SCORED[2] = False  # a sequence without rows
NOISY = IDS.masked_fill(SCORED, MASK)
ROWS = SCORED.flatten().nonzero()[:, 0]
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
WAYS: dict[str, dict[str, Any]] = {
    "one graph": {},  # or one for each length
    "replayed": {"replay": True},
    "one sequence at a time": {"micro_batch_tokens": T},
    "two at a time, graphs kept": {"micro_batch_tokens": 2 * T, "replay": False},
}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=list(WAYS))


def plain(model: nn.Module, temperature: float = 1.0, noisy: Tensor = NOISY) -> tuple[Tensor, Tensor]:
    """Log-probabilities of IDS and entropies, [P, T], from all logits."""
    output = model(noisy)
    logp = torch.log_softmax((output if isinstance(output, Tensor) else output.logits) / temperature, -1)
    return logp.gather(-1, IDS[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def gradients(model: nn.Module, *values: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = sum((v * torch.linspace(-1, 1.5, v.numel(), dtype=v.dtype)).sum() for v in values)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_way
@every_architecture
def test_values_and_gradients_are_those_of_all_logits(build, options: dict[str, Any]) -> None:
    model = build(torch.float64)
    expected = plain(model, 0.7)[0][SCORED]
    wanted = gradients(model, expected)
    found = bk.row_logprob(model, NOISY, SCORED, IDS, temperature=0.7, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradients(model, found), wanted, **CLOSE)


@every_way
def test_entropy_and_its_gradient(options: dict[str, Any]) -> None:
    model = bert(torch.float64)
    expected = [x[SCORED] for x in plain(model)]
    wanted = gradients(model, *expected)
    found = bk.row_logprob(model, NOISY, SCORED, IDS, return_entropy=True, **options)
    torch.testing.assert_close(list(found), expected, **CLOSE)
    torch.testing.assert_close(gradients(model, *found), wanted, **CLOSE)


@every_way
def test_restricted_support(options: dict[str, Any]) -> None:
    model = llada(torch.float64)
    targets = IDS[SCORED]
    support = torch.stack([targets, (targets + 7) % V, (targets + 20) % V], 1)
    support[::3, 2] = -1
    logits = model(NOISY).logits[SCORED]
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for i, ids in enumerate(support):
        allowed[i, ids[ids >= 0]] = True
    expected = torch.log_softmax(logits.masked_fill(~allowed, -torch.inf), -1).gather(-1, targets[:, None])[:, 0]
    wanted = gradients(model, expected)
    found = bk.row_logprob(model, NOISY, SCORED, IDS, support=support, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradients(model, found), wanted, **CLOSE)
    order = torch.randperm(ROWS.numel())
    shuffled = bk.row_logprob(model, NOISY, ROWS[order], targets[order], support=support[order], **options)
    torch.testing.assert_close(shuffled, expected[order], **CLOSE)


@every_way
def test_rows_in_any_order_and_twice(options: dict[str, Any]) -> None:
    model = bert(torch.float64)
    order = torch.cat([torch.randperm(ROWS.numel()), torch.tensor([3, 0])])
    expected = plain(model)[0].flatten()[ROWS[order]]
    wanted = gradients(model, expected)
    for targets in (IDS, IDS.flatten()[ROWS[order]]):
        found = bk.row_logprob(model, NOISY, ROWS[order], targets, **options)
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(gradients(model, found), wanted, **CLOSE)


class Kept(nn.Module):
    """A model that notes what it is called with, and adds `shift_by` [B] or [B, T] to its embedding if given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain(torch.float64)
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, extra: Tensor | None = None, flag: str = "") -> Tensor:
        self.calls.append({"ids": input_ids.clone(), "extra": extra, "flag": flag})
        return self.inner(input_ids)


@every_way
def test_padding_is_cut_away_from_ids_and_arguments(options: dict[str, Any]) -> None:
    model = Kept()
    attention = torch.ones(P, T, dtype=torch.int64)
    attention[0, :3] = attention[3, :3] = 0
    attention[1, 7:] = 0
    scored = SCORED & attention.bool()
    expected, wanted_rows = [], []
    for p in range(P):
        keep = attention[p].bool()
        logp = torch.log_softmax(model.inner(NOISY[p : p + 1, keep]), -1).gather(-1, IDS[p : p + 1, keep, None])[
            0, :, 0
        ]
        expected.append(logp[scored[p, keep]])
    expected = torch.cat(expected)
    wanted = gradients(model, expected)
    garbage = NOISY.masked_fill(attention == 0, 10**6)  # padding may hold anything
    extra = torch.arange(P * T).view(P, T)
    kwargs = {"extra": extra, "flag": "as it is"}
    bk.models.assume_bidirectional(model)
    found = bk.row_logprob(
        model, garbage, scored, IDS, attention_mask=attention, model_kwargs=kwargs, head=model.inner.out, **options
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradients(model, found), wanted, **CLOSE)
    for call in model.calls:
        assert call["flag"] == "as it is" and call["extra"].shape == call["ids"].shape
        assert torch.equal(NOISY.flatten()[call["extra"]], call["ids"]), "argument and tokens lost the same places"
        wanted_rows += call["extra"][:, 0].div(T, rounding_mode="floor").tolist()
    assert set(wanted_rows) == {p for p in range(P) if scored[p].any()}, "a sequence without rows is not run"


def test_a_shifted_model_is_asked_for_tokens() -> None:
    model = llada(torch.float64)
    spec = HeadSpec(model.lm_head, shift=1)
    scored = SCORED.clone()
    scored[:, 0] = False
    logp = torch.log_softmax(model(NOISY).logits, -1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    for options in WAYS.values():
        found = bk.row_logprob(model, NOISY, scored, IDS, head=spec, **options)
        torch.testing.assert_close(found, logp[scored[:, 1:]], **CLOSE)
    with pytest.raises(ValueError, match=r"row i-1 predicts token i in this model.*rows \[0\] ask"):
        bk.row_logprob(model, NOISY, torch.tensor([0]), IDS[:1, 0], head=spec)


@every_way
def test_no_logits_are_made(options: dict[str, Any]) -> None:
    model = Plain()
    spec = untouchable(model.out)
    bk.row_logprob(model, NOISY, SCORED, IDS, head=spec, **options).sum().backward()


def saved_elements(function) -> tuple[Tensor, int]:
    """The result, and how many numbers autograd keeps for it."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    return result, kept


def test_several_micro_batches_keep_no_graph() -> None:
    model = bert()
    many, scored, ids = (x.repeat(6, 1) for x in (NOISY, SCORED, IDS))
    _, one = saved_elements(lambda: bk.row_logprob(model, NOISY, SCORED, IDS))
    _, all_of_them = saved_elements(
        lambda: bk.row_logprob(model, many, scored, ids, micro_batch_tokens=P * T, replay=False)
    )
    result, replayed = saved_elements(lambda: bk.row_logprob(model, many, scored, ids, micro_batch_tokens=P * T))
    assert all_of_them > 4 * one and replayed <= many.shape[0] * T, "only the permutation of the rows, if that"
    assert result.requires_grad
    _, insisted = saved_elements(lambda: bk.row_logprob(model, NOISY, SCORED, IDS, replay=True))
    assert insisted == 0 < one


def test_out_of_memory_turns_one_graph_into_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain(torch.float64)
    plain_forward = model.mix.forward
    expected = plain(model)[0][SCORED]
    wanted = gradients(model, expected)

    def forward(x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return plain_forward(x)

    spec = HeadSpec(model.out)
    bk.row_logprob(model, NOISY, SCORED, IDS, head=spec)  # the probe has run
    monkeypatch.setattr(model.mix, "forward", forward)
    found = bk.row_logprob(model, NOISY, SCORED, IDS, head=spec)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradients(model, found), wanted, **CLOSE)
    with pytest.raises(torch.OutOfMemoryError, match="micro_batch_tokens=27 do not fit"):
        bk.row_logprob(model, NOISY, SCORED, IDS, head=spec, micro_batch_tokens=27)


def test_no_rows_at_all() -> None:
    model = bert()
    none = torch.zeros(0, dtype=torch.int64)
    found = bk.row_logprob(model, NOISY, none, none)
    assert found.shape == (0,)
    found.sum().backward()
    with torch.no_grad():
        assert not bk.row_logprob(model, NOISY, SCORED, IDS).requires_grad


def test_old_and_new_policy_agree_to_the_bit() -> None:
    model = bert()
    with torch.no_grad():
        old = bk.row_logprob(model, NOISY, SCORED, IDS)
    assert torch.equal(bk.row_logprob(model, NOISY, SCORED, IDS).detach(), old)
    assert torch.equal(bk.row_logprob(model, NOISY, SCORED, IDS, replay=True).detach(), old)


def test_a_causal_model_is_refused_unless_it_is_given_its_mask() -> None:
    model = llada()
    model.config.is_causal = True
    for layer in model.model.layers:
        layer.self_attn.is_causal = True
    with pytest.raises(ValueError, match="is causal"):
        bk.row_logprob(model, NOISY, SCORED, IDS)
    mask = torch.ones(P, 1, T, T, dtype=torch.bool)
    found = bk.row_logprob(model, NOISY, SCORED, IDS, model_kwargs={"attention_mask": mask}, micro_batch_tokens=T)
    torch.testing.assert_close(found, plain(llada())[0][SCORED], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": NOISY.int()}, TypeError, "input_ids must be int64"),
        ({"input_ids": NOISY[0]}, ValueError, r"input_ids must have shape \[P, T\]"),
        ({"input_ids": NOISY + V}, ValueError, "rows of the model's embedding"),
        ({"rows": SCORED.int()}, TypeError, "rows must be int64 or bool"),
        ({"rows": SCORED[:2]}, ValueError, r"rows must have shape \[5, 9\]"),
        ({"rows": torch.tensor([45])}, ValueError, r"rows must be in \[0, 45\)"),
        ({"targets": IDS[:, 1:]}, ValueError, r"targets must have shape \[5, 9\]"),
        ({"targets": IDS[0]}, ValueError, r"targets must have shape \[\d+\] \(one per row\)"),
        ({"targets": IDS + V}, ValueError, "vocabulary of the head"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above"),
        ({"support": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"support must have shape \[\d+, K\]"),
        ({"attention_mask": torch.zeros(P, T)}, ValueError, r"rows \[.*\] are padding \(attention_mask 0\)"),
        (
            {"attention_mask": torch.ones(P, T), "model_kwargs": {"attention_mask": 1}},
            ValueError,
            "attention_mask is given twice",
        ),
        ({"micro_batch_tokens": 0}, ValueError, "micro_batch_tokens must be at least 1"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input_ids": NOISY, "rows": SCORED, "targets": IDS} | changes
    with pytest.raises(error, match=message):
        bk.row_logprob(bert(), **given)


def test_arguments_that_cannot_be_cut_are_named() -> None:
    class Mask:  # the shape of a BlockMask
        shape = (P, 1, T, T)

    model = Kept()
    bk.models.assume_bidirectional(model)
    given: dict[str, Any] = {"model_kwargs": {"extra": Mask()}, "head": model.inner.out}
    bk.row_logprob(model, NOISY, SCORED, IDS, **given)
    with pytest.raises(ValueError, match=r"model_kwargs\['extra'\], a Mask, cannot be cut into micro-batches"):
        bk.row_logprob(model, NOISY, SCORED, IDS, micro_batch_tokens=T, **given)
    attention = torch.ones(P, T)
    attention[0, 0] = 0
    scored = SCORED & attention.bool()
    with pytest.raises(ValueError, match=r"model_kwargs\['extra'\], a Mask, cannot be cut: pass no attention_mask"):
        bk.row_logprob(model, NOISY, scored, IDS, attention_mask=attention, **given)
    given["model_kwargs"] = {"extra": torch.ones(P, 1, T, T)}
    with pytest.raises(ValueError, match=r"model_kwargs\['extra'\] \[5, 1, 9, 9\] cannot lose its padding"):
        bk.row_logprob(model, NOISY, scored, IDS, attention_mask=attention, **given)
