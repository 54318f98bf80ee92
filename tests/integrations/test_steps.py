"""Trainers of decoding steps: the general function and each trainer's own, against their arithmetic on all logits."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from completion_checks import (
    PAD,
    B,
    L,
    LeavesRandomStateAlone,
    P,
    T,
    assert_flat,
    gradients_of,
    logits_of,
    padded,
    positional,
    sequences,
    shifted_model,
    token_logp,
    unshifted,
)
from models_zoo import MASK, assert_same_gradients, bert, llada, untouchable
from tolerances import assert_as_good_as_torch
from torch import Tensor, nn

from bgpo_kernels.integrations import steps

ARGS = SimpleNamespace(mask_id=MASK, p_mask_prompt=0.3, cfg_scale=0.0)
TRAINER = SimpleNamespace(
    args=ARGS, temperature=0.7, max_completion_length=L, processing_class=SimpleNamespace(mask_token_id=MASK)
)
close = {"rtol": 1e-10, "atol": 1e-10}


def trajectory(ids: Tensor, count: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """States before each of ``count`` steps and at the end, ``[B, T]``; the tokens each decodes, ``[B, L]`` bool."""
    order = torch.rand(len(ids), L, generator=torch.Generator().manual_seed(8)).argsort(-1) * count // L
    completion = ids[:, P:]
    states = [torch.cat([ids[:, :P], torch.where(order >= k, MASK, completion)], 1) for k in range(count + 1)]
    return states, [order == k for k in range(count)]


def random_loss(values: Tensor) -> Tensor:
    weight = torch.randn(values.shape, dtype=values.dtype, generator=torch.Generator().manual_seed(1))
    return (weight * values).sum()


def same(ours: Any, theirs: Any, model: Any) -> Tensor:
    """Values and gradients of both ways agree on fresh models; the values."""
    values, gradients = gradients_of(ours, model(), random_loss)
    expected, expected_gradients = gradients_of(theirs, model(), random_loss)
    torch.testing.assert_close(values, expected, **close)
    assert_same_gradients(gradients, expected_gradients)
    return values


# ---------------------------------------------------------------------------------------------- the general function


@unshifted
def test_steps_stacked_in_any_dimensions(build) -> None:
    states, decoded = trajectory(sequences())
    noisy, targets = torch.stack(states[:-1]), torch.stack(states[1:])
    rows = F.pad(torch.stack(decoded), (P, 0))

    def plain(model: nn.Module) -> Tensor:
        return torch.stack([token_logp(logits_of(model, n), t) for n, t in zip(noisy, targets, strict=True)]) * rows

    values = same(lambda m: steps.step_logprob(m, noisy, targets, rows), plain, lambda: build(torch.float64))
    assert values.shape == (3, B, T)


def test_a_shifted_model_a_temperature_and_padding() -> None:
    ids, attended = padded(sequences())
    states, decoded = trajectory(ids)
    rows = F.pad(decoded[1], (P, 0)) & attended.bool()

    def plain(model: nn.Module) -> Tensor:
        found = torch.zeros(B, T, dtype=torch.float64)
        for b, real in enumerate(attended.bool()):
            logits = logits_of(model, states[1][b : b + 1, real]) / 0.6
            found[b, real] = token_logp(logits.roll(1, 1), states[2][b : b + 1, real])[0]
        return found * rows

    heads = {}

    def model() -> nn.Module:
        made, heads["head"] = shifted_model()
        return made

    same(
        lambda m: steps.step_logprob(
            m, states[1], states[2], rows, attention_mask=attended, temperature=0.6, head=heads["head"]
        ),
        plain,
        model,
    )


def test_in_fp32_as_good_as_torch() -> None:
    states, decoded = trajectory(sequences())
    rows = F.pad(decoded[0], (P, 0))
    found = [steps.step_logprob(llada(), states[0], states[1], rows)[rows].detach()]
    found += [
        token_logp(logits_of(llada(dtype), states[0]), states[1])[rows].detach()
        for dtype in (torch.float32, torch.float64)
    ]
    assert_as_good_as_torch(*found)


def test_nothing_decoded() -> None:
    ids = sequences()
    model = llada()
    values = steps.step_logprob(model, ids, ids, torch.zeros_like(ids, dtype=torch.bool))
    values.sum().backward()
    assert not bool(values.any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noisy_ids": torch.zeros(B, T)}, TypeError, "noisy_ids must be int64"),
        ({"noisy_ids": torch.zeros(T, dtype=torch.int64)}, ValueError, "with a leading dimension"),
        ({"targets": torch.zeros(B, L, dtype=torch.int64)}, ValueError, "targets must have shape"),
        ({"rows": torch.zeros(B, T)}, TypeError, "rows must be bool"),
        ({"attention_mask": torch.ones(B, L)}, ValueError, "attention_mask must have shape"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"noisy_ids": sequences(), "targets": sequences(), "rows": torch.ones(B, T, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        steps.step_logprob(llada(), **given | change)


# -------------------------------------------------------------------------------------------------------- EOSER-ASS-RL


@unshifted
def test_cj_grpo_values_and_gradients(build) -> None:
    ids = sequences()
    states, decoded = trajectory(ids)

    def plain(model: nn.Module) -> Tensor:
        """Step by step: logits of everything, the completion's log-probabilities, which the loss then masks."""
        logps = [token_logp(logits_of(model, s)[:, -L:], t[:, -L:]) for s, t in pairwise(states)]
        return torch.stack(logps) * torch.stack(decoded)

    def ours(model: nn.Module) -> Tensor:
        found = steps.cj_grpo_get_per_token_logps(TRAINER, model, ids, states, decoded, L)
        assert isinstance(found, list)
        return torch.stack(found)

    assert same(ours, plain, lambda: build(torch.float64)).shape == (3, B, L)


