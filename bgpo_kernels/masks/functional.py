"""``random_mask``: reproducible Monte Carlo maskings, a pure function of (seed, sample id, sample index, position)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import validation as check
from ..backends import engine, resolve, why_not
from . import ops
from .draw import MAX_ID, MaskDraw
from .reference import Facts
from .schedule import HARMONIC, SCHEDULES, SCHEMES, CountSchedule, DrawSpec, count_tables, prompt_threshold


def random_mask(
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    mask_token_id: int,
    n_mc: int,
    seed: int,
    sample_ids: Tensor | None = None,
    mc_range: tuple[int, int] | None = None,
    scheme: str = "exact",
    schedule: str | CountSchedule = "stratified",
    prompt_mask_prob: float = 0.0,
    prompt_mask: Tensor | None = None,
    backend: str = "auto",
) -> MaskDraw:
    """Draw n_mc masked copies of every sequence (mask stream, version 1: the same bits on every backend and device).

    For any scheme the estimate ``E[weight * sum_{masked} log p]`` is the same evidence lower bound:

    * ``exact``: l from ``schedule``, a uniform random l-subset of the L response tokens, weight ``(L/l)(1/L)/q(l)``.
    * ``bernoulli``: t in (0, 1], each response token masked with probability t, weight ``1/t``.
    * ``coupled``: samples 2i, 2i+1 are complements, l ~ U{0..L}, weights ``(L+1)/l`` and ``(L+1)/(L-l)``, 0 if empty.
    * ``full``: every response token, weight 1 (not an ELBO: diffu-GRPO's one-step estimate).

    Args:
        input_ids: ``[B, T]`` int64, clean tokens.
        response_mask: ``[B, T]`` bool, True where a token may be masked and is scored. Any pattern, one or more a row.
        mask_token_id: id written over masked tokens; the response must not hold it already.
        n_mc: samples per sequence; even for ``coupled``.
        seed: 0 .. 2^64-1.
        sample_ids: ``[B]`` int64 logical ids, default 0..B-1. Masks depend on these, not on the place in the batch.
        mc_range: ``(lo, hi)``, draw only these of the n_mc samples, bit for bit as in the full draw.
        scheme, schedule: see above; ``schedule`` is "uniform" (iid), "stratified" (sample j in stratum j of n),
            "harmonic" (q(l) ~ 1/l, stratified) or a :class:`CountSchedule`. The last two go with ``exact`` only.
        prompt_mask_prob, prompt_mask: mask prompt tokens (``[B, T]`` bool, disjoint from the response) with this
            probability; they are never scored. Their stream position is the index in T.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A :class:`MaskDraw` on the device of ``input_ids``.

    Raises:
        TypeError: wrong dtypes. ValueError: shapes that disagree, a row with no response token, a response that holds
            the mask token, negative ids, n_mc < 1 or odd for coupled, seed or mc_range out of range, an unknown scheme
            or schedule, a backend that cannot serve the device.
    """
    check_draw_tensors(input_ids, response_mask, sample_ids, prompt_mask)
    n_mc, seed, mask_token_id = _check_numbers(n_mc, seed, mask_token_id)
    _check_law(scheme, schedule, n_mc)
    lo, hi = _check_range(mc_range, n_mc)
    probability = check.number("prompt_mask_prob", prompt_mask_prob, 0.0, high=1.0)
    if probability > 0 and prompt_mask is None:
        raise ValueError("prompt_mask_prob > 0 needs prompt_mask [B, T] bool")
    resolved = resolve(backend, input_ids.device)
    facts = check_response(input_ids, response_mask, prompt_mask, sample_ids, mask_token_id, n_mc, resolved)
    if sample_ids is None:
        sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
    spec = _spec(scheme, schedule, n_mc, lo, hi, seed, mask_token_id, probability, facts.lengths, input_ids.device)
    return draw_unchecked(input_ids, response_mask, prompt_mask, sample_ids, spec, resolved, facts)


def make_spec(
    scheme: str, schedule: str | CountSchedule, n_mc: int, seed: int, mask_token_id: int, lengths: list[int],
    device: torch.device,
) -> DrawSpec:  # fmt: skip
    """A validated spec of all n_mc samples; the estimators cut parts out of it."""
    n_mc, seed, mask_token_id = _check_numbers(n_mc, seed, mask_token_id)
    _check_law(scheme, schedule, n_mc)
    return _spec(scheme, schedule, n_mc, 0, n_mc, seed, mask_token_id, 0.0, lengths, device)


def draw_unchecked(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor,
    spec: DrawSpec,
    backend: str,
    facts: Facts,
) -> MaskDraw:
    """The draw itself, for inputs that were checked. Reads nothing from the device: the host draws the counts too."""
    law = "reference" if backend == "reference" or why_not("cpu", torch.device("cpu")) else "cpu"
    counts = engine("masks", law).draw_counts(torch.tensor(facts.lengths), torch.tensor(facts.sample_ids), spec)
    host_offsets = tuple(counts.offsets.tolist())
    noisy, rows, targets, count, weight, offsets = ops.mask_draw(
        input_ids, response_mask, prompt_mask, sample_ids, *(spec.device_tables or (None, None, None)), *counts,
        host_offsets[-1], spec.scheme, spec.schedule, spec.n_mc, spec.lo, spec.hi, ops.signed(spec.seed),
        spec.mask_token_id, spec.prompt_threshold, backend,
    )  # fmt: skip
    return MaskDraw(noisy, rows, targets, offsets, weight, count, host_offsets, facts.largest_response)


def _spec(
    scheme: str, schedule: str | CountSchedule, n_mc: int, lo: int, hi: int, seed: int, mask_token_id: int,
    probability: float, lengths: list[int], device: torch.device,
) -> DrawSpec:  # fmt: skip
    law = HARMONIC if schedule == "harmonic" else schedule
    threshold = prompt_threshold(probability)
    if not isinstance(law, CountSchedule):
        return DrawSpec(scheme, law, n_mc, lo, hi, seed, mask_token_id, threshold)
    tables = count_tables(law, lengths, n_mc)
    return DrawSpec(scheme, "table", n_mc, lo, hi, seed, mask_token_id, threshold, tables, tables.to(device))


def check_draw_tensors(input_ids: Any, response_mask: Any, sample_ids: Any, prompt_mask: Any) -> None:
    """Types, shapes and devices of what a draw reads."""
    check.dtype("input_ids", check.tensor("input_ids", input_ids), torch.int64)
    check.shape("input_ids", input_ids, ("B", "T"))
    size = tuple(input_ids.shape)
    for name, mask in (("response_mask", response_mask), ("prompt_mask", prompt_mask)):
        if mask is None and name == "prompt_mask":
            continue
        check.dtype(name, check.tensor(name, mask), torch.bool)
        check.shape(name, mask, size, " (as input_ids)")
        check.same_device(name, mask, "input_ids", input_ids)
    if sample_ids is not None:
        check.dtype("sample_ids", check.tensor("sample_ids", sample_ids), torch.int64)
        check.shape("sample_ids", sample_ids, size[:1], " (one per sequence)")
        check.same_device("sample_ids", sample_ids, "input_ids", input_ids)


def _check_numbers(n_mc: Any, seed: Any, mask_token_id: Any) -> tuple[int, int, int]:
    """As Python ints: NumPy's, which are let in, would wrap around in ``n_mc << 32``."""
    return (
        check.integer("n_mc", n_mc, 1),
        check.integer("seed", seed, 0, check.MAX_SEED),
        check.integer("mask_token_id", mask_token_id, 0, MAX_ID),
    )


def _check_law(scheme: Any, schedule: Any, n_mc: int) -> None:
    if not isinstance(scheme, str):
        raise TypeError(f"scheme must be a name, got {type(scheme).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    if not isinstance(schedule, CountSchedule):
        if not isinstance(schedule, str):
            raise TypeError(f"schedule must be a name or a CountSchedule, got {type(schedule).__name__}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a CountSchedule; got {schedule!r}")
    if scheme != "exact" and schedule not in ("uniform", "stratified"):
        name = schedule.name if isinstance(schedule, CountSchedule) else schedule
        raise ValueError(f"scheme={scheme!r} takes schedule 'uniform' or 'stratified', not {name!r}")
    if scheme == "coupled" and n_mc % 2:
        raise ValueError(f"scheme='coupled' pairs samples, so n_mc must be even; got {n_mc}")


def _check_range(mc_range: Any, n_mc: int) -> tuple[int, int]:
    if mc_range is None:
        return 0, n_mc
    if not (isinstance(mc_range, tuple | list) and len(mc_range) == 2):
        raise TypeError(f"mc_range must be a pair (lo, hi), got {mc_range!r}")
    lo = check.integer("mc_range[0]", mc_range[0], 0, n_mc - 1)
    return lo, check.integer("mc_range[1]", mc_range[1], lo + 1, n_mc)


def check_response(
    input_ids: Tensor,
    response_mask: Tensor,
    prompt_mask: Tensor | None,
    sample_ids: Tensor | None,
    mask_token_id: int,
    n_mc: int,
    backend: str,
) -> Facts:
    """Checks of tensor values; what the host has to know of them: one read from the device in all."""
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids holds no token: shape {list(input_ids.shape)}")
    facts = engine("masks", backend).input_facts(input_ids, response_mask, prompt_mask, sample_ids, mask_token_id)
    if 0 in facts.lengths:
        rows = [b for b, length in enumerate(facts.lengths) if length == 0]
        raise ValueError(f"response_mask has no True in row(s) {rows[:8]}: a sequence needs a response token")
    if n_mc * (max(facts.lengths) + 1) >= 2**31:
        raise ValueError(f"n_mc * (L + 1) must stay below 2^31, got n_mc={n_mc} and L={max(facts.lengths)}")
    if facts.lowest < 0 or facts.highest > MAX_ID:
        check.ids_in_range("input_ids", input_ids, 0, MAX_ID + 1, "token ids")
    if facts.held:
        held = response_mask & (input_ids == mask_token_id)
        raise ValueError(
            f"the response of row(s) {held.any(-1).nonzero().flatten()[:8].tolist()} already holds the mask token "
            f"{mask_token_id}: it cannot be scored there; leave those positions out of response_mask"
        )
    if facts.overlap:
        raise ValueError("prompt_mask and response_mask overlap: a token is either prompt or response")
    return facts
