"""Masks whose counts a trainer chooses by a law of its own, on the mask stream of ``random_mask``.

``random_mask`` draws counts from laws over all of 1..L. SPG restricts them to a range or to one block, and quadrature
fixes them. Here the counts are given and the tokens are those with the smallest selection keys of the stream
(docs/masks.md): at equal counts the masks are ``random_mask``'s, bit for bit. Every word depends on (seed, sample id,
sample, position) alone, so masks do not depend on batch, padding, rank or device, and no random state is touched.

Shapes: B sequences, n samples, T tokens. Positions are ranks within the maskable tokens of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks.draw import MaskDraw
from ..masks.reference import COUNTS, KEYS, PROMPT, words
from ..masks.schedule import prompt_threshold

_LAST = 2**63 - 1


def rank_of(mask: Tensor) -> Tensor:
    """Place of every token among the True ones of its row, ``[B, T] int64``; meaningless where False."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def count_words(samples: Tensor, sample_ids: Tensor, seed: int, position: int = 0) -> Tensor:
    """The 32-bit word ``[B, n]`` that decides a count; positions above 0 serve further choices."""
    place = torch.full_like(samples, position)
    return words(place[None], samples[None], sample_ids[:, None], COUNTS, seed)[0]


def in_range(word: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Uniform integers in [low, high], from 32-bit words."""
    return low + ((word * (high - low + 1)) >> 32)


def subsets(position: Tensor, allowed: Tensor, count: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
    """Uniform random subsets of ``count [B, n]`` of the ``allowed [B, n, T]`` tokens, as bool ``[B, n, T]``."""
    samples = torch.arange(count.shape[1], device=count.device)
    high, low = words(position[:, None], samples[None, :, None], sample_ids[:, None, None], KEYS, seed)
    keys = ((high << 32) | low) ^ -(2**63)  # order of unsigned numbers
    order = keys.masked_fill(~allowed, _LAST).argsort(dim=-1, stable=True)
    first = torch.arange(allowed.shape[-1], device=count.device) < count[..., None]
    return torch.zeros_like(allowed).scatter(-1, order, first) & allowed


def scattered(position: Tensor, samples: int, probability: float, sample_ids: Tensor, seed: int) -> Tensor:
    """Bool ``[B, n, T]``, True with this probability, token by token: the stream of masked prompt tokens."""
    j = torch.arange(samples, device=position.device)
    word, _ = words(position[:, None], j[None, :, None], sample_ids[:, None, None], PROMPT, seed)
    return word < prompt_threshold(probability)


def explicit_draw(input_ids: Tensor, noisy_ids: Tensor, scored: Tensor, weight: Tensor) -> MaskDraw:
    """A :class:`MaskDraw` from explicit masks.

    Args:
        input_ids: ``[B, T]`` clean. noisy_ids: ``[B, n, T]``, what the model sees.
        scored: ``[B, n, T]`` bool. weight: ``[B, n]``, of every scored token.
    """
    rows = scored.flatten().nonzero()[:, 0]
    targets = input_ids[:, None].expand_as(noisy_ids).reshape(-1)[rows]
    count = scored.sum(-1)
    offsets = torch.cat((count.new_zeros(1), count.flatten().cumsum(0)))
    return MaskDraw(noisy_ids, rows, targets, offsets, weight.float(), count.to(torch.int32))


def join(draws: list[MaskDraw], input_ids: Tensor, mask_token_id: int) -> MaskDraw:
    """The samples of several draws of the same clean sequences as one draw, in order.

    The masks are taken from the row lists and written over ``input_ids`` anew, so that a clean token which happens to
    be the mask token stays what it is.
    """
    shape = draws[0].noisy_ids.shape
    masks = []
    for draw in draws:
        flat = torch.zeros(shape, dtype=torch.bool, device=input_ids.device).flatten()
        flat[draw.rows] = True
        masks.append(flat.view(shape))
    scored = torch.cat(masks, 1)
    noisy = torch.where(scored, mask_token_id, input_ids[:, None])
    return explicit_draw(input_ids, noisy, scored, torch.cat([draw.segment_weight for draw in draws], 1))
