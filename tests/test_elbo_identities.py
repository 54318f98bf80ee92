"""Every scheme and schedule estimates the same evidence lower bound, value and gradient.

With M the masked positions of a response of L tokens and f(M, i) = log p(y_i | y outside M), the bound is

    sum over M of 1 / (|M| C(L, |M|)) * sum_{i in M} f(M, i)

the any-order autoregressive average. Small L is enumerated, in rationals and in fp64 with a tabular model whose f is
free for every mask; the weights and counts are those of real draws.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, permutations
from math import comb, factorial

import pytest
import torch
from mask_model import LAWS, MASK_ID, draw, fp32
from torch import Tensor

import bgpo_kernels as bk

ELBO_LAWS = [law for law in LAWS if law != "full"]
TABLE_LAWS = [law for law in ELBO_LAWS if law.startswith(("exact", "coupled"))]
L, V = 5, 3


def count_law(law: str, length: int) -> dict[int, tuple[Fraction, Fraction]]:
    """Count -> (its probability over all samples, weight of each masked token), from the definitions."""
    scheme, _, exact_law = LAWS[law]
    if scheme == "coupled":  # L - l is uniform on 0..L where l is
        each = Fraction(1, length + 1)
        return {count: (each, Fraction(length + 1, count) if count else Fraction(0)) for count in range(length + 1)}
    q = exact_law(length) if exact_law else [Fraction(1, length)] * length
    return {count: (p, Fraction(length, count) / length / p) for count, p in enumerate(q, 1)}


def subset_weight(law: str, length: int, size: int) -> Fraction:
    """Probability of one given subset times the weight of its tokens, averaged over what else is random."""
    if LAWS[law][0] == "bernoulli":  # integral of (1/t) t^l (1-t)^(L-l): a beta function
        return Fraction(factorial(size - 1) * factorial(length - size), factorial(length))
    probability, weight = count_law(law, length)[size]
    return probability * weight / comb(length, size)


def subsets(length: int) -> list[tuple[int, ...]]:
    return [places for size in range(1, length + 1) for places in combinations(range(length), size)]


# ----------------------------------------------------------------------------------------------------- rationals


def rational_loss(masked: tuple[int, ...], i: int) -> Fraction:
    """Depends on the token, on how many and on which others are hidden."""
    return -Fraction((i + 2) * (3 + sum(masked)), 1 + len(masked)) - Fraction(min(masked), 10)


def test_any_order_average_in_rationals() -> None:
    length = 6
    average = Fraction(0)
    for order in permutations(range(length)):
        average += sum(rational_loss(tuple(sorted(order[k:])), order[k]) for k in range(length))
    average /= factorial(length)
    assert average == Fraction(-313333, 4200)
    for law in ELBO_LAWS:
        total = sum(
            subset_weight(law, length, len(masked)) * sum(rational_loss(masked, i) for i in masked)
            for masked in subsets(length)
        )
        assert total == average, law


@pytest.mark.parametrize("law", TABLE_LAWS)
def test_weights_of_draws_are_those_of_the_identity(law: str) -> None:
    for length in (1, 2, 5, 6, 11):
        ids = torch.zeros(40, length, dtype=torch.int64)
        drawn = draw(law, ids, ids == 0, n_mc=24)
        seen = set(zip(drawn.count.flatten().tolist(), drawn.segment_weight.flatten().tolist(), strict=True))
        assert seen == {(count, fp32(weight)) for count, (_, weight) in count_law(law, length).items()}


# ------------------------------------------------------------------------------------------------- tabular model


class Table:
    """Free logits for every mask and position: `log_prob [2^L, L]` of the hidden tokens, fp64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logits = torch.randn(2**L, L, V, dtype=torch.float64, generator=generator).mul(2).requires_grad_()
        self.tokens = torch.randint(0, V, (L,), generator=generator)

    def log_prob(self) -> Tensor:
        return self.logits.log_softmax(-1)[:, torch.arange(L), self.tokens]

    def slope(self, direction: Tensor) -> Tensor:
        """Derivative of `log_prob` as the logits move in a direction: that of the target minus its expectation."""
        expected = (self.logits.detach().softmax(-1) * direction).sum(-1)
        return direction[:, torch.arange(L), self.tokens] - expected

    def sums(self) -> Tensor:
        """`[2^L]`: sum over the masked positions of each mask (bit p: position p is masked)."""
        masked = (torch.arange(2**L)[:, None] >> torch.arange(L)) & 1
        return (masked * self.log_prob()).sum(-1)

    def elbo(self) -> Tensor:
        """The any-order average, one order after another."""
        logp = self.log_prob()
        orders = list(permutations(range(L)))
        terms = [logp[sum(1 << p for p in order[k:]), order[k]] for order in orders for k in range(L)]
        return torch.stack(terms).sum() / len(orders)

    def mean_by_count(self) -> Tensor:
        """`[L+1]`: mean of `sums` over the masks with 0..L tokens."""
        size = torch.tensor([bin(code).count("1") for code in range(2**L)])
        return torch.stack([self.sums()[size == count].mean() for count in range(L + 1)])


