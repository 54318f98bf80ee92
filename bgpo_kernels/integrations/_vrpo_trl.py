"""TRL's DPO trainer on ELBO estimates; the two functions are part of ``vrpo``, where their purpose is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._vrpo_pairs import dpo_logit, sequence_elbos


def concatenated_forward(
    self: Any,
    model: nn.Module,
    batch: dict[str, Any],
    is_ref_model: bool = False,
    *,
    n_mc: int = 8,
    seed: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """ELBO estimates in place of log-likelihoods, as ``DPOTrainer.concatenated_forward`` of TRL 0.12 to 0.28.

    Returns ``chosen_logps`` and ``rejected_logps`` ``[B]``. No logits are made, so ``mean_chosen_logits`` and
    ``mean_rejected_logits``, which TRL logs, are NaN. Prompt and completion are joined without padding between them.

    Args:
        self: the trainer; read are ``pad_token_id``, ``max_length``, ``truncation_mode``, ``rpo_alpha``, ``ld_alpha``,
            ``use_weighting`` and ``args.seed``, ``state.global_step`` for the seed.
        batch: TRL's: ``{prompt,chosen,rejected}_{input_ids,attention_mask}``.
        seed: of the masks; default: ``args.seed + state.global_step``, the same for policy and reference of a step.
            Pass a number when reference log-probs are computed in advance (``precompute_ref_log_probs``).
        options: of :func:`sequence_elbos`.
    """
    del is_ref_model  # both are scored alike
    for name in ("rpo_alpha", "ld_alpha"):
        if getattr(self, name, None) is not None or getattr(getattr(self, "args", None), name, None) is not None:
            raise ValueError(f"{name} needs autoregressive log-probs of tokens, which a diffusion LM has not")
    if "sft" in (getattr(self, "loss_type", None) or ()):
        raise ValueError("loss_type 'sft' needs the log-likelihood of an autoregressive model")
    if getattr(self, "use_weighting", False):
        raise ValueError("use_weighting needs logits of every token, which are not made here")
    _refuse_precomputed(self, seed)
    ids, attention, completion = _concatenated(self, batch)
    elbos = sequence_elbos(
        model, ids, completion, attention_mask=attention, n_mc=n_mc, seed=_seed(self, seed), **options
    )
    chosen, rejected = elbos.chunk(2)
    missing = torch.full((), torch.nan, device=ids.device)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "mean_chosen_logits": missing,
        "mean_rejected_logits": missing,
    }


def compute_loss(
    self: Any,
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool,
    *,
    n_mc: int = 8,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    """VRPO's loss, as ``DPOTrainer._compute_loss`` of TRL 0.29 and later.

    ``inputs`` holds ``input_ids``, ``attention_mask`` and ``completion_mask``, each ``[2 B, T]``, chosen first, and
    maybe ``ref_chosen_logps`` and ``ref_rejected_logps``. Rewards and log-probs are logged as TRL logs them; what needs
    logits (entropy, token accuracy) is not.

    Args:
        self: the trainer; read are ``beta``, ``loss_types``, ``loss_weights``, ``f_divergence_type``, ``ld_alpha``,
            ``ref_model``, ``model``, ``precompute_ref_logps``, ``accelerator``, ``_metrics``, ``args.seed`` and
            ``state.global_step``.
        seed, n_mc, options: as :func:`concatenated_forward`.
    """
    if return_outputs:
        raise ValueError("return_outputs=True is not served: no logits are made")
    _refuse_other_losses(self)
    _refuse_precomputed(self, seed)
    draws = {"n_mc": n_mc, "seed": _seed(self, seed), "attention_mask": inputs["attention_mask"], **options}
    ids, completion = inputs["input_ids"], inputs["completion_mask"]
    chosen, rejected = sequence_elbos(model, ids, completion, **draws).chunk(2)
    if self.precompute_ref_logps:
        ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    else:
        with torch.no_grad(), _as_reference(self) as reference:
            ref_chosen, ref_rejected = sequence_elbos(reference, ids, completion, **draws).chunk(2)
    logit = dpo_logit(chosen, rejected, ref_chosen, ref_rejected)
    length = completion.sum(-1)
    loss = sum(
        (weight * _LOSSES[kind](self.beta, logit, chosen - ref_chosen, rejected - ref_rejected, length)).mean()
        for kind, weight in zip(self.loss_types, self.loss_weights, strict=True)
    )
    _log(self, chosen, rejected, ref_chosen, ref_rejected)
    assert isinstance(loss, Tensor)
    return loss


def _sigmoid(beta: float, logit: Tensor, *_: Tensor) -> Tensor:
    return -F.logsigmoid(beta * logit)


def _ipo(beta: float, logit: Tensor, chosen: Tensor, rejected: Tensor, length: Tensor) -> Tensor:
    first, second = length.clamp(min=1).chunk(2)
    return (chosen / first - rejected / second - 1 / (2 * beta)) ** 2


_LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": _sigmoid, "ipo": _ipo}


def _refuse_other_losses(self: Any) -> None:
    other = [kind for kind in self.loss_types if kind not in _LOSSES]
    if other:
        served = ", ".join(_LOSSES)
        raise ValueError(f"loss_type {other} is not served here, but {served}; use pair_elbos in a loss of your own")
    if getattr(self, "f_divergence_type", "reverse_kl") != "reverse_kl":
        raise ValueError(f"f_divergence_type must be 'reverse_kl', got {self.f_divergence_type!r}")
    if getattr(self, "ld_alpha", None) is not None:
        raise ValueError("ld_alpha needs autoregressive log-probs of tokens, which a diffusion LM has not")


def _refuse_precomputed(self: Any, seed: int | None) -> None:
    args = getattr(self, "args", None)
    names = ("precompute_ref_logps", "precompute_ref_log_probs")
    if seed is None and any(getattr(owner, name, False) for owner in (self, args) for name in names):
        raise ValueError(
            "reference log-probs computed in advance need masks that do not change from step to step: pass seed=, or "
            "switch precomputing off"
        )


def _seed(self: Any, seed: int | None) -> int:
    return self.args.seed + self.state.global_step if seed is None else seed


def _concatenated(self: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention and completion masks ``[2 B, T]``, chosen first, without padding between prompt and completion."""
    sequences = []
    for kind in ("chosen", "rejected"):
        for i in range(len(batch["prompt_input_ids"])):
            prompt, answer = (
                batch[f"{name}_input_ids"][i][batch[f"{name}_attention_mask"][i].bool()] for name in ("prompt", kind)
            )
            ids = torch.cat((prompt, answer))
            sequences.append(_truncated(self, ids, torch.arange(len(ids), device=ids.device) >= len(prompt)))
    width = max(len(ids) for ids, _ in sequences)

    def padded(values: list[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(v, (0, width - len(v)), value=value) for v in values])

    ids = padded([i for i, _ in sequences], self.pad_token_id)
    attention = padded([torch.ones_like(i) for i, _ in sequences], 0)
    return ids, attention, padded([m.long() for _, m in sequences], 0)


