"""Whether a model looks in both directions, asked of the model itself.

A masked diffusion LM that has silently become causal (a default mask, a padded batch, a reloaded config) still trains,
on the wrong likelihood. So two sequences that differ only in their last token go through the model, and the hidden
states of the earlier positions must differ.

How much is a difference? In a dense model causal means equal to the bit. In a mixture of experts it does not: the
changed token changes how many rows each expert multiplies, hence the rounding of every other row. So the probe also
changes the *other sequences* of the batch, which nothing legitimate connects with the first one, and an edit counts as
seen only when it moves the hidden states a few times more than that, and more than the last bits of fp32. In a dense
model the others have no effect at all and a causal one gives exactly 0.

On the same forwards the placeholder of the head is a ramp of known numbers, so what comes out as logits shows the scale
and cap the model really applies, to be compared with the HeadSpec.

A model whose attention contributes exactly nothing, such as one with freshly zeroed output projections, is taken for
causal. Cost, once per model: nine forwards of 4 x 8 tokens without a head, three more with padding. No gradient, no
random state, no change of mode remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..head.options import LogitTransform
from .heads import HeadSpec, capture_head, forward_kwargs, model_spec, unwrap, without_gradient

_BATCH, _LENGTH = 4, 8  # short, so that the edited token is inside every attention window
_DRAWS = 3  # one draw may be uninformative: ids with equal embeddings, expert loads that happen to round alike
_SEEN = 4.0  # times the effect of the other sequences: up to there an edit may be rounding,
_LAST_BITS = 2.0**-18  # and up to there times the largest hidden state (unseen: ~2^-22, seen, BERT of width 8: 2^-13)
_LEAK = 1 / 32  # times the effect of a token that is seen: above it the padding is seen too
_RAMP = 100.0  # far beyond any cap in use, so that a missing or different cap shows
_TRANSFORM_RTOL = 0.03  # a few roundings in bfloat16, each 2^-8
_ESCAPE = ". If you know better, call bgpo_kernels.models.assume_bidirectional(model)."

_passed: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()
_assumed: WeakSet[nn.Module] = WeakSet()


def assume_bidirectional(model: nn.Module) -> None:
    """Switch `assert_bidirectional` off for this model: you vouch for its attention and its HeadSpec.

    For models the probe cannot judge, such as one that needs further inputs to run. The probe of block-diffusion models
    (`assert_block_semantics`) is switched off as well.
    """
    _assumed.add(unwrap(model))


def is_assumed(core: nn.Module) -> bool:
    """Whether `assume_bidirectional` was called for this model."""
    return core in _assumed


def assert_bidirectional(model: nn.Module, head_spec: HeadSpec, *, padded: bool = False) -> None:
    """ValueError when the model is (or has silently become) causal, or when it is not what `head_spec` says.

    Checks that a late token changes earlier hidden states; that the head sees one row per token; that they are finite;
    that the model's own scale and cap after the head are those of `head_spec`. With `padded=True` all of that under an
    `attention_mask` with zeros (some models go causal only then), and that the padding changes nothing.

    A pass is remembered per model, attention implementation, `config.is_causal` and head options. The model runs in
    evaluation mode without gradients; modes, `.grad` and random states are left as they were.
    """
    core = unwrap(model)
    if is_assumed(core):
        return
    if model_spec(core).attention == "block":
        raise ValueError(
            f"{type(core).__name__} attends in blocks, so its likelihood needs the clean tokens beside the noisy ones: "
            f"call bgpo_kernels.block_row_logprob, or pass your own mask as model_kwargs of row_logprob{_ESCAPE}"
        )
    config = getattr(core, "config", None)
    key = (
        padded,
        getattr(config, "is_causal", None),
        str(getattr(config, "_attn_implementation", None)),
        head_spec.logit_scale,
        head_spec.softcap,
    )
    if key in _passed.get(core, ()):
        return
    with undisturbed(core):
        _probe(core, head_spec, padded)
    _passed.setdefault(core, set()).add(key)


def _probe(model: nn.Module, spec: HeadSpec, padded: bool) -> None:
    def hidden(ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        return hidden_states(model, spec, ids, {"attention_mask": mask} if padded else {})

    largest = others = seen = padding = 0.0
    for ids, other in draws(model, spec, _LENGTH):
        before = hidden(ids)
        largest = max(largest, float(before[:, 1:].abs().max()))
        others = max(others, _effect(before, hidden(torch.cat([ids[:1], other[1:]]))))
        seen = max(seen, _effect(before, hidden(edit(ids, other, -1))))
        if padded:
            padding = max(padding, _effect(before, hidden(edit(ids, other, 0))))
    rounding = unseen(others, largest)
    if seen <= rounding:
        condition = " when attention_mask has a zero" if padded else ""
        raise ValueError(
            f"{type(model).__name__} is causal{condition}: its last token does not change the hidden states before it, "
            "so it cannot score masked tokens. Turn its attention around: for models of transformers layers "
            f"bgpo_kernels.models.make_bidirectional(model) does it{_ESCAPE}"
        )
    if padding > max(rounding, _LEAK * seen):
        raise ValueError(
            f"{type(model).__name__} attends to padding: a token where attention_mask is 0 moves the hidden states of "
            f"the others by up to {padding:.2g}, a real one by {seen:.2g}. Use an attention implementation that takes "
            f"the mask, or score without padding{_ESCAPE}"
        )


def draws(model: nn.Module, spec: HeadSpec, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of ordinary ids [B, T], different from each other everywhere."""
    generator = torch.Generator().manual_seed(0)
    candidates = _ordinary_ids(model, spec)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    for _ in range(_DRAWS):
        chosen = torch.randint(len(candidates), (_BATCH, length), generator=generator)
        step = torch.randint(1, len(candidates), chosen.shape, generator=generator)
        yield candidates[chosen].to(device), candidates[(chosen + step) % len(candidates)].to(device)


