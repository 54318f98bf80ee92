"""Inputs of a block-diffusion model: the clean sequence, the noisy copy beside it, and who sees whom.

Such a model denoises block after block, and each block sees the *clean* text before it. One forward pass gives the
likelihood of all blocks when the noisy tokens follow the clean ones (BD3-LM, arXiv 2503.09573):

    ids        [ clean 0 .. T-1 | noisy s .. T-1 ]      S = 2T - s tokens; s begins the first block of the response
    positions  [       0 .. T-1 |       s .. T-1 ]
    clean token of block k      sees clean blocks <= k
    noisy token of block k      sees clean blocks <  k and noisy block k

Nothing before s is noisy, so the prompt is there once. Blocks of `block_length` tokens are counted from the first
token of the sequence, as SDAR and LLaDA2 are trained and generate (``origin="sequence"``; a block may then hold the
prompt's end and the response's beginning), or from the first token of the response (``origin="response"``: dLLM-RL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import validation as check

ORIGINS = ("sequence", "response")
FLAVOURS = ("bool", "additive", "flex")


def block_visible(query_noisy: Tensor, query_block: Tensor, key_noisy: Tensor, key_block: Tensor) -> Tensor:
    """Whether a token sees another: bool, of the arguments' common shape.

    `*_noisy` (bool) says which half a token is of, `*_block` (int) its block. Clean tokens have one visible block more
    than noisy ones, their own.
    """
    own_block = query_noisy & key_noisy & (key_block == query_block)
    clean_past = ~key_noisy & (key_block + query_noisy.int() <= query_block)
    return own_block | clean_past


@dataclass(frozen=True)
class BlockLayout:
    """Where the S tokens of a layout come from, for sequences of T tokens with prompts of one length."""

    place: Tensor  # [S] int64: the token's place in the sequence, which is also its position
    noisy: Tensor  # [S] bool
    block: Tensor  # [S] int64; blocks before a response's first are negative where blocks are counted from it
    start: int  # s: noisy tokens are those of places s .. T-1

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.place.shape[0] + self.start) // 2


def block_layout(
    tokens: int, prompt_length: int, block_length: int, origin: str = "sequence", device: torch.device | str = "cpu"
) -> BlockLayout:
    """The layout of `tokens` tokens, the first `prompt_length` of which are prompt. Raises ValueError out of range."""
    tokens = check.integer("tokens", tokens, 1)
    prompt_length = check.integer("prompt_length", prompt_length, 0, tokens - 1)
    block_length = check.integer("block_length", block_length, 1)
    if origin not in ORIGINS:
        raise ValueError(f"origin must be one of {', '.join(ORIGINS)}; got {origin!r}")
    first = 0 if origin == "sequence" else prompt_length
    start = prompt_length - (prompt_length - first) % block_length
    place = torch.cat([torch.arange(tokens, device=device), torch.arange(start, tokens, device=device)])
    noisy = torch.arange(place.shape[0], device=device) >= tokens
    return BlockLayout(place, noisy, (place - first).div(block_length, rounding_mode="floor"), start)


def block_mask(layout: BlockLayout, flavour: str, dtype: torch.dtype = torch.float32) -> Any:
    """The mask of a layout, the same for every sequence and head.

    "bool": [1, 1, S, S], True where a key is seen. "additive": the same in `dtype`, 0 where seen and -inf elsewhere.
    "flex": the BlockMask of `torch.nn.attention.flex_attention`, which skips blocks that are not seen at all.
    """
    noisy, block = layout.noisy, layout.block
    if flavour == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return block_visible(noisy[q], block[q], noisy[k], block[k])

        size = block.shape[0]
        return create_block_mask(visible, None, None, size, size, device=str(block.device))
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour must be one of {', '.join(FLAVOURS)}; got {flavour!r}")
    seen = block_visible(noisy[:, None], block[:, None], noisy[None], block[None])[None, None]
    if flavour == "bool":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


@dataclass(frozen=True)
class BlockInputs:
    """What the model is called with, and where the scored tokens went."""

    input_ids: Tensor  # [P, S]
    position_ids: Tensor  # [P, S]
    attention_mask: Any  # [P, 1, S, S] (one mask seen P times, no copies), or a BlockMask
    rows: Tensor | None  # [N] flat indices into P*S

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The arguments of the model's forward beside `input_ids`."""
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids}