def _truncated(self: Any, ids: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor]:
    longest = getattr(self, "max_length", None)
    if longest is None or len(ids) <= longest:
        return ids, is_answer
    kept = slice(-longest, None) if getattr(self, "truncation_mode", "keep_end") == "keep_end" else slice(longest)
    return ids[kept], is_answer[kept]


def _as_reference(self: Any) -> AbstractContextManager[Any]:
    """The reference model: the trainer's, or its policy with the adapters off (or the adapter "ref")."""
    if self.ref_model is not None:
        return nullcontext(self.ref_model)
    return _Adapterless(self.accelerator.unwrap_model(self.model), self.model)


class _Adapterless:
    def __init__(self, unwrapped: Any, model: nn.Module) -> None:
        self._unwrapped, self._model = unwrapped, model
        if not hasattr(unwrapped, "disable_adapter"):
            raise ValueError("ref_model is None and the policy has no adapters to switch off: pass a ref_model")

    def __enter__(self) -> nn.Module:
        self._named = "ref" in getattr(self._unwrapped, "peft_config", {})
        if self._named:
            self._active = self._unwrapped.active_adapter
            self._unwrapped.set_adapter("ref")
        else:
            self._off = self._unwrapped.disable_adapter()
            self._off.__enter__()
        return self._model

    def __exit__(self, *error: Any) -> None:
        if self._named:
            self._unwrapped.set_adapter(self._active)
        else:
            self._off.__exit__(*error)


def _log(self: Any, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> None:
    gather = self.accelerator.gather
    metrics = self._metrics["train" if self.model.training else "eval"]
    reward_chosen = gather(self.beta * (chosen - ref_chosen).detach())
    reward_rejected = gather(self.beta * (rejected - ref_rejected).detach())
    metrics["rewards/chosen"].append(reward_chosen.mean().item())
    metrics["rewards/rejected"].append(reward_rejected.mean().item())
    metrics["rewards/accuracies"].append((reward_chosen > reward_rejected).float().mean().item())
    metrics["rewards/margins"].append((reward_chosen - reward_rejected).mean().item())
    metrics["logps/chosen"].append(gather(chosen.detach()).mean().item())
    metrics["logps/rejected"].append(gather(rejected.detach()).mean().item())
