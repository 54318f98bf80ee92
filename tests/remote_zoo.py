"""Tiny models in the manner of the remote code of SDAR, LLaDA2 and LLaDA, as classes and as folders with that code.

Written for these tests, in plain torch, and as awkward as the originals: SDAR skips its head and wants a BlockMask in
training mode and a mask of truth values otherwise; LLaDA2 adds whatever mask it gets to the scores and insists on one
per sequence; LLaDA's head is not where transformers looks for it, and `when_padded` says what a padding mask does.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
from torch.nn.attention.flex_attention import flex_attention
from transformers import PretrainedConfig, PreTrainedModel

V, H, MASK = 23, 16, 22


class TinyConfig(PretrainedConfig):
    """Options of all the models below."""

    model_type = "tiny_remote"

    def __init__(
        self, vocab_size: int = 23, hidden_size: int = 16, causal: bool = False, when_padded: str = "", **kwargs: Any
    ) -> None:
        self.vocab_size, self.hidden_size, self.causal, self.when_padded = vocab_size, hidden_size, causal, when_padded
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class Layer(nn.Module):
    """Attention and MLP of two heads; positions are in the hidden states. `takes` is the kind of mask."""

    def __init__(self, width: int, takes: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.takes = takes

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(F.layer_norm(x, (width,))).view(batch, tokens, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.takes == "bool" and self.training:
            mixed = flex_attention(q, k, v, block_mask=mask)
        elif self.takes == "bool":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool())
        else:
            scores = q @ k.transpose(-1, -2) / (width // 2) ** 0.5
            mixed = (scores if mask is None else scores + mask).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (width,)))))


class TinyModel(PreTrainedModel):
    """Embeddings of tokens and positions, two layers, and whatever head the derived classes have."""

    config_class = TinyConfig
    takes = "additive"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed, self.position = nn.Embedding(config.vocab_size, width), nn.Embedding(128, width)
        self.layers = nn.ModuleList(Layer(width, self.takes) for _ in range(2))
        self.make_head(width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.4)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def make_head(self, width: int, vocabulary: int) -> None:
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def hidden(self, input_ids: Tensor, mask: Any, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if self.config.causal and mask is not None:  # a flaw: the mask is cut to a triangle
            mask = mask.tril() if mask.dtype == torch.bool else mask + mask.new_full(mask.shape, -torch.inf).triu(1)
        x = self.embed(input_ids) + self.position(position_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class SDARForCausalLM(TinyModel):
    takes = "bool"

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        hidden = self.hidden(input_ids, attention_mask, position_ids)
        return SimpleNamespace(logits=None if self.training else self.lm_head(hidden))


class LLaDA2MoeModelLM(TinyModel):
    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        batch, tokens = input_ids.shape
        if attention_mask is not None and attention_mask.shape != (batch, 1, tokens, tokens):
            raise ValueError(f"a mask per sequence, please, not {list(attention_mask.shape)}")
        hidden = self.hidden(input_ids, attention_mask, position_ids)
        logits = self.lm_head(hidden)
        return SimpleNamespace(logits=logits if logits.dtype == torch.float64 else logits.float())


class LLaDAModelLM(TinyModel):
    def make_head(self, width: int, vocabulary: int) -> None:
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict({"ff_out": nn.Linear(width, vocabulary, bias=False)})

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        tokens = input_ids.shape[1]
        triangle = self.embed.weight.new_full((tokens, tokens), -torch.inf).triu(1)
        bias = triangle if self.config.causal else triangle.new_zeros(tokens, tokens)
        if attention_mask is not None and not bool(attention_mask.all()):
            bias = triangle if self.config.when_padded == "causal" else bias
            if self.config.when_padded != "attends":
                seen = attention_mask.bool()[:, None, None] | torch.eye(tokens, dtype=torch.bool)
                bias = bias.masked_fill(~seen, -torch.inf)
        return SimpleNamespace(logits=self.model.transformer["ff_out"](self.hidden(input_ids, bias, None)))


def tiny(kind: type[TinyModel], dtype: torch.dtype = torch.float64, **config: Any) -> TinyModel:
    """Random weights, evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return kind(TinyConfig(**config)).to(dtype).eval()


_HEADER = """from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import PretrainedConfig, PreTrainedModel

"""


def write_folder(folder: Path, kind: type[TinyModel], **config: Any) -> TinyModel:
    """A folder of the model with its code in two Python files and its weights in safetensors; the model itself."""
    model = tiny(kind, torch.float32, **config)
    model.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    text["auto_map"] = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": f"modeling_tiny.{kind.__name__}",
        "AutoTokenizer": ["tokenization_tiny.Tiny", None],
    }
    (folder / "config.json").write_text(json.dumps(text))
    parts = [inspect.getsource(c) for c in (Layer, TinyModel, kind)]
    (folder / "configuration_tiny.py").write_text(_HEADER + inspect.getsource(TinyConfig))
    imports = "from .configuration_tiny import TinyConfig\n\n\n"
    (folder / "modeling_tiny.py").write_text(_HEADER + imports + "\n\n".join(parts))
    return model
