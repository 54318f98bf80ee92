"""LLaDA and Dream as transformers' own Llama and Qwen2 layers: what those two need on top.

Their files keep the official names (`native_layouts.py`): `from_pretrained`, `save_pretrained` and `load_state_dict`
translate. The state dict of a model in memory has transformers' names.

What a masked LM must not do is refused where transformers would do it silently: the loss of `labels` (of the next
token), a cache of keys and values, token-by-token `generate`, and arguments of the remote code that would be ignored.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from . import checkpoint_writing
from .heads import HeadSpec, register
from .native_layouts import dream_name, llada_name

_REFUSED = {
    "labels": "the loss of transformers is that of the next token; compute your own from the logits",
    "past_key_values": "a bidirectional model cannot reuse keys and values",
    "attention_bias": "pass attention_mask, [B, T] with 0 at padding, or boolean [B, 1, T, T]",
    "num_logits_to_keep": "its name is logits_to_keep",
    "is_causal": "this model looks in both directions",
}


class _Official:
    """What NativeLLaDA and NativeDream share: forward's arguments, and files in the official layout."""

    official_name = staticmethod(dream_name)  # a parameter's name in the files
    official_folder: str | None = None  # where it was loaded from
    config: Any

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | PathLike[str], **options: Any) -> Any:
        """`load_native` with its options; ValueError when what lies there is of the other family."""
        from .checkpoint import load_native

        model = load_native(path_or_hub_id, **options)
        if not isinstance(model, cls):
            raise ValueError(f"{path_or_hub_id} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def save_pretrained(self, save_directory: str | PathLike[str], **options: Any) -> None:
        """See `checkpoint_writing.save_official`: safetensors and config.json as the remote code wants them."""
        checkpoint_writing.save_official(self, save_directory, **options)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """torch's, for official names (a Trainer that resumes reads its checkpoint so) and transformers' alike."""
        named: Any = self
        native = {self.official_name(name): name for name, _ in checkpoint_writing.expected(named)}
        renamed = {native.get(name, name): tensor for name, tensor in state_dict.items()}
        parent: Any = super()
        return parent.load_state_dict(renamed, strict=strict, assign=assign)

    def generate(self, *_: Any, **__: Any) -> Any:
        """Refused: transformers would write one token after the other."""
        raise TypeError(f"{type(self).__name__} is a masked LM: use the sampler of your trainer, which unmasks tokens")

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, T]
        attention_mask: Tensor | str | None = None,  # [B, T], or [B, 1, T, T] boolean; Dream's "full" is none
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """Logits [B, T, V] of every token from the tokens on both sides."""
        for name, advice in _REFUSED.items():
            value = options.pop(name, None)
            if isinstance(value, Tensor) or value not in (None, False, 0):
                raise ValueError(f"{type(self).__name__} does not take {name}: {advice}")
        if isinstance(attention_mask, str):
            if attention_mask != "full":
                raise ValueError(f"attention_mask must be a tensor, None or 'full', got {attention_mask!r}")
            attention_mask = None
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
            attention_mask = self._dense(attention_mask)
        parent: Any = super()
        return parent.forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep, **options,
        )  # fmt: skip

    def _dense(self, visible: Tensor) -> Tensor:
        """A boolean mask [B, 1, T, T] as the attention in use wants it: eager adds its mask to the scores."""
        if self.config._attn_implementation != "eager":
            return visible
        backbone: Any = self
        dtype = backbone.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )


class NativeLLaDA(_Official, LlamaForCausalLM):  # type: ignore[misc]
    """LLaDA on Llama layers: rotary positions in fp32, and logits / sqrt(H) where the config says scale_logits."""

    official_name = staticmethod(llada_name)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.rope_full_precision:
            self.model.rotary_emb.__class__ = _FullPrecisionAngles
            for layer in self.model.layers:
                layer.self_attn.__class__ = _FullPrecisionRotation

    @property
    def logit_scale(self) -> float:
        """What the logits are multiplied with."""
        return 1 / math.sqrt(self.config.hidden_size) if self.config.scale_logits else 1.0

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | str | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """As `_Official.forward`."""
        output = super().forward(input_ids, attention_mask, position_ids, inputs_embeds, logits_to_keep, **options)
        if self.logit_scale == 1.0:
            return output
        if isinstance(output, tuple):
            return (output[0] * self.logit_scale, *output[1:])
        output.logits = output.logits * self.logit_scale
        return output


class NativeDream(_Official, Qwen2ForCausalLM):  # type: ignore[misc]
    """Dream, Dream-Coder and DiffuCoder on Qwen2 layers. Row i-1 of the logits predicts token i."""


class _FullPrecisionAngles(LlamaRotaryEmbedding):
    """cos and sin in fp32 at least, whatever the model's dtype."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(_at_least_fp32(x[:, :, :1]), position_ids)


class _FullPrecisionRotation(LlamaAttention):
    """Llama's attention, with queries and keys rotated in fp32 and rounded once, as LLaDA was trained."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (_rotated(x, *position_embeddings) for x in (q, k))
        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout: Any = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options)
        return self.o_proj(out.reshape(*shape[:-2], -1).contiguous()), weights


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D] rotated by angles [B, T, D]."""
    full = _at_least_fp32(x)
    return (full * cos[:, None] + rotate_half(full) * sin[:, None]).to(x.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _llada_head(model: nn.Module) -> HeadSpec:
    native: Any = model
    return HeadSpec(native.get_output_embeddings(), logit_scale=native.logit_scale)


def _dream_head(model: nn.Module) -> HeadSpec:
    native: Any = model
    return HeadSpec(native.get_output_embeddings(), shift=1)


register("NativeLLaDA", _llada_head)
register("NativeDream", _dream_head)
