"""DMPO's ELBO and weighted denoising cross-entropy.

Replaces two methods of ``DMPOTrainer`` in yuchen-zhu-zyc/DMPO, DMPO/dmpo_trainer.py: ``compute_log_prob_elbo``, which
scores the sampled completions under current and reference policy, and ``compute_loss``, which calls the model inside.
R maskings of a completion of L tokens, M_j with m_j = max(|M_j|, 1) tokens, lp from one forward each:

    ELBO of token k        1/R sum_j L/m_j [k in M_j] lp_jk
    loss "wdce"            - 1/R sum_i A_i sum_j 1/m_ij sum_{k in M_ij} lp_ijk         A centred as the options say
    loss "ddo"             - mean_i A_i log s(b g_i) - a mean_i log s(-b g_i)          g_i = ELBO_i - log_prob_cur_i

Mask law: p uniform on [0.1, 1] (``loss_mask_prob_clamp``) or [0, 1], every token with probability p; with
``loss_antithetic`` maskings R/2.. are the complements of 0..R/2-1; the prompt is never masked.

Saved: the head runs on the masked completion tokens, instead of all tokens of prompt and completion, of which upstream
sets the others' cross-entropy to 0; no [R*B, T, V] logits, and in the ELBO no two of them at once. Under grad mode
several micro-batches leave no graph behind, so memory does not grow with R.

What differs from upstream:

* Masks are drawn by counter from (``args.seed``, global step, sequence, masking): they replay, depend on no batch, and
  leave the global random state alone. The counts follow upstream's law, exactly, except that a masking of no token
  (which upstream weighs as 0) is not drawn; they are stratified over the maskings of a sequence.
* ``loss_mask_non_eos``: masks stay off the tokens after EOS. Upstream inverts an integer mask there, and clears two
  maskings of its batch instead.
* ``loss="ddo"`` takes the mean over maskings. Upstream takes their sum when ``ddo_indep_set`` is off, and compares it
  with a mean; ``ddo_sum=True`` does that.
* ``log_rnd_omit_eos``: the ELBO comes as [B, L], which the trainer then multiplies by a [B, L] mask; upstream's
  [B, T] raises an error there.
* Log-probabilities are computed in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation as check
from ..masks import CountSchedule
from ..models import HeadSpec
from ._common import content_ids
from ._completions import draw_masks, inside, score_rows, without_left_padding

_ELBO, _LOSS = 0, 1  # what a seed is for


@torch.no_grad()
def compute_log_prob_elbo(
    self: Any,
    model: nn.Module,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None,
    repeated_size: int,
    *,
    masks: Tensor | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    pad_token_id: int | None = None,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``DMPOTrainer.compute_log_prob_elbo``: the ELBO, token by token, under reference and current policy.

    Args:
        self: the trainer; ``args`` (mask_id, loss_antithetic, loss_mask_prob_clamp, log_rnd_omit_eos, seed), ``state``
            (global_step) and ``accelerator`` are read.
        model: a PEFT model; the reference is the model without its adapter.
        prompt_ids: ``[B, P]`` int64. completion_ids: ``[B, L]`` int64. completion_mask: not used, as upstream.
        repeated_size: R, maskings of every completion.
        masks: ``[B, R, L]`` bool, instead of masks drawn here.
        seed: None: made of ``args.seed`` and the global step.
        sample_ids: ``[B]`` int64, what masks depend on besides the seed. None: the tokens themselves.
        pad_token_id: cut the leading run of this id off every prompt. None: padding is attended, as upstream does.
        micro_batch_tokens, head, backend: as :func:`bgpo_kernels.row_logprob`.

    Returns:
        (reference, current), ``[B, T]`` fp32 each, 0 on the prompt; ``[B, L]`` when ``args.log_rnd_omit_eos``.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; shapes that disagree.
    """
    input_ids = _joined(prompt_ids, completion_ids)
    scored = torch.ones_like(completion_ids, dtype=torch.bool)
    attended = _attended(input_ids, scored, pad_token_id)
    if masks is None:
        repeats = check.integer("repeated_size", repeated_size, 1)
        ids = content_ids(input_ids, attended) if sample_ids is None else sample_ids
        masks = draw_maskings(self.args, scored, repeats, _seed(self, seed, _ELBO), ids, backend)
    else:
        _check_masks(masks, scored, repeated_size)
    options = {"micro_batch_tokens": micro_batch_tokens, "head": head, "backend": backend}

    def elbo() -> Tensor:
        logp = _masked_logprob(model, input_ids, masks, self.args.mask_id, attended, **options)
        return (completion_ids.shape[1] / _count(masks, logp)[..., None] * logp).mean(1)

    current = elbo()
    with self.accelerator.unwrap_model(model).disable_adapter():
        reference = elbo()
    if self.args.log_rnd_omit_eos:
        return reference, current
    before = (prompt_ids.shape[1], 0)
    return F.pad(reference, before), F.pad(current, before)


