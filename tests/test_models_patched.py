"""A patched model's own forward: log-probabilities where its logits would be, by whatever way it makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_zoo import MASK, Plain, V, bert, every_architecture, llada
from torch import Tensor, nn

import bgpo_kernels as bk
from bgpo_kernels.models import HeadSpec

IDS = torch.randint(5, MASK, (3, 7), generator=torch.Generator().manual_seed(1))
SCORED = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.4
ROWS = SCORED.flatten().nonzero()[:, 0]
NOISY = IDS.masked_fill(SCORED, MASK)
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def plain(model: nn.Module, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the clean tokens and entropies, [3, 7] each, from all logits."""
    logp = torch.log_softmax(logits_of(model(NOISY)) / temperature, -1)
    return logp.gather(-1, IDS[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_architecture
def test_rows_and_labels_give_what_the_logits_give(build) -> None:
    model = build(torch.float64)
    expected, entropy = plain(model, 0.7)
    wanted = gradients(model, expected[SCORED])
    with bk.patch(model, IDS[SCORED], rows=ROWS, temperature=0.7, return_entropy=True) as patched:
        flat = model(input_ids=NOISY).logits
    torch.testing.assert_close(flat, expected[SCORED], **CLOSE)
    torch.testing.assert_close(patched.entropy, entropy[SCORED], **CLOSE)
    torch.testing.assert_close(gradients(model, flat), wanted, **CLOSE)
    with bk.patch(model, IDS.masked_fill(~SCORED, -100), temperature=0.7):
        dense = model(input_ids=NOISY).logits
    assert torch.equal(dense[~SCORED], torch.zeros_like(dense[~SCORED]))
    torch.testing.assert_close(dense[SCORED], expected[SCORED], **CLOSE)
    assert model(input_ids=NOISY).logits.shape == (3, 7, V), "the model is as it was"


def test_a_loss_inside_the_forward_sees_them() -> None:
    class WithLoss(Plain):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
            if labels is None:
                return super().forward(input_ids)
            with bk.patch(self, labels, head=self.out):
                return -super().forward(input_ids).sum()

    model = WithLoss(torch.float64)
    loss = model(NOISY, IDS.masked_fill(~SCORED, -100))
    torch.testing.assert_close(loss, -plain(model)[0][SCORED].sum(), **CLOSE)


@pytest.mark.parametrize(
    ("after", "spec"),
    [(lambda x: 0.3 * x, {"logit_scale": 0.3}), (lambda x: 5 * torch.tanh(x / 5), {"softcap": 5.0})],
    ids=["scale", "cap"],
)
def test_what_the_model_does_to_its_logits_is_not_done_to_log_probabilities(after, spec: dict[str, float]) -> None:
    model = Plain(torch.float64, after)
    expected, _ = plain(model)
    with bk.patch(model, IDS[SCORED], rows=ROWS, head=HeadSpec(model.out, **spec)):
        flat = model(NOISY)
    torch.testing.assert_close(flat, expected[SCORED], **CLOSE)
    assert "forward" not in vars(model) and model(NOISY).shape == (3, 7, V)


def test_a_shifted_model_is_asked_for_tokens() -> None:
    model = llada(torch.float64)
    spec = HeadSpec(model.lm_head, shift=1)
    logp = torch.log_softmax(model(NOISY).logits, -1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    scored = SCORED.clone()
    scored[:, 0] = False
    rows = scored.flatten().nonzero()[:, 0]
    for targets, given in ((IDS[scored], rows), (IDS.masked_fill(~scored, -100), None)):
        with bk.patch(model, targets, rows=given, head=spec):
            found = model(NOISY).logits
        found = found if given is not None else found[scored]
        torch.testing.assert_close(found, logp[scored[:, 1:]], **CLOSE)
    for targets, given, message in (
        (IDS[:, 0], torch.arange(0, 21, 7), r"rows \[0, 7, 14\] are first tokens"),
        (IDS.flatten(), None, "row i-1 predicts token i in this model: pass rows"),
    ):
        with bk.patch(model, targets, rows=given, head=spec), pytest.raises(ValueError, match=message):
            model(NOISY)


def test_contexts_nest_and_failures_restore() -> None:
    model = bert(torch.float64)
    with bk.patch(model, IDS.flatten()):
        with bk.patch(model, IDS[SCORED], rows=ROWS):
            assert model(NOISY).logits.shape == (int(SCORED.sum()),)
        assert model(NOISY).logits.shape == (21,)
        with pytest.raises(ValueError, match="targets has 21 entries for 14 hidden rows"):
            model(NOISY[:2])
    assert model(NOISY).logits.shape == (3, 7, V)


def test_every_call_may_score_other_rows() -> None:
    model = bert(torch.float64)
    expected, entropy = plain(model)
    with bk.patch(model, return_entropy=True) as patched:
        with pytest.raises(ValueError, match=r"before it was told what to score: give targets to patch"):
            model(NOISY)
        patched.score(IDS[SCORED], rows=ROWS)
        torch.testing.assert_close(model(NOISY).logits, expected[SCORED], **CLOSE)
        patched.score(IDS)
        torch.testing.assert_close(model(NOISY).logits, expected, **CLOSE)
        torch.testing.assert_close(patched.entropy, entropy, **CLOSE)
    with pytest.raises(ValueError, match="rows and support need targets"), bk.patch(model, rows=ROWS):
        pass


def test_an_error_that_leaves_the_context_restores_the_model() -> None:
    capped = Plain(after=lambda x: 5 * torch.tanh(x / 5))
    for model, head in ((bert(), None), (capped, HeadSpec(capped.out, softcap=5.0))):
        with pytest.raises(KeyError), bk.patch(model, IDS.flatten(), head=head):
            raise KeyError
        assert logits_of(model(NOISY)).shape == (3, 7, V)


def test_mistakes_are_named() -> None:
    model = bert()
    together = r"rows and support go with targets \[N\], not with targets \[3, 7\]"
    with pytest.raises(ValueError, match=together), bk.patch(model, IDS, rows=ROWS):
        pass
    with bk.patch(model, IDS[:2]), pytest.raises(ValueError, match=r"targets must have shape \[3, 7\]"):
        model(NOISY)
    with pytest.raises(TypeError, match="targets must be int64"), bk.patch(model, IDS.int()):
        pass