def unseen(others: float, largest: float) -> float:
    """How far an edit may move hidden states of size `largest` without being seen, when the other sequences of the
    batch move them by `others`."""
    return max(_SEEN * others, _LAST_BITS * largest)


def edit(ids: Tensor, other: Tensor, position: int) -> Tensor:
    """`ids` [B, T] with one token of the first sequence replaced by that of `other`."""
    edited = ids.clone()
    edited[0, position] = other[0, position]
    return edited


def _effect(before: Tensor, after: Tensor) -> float:
    """Largest change of the first sequence's hidden states [B, T, H], its first (padding) and last position left out.

    Position T - 2 is next to the edited T - 1, so a local attention window never hides the edit.
    """
    return float((before[0, 1:-1] - after[0, 1:-1]).abs().max())


def _ordinary_ids(model: nn.Module, spec: HeadSpec) -> Tensor:
    """Sorted ids [K] both embedding and head have, without special ones, which may act beyond their embedding
    (RoBERTa counts positions from the padding id)."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    config = getattr(model, "config", None)
    weight: Any = spec.module.weight
    sizes = (
        getattr(embedding, "num_embeddings", None),
        getattr(config, "vocab_size", None),
        getattr(spec.module, "out_features", weight.shape[0]),  # a sharded weight has no shape of its own
    )
    size = min(s for s in sizes if isinstance(s, int) and s > 0)
    fields = getattr(config, "__dict__", {})
    special = {value for name, value in fields.items() if name.endswith("token_id") and isinstance(value, int)}
    ordinary = [i for i in range(min(size, 1024)) if i not in special]
    return torch.tensor(ordinary if len(ordinary) > 1 else range(size))


def hidden_states(model: nn.Module, spec: HeadSpec, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [B, T, H] in fp64 that the head receives for `ids` [B, T], after the checks of one forward."""
    with capture_head(model, spec, Tensor.clone, placeholder=_ramp) as capture:
        output = model(ids, **forward_kwargs(model), **kwargs)
    hidden = capture.value.double()
    if hidden.numel() != ids.numel() * hidden.shape[-1]:
        raise ValueError(
            f"the head of {type(model).__name__} receives hidden states {list(hidden.shape)} for input ids "
            f"{list(ids.shape)}: it must see one row per token (no unpadding, prompt tuning or logits_to_keep)"
        )
    hidden = hidden.reshape(*ids.shape, -1)
    if not bool(torch.isfinite(hidden[:, 1:]).all()):
        raise ValueError(f"{type(model).__name__} gives hidden states that are not finite for ordinary ids{_ESCAPE}")
    _check_transform(model, spec, output, _ramp(capture.value))
    return hidden


def _ramp(hidden: Tensor) -> Tensor:
    """Known numbers [.., 1] in place of the logits of hidden [.., H]."""
    rows = hidden[..., :1]
    return torch.linspace(-_RAMP, _RAMP, rows.numel(), device=rows.device).to(rows.dtype).view(rows.shape)


def _check_transform(model: nn.Module, spec: HeadSpec, output: Any, raw: Tensor) -> None:
    """ValueError when the model made other logits out of `raw` than `spec` would. A model whose output is no tensor of
    logits, or is normalised over the vocabulary (then it is constant here), says nothing and passes."""
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else output)
    if not isinstance(logits, Tensor) or logits.numel() != raw.numel():
        return
    actual = logits.double().flatten()
    expected = LogitTransform(spec.logit_scale, spec.softcap).apply(raw.double()).flatten()
    tolerance = _TRANSFORM_RTOL * float(expected.abs().max())
    if bool(actual.max() == actual.min()) or bool(((actual - expected).abs() <= tolerance).all()):
        return
    raise ValueError(
        f"{type(model).__name__} turns a head output of {float(raw.max()):.4g} into the logit {float(actual[-1]):.4g}, "
        f"but logit_scale={spec.logit_scale:.4g} and softcap={spec.softcap} give {float(expected[-1]):.4g}: pass "
        f"head=HeadSpec(...) with the model's own scale and cap{_ESCAPE}"
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients; every module's mode and all random states come back."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    training = [module for module in model.modules() if module.training]
    # The flags are set directly: train() and eval() have side effects in some models (loralib merges its weights).
    with torch.random.fork_rng(devices=devices), without_gradient():
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
