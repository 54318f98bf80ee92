"""Small models, a batch for them, and the plain restatement that the estimators are compared with.

The restatement shares nothing with the estimators but the draw: one forward of the model on all B*n noisy copies, all
logits, torch's own log_softmax, every graph kept. Weights are made in fp32 and then cast, so that a model in fp64 is
the exact reference of the same model in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM, PreTrainedModel

import bgpo_kernels as bk
from bgpo_kernels.models import HeadSpec
from bgpo_kernels.models.llada import build_llada, llada_config

V, MASK = 61, 60
_WIDTH = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2, "vocab_size": V}


@contextmanager
def seed(value: int) -> Iterator[None]:
    """Weights of their own, and the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        yield


def bert(dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """BertForMaskedLM: head bias, tied embeddings."""
    fields = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64, "mask_token_id": MASK} | _WIDTH
    with seed(0):
        return BertForMaskedLM(BertConfig(**fields | config)).eval().to(dtype)


def modern_bert(dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """ModernBertForMaskedLM: head bias, tied embeddings, rotary positions."""
    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    fields = {"hidden_size": 16, "intermediate_size": 24, "mask_token_id": MASK} | special | _WIDTH
    with seed(1):
        return ModernBertForMaskedLM(ModernBertConfig(**fields | config)).eval().to(dtype)


def llada(dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """The LLaDA architecture: no bias anywhere, head not tied."""
    fields = {"mask_token_id": MASK, "eos_token_id": 2} | _WIDTH
    model = build_llada(llada_config("tiny", **fields | config), seed=2).to(dtype)
    if dtype == torch.float64:  # transformers' RMSNorm computes in fp32 whatever the model's dtype
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = lambda x, m=module: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    return model


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {"bert": bert, "modernbert": modern_bert, "llada": llada}
every_architecture = pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=list(ARCHITECTURES))


class Plain(nn.Module):
    """Embedding, a layer that mixes all positions, head. ``after`` is what the model does to its logits."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
        vocabulary: int = V,
        width: int = 8,
    ) -> None:
        super().__init__()
        with seed(3):
            self.embed = nn.Embedding(vocabulary, width)
            self.mix = nn.Linear(width, width)
            self.out = nn.Linear(width, vocabulary)
        self.after = after
        self.to(dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        neighbours = x.roll(1, dims=1) - 0.5 * x.roll(-1, dims=1)
        return self.after(self.out(torch.tanh(self.mix(x + neighbours) + x.mean(dim=1, keepdim=True))))


class _Untouchable(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise AssertionError("the logits were formed")


def untouchable(head: nn.Linear) -> HeadSpec:
    """The head made to raise whenever it is run, and vouched for."""
    head.__class__ = _Untouchable
    return HeadSpec(head)


class Batch(NamedTuple):
    """Clean sequences of equal length, what of them is scored, and one advantage each."""

    ids: Tensor  # [B, T]
    response: Tensor  # [B, T]
    advantages: Tensor  # [B], exact in bf16, so that no cast of them is ever felt

    @property
    def length(self) -> Tensor:
        """``[B]``."""
        return self.response.sum(-1)


def make_batch(sequences: int = 3, tokens: int = 10) -> Batch:
    """Responses of different lengths; in every second row the last token is context."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, MASK, (sequences, tokens), generator=generator)
    begin = torch.arange(sequences) % 3 + 3
    end = tokens - torch.arange(sequences) % 2
    places = torch.arange(tokens)
    response = (places >= begin[:, None]) & (places < end[:, None])
    advantages = torch.tensor([1.5, -0.75, 0.5, -1.25, 2.0])[:sequences]
    return Batch(ids, response, advantages)


def perturbed(model: nn.Module, size: float = 0.02) -> nn.Module:
    """The model itself, every parameter moved a little: a newer or older policy."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def plain_scores(
    model: nn.Module, ids: Tensor, response: Tensor, draw: bk.MaskDraw, temperature: float = 1.0, shift: int = 0
) -> Tensor:
    """ELBO estimates ``[B, n]`` from all logits, with one graph over everything."""
    batch, samples, tokens = draw.noisy_ids.shape
    output = model(input_ids=draw.noisy_ids.reshape(-1, tokens))
    logits = getattr(output, "logits", output)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = (logits / temperature).log_softmax(-1).view(batch, samples, tokens, -1).roll(shift, dims=2)
    token = logp.gather(-1, ids[:, None, :, None].expand(-1, samples, -1, -1))[..., 0]
    masked = (draw.noisy_ids == MASK) & response[:, None]
    return draw.segment_weight.to(token.dtype) * (token * masked).sum(-1)


def plain_bgpo(
    scores: Tensor,  # [B, n]
    advantages: Tensor,  # [B]
    *,
    old: Tensor | None = None,
    length: Tensor | None = None,
    clip: tuple[float, float] = (1.0, torch.inf),
    dual: float = torch.inf,
    normalizer: float | None = None,
) -> Tensor:
    """BGPO's loss as the paper writes it, with PPO's clip on the ratio of each sample."""
    a = advantages[:, None].to(scores.dtype)
    d = scores - (scores.detach() if old is None else old)
    d = d if length is None else d / length[:, None]
    gain = a * torch.clamp(1 + d, max=1 + clip[1])
    loss = a * torch.clamp(torch.exp(d), min=1 - clip[0], max=dual)
    total = torch.where(a >= 0, gain, loss).sum()
    return -total / ((len(a) if normalizer is None else normalizer) * scores.shape[1])


# One loss, BGPO's on-policy with length normalisation, by each of the three calls and by torch.

N = 8
DRAWING: dict[str, Any] = {"n_mc": N, "seed": 23, "mask_token_id": MASK}
Call = Callable[..., None]


def loss_of(batch: Batch) -> Callable[[Tensor], Tensor]:
    return lambda scores: plain_bgpo(scores, batch.advantages, length=batch.length)


def by_bgpo(model: nn.Module, batch: Batch, **options: Any) -> None:
    bk.bgpo_backward(model, batch.ids, batch.response, batch.advantages, **DRAWING | options)


def by_replay(model: nn.Module, batch: Batch, **options: Any) -> None:
    bk.replay_backward(model, batch.ids, batch.response, loss_of(batch), **DRAWING | options)


def by_elbo(model: nn.Module, batch: Batch, **options: Any) -> None:
    scores = bk.elbo_logprob(model, batch.ids, batch.response, per_sample=True, **DRAWING | options)
    with torch.autocast("cpu", enabled=False):  # torch asks for a backward outside the autocast of its forward
        loss_of(batch)(scores).backward()


def by_torch(model: nn.Module, batch: Batch, **options: Any) -> None:
    draw = bk.random_mask(batch.ids, batch.response, **DRAWING | options)
    loss_of(batch)(plain_scores(model, batch.ids, batch.response, draw)).backward()


every_call = pytest.mark.parametrize("call", [by_bgpo, by_replay, by_elbo], ids=["bgpo", "replay", "elbo"])
two_passes = pytest.mark.parametrize("call", [by_replay, by_elbo], ids=["replay", "elbo"])


def gradients_of(call: Call, model: nn.Module, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """Of a model that has none, removed from it."""
    call(model, batch, **options)
    return take_gradients(model)


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, removed from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, Tensor], plain: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Every gradient of fp64 models. The absolute part, relative to the largest gradient, is for gradients that are
    zero by mathematics and rounding in practice (the bias of attention keys)."""
    assert ours.keys() == plain.keys()
    top = max(float(g.abs().max()) for g in plain.values())
    assert top > 1e-3, "a vanishing gradient tests nothing"
    for name, expected in plain.items():
        wrong = ~torch.isclose(ours[name], expected, rtol=rtol, atol=1e-3 * rtol * top)
        assert not bool(wrong.any()), f"{name}: {ours[name][wrong][:4].tolist()} for {expected[wrong][:4].tolist()}"


def as_one(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector: the largest of a bias's 16 rounding errors is luck, that of thousands is not."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def assert_bitwise(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every gradient, to the bit."""
    assert ours.keys() == other.keys()
    different = [name for name in ours if not torch.equal(ours[name], other[name])]
    assert not different, f"differ: {different}"
