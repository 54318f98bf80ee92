"""Log-probabilities under block-diffusion models: SDAR, TraDo, LLaDA2, and what is registered as one.

The model is called with the clean and the noisy tokens side by side under a block mask (`block_masks.py`), which gives
every block the clean text before it; `row_logprob` does the rest, the head on the scored rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from .block_masks import block_diffusion_inputs, check_pair
from .block_probe import assert_block_semantics, mask_dtype, resolve_block_length, resolve_flavour
from .heads import HeadSpec, find_head


def block_row_logprob(
    model: nn.Module,
    clean_ids: Tensor,
    noisy_ids: Tensor,
    rows: Tensor,
    targets: Tensor | None = None,
    *,
    prompt_length: int | Tensor,
    block_length: int | None = None,
    origin: str = "sequence",
    flavour: str = "auto",
    attention_mask: Tensor | None = None,
    support: Tensor | None = None,
    head: nn.Module | HeadSpec | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log p(target | clean tokens of earlier blocks, noisy tokens of its own block)`` at the chosen tokens.

    Differentiable as :func:`bgpo_kernels.row_logprob`, at the cost of one forward of 2T tokens less the prompt's.
    Sequences are grouped by their number of tokens and of prompt tokens; with several groups the rows are scored
    without gradient and run again in the backward (``replay``), so that memory does not grow with the groups.

    Args:
        model: a model known to attend in blocks, or any whose forward takes ``attention_mask`` and ``position_ids``
            together with a ``flavour``.
        clean_ids: ``[B, T]`` int64.
        noisy_ids: ``[P, T]`` int64, P a multiple of B: the P/B noisy copies of the first sequence, then of the second.
        rows: the noisy tokens to score: ``[P, T]`` bool, or ``[N]`` int64 flat indices into P*T, in any order.
        targets: ``[P, T]`` int64 of which those at ``rows`` are read, ``[N]``, or None: the clean tokens.
        prompt_length: where the response begins in a row, padding before it included: one int or ``[B]`` int64.
        block_length: tokens of a block; None: what the config or the table of known models says.
        origin: blocks begin at the first token of the ``"sequence"`` (SDAR, LLaDA2) or of the ``"response"``.
        flavour: the mask the model takes, ``"bool"``, ``"additive"`` or ``"flex"``; ``"auto"``: as the table says.
        attention_mask: ``[B, T]`` of 0 and 1; padding on either side is cut away before anything else.
        support, head, options: as :func:`bgpo_kernels.row_logprob` (``temperature``, ``return_entropy``, ``replay``,
            ``micro_batch_tokens``, ``backend``).

    Returns:
        ``[N]`` fp32 (fp64 for a model in fp64), in the order of ``rows``; with ``return_entropy`` a pair.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; noise or rows before the first block of the
            response; no response; a model that does not obey the mask (`assert_block_semantics`).
    """
    from ..estimators.rows import row_logprob  # which imports this package

    check_pair(clean_ids, noisy_ids)
    for name in ("attention_mask", "model_kwargs"):
        if name in options:
            raise TypeError(f"{name} is made by block_row_logprob; for a mask of your own call row_logprob")
    spec = find_head(model, head)
    length = resolve_block_length(model, block_length)
    groups = _groups(clean_ids, noisy_ids, rows, targets, prompt_length, attention_mask)
    assert_block_semantics(model, spec, length, flavour=flavour)
    flavour = resolve_flavour(model, flavour)
    if len(groups) > 1 and options.get("replay") is None:
        options["replay"] = True
    found: list[Any] = []
    for group in groups:
        inputs = block_diffusion_inputs(
            group.clean_ids, group.noisy_ids, block_length=length, prompt_length=group.prompt_length, origin=origin,
            rows=group.rows, flavour=flavour, dtype=mask_dtype(model, spec, clean_ids.device),
        )  # fmt: skip
        assert inputs.rows is not None
        own = None if support is None else support[group.chosen]
        found.append(
            row_logprob(
                model, inputs.input_ids, inputs.rows, group.targets, model_kwargs=inputs.model_kwargs, support=own,
                head=head, **options,
            )
        )  # fmt: skip
    order = torch.cat([group.chosen for group in groups]).argsort()
    if options.get("return_entropy"):
        logp, entropy = zip(*found, strict=True)
        return torch.cat(logp)[order], torch.cat(entropy)[order]
    return torch.cat(found)[order]


@dataclass(frozen=True)
class _Group:
    """Noisy sequences with as many tokens and prompt tokens as each other, without padding, each with its clean one."""

    clean_ids: Tensor  # [p, T']
    noisy_ids: Tensor  # [p, T']
    rows: Tensor  # [M] flat indices into p*T'
    targets: Tensor  # [M]
    chosen: Tensor  # [M] which of the caller's rows these are
    prompt_length: int


