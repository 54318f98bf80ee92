"""What the three model-level calls share: checked inputs, sequences without their padding, and their draws.

MC samples of one sequence all have its length, so a micro-batch holds samples of one sequence only: no padding, no
attention mask, no packing, and results that do not depend on which sequences share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..backends import resolve
from ..head.options import LogitTransform
from ..masks.draw import MaskDraw
from ..masks.functional import check_draw_tensors, check_response, draw_unchecked, make_spec
from ..masks.reference import Facts
from ..masks.schedule import CountSchedule, DrawSpec
from ..models import HeadSpec, assert_bidirectional, default_mask_token_id, find_head, forward_kwargs, unwrap
from .micro_batch import Group


@dataclass(frozen=True)
class Sequence:
    """One sequence without padding."""

    keep: Tensor  # [T'] int64: its tokens' places in the padded row
    input_ids: Tensor  # [1, T']
    response_mask: Tensor  # [1, T']
    sample_ids: Tensor  # [1]
    sample_id: int
    length: int  # L

    @property
    def tokens(self) -> int:
        """T'."""
        return self.input_ids.shape[1]


@dataclass(frozen=True)
class Problem:
    """A model, its head, and B sequences with n_mc maskings each."""

    model: nn.Module
    head: HeadSpec
    sequences: list[Sequence]
    n_mc: int
    spec: DrawSpec | None  # None: an explicit draw
    explicit: MaskDraw | None
    transform: LogitTransform
    backend: str
    device: torch.device
    facts: Facts
    forward_kwargs: dict[str, Any]

    def draw(self, b: int, lo: int, hi: int) -> MaskDraw:
        """Samples lo..hi-1 of sequence b, bit for bit those of the full draw."""
        sequence = self.sequences[b]
        if self.explicit is not None:
            return self.explicit.sequence(b, lo, hi, sequence.keep)
        assert self.spec is not None
        facts = self.facts._replace(lengths=[sequence.length], sample_ids=[sequence.sample_id])
        return draw_unchecked(
            sequence.input_ids, sequence.response_mask, None, sequence.sample_ids, self.spec.part(b, lo, hi),
            self.backend, facts,
        )  # fmt: skip

    @property
    def score_dtype(self) -> torch.dtype:
        """fp32, or fp64 for a model in fp64."""
        return torch.float64 if self.head.module.weight.dtype == torch.float64 else torch.float32

    @property
    def groups(self) -> list[Group]:
        """A group is the n_mc samples of one sequence."""
        return [Group(self.n_mc, s.tokens) for s in self.sequences]

    def lengths(self) -> Tensor:
        """Response lengths ``[B] fp32``."""
        return torch.tensor([s.length for s in self.sequences], dtype=torch.float32, device=self.device)


def prepare(
    model: nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    n_mc: int,
    seed: int,
    attention_mask: Tensor | None,
    sample_ids: Tensor | None,
    scheme: str,
    schedule: str | CountSchedule,
    mask_token_id: int | None,
    temperature: float,
    draw: MaskDraw | None,
    head: nn.Module | HeadSpec | None,
    backend: str,
) -> Problem:
    """Check everything a user can get wrong, once, before any forward pass."""
    check_draw_tensors(input_ids, response_mask, sample_ids, None)
    spec = find_head(model, head)
    transform = LogitTransform(
        spec.logit_scale, spec.softcap, check.number("temperature", temperature, 0.0, exclusive=True)
    )
    attended = _attended(attention_mask, input_ids, response_mask)
    if draw is None:
        n_mc, mask_token_id = check.integer("n_mc", n_mc, 1), _mask_token_id(model, mask_token_id)
    else:
        _check_explicit(draw, input_ids, response_mask)
        n_mc, mask_token_id = draw.n_mc, -1
    resolved = resolve(backend, input_ids.device)
    facts = check_response(input_ids, response_mask, None, sample_ids, mask_token_id, n_mc, resolved)
    max_id = facts.largest_response
    tokens = {"input_ids": input_ids} if draw is None else {"input_ids": input_ids, "draw.noisy_ids": draw.noisy_ids}
    _check_vocabulary(model, spec, max_id if draw is None else draw.max_target, mask_token_id, tokens, attended)
    if sample_ids is None:
        sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
    draw_spec = None
    if draw is None:
        draw_spec = make_spec(scheme, schedule, n_mc, seed, mask_token_id, facts.lengths, input_ids.device)
    sequences = _sequences(input_ids, response_mask, attended, sample_ids, facts)
    _check_shift(spec.shift, sequences)
    assert_bidirectional(model, spec)
    return Problem(
        model, spec, sequences, n_mc, draw_spec, draw, transform, resolved, input_ids.device, facts,
        forward_kwargs(model),
    )  # fmt: skip


