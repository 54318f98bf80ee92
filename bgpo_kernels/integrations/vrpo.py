"""VRPO (LLaDA 1.5, arXiv 2505.19223) and any other DPO-like loss of preference pairs on ELBO estimates.

With E(y) the mean over n maskings of ``(L/l) sum_{k masked} log p_k`` (exactly l of L completion tokens masked):

    logit = (E_policy(chosen) - E_ref(chosen)) - (E_policy(rejected) - E_ref(rejected)),  loss = -logsigmoid(beta logit)

VRPO's three rules are defaults here: more samples (``n_mc``; memory does not grow with it), the whole budget on
different noise levels (one masking per level, the levels spread over n strata), and policy and reference on **the same
masks** (its antithetic sampling): masks depend on the seed and the sequence alone, so a reference scored elsewhere,
earlier or on another rank with the same seed meets the same masks. Chosen and rejected are sequences of their own and
have masks of their own.

``pair_elbos``           chosen and rejected of one model, for a loss of your own
``dpo_logit``            the logit from the four estimates
``concatenated_forward`` TRL 0.12 to 0.28: replaces ``DPOTrainer.concatenated_forward``, through which policy and
                         reference both go; the trainer's loss, whichever it is, stays
``compute_loss``         TRL 0.29 and later: replaces ``DPOTrainer._compute_loss`` (loss types "sigmoid" and "ipo")

The training code of LLaDA 1.5 is not public and its constants are not repeated here: pass your own beta. DARE's VRPO
divides every estimate by the padded response length R; use beta / R for the same.

Saved: the head runs on masked tokens only, and of the 2 n graphs of a pair one micro-batch is alive at a time.
"""

from __future__ import annotations

from ._vrpo_pairs import dpo_logit, pair_elbos, sequence_elbos
from ._vrpo_trl import compute_loss, concatenated_forward

__all__ = ["compute_loss", "concatenated_forward", "dpo_logit", "pair_elbos", "sequence_elbos"]
