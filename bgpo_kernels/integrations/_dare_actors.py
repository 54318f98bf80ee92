"""DARE's block-diffusion, MDPO and JustGRPO actors. See ``dare.py``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..head.functional import masked_logprob
from ..models import HeadSpec, capture_head, find_head, unwrap
from ..models.patched import expand_rows
from ._completions import score_rows


def block_diffusion_token_losses(
    self: Any,
    artifacts: Any,
    block_attention_mask: Any,
    *,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``_compute_block_diffusion_token_losses`` of the SDAR and LLaDA2 actors: -log p / p_mask; ``[B, S]``.

    The model's own patched forward runs, on DARE's own layout and mask; its head is replaced. The mask is an argument,
    since only DARE can build it: ``build_block_diffusion_mask(artifacts, block_size=self.block_length,
    block_origin=self.block_origin)``.

    Args:
        self: the actor; ``actor_module`` is read, and of its config ``model_type``.
        artifacts: DARE's ``BlockDiffusionArtifacts`` of one MC sample.

    Raises:
        ValueError: a model that is neither SDAR nor LLaDA2; sequence parallelism.
    """
    refuse_sequence_parallelism(self)
    target = artifacts.target_mask.bool()
    targets = artifacts.clean_input_ids[target]
    model = self.actor_module
    spec = find_head(model, head)
    module: Any = spec.module

    def consume(hidden: Tensor) -> Tensor:  # [M, H], the targets' rows
        logp = masked_logprob(
            hidden, module.weight, targets, bias=getattr(module, "bias", None), softcap=spec.softcap,
            logit_scale=spec.logit_scale, backend=backend,
        )  # fmt: skip
        assert isinstance(logp, Tensor)
        return logp

    with autocast(target.device), capture_head(model, spec, consume) as capture:
        model(
            input_ids=torch.cat([artifacts.noisy_input_ids, artifacts.clean_input_ids], 1),
            attention_mask=block_attention_mask,
            position_ids=torch.cat([artifacts.position_ids, artifacts.position_ids], 1),
            use_cache=False,
            return_dict=True,
            **_loss_arguments(model, target, artifacts),
        )
    return expand_rows(-capture.value / artifacts.p_mask[target], target)


def _loss_arguments(model: nn.Module, target: Tensor, artifacts: Any) -> dict[str, Any]:
    """Arguments that make DARE's patched forwards run the head on the targets. The loss they then compute, of one class
    that every target is, is 0 and costs nothing."""
    keep = torch.cat([target, torch.zeros_like(target)], 1)
    length = artifacts.response_lengths.sum()
    kind = str(getattr(getattr(unwrap(model), "config", None), "model_type", ""))
    if kind.startswith("sdar"):
        count = int(target.sum())
        return {
            "logits_to_keep": keep,
            "ulysses_sp_training": True,
            "ulysses_sp_targets": torch.zeros(count, dtype=torch.int64, device=target.device),
            "ulysses_sp_p_mask": torch.ones(count, device=target.device),
            "ulysses_sp_answer_len": length,
            "ulysses_sp_return_token_loss": True,
        }
    if kind.startswith("llada2"):
        return {
            "block_diffusion_targets": torch.where(keep, 0, -100),
            "block_diffusion_p_mask": torch.ones(keep.shape, device=target.device),
            "block_diffusion_answer_len": length,
            "return_block_diffusion_token_loss": True,
        }
    raise ValueError(
        f"config.model_type must begin with 'sdar' or 'llada2', DARE's block-diffusion models; got {kind!r}"
    )


def forward_micro_batch_mdpo(
    self: Any,
    micro_batch: Any,
    temperature: float = 1.0,
    *,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``_forward_micro_batch_mdpo``: ``[B, R]`` log-probabilities of ``target_ids`` given ``input_ids``, one step each.

    Scored are the attended tokens of ``completion_mask``; the others give 0. ``temperature`` is not used, as upstream.
    """
    refuse_sequence_parallelism(self)
    ids, attended, counted = (micro_batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    check.shape("completion_mask", counted, (ids.shape[0], "R"), " (B as input_ids)")
    length = counted.shape[1]
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, -length:] = counted.bool()
    with autocast(ids.device):
        (logp,) = score_rows(
            self.actor_module, ids, rows & attended.bool(), micro_batch["target_ids"], attention_mask=attended,
            micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
        )  # fmt: skip
    return logp[:, -length:]


def forward_ar_position_chunk(
    self: Any,
    micro_batch: Any,
    temperature: float,
    position_start: int,
    position_end: int,
    calculate_entropy: bool = False,
    *,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``_forward_ar_position_chunk``: response tokens of a range of positions, each with itself and later ones masked.

    Returns:
        ``(entropy or None, log_probs, log_probs)``, ``[B, position_end - position_start]`` each, 0 at padding.
    """
    refuse_sequence_parallelism(self)
    if getattr(self, "cfg_scale", 0.0):
        raise ValueError(f"self.cfg_scale is {self.cfg_scale}: guidance mixes the logits of two forward passes")
    ids, attended = micro_batch["input_ids"], micro_batch["attention_mask"]
    length = micro_batch["responses"].shape[-1]
    if not 0 <= position_start < position_end <= length:
        raise ValueError(f"positions must be within 0..{length} and ascend, got {position_start}, {position_end}")
    tokens = torch.arange(ids.shape[1], device=ids.device)
    begin = ids.shape[1] - length
    place = torch.arange(begin + position_start, begin + position_end, device=ids.device)
    noisy = torch.where((tokens >= place[:, None])[:, None], self.MASK_TOKEN_ID, ids)  # [k, B, T]
    rows = (tokens == place[:, None])[:, None] & attended.bool()
    with autocast(ids.device):
        found = score_rows(
            self.actor_module, noisy.flatten(0, 1), rows.flatten(0, 1), ids.expand_as(noisy).flatten(0, 1),
            temperature=float(temperature), return_entropy=calculate_entropy,
            attention_mask=attended.expand_as(noisy).flatten(0, 1), micro_batch_tokens=micro_batch_tokens, head=head,
            backend=backend,
        )  # fmt: skip
    values = [value.view(noisy.shape).sum(-1).transpose(0, 1) for value in found]
    return values[1] if calculate_entropy else None, values[0], values[0]


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 as DARE runs its models, and none on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def refuse_sequence_parallelism(actor: Any) -> None:
    """ValueError under Ulysses."""
    if getattr(actor, "use_ulysses_sp", False):
        raise ValueError(
            "ulysses_sequence_parallel_size is above 1: sequences cut over ranks are not served; set it to 1 (the head "
            "no longer needs the memory it saved)"
        )