def _sequences(
    input_ids: Tensor, response_mask: Tensor, attended: Tensor | None, sample_ids: Tensor, facts: Facts
) -> list[Sequence]:
    device = input_ids.device
    everything = torch.arange(input_ids.shape[1], device=device)
    on_host = None if attended is None else attended.cpu()
    found = []
    for b, (sample_id, length) in enumerate(zip(facts.sample_ids, facts.lengths, strict=True)):
        keep = everything if on_host is None else on_host[b].nonzero().flatten().to(device)
        ids, response = input_ids[b : b + 1, keep], response_mask[b : b + 1, keep]
        found.append(Sequence(keep, ids, response, sample_ids[b : b + 1], sample_id, length))
    return found


def padding_of(attention_mask: Any, input_ids: Tensor) -> Tensor | None:
    """Boolean [B, T] of real tokens, or None when no mask is given."""
    if attention_mask is None:
        return None
    check.tensor("attention_mask", attention_mask)
    check.shape("attention_mask", attention_mask, tuple(input_ids.shape), " (as input_ids; 1 marks tokens, 0 padding)")
    check.same_device("attention_mask", attention_mask, "input_ids", input_ids)
    attended = attention_mask.bool()
    if attention_mask.dtype != torch.bool and not bool((attended == attention_mask).all()):
        raise ValueError("attention_mask must hold 0 and 1 only; additive masks are not padding masks")
    return attended


def _attended(attention_mask: Any, input_ids: Tensor, response_mask: Tensor) -> Tensor | None:
    """``padding_of``, with the response outside of it."""
    attended = padding_of(attention_mask, input_ids)
    if attended is None:
        return None
    outside = response_mask & ~attended
    if bool(outside.any()):
        rows = outside.any(-1).nonzero().flatten()[:8].tolist()
        raise ValueError(f"response_mask marks padding (attention_mask 0) as response in row(s) {rows}")
    return attended


def _mask_token_id(model: nn.Module, given: int | None) -> int:
    own = getattr(getattr(unwrap(model), "config", None), "mask_token_id", None)
    if given is None:
        own = default_mask_token_id(model) if own is None else own
        if own is None:
            raise ValueError(
                "mask_token_id is missing: the model's config has none, so pass the tokenizer's mask_token_id"
            )
        return int(own)
    given = check.integer("mask_token_id", given, 0)
    if own is not None and given != own:
        raise ValueError(
            f"mask_token_id {given} disagrees with the model, whose config says {own}: is the tokenizer that of "
            "another model? Pass None for the model's own, or set model.config.mask_token_id"
        )
    return given


def _check_vocabulary(
    model: nn.Module,
    spec: HeadSpec,
    max_id: int,
    mask_token_id: int,
    tokens: dict[str, Tensor],
    attended: Tensor | None,
) -> None:
    """``tokens`` [B, T] or [B, n, T] by argument name; padding may hold anything."""
    size = spec.vocab_size
    if max_id >= size:
        raise ValueError(f"response id {max_id} (input_ids or draw.targets) is outside the head's vocabulary of {size}")
    known = check_embedding(model, tokens, attended)
    if known is not None and mask_token_id >= known:
        raise ValueError(f"mask_token_id {mask_token_id} is outside the model's embedding of {known} rows")


def check_embedding(model: nn.Module, tokens: dict[str, Tensor], attended: Tensor | None) -> int | None:
    """Rows of the model's embedding, if it tells, after checking that every real token is one of them."""
    getter = getattr(unwrap(model), "get_input_embeddings", None)
    known = getattr(getter() if callable(getter) else None, "num_embeddings", None)
    if known is not None:
        for name, ids in tokens.items():
            real = ids if attended is None else ids.movedim(-1, 1)[attended]
            check.ids_in_range(name, real, 0, known, "rows of the model's embedding")
    return known


def _check_shift(shift: int, sequences: list[Sequence]) -> None:
    early = [b for b, s in enumerate(sequences) if shift and bool(s.response_mask[:, :shift].any())]
    if early:
        raise ValueError(
            f"row i-{shift} predicts token i in this model, so the response cannot start at the first token, as "
            f"response_mask says of row(s) {early[:8]}"
        )


def _check_explicit(draw: Any, input_ids: Tensor, response_mask: Tensor) -> None:
    if not isinstance(draw, MaskDraw):
        raise TypeError(f"draw must be a MaskDraw, got {type(draw).__name__}")
    batch, tokens = input_ids.shape
    check.shape("draw.noisy_ids", draw.noisy_ids, (batch, "n", tokens), " (B and T of input_ids)")
    check.same_device("draw", draw.noisy_ids, "input_ids", input_ids)
    stray = draw.rows[~response_mask[draw.rows // (draw.n_mc * tokens), draw.rows % tokens]][:4].tolist()
    if stray:
        raise ValueError(f"draw.rows {stray} (flat indices into B*n*T) are not marked in response_mask")