def test_cj_grpo_keeps_no_graphs_of_its_steps() -> None:
    def call(count: int, tokens: int | None) -> list[Tensor]:
        ids = sequences(1)
        states, decoded = trajectory(ids, count)
        return steps.cj_grpo_get_per_token_logps(TRAINER, llada(), ids, states, decoded, L, micro_batch_tokens=tokens)

    assert_flat(call, lambda count: count * L)
    model = llada()
    states, decoded = trajectory(sequences())
    head = untouchable(model.get_output_embeddings())
    steps.cj_grpo_get_per_token_logps(TRAINER, model, sequences(), states, decoded, L, head=head)


def test_one_step_grpo() -> None:
    ids = sequences()
    masked = torch.cat([ids[:, :P], torch.full((B, L), MASK)], 1)

    def plain(model: nn.Module) -> Tensor:
        return token_logp(logits_of(model, masked)[:, -L:], ids[:, -L:])

    values = same(lambda m: steps.one_step_get_per_token_logps(TRAINER, m, ids, L), plain, lambda: llada(torch.float64))
    rows = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.5
    some = steps.one_step_get_per_token_logps(TRAINER, llada(torch.float64), ids, L, rows=rows)
    torch.testing.assert_close(some, values * rows[:, P:], **close)


# ------------------------------------------------------------------------------------------------------------------ d2