def compute_loss(
    self: Any,
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
    *,
    masks: Tensor | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    pad_token_id: int | None = None,
    ddo_sum: bool = False,
    micro_batch_tokens: int | None = None,
    head: nn.Module | HeadSpec | None = None,
    backend: str = "auto",
) -> Tensor:
    """``DMPOTrainer.compute_loss``.

    Args:
        self: the trainer; as :func:`compute_log_prob_elbo`, and in ``args`` the options of the loss.
        model: the policy, wrapped or not.
        inputs: what ``_generate_and_score_completions`` returned.
        return_outputs: refused when True, as upstream. num_items_in_batch: not used, as upstream.
        masks: ``[B, R, L]`` bool with R = ``args.num_replicates``, instead of masks drawn here.
        ddo_sum: upstream's sum over maskings in the DDO loss.
        Others: as :func:`compute_log_prob_elbo`.

    Returns:
        Scalar, with a graph under grad mode.

    Raises:
        TypeError, ValueError: as :func:`bgpo_kernels.row_logprob`; shapes that disagree. NotImplementedError: a loss
            that is neither "wdce" nor "ddo".
    """
    if return_outputs:
        raise ValueError("DMPO's trainer does not support returning outputs")
    args = self.args
    if args.loss not in ("wdce", "ddo"):
        raise NotImplementedError(f"args.loss must be 'wdce' or 'ddo', got {args.loss!r}")
    input_ids = _joined(inputs["prompt_ids"], inputs["completion_ids"])
    scored = torch.ones_like(inputs["completion_ids"], dtype=torch.bool)
    attended = _attended(input_ids, scored, pad_token_id)
    if args.loss_mask_non_eos:
        scored = inputs["completion_mask"] != 0
    if masks is None:
        repeats = check.integer("args.num_replicates", args.num_replicates, 1)
        ids = content_ids(input_ids, attended) if sample_ids is None else sample_ids
        masks = draw_maskings(args, scored, repeats, _seed(self, seed, _LOSS), ids, backend)
    else:
        _check_masks(masks, scored, args.num_replicates)
    logp = _masked_logprob(
        model, input_ids, masks, args.mask_id, attended, micro_batch_tokens=micro_batch_tokens, head=head,
        backend=backend,
    )  # fmt: skip
    per_token = logp.sum(-1) / _count(masks, logp)  # [B, R]
    if args.loss == "wdce":
        return _wdce(args, per_token, inputs, scored.shape[-1])
    return _ddo(args, per_token * scored.shape[-1], inputs, ddo_sum)


def _wdce(args: Any, per_token: Tensor, inputs: dict[str, Any], length: int) -> Tensor:
    advantages = inputs["advantages"]
    if args.advantage_centering:
        if args.advantage_centering_unbias:
            elbo = length * per_token.detach().mean(1)
            centre = (elbo - inputs["log_prob_cur"]).softmax(-1)
        elif args.advantage_centering_neg:
            centre = inputs["negative_advantages"]
        else:
            centre = advantages.mean(-1, keepdim=True)
        advantages = advantages - args.centering_strength * centre
    return -(per_token.mean(1) * advantages).sum()


def _ddo(args: Any, elbo: Tensor, inputs: dict[str, Any], total: bool) -> Tensor:
    """``elbo [B, R]``. With ``ddo_indep_set`` each half of the maskings serves one of the two terms."""
    if args.ddo_indep_set:
        real, fake = (half.mean(1) for half in elbo.chunk(2, dim=1))
    else:
        real = fake = elbo.sum(1) if total else elbo.mean(1)
    real, fake = real - inputs["log_prob_cur"], fake - inputs["log_prob_cur"]
    gain = inputs["advantages"] * F.logsigmoid(args.ddo_beta * real)
    return -gain.mean() - args.ddo_alpha * F.logsigmoid(-args.ddo_beta * fake).mean()


