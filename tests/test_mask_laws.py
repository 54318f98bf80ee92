"""The laws of `random_mask`, in exact integers where they are integers and by fixed-seed statistics where they are not.

A chi-square test fails at p < 1e-6, a mean at 5 standard errors; seeds are fixed, so a pass stays a pass.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from math import comb

import pytest
import torch
from mask_model import COUNTS, FALLING, LAWS, MASK_ID, draw, falling, fp32, harmonic, words
from torch import Tensor

import bgpo_kernels as bk
from bgpo_kernels.masks.schedule import HARMONIC


def p_value(observed: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-square, all cells expected to be well filled."""
    assert observed.sum() == pytest.approx(float(expected.sum())) and float(expected.min()) > 20
    return chi_square_tail(((observed - expected).double() ** 2 / expected).sum(), len(expected) - 1)


def chi_square_tail(statistic: Tensor, freedom: int) -> float:
    if freedom == 0:  # one cell holds everything
        return 1.0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2))


def assert_mean(values: Tensor, expected: float, deviation: float | None = None, what: str = "") -> None:
    """The mean of independent values lies within 5 standard errors."""
    error = (float(values.double().std()) if deviation is None else deviation) / len(values) ** 0.5
    found = float(values.double().mean())
    assert abs(found - expected) < 5 * error, f"{what}: {found:.6g} for {expected:.6g} +- {error:.2g}"


def many(law: str, length: int, n: int, batch: int, seed: int = 11) -> tuple[Tensor, bk.MaskDraw]:
    """Masked positions `[batch, n, length]` of responses without prompt, and their draw."""
    ids = torch.zeros(1, length, dtype=torch.int64).expand(batch, -1)
    drawn = draw(law, ids, torch.ones_like(ids, dtype=torch.bool), n_mc=n, seed=seed)
    return drawn.noisy_ids == MASK_ID, drawn


def subset_code(masked: Tensor) -> Tensor:
    """Masks as integers, bit p for position p."""
    return (masked.long() << torch.arange(masked.shape[-1])).sum(-1)


