"""LLaDA's likelihood evaluation (ML-GSAI/LLaDA): replaces ``get_log_likelihood`` of ``get_log_likelihood.py``.

    log p(answer | prompt)  is estimated by  mean_j (L/l_j) sum_{k in M_j} log p_k,      M_j a random l_j-subset

over mc_num masks, with l_j spread evenly over 1..L, as in the original (the 128-mask protocol of LLaDA's appendix B.5).
With ``cfg_scale`` c > 0 the log-softmax is of ``u + (c + 1)(z - u)``, z the logits given the prompt and u those given a
masked prompt; the head is linear, so that is the head applied to ``h_u + (c + 1)(h_z - h_u)``, and no logits are kept.

Saved: the head runs on masked tokens only, without N x V logits. An answer of one token has one possible mask, which
is evaluated once, not mc_num times.

What differs from the original:

* the number is the same on every run and in any order: masks are keyed (seed, tokens), where the original draws from
  the global random state and its result moves with what was evaluated before;
* all ``mc_num`` masks are used, where the original rounds down to a multiple of ``batch_size``; it spreads l evenly
  over a batch, we over all mc_num;
* an answer or prompt that holds the mask token is scored by explicit masks; the original also scores every token of the
  prompt that equals the mask token.

``is_greedy`` is ``suffix_greedy_prediction`` of ``eval_llada.py``: whether decoding token by token, the most confident
first, gives the answer. It stops at the first token that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..estimators import elbo_logprob
from ..head import masked_logprob
from ..masks import MaskDraw, random_mask
from ..models import HeadSpec, assert_bidirectional, capture_head, find_head, forward_kwargs, without_gradient
from ._common import content_ids
from ._subsets import join


@torch.no_grad()
def get_log_likelihood(
    model: nn.Module,
    prompt: Tensor,
    answer: Tensor,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    mask_id: int = 126336,
    *,
    seed: int = 0,
    draw: MaskDraw | None = None,
    sample_ids: Tensor | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> float:
    """The estimate of log p(answer | prompt) in nats, as LLaDA's function of this name.

    Args:
        prompt: ``[l1]`` int64. answer: ``[l2]`` int64.
        mc_num: masks; one is exact for an answer of one token. batch_size: sequences in a forward pass.
        cfg_scale: unsupervised classifier-free guidance.
        seed, draw, sample_ids (``[1]``): of the masks; ``draw [1, mc_num]`` gives them explicitly.
        head, backend: as :func:`bgpo_kernels.elbo_logprob`.
    """
    sequence, response = _sequence(model, prompt, answer)
    batch_size = check.integer("batch_size", batch_size, 1)
    mc_num, tokens = check.integer("mc_num", mc_num, 1), sequence.shape[1]
    scale = check.number("cfg_scale", cfg_scale, 0.0)
    if draw is None:
        ids = content_ids(sequence) if sample_ids is None else sample_ids
        draw = draw_masks(sequence, response, 1 if len(answer) == 1 else mc_num, seed, mask_id, ids, backend=backend)
    if scale == 0:
        elbo = elbo_logprob(
            model, sequence, response, draw=draw, micro_batch_tokens=batch_size * tokens, head=head, backend=backend
        )
        return float(elbo)
    spec = _guidable(model, head)
    sums = []
    everything = torch.arange(tokens, device=sequence.device)
    for lo in range(0, draw.n_mc, batch_size):
        part = draw.sequence(0, lo, min(lo + batch_size, draw.n_mc), everything)
        score = _scorer(spec, part, backend)
        logp = _guided(model, spec, part.noisy_ids[0], ~response, part.rows, mask_id, scale, score)
        sums.append(part.reduce(logp)[0])
    return float(torch.cat(sums).mean())


@torch.no_grad()
def is_greedy(
    model: nn.Module,
    prompt: Tensor,
    answer: Tensor,
    cfg_scale: float = 0.0,
    mask_id: int = 126336,
    *,
    head: nn.Module | HeadSpec | None = None,
) -> bool:
    """Whether greedy decoding of as many masks after ``prompt``, most confident token first, gives ``answer``."""
    sequence, response = _sequence(model, prompt, answer)
    scale = check.number("cfg_scale", cfg_scale, 0.0)
    spec = _guidable(model, head) if scale else find_head(model, head)
    assert_bidirectional(model, spec)
    target, open_ = sequence[0], response[0].clone()
    noisy = torch.where(response, mask_id, sequence)
    while bool(open_.any()):
        rows = open_.nonzero()[:, 0]
        logits = _guided(model, spec, noisy, ~response, rows, mask_id, scale, lambda hidden: _logits(spec, hidden))
        confidence, best = logits.softmax(-1).max(-1)
        chosen = confidence.argmax()
        if best[chosen] != target[rows[chosen]]:
            return False
        noisy[0, rows[chosen]] = target[rows[chosen]]
        open_[rows[chosen]] = False
    return True


def draw_masks(
    sequence: Tensor,
    response: Tensor,
    mc_num: int,
    seed: int,
    mask_id: int,
    sample_ids: Tensor,
    *,
    backend: str = "auto",
) -> MaskDraw:
    """Masks of ``sequence [1, T]``, its ``response [1, T]`` bool; a token that equals mask_id is like any other."""
    plain = torch.where(sequence == mask_id, 0 if mask_id else 1, sequence)
    options: dict[str, Any] = {"n_mc": mc_num, "seed": seed, "sample_ids": sample_ids, "backend": backend}
    return join([random_mask(plain, response, mask_token_id=mask_id, **options)], sequence, mask_id)


def _sequence(model: nn.Module, prompt: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ``[1, T]`` on the model's device, and which of them are the answer."""
    for name, value in (("prompt", prompt), ("answer", answer)):
        check.dtype(name, check.tensor(name, value), torch.int64)
        check.shape(name, value, ("l1" if name == "prompt" else "l2",))
    if len(answer) == 0:
        raise ValueError("answer holds no token")
    device = next(model.parameters()).device
    sequence = torch.cat((prompt.to(device), answer.to(device)))[None]
    return sequence, torch.arange(sequence.shape[1], device=device)[None] >= len(prompt)