def draw_maskings(
    args: Any, scored: Tensor, repeats: int, seed: int, sample_ids: Tensor, backend: str = "auto"
) -> Tensor:
    """``[B, R, L]`` bool, R maskings of the ``scored [B, L]`` tokens by the law of ``args``."""
    drawn = draw_masks(
        scored, seed=seed, sample_ids=sample_ids, n_mc=(repeats + 1) // 2 if args.loss_antithetic else repeats,
        scheme="exact", schedule=CLAMPED if args.loss_mask_prob_clamp else "stratified", backend=backend,
    ).masked  # fmt: skip
    if not args.loss_antithetic:
        return drawn
    return torch.cat([drawn, scored[:, None] & ~drawn], 1)[:, :repeats]


def _masked_logprob(
    model: nn.Module, input_ids: Tensor, masks: Tensor, mask_id: int, attended: Tensor | None, **options: Any
) -> Tensor:
    """``[B, R, L]``, 0 where not masked."""
    batch, repeats, length = masks.shape
    rows = F.pad(masks, (input_ids.shape[1] - length, 0)).flatten(0, 1)
    clean = input_ids.repeat_interleave(repeats, 0)
    attended = None if attended is None else attended.repeat_interleave(repeats, 0)
    noisy = clean.masked_fill(rows, mask_id)
    (logp,) = score_rows(model, noisy, rows, clean, attention_mask=attended, **options)
    return logp[:, -length:].view(batch, repeats, length)


def _count(masks: Tensor, like: Tensor) -> Tensor:
    """``[B, R]``, masked tokens, at least 1."""
    return masks.sum(-1).clamp(min=1).to(like.dtype)


def _clamped_law(length: int) -> Tensor:
    """Law of the number of masked tokens when each is masked with probability p, and p is uniform on [0.1, 1].

    The integral of ``C(L, l) p^l (1-p)^(L-l)`` over [a, 1] is ``P(X <= l) / (L+1)``, X binomial of L+1 trials at a.
    """
    low, trials = 0.1, length + 1
    k = torch.arange(trials, dtype=torch.float64)
    choose = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    law = (choose + k * math.log(low) + (trials - k) * math.log1p(-low)).exp().cumsum(0)[1:]  # l = 1..L
    law = law.clamp(min=1e-30)  # the smallest counts of very long completions would underflow
    return law / law.sum()


CLAMPED = CountSchedule(_clamped_law, name="DMPO's, p in [0.1, 1]")


def _attended(input_ids: Tensor, scored: Tensor, pad_token_id: int | None) -> Tensor | None:
    """``[B, T]`` without the padding of prompts, None when that is attended."""
    return without_left_padding(input_ids, F.pad(scored, (input_ids.shape[1] - scored.shape[1], 0)), pad_token_id)


def _check_masks(masks: Any, scored: Tensor, repeats: int) -> None:
    check.dtype("masks", check.tensor("masks", masks), torch.bool)
    check.shape("masks", masks, (scored.shape[0], repeats, scored.shape[1]), " (B, R, L)")
    check.same_device("masks", masks, "completion_ids", scored)
    inside("masks", masks, scored[:, None], "tokens after EOS, which loss_mask_non_eos leaves unmasked")


def _joined(prompt_ids: Any, completion_ids: Any) -> Tensor:
    for name, value in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
        check.dtype(name, check.tensor(name, value), torch.int64)
    check.shape("prompt_ids", prompt_ids, ("B", "P"))
    check.shape("completion_ids", completion_ids, (prompt_ids.shape[0], "L"), " (B of prompt_ids)")
    return torch.cat([prompt_ids, completion_ids], 1)


def _seed(trainer: Any, seed: int | None, purpose: int) -> int:
    """Upstream draws anew at every call; here the seed, the step and what it is for make a call's masks."""
    if seed is not None:
        return seed
    return (trainer.args.seed & 0xFFFFFFFF) | (trainer.state.global_step & 0x7FFFFFFF) << 32 | purpose << 63
