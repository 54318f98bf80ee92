"""Memory: no logits, no dependence on n_mc, no activations in the graph of an estimate, one dW."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_zoo import (
    Batch,
    Call,
    by_bgpo,
    by_elbo,
    by_replay,
    by_torch,
    every_architecture,
    llada,
    make_batch,
    untouchable,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import bgpo_kernels as bk

TOKENS, WIDTH, WORDS = 48, 32, 512


class Meter(TorchDispatchMode):
    """Bytes of the storages that torch's operations make: alive now, alive at most, and each one's size when made.

    A storage counts once, however many tensors share it, and until the last of them is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.made: list[int] = []
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known | self._alive:
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.made.append(size)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def by_bgpo_off_policy(model: nn.Module, batch: Batch, **options: Any) -> None:
    old = torch.full((len(batch.ids), options["n_mc"]), -100.0)
    by_bgpo(model, batch, old_logprob=old, **options)


CALLS = {"bgpo": by_bgpo, "bgpo off-policy": by_bgpo_off_policy, "replay": by_replay, "elbo": by_elbo}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def peak(call: Call, n_mc: int) -> int:
    """Of a model that has run before, from no gradients; all of the response masked, so that samples cost alike."""
    model, batch = llada(vocab_size=WORDS, hidden_size=WIDTH), make_batch(2, TOKENS)
    options = {"n_mc": n_mc, "scheme": "full"} | ({} if call is by_torch else {"micro_batch_tokens": TOKENS})
    call(model, batch, **options)
    model.zero_grad(set_to_none=True)
    bk.set_workspace_bytes(None)  # and from no workspace
    with Meter() as meter:
        call(model, batch, **options)
    return meter.peak


@every_call
def test_peak_does_not_depend_on_the_number_of_samples(call: Call) -> None:
    one, many = peak(call, 1), peak(call, 32)
    assert many == pytest.approx(one, rel=0.01)


def test_the_meter_sees_graphs_that_are_kept() -> None:
    """What the test above would find in an implementation that is not flat."""
    assert peak(by_torch, 32) > 16 * peak(by_torch, 1)
    assert peak(by_torch, 1) > 1.2 * peak(by_bgpo, 1)


@every_call
@every_architecture
def test_logits_never_exist(build: Callable[..., nn.Module], call: Call) -> None:
    """The head's own forward raises, and over many chunks no tensor comes near the size of [T, V]."""
    words, chunk = 4096, 1 << 16
    model, batch = build(vocab_size=words), make_batch(2, TOKENS)
    head = untouchable(model.get_output_embeddings())
    bk.set_workspace_bytes(chunk)
    assert batch.response.sum(-1).min() * words * 4 > 8 * chunk, "a sample must need many chunks"
    with Meter() as meter:
        call(model, batch, n_mc=3, scheme="full", head=head)
    weight = words * 16 * 4
    assert max(meter.made) <= weight < TOKENS * words * 4
    assert chunk in meter.made, "the workspace is what was set"


@pytest.mark.parametrize("per_sample", [False, True])
def test_graph_of_an_estimate_holds_numbers_only(per_sample: bool) -> None:
    model, batch = llada(vocab_size=WORDS, hidden_size=WIDTH), make_batch(2, TOKENS)
    bk.elbo_logprob(model, batch.ids, batch.response, n_mc=8)
    with Meter() as meter:
        estimates = bk.elbo_logprob(model, batch.ids, batch.response, n_mc=8, per_sample=per_sample)
        bk.set_workspace_bytes(None)  # gives the workspace back
    held = meter.now
    one_activation = TOKENS * WIDTH * 4
    assert estimates.requires_grad and meter.peak > 4 * one_activation
    assert held < one_activation, "ids, response masks and scores of two sequences"
    del estimates
    assert meter.now == 0


@pytest.mark.parametrize("call", [by_bgpo, by_bgpo_off_policy, by_replay], ids=["bgpo", "bgpo off-policy", "replay"])
@pytest.mark.parametrize("trained", [True, False])
def test_head_gradient_is_summed_in_place(call: Call, trained: bool) -> None:
    """One [V, H] in all, .grad itself, whatever the number of micro-batches and chunks; none for a frozen head."""
    model, batch = llada(vocab_size=WORDS, hidden_size=16), make_batch(2, TOKENS)
    model.get_input_embeddings().requires_grad_(False)
    model.lm_head.requires_grad_(trained)
    bk.set_workspace_bytes(8 * WORDS * 4 * 8)
    call(model, batch, n_mc=1)
    model.zero_grad(set_to_none=True)
    with Meter() as meter:
        call(model, batch, n_mc=6, micro_batch_tokens=2 * TOKENS)
    assert meter.made.count(WORDS * 16 * 4) == trained


def test_head_gradient_of_16_bit_weights_has_one_wide_accumulator() -> None:
    model, batch = llada(torch.bfloat16, vocab_size=WORDS, hidden_size=16), make_batch(2, TOKENS)
    model.get_input_embeddings().requires_grad_(False)
    bk.set_workspace_bytes(1 << 16)
    by_bgpo(model, batch, n_mc=1)
    model.zero_grad(set_to_none=True)
    with Meter() as meter:
        by_bgpo(model, batch, n_mc=6, micro_batch_tokens=2 * TOKENS)
    assert meter.made.count(WORDS * 16 * 4) == 1
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