def _guidable(model: nn.Module, head: nn.Module | HeadSpec | None) -> HeadSpec:
    spec = find_head(model, head)
    if spec.softcap is not None:
        raise ValueError("cfg_scale > 0 mixes logits, which a softcap keeps from being mixed before the head")
    assert_bidirectional(model, spec)
    return spec


def _guided(
    model: nn.Module, spec: HeadSpec, noisy: Tensor, prompt: Tensor, rows: Tensor, mask_id: int, scale: float,
    consume: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """``consume(hidden [N, H])`` of the rows, guided by a forward without the prompt when ``scale`` > 0."""
    free = (
        None if scale == 0 else _at_head(model, spec, torch.where(prompt, mask_id, noisy), rows, lambda hidden: hidden)
    )

    def mixed(hidden: Tensor) -> Tensor:
        if free is None:
            return consume(hidden)
        return consume((free.double() + (scale + 1) * (hidden.double() - free.double())).to(hidden.dtype))

    return _at_head(model, spec, noisy, rows, mixed)


def _at_head(
    model: nn.Module, spec: HeadSpec, noisy: Tensor, rows: Tensor, consume: Callable[[Tensor], Tensor]
) -> Tensor:
    """``consume`` of the hidden states that predict ``rows``, run where the head's weight is whole."""

    def at_rows(hidden: Tensor) -> Tensor:
        return consume(hidden.reshape(-1, hidden.shape[-1])[rows - spec.shift])

    with without_gradient(), capture_head(model, spec, at_rows) as capture:
        model(input_ids=noisy, **forward_kwargs(model))
    return capture.value


def _scorer(spec: HeadSpec, part: MaskDraw, backend: str) -> Callable[[Tensor], Tensor]:
    module: Any = spec.module

    def score(hidden: Tensor) -> Tensor:
        logp = masked_logprob(
            hidden, module.weight, part.targets, bias=getattr(module, "bias", None), logit_scale=spec.logit_scale,
            backend=backend,
        )  # fmt: skip
        assert isinstance(logp, Tensor)
        return logp

    return score


def _logits(spec: HeadSpec, hidden: Tensor) -> Tensor:
    logits = spec.logit_scale * spec.module(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if spec.softcap is None else spec.softcap * torch.tanh(logits / spec.softcap)