def value_and_gradient(table: Table, value: Tensor) -> tuple[Tensor, Tensor]:
    return value.detach(), torch.autograd.grad(value, table.logits)[0]


def assert_same_elbo(table: Table, value: Tensor, rtol: float) -> None:
    want_value, want_gradient = value_and_gradient(table, table.elbo())
    got_value, got_gradient = value_and_gradient(table, value)
    torch.testing.assert_close(got_value, want_value, rtol=rtol, atol=0)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=rtol, atol=1e-15)
    assert float(want_gradient.abs().max()) > 0.01


@pytest.mark.parametrize("law", ELBO_LAWS)
def test_enumerated_masks_give_the_any_order_average(law: str) -> None:
    table = Table()
    size = [bin(code).count("1") for code in range(2**L)]
    weights = torch.tensor([float(subset_weight(law, L, s)) if s else 0.0 for s in size], dtype=torch.float64)
    assert_same_elbo(table, weights @ table.sums(), rtol=1e-12)


@pytest.mark.parametrize(("law", "n"), [("exact-stratified", 4 * L), ("coupled-stratified", 6 * (L + 1))])
def test_counts_and_weights_of_one_draw_integrate_exactly(law: str, n: int) -> None:
    """As many strata as outcomes: every draw holds each count equally often, so only the choice of subset is random.

    With that averaged out, a single draw's counts and weights give the bound, to the rounding of fp32 weights.
    """
    table = Table()
    drawn = draw(law, table.tokens[None], torch.ones(1, L, dtype=torch.bool), n_mc=n)
    by_count = table.mean_by_count()[drawn.count[0].long()]
    assert_same_elbo(table, (drawn.segment_weight[0].double() * by_count).mean(), rtol=2**-23)


def score(table: Table, drawn: bk.MaskDraw, values: Tensor) -> Tensor:
    """`values [2^L, L]` of the masked rows of a draw, in the order of its rows."""
    segment, position = drawn.rows // L, drawn.rows % L
    code = ((drawn.noisy_ids == MASK_ID).long() << torch.arange(L)).sum(-1).flatten()
    return values[code[segment], position]


@pytest.mark.parametrize("law", ELBO_LAWS)
def test_real_draws_estimate_value_and_gradient(law: str) -> None:
    """5 standard errors over independent sequences; the gradient along random directions of the logits."""
    table, batch, n = Table(), 20_000, 6
    ids = table.tokens[None].expand(batch, -1)
    drawn = draw(law, ids, torch.ones_like(ids, dtype=torch.bool), n_mc=n, seed=5)
    value, gradient = value_and_gradient(table, table.elbo())
    checks = [(table.log_prob().detach(), float(value))]
    for _ in range(4):
        direction = torch.randn_like(table.logits.detach())
        checks.append((table.slope(direction), float((gradient * direction).sum())))
    for values, want in checks:
        estimates = drawn.reduce(score(table, drawn, values)).mean(-1)
        error = float(estimates.std()) / batch**0.5
        assert error < 0.02 * float(values.abs().sum(-1).mean()), "sharp enough to see a wrong weight"
        assert abs(float(estimates.mean()) - want) < 5 * error


