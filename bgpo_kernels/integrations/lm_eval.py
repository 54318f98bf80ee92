"""lm-evaluation-harness: likelihood tasks (HellaSwag, MMLU, ARC, ...) of masked diffusion language models.

Stands where ``LLaDAEvalHarness`` stands in ML-GSAI/LLaDA's ``eval_llada.py``, for any model this package can read.
A request (context, continuation) is answered by ``(estimate of log p(continuation | context), is_greedy)`` as
:mod:`~bgpo_kernels.integrations.llada_eval` computes them. The estimate is reproducible: it depends on the seed and the
tokens, not on the order or sharding of requests.

The class works without lm_eval. Where lm_eval is installed it derives from ``lm_eval.api.model.LM`` and is registered
as ``bgpo_mdlm``; ``python -m bgpo_kernels.integrations.lm_eval`` is lm_eval's own command line with that name known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import validation as check
from ..models import HeadSpec
from ..models.checkpoint import load_native
from ..models.remote import load_remote
from .llada_eval import get_log_likelihood, is_greedy

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    LM, register_model = object, None


class MaskedDiffusionLM(LM):
    """A model that answers likelihood requests of lm-evaluation-harness."""

    def __init__(
        self,
        pretrained: str | nn.Module,
        tokenizer: Any = None,
        mask_id: int | None = None,
        max_length: int = 4096,
        batch_size: int | str = 32,
        mc_num: int = 128,
        is_check_greedy: bool = True,
        cfg: float = 0.0,
        device: str | None = None,
        dtype: str = "bfloat16",
        trust_remote_code: bool = False,
        seed: int = 0,
        head: nn.Module | HeadSpec | None = None,
        **ignored: Any,
    ) -> None:
        """Load, or take, a model.

        Args:
            pretrained: a model; or the name of a checkpoint, loaded into native layers, or with its own code if you
                pass ``trust_remote_code=True``. tokenizer: likewise; default: the checkpoint's.
            mask_id: default: the model's ``config.mask_token_id``, else the tokenizer's.
            max_length: longer contexts lose their beginning.
            batch_size: masked copies of a sequence in a forward pass. mc_num: masks of an estimate.
            is_check_greedy: False answers False without decoding, which saves a forward pass per token.
            cfg: guidance scale. device, dtype, trust_remote_code: for loading.
            ignored: what lm_eval passes to every model (``max_batch_size``).
        """
        super().__init__()
        del ignored
        self.model = _load(pretrained, device, dtype, trust_remote_code) if isinstance(pretrained, str) else pretrained
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"pretrained must be a name or a torch.nn.Module, got {type(pretrained).__name__}")
        self.model.eval()
        self.tokenizer = _tokenizer(pretrained, tokenizer, trust_remote_code)
        self.mask_id = _mask_id(self.model, self.tokenizer, mask_id)
        self.max_length = check.integer("max_length", int(max_length), 2)
        self.batch_size = 32 if batch_size == "auto" else check.integer("batch_size", int(batch_size), 1)
        self.mc_num = check.integer("mc_num", int(mc_num), 1)
        self.is_check_greedy, self.cfg, self.seed, self.head = bool(is_check_greedy), float(cfg), int(seed), head

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests."""
        return str(getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__)).replace("/", "__")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """``[(log p(continuation | context), is_greedy)]`` of requests whose ``args`` are (context, continuation)."""
        del disable_tqdm
        return [self._score(*self._encode_pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Estimates of log p(text); long texts in pieces of ``max_length - 1`` tokens, each after the one before it."""
        del disable_tqdm
        totals = []
        for request in requests:
            ids = [self._prefix(), *self._encode(request.args[0], add_special_tokens=False)]
            step = self.max_length - 1
            pieces = [(ids[i : i + 1], ids[i + 1 : i + 1 + step]) for i in range(0, len(ids) - 1, step)]
            totals.append(sum((self._likelihood(context, piece) for context, piece in pieces), 0.0))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Not served: this adapter has likelihoods, no sampler."""
        raise NotImplementedError(
            "bgpo_mdlm answers likelihood tasks only: generate with the model's own sampler, or take a task that "
            "scores options (output_type multiple_choice or loglikelihood)"
        )

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        kept = self.max_length - len(continuation)
        if kept < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens leaves no room for a context in "
                f"max_length={self.max_length}"
            )
        context = context[-kept:]
        greedy = self.is_check_greedy and is_greedy(
            self.model, torch.tensor(context), torch.tensor(continuation), self.cfg, self.mask_id, head=self.head
        )
        return self._likelihood(context, continuation), greedy

    def _likelihood(self, context: list[int], continuation: list[int]) -> float:
        return get_log_likelihood(
            self.model, torch.tensor(context), torch.tensor(continuation), self.mc_num, self.batch_size, self.cfg,
            self.mask_id, seed=self.seed, head=self.head,
        )  # fmt: skip

    def _encode(self, text: str, **options: Any) -> list[int]:
        return list(self.tokenizer(text, **options)["input_ids"])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, split where the context's own tokens end; spaces at its end belong to the continuation."""
        bare = context.rstrip()
        if not bare:
            return [self._prefix()], self._encode(context + continuation, add_special_tokens=False)
        whole, own = self._encode(context + continuation), self._encode(bare)
        return own, whole[len(own) :]

    def _prefix(self) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            if (found := getattr(self.tokenizer, name, None)) is not None:
                return int(found)
        raise ValueError("an empty context needs a token to start from, but the tokenizer has no bos or eos token")


def _load(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
    """A checkpoint in native layers, or with the code that it brings."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if trust_remote_code:
        return load_remote(name, trust_remote_code=True, dtype=getattr(torch, dtype), device=where)
    return load_native(name, dtype=getattr(torch, dtype), device=where)


def _tokenizer(pretrained: str | nn.Module, tokenizer: Any, trust_remote_code: bool) -> Any:
    if tokenizer is None and not isinstance(pretrained, str):
        raise ValueError("tokenizer is missing: pass it with a model that was built elsewhere")
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer or pretrained, trust_remote_code=trust_remote_code)


def _mask_id(model: nn.Module, tokenizer: Any, given: int | None) -> int:
    found = [getattr(getattr(model, "config", None), "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)]
    for value in (given, *found):
        if value is not None:
            return int(value)
    raise ValueError("mask_id is missing: neither the model's config nor the tokenizer has one")


if register_model is not None:
    register_model("bgpo_mdlm")(MaskedDiffusionLM)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