def d2_batch(iterations: int = 2) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``[I, B, T]`` ids, and three segments: states ``[I, B, T]`` and decoded tokens ``[1, B, L]``, as 0 and 1."""
    ids = sequences().expand(iterations, -1, -1)
    states, decoded = trajectory(sequences())
    return ids, [s.expand(iterations, -1, -1) for s in states[:-1]], [d[None].long() for d in decoded]


def seen_by_us(monkeypatch: pytest.MonkeyPatch, call: Any) -> Tensor:
    """What ``call`` shows the model, ``[P, T]``, from the model's own arguments."""
    from bgpo_kernels.integrations import _d2

    seen: list[Tensor] = []
    original = _d2.step_logprob

    def spy(model: Any, noisy: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(noisy)
        return original(model, noisy, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(_d2, "step_logprob", spy)
        call()
    return torch.stack(seen)


def test_d2_step_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, states, decoded = d2_batch()
    seeds = [42, 7]
    model = llada(torch.float64)
    (noisy,) = seen_by_us(monkeypatch, lambda: steps.d2_get_per_token_logps(TRAINER, model, ids, L, seeds, states[1]))
    hidden = noisy[..., :P] == MASK
    assert torch.equal(noisy[..., P:], states[1][..., P:])
    assert torch.equal(noisy[..., :P][~hidden], ids[..., :P][~hidden])
    assert bool(hidden.any()) and not bool(hidden.all()) and not torch.equal(hidden[0], hidden[1])

    def plain(m: nn.Module) -> Tensor:
        return token_logp(logits_of(m, noisy.flatten(0, 1))[:, -L:], ids.flatten(0, 1)[:, -L:]).view(2, B, L)

    everything = same(
        lambda m: steps.d2_get_per_token_logps(TRAINER, m, ids, L, seeds, states[1]), plain,
        lambda: llada(torch.float64),
    )  # fmt: skip
    segment = steps.d2_get_per_token_logps(TRAINER, model, ids, L, seeds, states[1], trajectory_mask=decoded[1])
    torch.testing.assert_close(segment, everything * decoded[1], **close)


def test_d2_old_and_reference_sum_over_the_segments() -> None:
    ids, states, decoded = d2_batch()
    model = llada(torch.float64)
    parts = [
        steps.d2_get_per_token_logps(TRAINER, model, ids, L, torch.tensor([3, 4]), s, trajectory_mask=d)
        for s, d in zip(states, decoded, strict=True)
    ]
    whole = steps.d2_get_per_token_logps_oldandref(TRAINER, model, ids, L, [3, 4], states, decoded)
    torch.testing.assert_close(whole, sum(parts), **close)
    assert bool((whole != 0).all()), "every token belongs to one segment"


def test_d2_prompt_masks_belong_to_the_sequence_not_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, states, _ = d2_batch(1)
    model, order = llada(), torch.tensor([2, 0, 1])

    def masks(i: Tensor, s: Tensor, **options: Any) -> Tensor:
        with LeavesRandomStateAlone():
            return seen_by_us(
                monkeypatch, lambda: steps.d2_get_per_token_logps(TRAINER, model, i, L, [5], s, **options)
            )[0]

    whole = masks(ids, states[0])
    assert torch.equal(masks(ids[:, order], states[0][:, order]), whole[:, order])
    assert torch.equal(masks(ids[:, 1:2], states[0][:, 1:2]), whole[:, 1:2])
    assert not torch.equal(masks(ids, states[0], sample_ids=torch.arange(B)), whole)


class PositionBias(nn.Module):
    """A model that takes d2's additive bias and position ids."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert(torch.float64)

    def get_output_embeddings(self) -> nn.Module:
        return self.bert.get_output_embeddings()

    def forward(self, input_ids: Tensor, attention_bias: Any = None, position_ids: Any = None) -> Any:
        kwargs = {} if attention_bias is None else {"attention_mask": attention_bias, "position_ids": position_ids}
        return self.bert(input_ids=input_ids, **kwargs)


def test_d2_any_order() -> None:
    ids = sequences()[None]
    order = torch.rand(B, L, generator=torch.Generator().manual_seed(2)).argsort(-1) + P
    places = torch.cat([torch.arange(P).expand(B, -1), order], 1)

    def plain(model: nn.Module) -> Tensor:
        """The layout and its visibility, written out token by token."""
        seen = torch.cat([ids[0], torch.full((B, L), MASK)], 1)
        bias = torch.full((T + L, T + L), torch.finfo(torch.float64).min, dtype=torch.float64)
        for q in range(T + L):
            for k in range(T + L):
                clean_q, clean_k, i, j = q < T, k < T, (q - P) % L, (k - P) % L
                visible = k < P or (q >= P and clean_q and clean_k and j <= i)
                visible = visible or (not clean_q and ((clean_k and i // 2 > j // 2) or q == k))
                bias[q, k] = 0.0 if visible else bias[q, k]
        at = torch.cat([places, order], 1)
        logits = model(seen, attention_bias=bias.expand(B, 1, -1, -1), position_ids=at).logits
        return token_logp(logits[:, -L:], ids[0, :, -L:])[None]

    same(lambda m: steps.d2_any_order_get_per_token_logps(TRAINER, m, ids, places[None], L), plain, PositionBias)


# ---------------------------------------------------------------------------------------------------------------- MDPO


def test_mdpo() -> None:
    clean = sequences()
    left = torch.arange(B) % 3
    attended = (torch.arange(T) >= left[:, None]).long()
    states, _ = trajectory(torch.where(attended.bool(), clean, PAD))
    rows = (states[1] == MASK)[:, -L:]

    def plain(model: nn.Module) -> Tensor:
        found = torch.zeros(B, L, dtype=torch.float64)
        for b in range(B):
            logits = logits_of(model, states[1][b : b + 1, left[b] :])[:, -L:] / TRAINER.temperature
            found[b] = token_logp(logits, clean[b : b + 1, -L:])[0]
        return found * rows

    same(
        lambda m: steps.mdpo_get_per_token_logps(TRAINER, m, states[1], clean, attended), plain,
        lambda: llada(torch.float64),
    )  # fmt: skip
    model, explicit = llada(torch.float64), F.pad(rows, (P, 0)) & (torch.arange(T) % 2 == 0)
    some = steps.mdpo_get_per_token_logps(TRAINER, model, states[1], clean, attended, rows=explicit)
    torch.testing.assert_close(some, plain(model) * explicit[:, -L:], **close)


# ------------------------------------------------------------------------------------------------------------ JustGRPO


def update(ids: Tensor, **extra: Any) -> dict[str, Any]:
    advantages = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)
    inputs = {"advantages": advantages, "generated_ids": ids, "prompt_len": P, "rewards": torch.tensor([1.0, 0.0, 0.5])}
    return {"inputs": inputs, "valid_samples": torch.tensor([1, 1, 0]), "gen_length": L, "mask_id": MASK} | extra


def plain_justgrpo(model: nn.Module, ids: Tensor, gain: float, temperature: float, old: Tensor | None = None) -> Tensor:
    """Token by token: everything from t on masked, the logits of all rows, one of them scored. The total loss."""
    advantages = update(ids)["inputs"]["advantages"]
    total = 0.0
    for t in range(L):
        x = torch.cat([ids[:, : P + t], torch.full((B, L - t), MASK)], 1)
        logp = token_logp(logits_of(model, x)[:, P + t] / temperature, ids[:, P + t])
        ratio = (logp - (logp.detach() if old is None else old[:, t])).exp()
        total = total - torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    valid = update(ids)["valid_samples"].float().mean().item()
    return total * gain / L / (valid + 1e-5)


@pytest.mark.parametrize("options", [{}, {"positions_per_pass": 3}, {"micro_batch_tokens": T}])
@pytest.mark.parametrize("off_policy", [False, True])
def test_justgrpo_adds_the_gradient_of_its_loss(options: dict[str, Any], off_policy: bool) -> None:
    ids = sequences()
    old = None
    if off_policy:
        with torch.no_grad():
            old = steps.left_to_right_logprob(llada(torch.float64), ids, P, mask_token_id=MASK, temperature=0.8)
        old = old + torch.linspace(-0.4, 0.4, L, dtype=torch.float64)
    model, other = llada(torch.float64), llada(torch.float64)
    plain_justgrpo(other, ids, 0.7, 0.8, old).backward()
    calls: list[Tensor] = []
    accelerator = SimpleNamespace(
        gather=lambda x: x, backward=lambda loss: (calls.append(loss.detach()), loss.backward())
    )
    result = steps.justgrpo_logprob_loss(
        model, **update(ids), gain=0.7, temperature=0.8, accelerator=accelerator, old_logprob=old, **options
    )
    assert len(calls) == -(-L // options.get("positions_per_pass", 1))
    assert result == {"reward": 0.5, "valid_samples": pytest.approx(2 / 3)}
    found, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (model, other))
    assert_same_gradients(found, expected)


def test_left_to_right_without_padding_and_without_accelerator() -> None:
    ids, attended = padded(sequences())
    model = llada(torch.float64)
    found = steps.left_to_right_logprob(model, ids, P, mask_token_id=MASK, attention_mask=attended, positions=(1, L))
    assert found.shape == (B, L - 1)
    for b in range(B):
        real = ids[b, attended[b].bool()][None]
        prompt = P - b % 3
        alone = steps.left_to_right_logprob(model, real, prompt, mask_token_id=MASK)[0, 1:]
        torch.testing.assert_close(found[b, : len(alone)], alone, rtol=1e-10, atol=1e-10)
        assert not bool(found[b, len(alone) :].any())
    steps.justgrpo_logprob_loss(model, **update(sequences()))
    assert model.get_output_embeddings().weight.grad is not None


def test_justgrpo_errors() -> None:
    ids = sequences()
    with pytest.raises(ValueError, match="must hold prompt_len \\+ gen_length"):
        steps.justgrpo_logprob_loss(llada(), **update(ids, gen_length=L + 1))
    with pytest.raises(ValueError, match="old_logprob must have shape"):
        steps.justgrpo_logprob_loss(llada(), **update(ids), old_logprob=torch.zeros(B, 1))
    with pytest.raises(ValueError, match="positions_per_pass must be at least 1"):
        steps.justgrpo_logprob_loss(llada(), **update(ids), positions_per_pass=0)
    with pytest.raises(ValueError, match="positions must be within"):
        steps.left_to_right_logprob(llada(), ids, P, positions=(3, 3))
    with pytest.raises(ValueError, match="prompt_len must be"):
        steps.left_to_right_logprob(llada(), ids, T)


# --------------------------------------------------------------------------------------------------------------- DCoLT


def dcolt_batch(lengths: list[int]) -> dict[str, Tensor]:
    """Sequences padded on the right; the completion begins after each one's own prompt."""
    prompt_len = torch.tensor(lengths) - L
    attended = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    clean = torch.where(attended.bool(), sequences(), PAD)
    flag = torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.4
    token = prompt_len[:, None] + torch.arange(L)
    later = torch.zeros(B, T, dtype=torch.bool).scatter(1, token, flag | (torch.arange(L) > 4))
    x = clean.masked_fill(later, MASK)
    x0 = torch.where(torch.zeros(B, T, dtype=torch.bool).scatter(1, token, flag), clean, x)
    return {"x": x, "x0": x0, "update_flag": flag, "prompt_len": prompt_len, "attention_mask": attended}


@pytest.mark.parametrize("lengths", [[T, T, T], [T, T - 2, T - 1]])
def test_dcolt_log_probabilities_and_hidden_states(lengths: list[int]) -> None:
    d = dcolt_batch(lengths)

    def plain(model: nn.Module) -> Tensor:
        found = []
        for b, length in enumerate(lengths):
            output = model(input_ids=d["x"][b : b + 1, :length], output_hidden_states=True)
            span = slice(length - L, length)
            logp = token_logp(output.logits[:, span] / 0.9, d["x0"][b : b + 1, span])
            total = torch.where(d["update_flag"][b], logp[0], 0.0).sum()
            found.append(torch.cat([total[None], output.hidden_states[-1][0, span].flatten()]))
        return torch.stack(found)

    def ours(model: nn.Module) -> Tensor:
        logp, hidden = steps.dcolt_step_logprob(model, **d, temperature=0.9)
        return torch.cat([logp[:, None], hidden.flatten(1)], 1)

    same(ours, plain, lambda: llada(torch.float64))


def test_dcolt_without_mask_at_temperature_zero_and_without_logits() -> None:
    d = dcolt_batch([T, T, T])
    model = llada(torch.float64)
    expected = steps.dcolt_step_logprob(model, **d, temperature=1.0)[0]
    del d["attention_mask"]
    head = untouchable(model.get_output_embeddings())
    torch.testing.assert_close(steps.dcolt_step_logprob(model, **d, temperature=0.0, head=head)[0], expected, **close)


def test_dcolt_errors() -> None:
    d = dcolt_batch([T, T, T])
    left_padded = d["attention_mask"].index_fill(1, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="zeros on the right only"):
        steps.dcolt_step_logprob(llada(), **d | {"attention_mask": left_padded})
    with pytest.raises(ValueError, match="exceed the sequences' lengths"):
        steps.dcolt_step_logprob(llada(), **d | {"prompt_len": d["prompt_len"] + 1})
    with pytest.raises(TypeError, match="update_flag must be bool"):
        steps.dcolt_step_logprob(llada(), **d | {"update_flag": d["update_flag"].long()})
    with pytest.raises(ValueError, match="x0 must have shape"):
        steps.dcolt_step_logprob(llada(), **d | {"x0": d["x0"][:, 1:]})


# ------------------------------------------------------------------------------------------------- errors, signatures


def test_errors_of_trajectories() -> None:
    ids = sequences()
    states, decoded = trajectory(ids)
    guided = SimpleNamespace(args=SimpleNamespace(mask_id=MASK, p_mask_prompt=0.3, cfg_scale=0.5))
    with pytest.raises(ValueError, match=r"self\.args\.cfg_scale is 0\.5"):
        steps.cj_grpo_get_per_token_logps(guided, llada(), ids, states, decoded, L)
    with pytest.raises(ValueError, match="one state more"):
        steps.cj_grpo_get_per_token_logps(TRAINER, llada(), ids, states[:-1], decoded, L)
    with pytest.raises(ValueError, match="reversed_traj_unmask_positions must have shape"):
        steps.cj_grpo_get_per_token_logps(TRAINER, llada(), ids, states, [d[:, 1:] for d in decoded], L)
    with pytest.raises(ValueError, match="reversed_traj must have shape"):
        steps.cj_grpo_get_per_token_logps(TRAINER, llada(), ids, [s[:, 1:] for s in states], decoded, L)
    with pytest.raises(ValueError, match="trajectory must have shape"):
        steps.d2_get_per_token_logps(TRAINER, llada(), ids[None], L, [1], states[0][None, :, 1:])
    with pytest.raises(ValueError, match="trajectory_mask must have shape"):
        steps.d2_get_per_token_logps(TRAINER, llada(), ids[None], L, [1], states[0][None], trajectory_mask=decoded[0])
    with pytest.raises(ValueError, match="trajectory holds 2 segments but trajectory_mask 3"):
        steps.d2_get_per_token_logps_oldandref(TRAINER, llada(), ids[None], L, [1], states[:2], decoded)
    nameless = SimpleNamespace(
        max_completion_length=L, temperature=1.0, processing_class=SimpleNamespace(mask_token_id=None)
    )
    with pytest.raises(ValueError, match="mask_token_id is None"):
        steps.mdpo_get_per_token_logps(nameless, llada(), ids, ids, torch.ones_like(ids))


def test_the_signatures_are_the_trainers() -> None:
    common = ["self", "model", "input_ids"]
    expected = {
        steps.cj_grpo_get_per_token_logps: [
            *common, "reversed_traj", "reversed_traj_unmask_positions", "logits_to_keep",
        ],
        steps.one_step_get_per_token_logps: [*common, "logits_to_keep"],
        steps.d2_get_per_token_logps: [*common, "logits_to_keep", "mask_seeds", "trajectory"],
        steps.d2_get_per_token_logps_oldandref: [
            *common, "logits_to_keep", "mask_seeds", "trajectory", "trajectory_mask",
        ],
        steps.d2_any_order_get_per_token_logps: [*common, "position_id", "logits_to_keep"],
        steps.mdpo_get_per_token_logps: [*common, "target_ids", "attention_mask"],
        steps.justgrpo_logprob_loss: [
            "model", "inputs", "valid_samples", "eps", "gain", "temperature", "accelerator", "gen_length", "mask_id",
        ],
    }  # fmt: skip
    for function, names in expected.items():
        assert positional(function) == names