def test_backward_through_reduce_is_the_gradient_of_the_estimate() -> None:
    """The chain that training runs: rows of a model, reduce, mean, backward; against weights applied by hand."""
    table = Table()
    ids = table.tokens[None].expand(50, -1)
    drawn = draw("coupled-uniform", ids, torch.ones_like(ids, dtype=torch.bool), n_mc=4)
    _, got = value_and_gradient(table, drawn.reduce(score(table, drawn, table.log_prob())).mean())
    code = ((drawn.noisy_ids == MASK_ID).long() << torch.arange(L)).sum(-1)
    _, want = value_and_gradient(table, (drawn.segment_weight.double() * table.sums()[code]).mean())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------------- constant loss


@pytest.mark.parametrize("law", ["exact-uniform", "exact-stratified"])
@pytest.mark.parametrize("length", [1, 2, 64, 100, 333, 4096])
def test_constant_loss_has_no_variance(law: str, length: int) -> None:
    """L/l times l times c: L c on every draw; bit for bit where L and l are powers of two."""
    ids = torch.zeros(20, length, dtype=torch.int64)
    drawn = draw(law, ids, ids == 0, n_mc=16)
    for c in (-1.0, -3.0, -0.7):
        got = drawn.reduce(torch.full((drawn.num_rows,), c))
        torch.testing.assert_close(got, torch.full_like(got, length * c), rtol=2**-22, atol=0)
        if length in (1, 2, 64) and c == int(c):
            power_of_two = (drawn.count & (drawn.count - 1)) == 0
            assert bool(power_of_two.any()) and bool((got[power_of_two] == length * c).all())


def test_constant_loss_under_the_other_laws() -> None:
    length, c = 60, -2.0
    ids = torch.zeros(200, length, dtype=torch.int64)

    def reduced(law: str) -> tuple[bk.MaskDraw, Tensor]:
        drawn = draw(law, ids, ids == 0, n_mc=8)
        return drawn, drawn.reduce(torch.full((drawn.num_rows,), c))

    drawn, got = reduced("full")
    assert bool((got == length * c).all())
    harmonic_number = sum(1 / k for k in range(1, length + 1))
    drawn, got = reduced("exact-harmonic")
    torch.testing.assert_close(got.double(), drawn.count.double() * c * harmonic_number, rtol=2**-22, atol=0)
    for law in ("bernoulli-uniform", "bernoulli-stratified"):
        drawn, got = reduced(law)
        torch.testing.assert_close(got, drawn.count * c * drawn.segment_weight, rtol=2**-22, atol=0)


@pytest.mark.parametrize("law", ["coupled-uniform", "coupled-stratified"])
def test_constant_loss_of_a_coupled_pair(law: str) -> None:
    """Each side that is not empty gives (L+1) c, whatever its count: 2(L+1)c, or (L+1)c where one side is empty.

    One pair of L+1 has l = 0 and one l = L, so the mean over pairs is 2 L c: exactly, with a stratum for each l.
    """
    length, c = 9, -3.0
    ids = torch.zeros(400, length, dtype=torch.int64)
    drawn = draw(law, ids, ids == 0, n_mc=2 * (length + 1))
    got = drawn.reduce(torch.full((drawn.num_rows,), c))
    pair, counts = got[:, 0::2] + got[:, 1::2], drawn.count[:, 0::2]
    sides = 2 - ((counts == 0) | (counts == length)).int()
    torch.testing.assert_close(pair, sides * (length + 1) * c, rtol=2**-22, atol=0)
    assert bool((sides == 1).any())
    if law == "coupled-stratified":
        torch.testing.assert_close(got.mean(-1), torch.full((400,), length * c), rtol=2**-21, atol=0)