def block_diffusion_inputs(
    clean_ids: Tensor,
    noisy_ids: Tensor,
    *,
    block_length: int,
    prompt_length: int = 0,
    origin: str = "sequence",
    rows: Tensor | None = None,
    flavour: str = "bool",
    dtype: torch.dtype = torch.float32,
) -> BlockInputs:
    """Clean and noisy ids in one forward pass, for sequences of one shape and without padding.

    Args:
        clean_ids: [B, T] int64.
        noisy_ids: [P, T] int64, P a multiple of B: the P/B noisy copies of the first sequence, then of the second, ...
            Before the first block of the response they must hold the clean tokens.
        block_length: tokens of a block.
        prompt_length: tokens before the response.
        origin: "sequence" or "response": where blocks are counted from.
        rows: [P, T] bool or [N] int64 flat indices into P*T: the noisy tokens to score.
        flavour, dtype: of the mask, as `block_mask`.

    `block_row_logprob` does all of it, with padding and prompts of several lengths. Raises TypeError and ValueError for
    dtypes, shapes and devices that disagree, rows in the clean prompt, and prompts that are not clean.
    """
    check_pair(clean_ids, noisy_ids)
    layout = block_layout(clean_ids.shape[1], prompt_length, block_length, origin, clean_ids.device)
    copies = noisy_ids.shape[0] // clean_ids.shape[0]
    clean = clean_ids.repeat_interleave(copies, 0)
    check.values(_noise_in_prompt(clean, noisy_ids, layout.start))
    ids = torch.cat([clean, noisy_ids[:, layout.start :]], dim=1)
    mask = block_mask(layout, flavour, dtype)
    if isinstance(mask, Tensor):
        mask = mask.expand(ids.shape[0], -1, -1, -1)
    return BlockInputs(ids, layout.place.expand(ids.shape), mask, None if rows is None else noisy_rows(layout, rows))


def noisy_rows(layout: BlockLayout, rows: Tensor) -> Tensor:
    """Flat indices into P*S of rows given as [P, T] bool or flat indices into P*T."""
    flat = rows.flatten().nonzero()[:, 0] if rows.dtype == torch.bool else rows
    sequence, place = flat // layout.tokens, flat % layout.tokens
    in_prompt = check.Suspect(
        place,
        lambda p: p < layout.start,
        lambda bad: (
            f"rows {flat[bad][:8].tolist()} (flat indices into P*T) are before the first noisy block, which begins at "
            f"token {layout.start}: only noisy tokens can be scored"
        ),
    )
    check.values(in_prompt)
    return sequence * layout.place.shape[0] + layout.tokens + place - layout.start


def check_pair(clean_ids: Any, noisy_ids: Any) -> None:
    """Types and shapes of [B, T] and [P, T]."""
    for name, value in (("clean_ids", clean_ids), ("noisy_ids", noisy_ids)):
        check.dtype(name, check.tensor(name, value), torch.int64)
    check.shape("clean_ids", clean_ids, ("B", "T"))
    check.shape("noisy_ids", noisy_ids, ("P", clean_ids.shape[1]), " (T of clean_ids)")
    check.same_device("noisy_ids", noisy_ids, "clean_ids", clean_ids)
    batch, copies = clean_ids.shape[0], noisy_ids.shape[0]
    if not batch or not copies or copies % batch:
        raise ValueError(f"noisy_ids must hold a multiple of the {batch} sequences of clean_ids, got {copies}")


def _noise_in_prompt(clean: Tensor, noisy: Tensor, start: int) -> check.Suspect:
    differ = clean[:, :start] != noisy[:, :start]

    def message(bad: Tensor) -> str:
        return (
            f"noisy_ids differ from clean_ids before token {start}, at {bad.nonzero()[:4].tolist()}: a block-diffusion "
            "model sees the text before the first noisy block as it is"
        )

    return check.Suspect(differ, lambda d: d, message)