def _groups(
    clean_ids: Tensor, noisy_ids: Tensor, rows: Any, targets: Any, prompt_length: Any, attention_mask: Any
) -> list[_Group]:
    """Sequences without rows are in no group, so the model does not see them."""
    from ..estimators.problem import padding_of

    copies, tokens = noisy_ids.shape[0] // clean_ids.shape[0], clean_ids.shape[1]
    flat, targets = _rows_and_targets(clean_ids, noisy_ids, rows, targets)
    attended = padding_of(attention_mask, clean_ids)
    if attended is None:
        attended = torch.ones_like(clean_ids, dtype=torch.bool)
    on_padding = ~attended.repeat_interleave(copies, 0).flatten()[flat]
    check.values(check.Suspect(on_padding, lambda bad: bad, lambda bad: f"rows {flat[bad][:8].tolist()} are padding"))
    begins = _response_begins(prompt_length, clean_ids)
    in_prompt = attended & (torch.arange(tokens, device=clean_ids.device) < begins[:, None])
    shapes = list(zip(attended.sum(-1).tolist(), in_prompt.sum(-1).tolist(), strict=True))  # (T', L0) of each sequence
    _check_responses(shapes)

    place = attended.cumsum(-1) - 1
    sequence, token = flat // tokens, flat % tokens
    scored = set(sequence.unique().tolist()) or {0}  # with no row at all, row_logprob says what comes out
    groups = []
    for shape in sorted(set(shapes)):
        members = [p for p in range(noisy_ids.shape[0]) if shapes[p // copies] == shape and p in scored]
        if not members:
            continue
        index = torch.tensor(members, device=clean_ids.device)
        rank = torch.full((noisy_ids.shape[0],), -1, device=clean_ids.device)
        rank[index] = torch.arange(len(members), device=clean_ids.device)
        chosen = (rank[sequence] >= 0).nonzero()[:, 0]
        own, keep = index // copies, attended[index // copies]
        at = rank[sequence[chosen]] * shape[0] + place[sequence[chosen] // copies, token[chosen]]
        size = (len(members), shape[0])
        clean, noisy = clean_ids[own][keep].view(size), noisy_ids[index][keep].view(size)
        groups.append(_Group(clean, noisy, at, targets[chosen], chosen, shape[1]))
    return groups


def _rows_and_targets(clean_ids: Tensor, noisy_ids: Tensor, rows: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """``[N]`` each: flat indices into P*T, and what to score there."""
    size = tuple(noisy_ids.shape)
    check.dtype("rows", check.tensor("rows", rows), torch.int64, torch.bool)
    check.same_device("rows", rows, "noisy_ids", noisy_ids)
    if rows.dtype == torch.bool:
        check.shape("rows", rows, size, " (a bool mask, as noisy_ids)")
        flat = rows.flatten().nonzero()[:, 0]
    else:
        check.shape("rows", rows, ("N",))
        check.ids_in_range("rows", rows, 0, noisy_ids.numel(), "flat indices into P*T of noisy_ids")
        flat = rows
    if targets is None:
        targets = clean_ids.repeat_interleave(size[0] // clean_ids.shape[0], 0)
    check.dtype("targets", check.tensor("targets", targets), torch.int64)
    check.same_device("targets", targets, "noisy_ids", noisy_ids)
    if targets.dim() == 2:
        check.shape("targets", targets, size, " (as noisy_ids), or [N]")
        targets = targets.flatten()[flat]
    check.shape("targets", targets, (flat.shape[0],), " (one per row), or that of noisy_ids")
    return flat, targets


def _response_begins(prompt_length: Any, clean_ids: Tensor) -> Tensor:
    """``[B]``."""
    batch, tokens = clean_ids.shape
    if isinstance(prompt_length, Tensor):
        check.dtype("prompt_length", prompt_length, torch.int64)
        check.shape("prompt_length", prompt_length, (batch,), " (B of clean_ids), or be an int")
        check.same_device("prompt_length", prompt_length, "clean_ids", clean_ids)
        check.ids_in_range("prompt_length", prompt_length, 0, tokens, "tokens before the response")
        return prompt_length
    prompt_length = check.integer("prompt_length", prompt_length, 0, tokens - 1)
    return torch.full((batch,), prompt_length, device=clean_ids.device)


def _check_responses(shapes: Sequence[tuple[int, int]]) -> None:
    empty = [b for b, (tokens, prompt) in enumerate(shapes) if tokens == prompt]
    if empty:
        raise ValueError(f"sequence(s) {empty[:8]} have no response after prompt_length (and without padding)")
