"""Block diffusion (SDAR, TraDo, LLaDA2): trainers that lay out clean and noisy tokens themselves.

The ids, attention mask (4D or ``BlockMask``) and position ids are the trainer's own and reach the model as they are:

* ``kept_logprob``: the general function, [rows] for a keep mask over the laid-out tokens (JetAstra/SDAR's models).
* ``extended_logprob``: ``logp_new_tok`` and ``logp_old_tok`` of Gen-Verse/dLLM-RL, train/rl_sdar.py and rl_trado.py.
* ``dirl_forward`` and ``dirl_logprob``: OpenMOSS/DiRL, train/grpo.py, whose model (models/sdar/modeling_sdar.py) lays
  out the tokens and computes the policy loss inside its forward.

    lp_i = log p(targets_i | layout)     for the rows to keep alone

Saved: the head runs on the kept rows. dLLM-RL makes the logits and log-probabilities of all L0 + 2 L1 tokens; DiRL
those of every masked token, and then selects the few that a decoding step chose. Neither [rows, V] array is made here.

What differs from upstream: log-probabilities are fp32; tokens that are not kept give 0. In DiRL, a micro-batch of
filler samples alone has loss 0 (upstream: the mean of nothing, NaN).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation as check
from ..estimators import row_logprob
from ..models import HeadSpec, patch, unwrap
from ..models.patched import expand_rows
from ._completions import same_as_input

_LARGEST_LOG_RATIO = 10.0  # DiRL bounds log-ratios by it before it exponentiates
_CLIP_HIGHER = 0.08  # and allows the ratio this much more than ppo_eps above 1


def kept_logprob(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    keep: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities of the kept rows of a layout; ``[rows]``, differentiable.

    Args:
        model: the policy; its attention is what ``attention_mask`` makes it, and is not checked.
        input_ids: ``[B, N]`` int64, clean and noisy tokens (L0 + 2 L1 of them in dLLM-RL, 2 L in SDAR).
        attention_mask: what the model takes: a tensor ``[B, 1, N, N]``, or a ``BlockMask``. A BlockMask of B sequences
            cannot be cut, so it needs a micro-batch that holds them all.
        position_ids: ``[B, N]``, or None.
        keep: ``[B, N]`` bool, the rows to score (noisy ones). targets: ``[B, N]`` int64, read there; or ``[rows]``.
        temperature, micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; a model set to fuse its head with its loss.
    """
    _refuse_fused_loss(model)
    kwargs = {"attention_mask": attention_mask}
    if position_ids is not None:
        same_as_input("position_ids", position_ids, input_ids, torch.int64)
        kwargs["position_ids"] = position_ids
    if micro_batch_tokens is None and not isinstance(attention_mask, Tensor):
        micro_batch_tokens = input_ids.numel()
    logp = row_logprob(
        model, input_ids, keep, targets, temperature=temperature, model_kwargs=kwargs,
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    assert isinstance(logp, Tensor)
    return logp


def extended_logprob(
    model: nn.Module,
    extended_input_ids: Tensor,
    p_mask: Tensor,
    tok_idx_ext: Tensor,
    labels: Tensor,
    attention_mask: Any,
    *,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """dLLM-RL's SDAR and TraDo: ``logp_new_tok [B, L0 + L1]`` of ``forward_process``, 0 outside ``p_mask``.

    Args:
        extended_input_ids: ``[B, L0 + 2 L1]``: prompt, clean response, noisy response.
        p_mask: ``[B, L0 + L1]`` bool. tok_idx_ext: ``[B, L0 + 2 L1]``, position ids. labels: ``[B, L0 + L1]``, clean.
        attention_mask: ``[B, 1, N, N]`` as ``process_pad`` returns it.
        Others: as :func:`kept_logprob`.
    """
    check.dtype("extended_input_ids", check.tensor("extended_input_ids", extended_input_ids), torch.int64)
    check.shape("extended_input_ids", extended_input_ids, ("B", "L0 + 2 L1"))
    batch, total = extended_input_ids.shape
    check.dtype("p_mask", check.tensor("p_mask", p_mask), torch.bool)
    check.shape("p_mask", p_mask, (batch, "L0 + L1"))
    same_as_input("labels", labels, p_mask, torch.int64)
    response = total - p_mask.shape[1]  # L1
    prompt = p_mask.shape[1] - response  # L0
    if response < 1 or prompt < 0:
        raise ValueError(
            f"extended_input_ids {list(extended_input_ids.shape)} must hold L0 + 2 L1 tokens for the L0 + L1 of p_mask "
            f"{list(p_mask.shape)}"
        )

    def laid_out(values: Tensor) -> Tensor:
        """A tensor over prompt and response, over the layout: the response's values at its noisy copy."""
        between = values.new_zeros(batch, response)
        return torch.cat([values[:, :prompt], between, values[:, prompt:]], 1)

    keep = laid_out(p_mask)
    logp = kept_logprob(
        model, extended_input_ids, attention_mask, tok_idx_ext, keep, laid_out(labels),
        micro_batch_tokens=micro_batch_tokens, head=head, backend=backend,
    )  # fmt: skip
    return expand_rows(logp, p_mask)


# ----------------------------------------------------------------------------------------------------------- DiRL


def dirl_logprob(
    model: nn.Module,
    *,
    input_ids: Tensor,
    labels: Tensor,
    masked_indices: Tensor,
    p_mask: Tensor | None = None,
    return_entropy: bool = False,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
    **model_inputs: Any,
) -> Any:
    """``[B, L]`` log-probabilities of a DiRL model in training mode, as ``compute_model_logprobs`` makes them.

    Args:
        model: in training mode, where its forward lays out clean and noisy tokens.
        input_ids, labels: ``[B, L]`` int64. masked_indices: ``[B, L]`` bool, the tokens it masks.
        p_mask: ``[B, L]`` bool, those of them to score. None: all of them.
        return_entropy: return the pair (logp, entropy), ``[B, L]`` each.
        model_inputs: everything else that the model's forward takes (``position_ids``, ``step_ids``, ...).

    Returns:
        fp32 (fp64 for a model in fp64), 0 at the other tokens.
    """
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("B", "L"))
    same_as_input("labels", labels, input_ids, torch.int64)
    same_as_input("masked_indices", masked_indices, input_ids, torch.bool)
    scored = masked_indices if p_mask is None else same_as_input("p_mask", p_mask, input_ids, torch.bool)
    if bool((scored & ~masked_indices).any()):
        at = (scored & ~masked_indices).nonzero()[:4].tolist()
        raise ValueError(f"p_mask marks tokens at {at} that masked_indices leaves in the clear")
    if bool((labels[scored] < 0).any()):
        at = (scored & (labels < 0)).nonzero()[:4].tolist()
        raise ValueError(f"labels are {labels[scored & (labels < 0)][:4].tolist()} at {at}, which are to be scored")
    if not model.training:
        raise ValueError("model is in evaluation mode, where it takes neither labels nor masked_indices: model.train()")
    rows = scored[masked_indices].nonzero()[:, 0]  # the head receives the masked tokens, sequence after sequence
    with patch(model, labels[scored], rows=rows, return_entropy=return_entropy, head=head, backend=backend) as patched:
        output = model(
            input_ids=input_ids, labels=labels, masked_indices=masked_indices, return_logits=True, **model_inputs
        )
    logp = expand_rows(output.logits, scored)
    return (logp, expand_rows(patched.entropy, scored)) if patched.entropy is not None else logp


def dirl_forward(
    model: nn.Module,
    *,
    input_ids: Tensor,
    labels: Tensor,
    masked_indices: Tensor,
    p_mask: Tensor,
    adv: Any,
    is_real: Any,
    logp_old_tok: Tensor | None = None,
    logp_ref_tok: Tensor | None = None,
    compute_rl_loss: bool = True,
    ppo_eps: float = 0.2,
    kl_beta: float = 0.0,
    use_kl_estimator_k3: bool = True,
    return_entropy: bool = False,
    dynamic_threshold: float | None = None,
    loss_mean: bool = True,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
    **model_inputs: Any,
) -> SimpleNamespace:
    """The call ``model(..., compute_rl_loss=True, ...)`` of DiRL's ``forward_process``, same arguments.

    Over the N tokens of ``p_mask`` in samples that are real, with r = exp(clamp(lp - old, -10, 10)):

        loss = - mean min(r A, clip(r, 1 - ppo_eps, 1 + ppo_eps + 0.08) A) + kl_beta mean k3(lp - ref)

    Args:
        p_mask: ``[B, L]`` bool, within ``masked_indices``. adv: ``[B]``. is_real: ``[B]`` bool, False for filler.
        logp_old_tok, logp_ref_tok: ``[B, L]`` or None (or empty); None old: on-policy.
        loss_mean: False sums. use_kl_estimator_k3: False takes lp - ref itself.
        compute_rl_loss, dynamic_threshold: taken and not used. Others: as :func:`dirl_logprob`.

    Returns:
        An object with ``loss``, ``entropy`` (mean, detached; 0 unless ``return_entropy``), ``kl_loss`` (detached) and
        ``logits`` None.
    """
    real = torch.as_tensor(is_real, device=input_ids.device).bool()
    check.shape("is_real", real, (input_ids.shape[0],), " (one per sample)")
    advantages = torch.as_tensor(adv, dtype=torch.float32, device=input_ids.device)
    check.shape("adv", advantages, (input_ids.shape[0],), " (one per sample)")
    scored = same_as_input("p_mask", p_mask, input_ids, torch.bool) & real[:, None]
    both = dirl_logprob(
        model, input_ids=input_ids, labels=labels, masked_indices=masked_indices, p_mask=scored,
        return_entropy=return_entropy, head=head, backend=backend, **model_inputs,
    )  # fmt: skip
    dense, entropy = both if return_entropy else (both, torch.zeros_like(input_ids, dtype=torch.float32))
    logp = dense[scored]
    old, ref = (
        _at(name, value, scored) for name, value in (("logp_old_tok", logp_old_tok), ("logp_ref_tok", logp_ref_tok))
    )
    divisor = max(1, logp.shape[0]) if loss_mean else 1
    ratio = (logp - (logp.detach() if old is None else old)).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    a = advantages[:, None].expand_as(input_ids)[scored]
    clipped = ratio.clamp(1 - ppo_eps, 1 + ppo_eps + _CLIP_HIGHER)
    loss = -torch.minimum(ratio * a, clipped * a).sum() / divisor + 0.0 * dense.sum()
    kl = torch.zeros((), dtype=logp.dtype, device=logp.device)
    if kl_beta > 0 and ref is not None:
        u = logp - ref
        u = (-u).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp() - 1 + u if use_kl_estimator_k3 else u
        kl = kl_beta * u.sum() / divisor
    mean = entropy.detach().sum() / max(1, logp.shape[0])
    return SimpleNamespace(loss=loss + kl, kl_loss=kl.detach(), entropy=mean, logits=None)


def _at(name: str, values: Tensor | None, scored: Tensor) -> Tensor | None:
    if values is None or values.numel() == 0:
        return None
    check.shape(name, values, tuple(scored.shape), " (as input_ids)")
    return values.to(scored.device)[scored]


def _refuse_fused_loss(model: nn.Module) -> None:
    core = unwrap(model)
    if core.training and getattr(getattr(core, "config", None), "fuse_cross_entropy", False) is True:
        raise ValueError(
            "model.config.fuse_cross_entropy is True: in training mode this model never calls its head; set it to False"
        )