# ---------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("schedule", "law"), [(HARMONIC, harmonic), (FALLING, falling)], ids=["harmonic", "falling"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 300])
@pytest.mark.parametrize("n", [1, 3, 16, 1000])
def test_count_tables_are_the_exact_law(schedule: bk.CountSchedule, law, length: int, n: int) -> None:
    thresholds, weights = schedule.table(length, n)
    assert thresholds.dtype == torch.int64 and weights.dtype == torch.float32
    assert bool((thresholds.diff() >= 0).all()) and int(thresholds[-1]) == n << 32
    cumulative = Fraction(0)
    # fp64 holds a cumulative probability to length * 2^-53, on a grid of n << 32; then one step for the rounding up
    slack = 1 + n * length / 2**20
    for count, q in enumerate(law(length), 1):
        cumulative += q
        exact = -((-cumulative * (n << 32)) // 1)
        assert abs(int(thresholds[count - 1]) - exact) <= slack
        assert float(weights[count - 1]) == pytest.approx(float(1 / (count * q)), rel=2**-23)


def test_harmonic_weights_are_one_number() -> None:
    for length in (*range(1, 100), 512, 4096):
        weights = HARMONIC.table(length, 4)[1].tolist()
        assert set(weights) == {fp32(sum(Fraction(1, count) for count in range(1, length + 1)))}


@pytest.mark.parametrize("length", [1, 4, 6, 12])
def test_stratified_counts_lie_in_their_strata(length: int) -> None:
    """n = L leaves no freedom, n = L/2 and n = 2L one count or half of one; the mean over samples is then uniform."""
    counts = torch.arange(1, length + 1)
    assert bool((many("exact-stratified", length, length, 500)[1].count == counts).all())
    double = many("exact-stratified", length, 2 * length, 500)[1].count
    assert bool((double == counts.repeat_interleave(2)).all())
    if length % 2 == 0:
        half = many("exact-stratified", length, length // 2, 500)[1].count
        assert bool(((half == counts[0::2]) | (half == counts[1::2])).all())


def stratum_law(law: list[Fraction], j: int, n: int) -> list[Fraction]:
    """Law of a table's outcome in stratum j of n: n times the overlap of each probability's interval with it."""
    edges = [Fraction(0)]
    for q in law:
        edges.append(edges[-1] + q)
    low, high = Fraction(j, n), Fraction(j + 1, n)
    return [n * max(Fraction(0), min(b, high) - max(a, low)) for a, b in pairwise(edges)]


@pytest.mark.parametrize("law", [law for law in LAWS if law.startswith(("exact", "coupled"))])
@pytest.mark.parametrize(("length", "n"), [(7, 1), (6, 4), (9, 6)])
def test_drawn_counts_follow_their_law(law: str, length: int, n: int) -> None:
    """Sample by sample against the exact law of its stratum; over the n samples these average to q itself."""
    scheme, schedule, exact_law = LAWS[law]
    n, step = (2 * n, 2) if scheme == "coupled" else (n, 1)
    outcomes = length + 1 if scheme == "coupled" else length  # a pair masks 0..L tokens
    q = exact_law(length) if exact_law else [Fraction(1, outcomes)] * outcomes
    batch = 40_000
    count = many(law, length, n, batch)[1].count[:, ::step].long() - (0 if scheme == "coupled" else 1)
    strata = count.shape[1]
    total = [Fraction(0)] * outcomes
    for j in range(strata):
        want = q if schedule == "uniform" else stratum_law(q, j, strata)
        total = [t + w / strata for t, w in zip(total, want, strict=True)]
        cells = torch.tensor([float(w) for w in want], dtype=torch.float64)
        seen = torch.bincount(count[:, j], minlength=outcomes).double()
        assert float(seen[cells == 0].sum()) == 0, "a count outside its stratum"
        assert p_value(seen[cells > 0], cells[cells > 0] * batch) > 1e-6
    assert total == q


@pytest.mark.parametrize("n", [4, 16])
def test_strata_divide_the_variance_by_n_squared(n: int) -> None:
    """Of the mean over n samples of a smooth monotone function of the count, against n independent counts."""
    batch, length = 8_000, 64
    grid = torch.arange(1, length + 1, dtype=torch.float64)
    mean = many("exact-stratified", length, n, batch)[1].count.double().mean(-1)
    ratio = float(mean.var() / (grid.var(correction=0) / n))
    want = ((length / n) ** 2 - 1) / (length**2 - 1)  # of uniform counts in a stratum and overall; 1/n^2 as L grows
    assert ratio == pytest.approx(want, rel=5 * (2 / batch) ** 0.5)
    assert_mean(mean, float(grid.mean()))


@pytest.mark.parametrize("schedule", ["uniform", "stratified"])
def test_bernoulli_times_are_uniform(schedule: str) -> None:
    batch, n, cells = 20_000, 4, 16
    time = 1 / many(f"bernoulli-{schedule}", 1, n, batch)[1].segment_weight.double()
    assert float(time.min()) > 0 and float(time.max()) <= 1
    for j in range(n):
        inside = time[:, j] * n - j if schedule == "stratified" else time[:, j]
        assert float(inside.min()) > -1e-6 and float(inside.max()) < 1 + 1e-6  # weights are fp32
        seen = torch.histc(inside.clamp(0, 1), cells, 0, 1)
        assert p_value(seen, torch.full((cells,), batch / cells)) > 1e-6


def test_bernoulli_tokens_are_independent_with_probability_t() -> None:
    masked, drawn = many("bernoulli-stratified", 12, 8, 20_000)
    masked, time = masked.flatten(0, 1).double(), 1 / drawn.segment_weight.double().flatten()[:, None]
    excess, variance = masked - time, time * (1 - time)
    for p in range(12):
        assert_mean(excess[:, p], 0.0, float(variance.mean().sqrt()), f"position {p}")
    for a, b in combinations(range(12), 2):
        assert_mean(excess[:, a] * excess[:, b], 0.0, float((variance**2).mean().sqrt()), f"positions {a}, {b}")


# --------------------------------------------------------------------------------------------------------- subsets


@pytest.mark.parametrize("law", ["exact-stratified", "coupled-stratified"])
def test_all_subsets_are_equally_likely(law: str) -> None:
    """L = 8: each of the C(8, k) subsets, for every k. As many strata as outcomes fix how often each k comes."""
    length, batch, rounds = 8, 70_000, 8
    n, per_round = (8, batch) if law == "exact-stratified" else (18, 2 * batch)
    seen = torch.zeros(2**length, dtype=torch.int64)
    for seed in range(rounds):
        seen += torch.bincount(subset_code(many(law, length, n, batch, seed)[0]).flatten(), minlength=2**length)
    size = torch.tensor([bin(code).count("1") for code in range(2**length)])
    for k in range(length + 1):
        cells = seen[size == k].double()
        expected = 0 if k == 0 and law == "exact-stratified" else rounds * per_round
        assert len(cells) == comb(length, k) and float(cells.sum()) == expected, f"k={k}"
        if len(cells) > 1:
            assert p_value(cells, torch.full_like(cells, expected / len(cells))) > 1e-6, f"k={k}"


def test_inclusion_of_tokens_and_pairs() -> None:
    """P(i) = k/L and P(i, j) = k(k-1) / (L(L-1)) for counts k across the range, also beyond one register of lanes."""
    length, batch = 30, 50_000
    masked, drawn = many("exact-stratified", length, length, batch)
    for k in (1, 2, 8, 15, 29):
        chosen = masked[:, k - 1].double()
        assert bool((drawn.count[:, k - 1] == k).all())
        single, both = k / length, k * (k - 1) / (length * (length - 1))
        share = chosen.mean(0)
        assert float((share - single).abs().max()) < 5 * (single * (1 - single) / batch) ** 0.5
        pairs = (chosen.T @ chosen / batch)[torch.ones(length, length).triu(1).bool()]
        assert float((pairs - both).abs().max()) <= 5 * (both * (1 - both) / batch) ** 0.5


def contingency(a: Tensor, b: Tensor, cells: int) -> float:
    """p-value of independence of two codes in 0..cells-1 (each uniform on its occupied values)."""
    table = torch.bincount(a * cells + b, minlength=cells * cells).view(cells, cells).double()
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    return chi_square_tail(statistic, (table.shape[0] - 1) * (table.shape[1] - 1))


def test_samples_rows_and_seeds_are_independent() -> None:
    """Subsets of L = 4 tokens drawn iid: between samples, near and far ids (low and high words), and seeds likewise."""
    batch = 60_000
    code = subset_code(many("exact-uniform", 4, 4, batch)[0])
    for j, i in combinations(range(4), 2):
        assert contingency(code[:, j], code[:, i], 16) > 1e-6, f"samples {j} and {i}"
    for shift in (1, 2, 256):
        assert contingency(code[:-shift, 0], code[shift:, 0], 16) > 1e-6, f"ids {shift} apart"
    ids = torch.zeros(batch, 4, dtype=torch.int64)
    far = draw("exact-uniform", ids, ids == 0, n_mc=4, seed=11, sample_ids=torch.arange(batch) + 2**32)
    assert contingency(code[:, 0], subset_code(far.noisy_ids == MASK_ID)[:, 0], 16) > 1e-6, "ids 2^32 apart"
    for seed in (12, 11 + 2**32):
        other = subset_code(many("exact-uniform", 4, 4, batch, seed)[0])
        assert contingency(code[:, 0], other[:, 0], 16) > 1e-6, f"seed {seed}"


def test_counts_say_nothing_about_places() -> None:
    """Count word and selection keys come from different purposes: the count's own word does not steer the choice."""
    masked, drawn = many("exact-uniform", 6, 2, 60_000)
    where = subset_code(masked)
    for k in (2, 3, 4):
        rows = drawn.count[:, 0] == k
        other = drawn.count[rows, 1].long()
        assert contingency(other, where[rows, 0], 64) > 1e-6, "count of one sample, place of another"
    word = torch.tensor([words(0, 0, b, COUNTS, 11)[0] for b in range(20_000)])
    for k in range(1, 6):
        rows = (drawn.count[:20_000, 0] == k).nonzero().flatten()
        half = (word[rows] >= word[rows].median()).long()
        assert contingency(half, where[rows, 0], 64) > 1e-6
