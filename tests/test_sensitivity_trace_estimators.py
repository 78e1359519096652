"""Hutchinson, Hutch++ and XTrace against matrices that are known, and against their formulas written out."""

import math

import numpy as np
import pytest
import torch

from mpq.sensitivity.trace_estimators import (
    FEWEST_PROBES,
    SHARED_SUBSPACE,
    SKEWNESS,
    StoppingRule,
    exact,
    hutch_plus_plus,
    hutchinson,
    random_signs,
    standard_error_factor,
    standard_error_of_mean,
    xtrace,
)

ALL = [hutchinson, hutch_plus_plus, xtrace]
SIZE = 200
INDEX = torch.arange(1, SIZE + 1).double()
SPECTRA = {"power": INDEX**-2.0, "exponential": 0.7**INDEX, "identity": torch.ones(SIZE).double()}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def matrix(eigenvalues):
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=seeded(0)).double())[0]
    return basis @ torch.diag(eigenvalues) @ basis.T


def estimates(method, eigenvalues, probes=30, repeats=100, **rule):
    a = matrix(eigenvalues)
    rule = StoppingRule(probes=probes, **({"tolerance": 0.0} | rule))
    found = [method(lambda v: a @ v, len(a), rule, seeded(seed)) for seed in range(repeats)]
    return np.array([(e.trace, e.standard_error, e.products) for e in found]).T


def rms(errors):
    return float(np.sqrt(np.mean(np.square(errors))))


@pytest.mark.parametrize("seed", range(3))
def test_every_probe_of_a_diagonal_matrix_is_exact(seed):
    diagonal = torch.randn(50, generator=seeded(9)).double()
    found = hutchinson(lambda v: diagonal[:, None] * v, 50, StoppingRule(probes=2), seeded(seed))
    assert found.trace == pytest.approx(float(diagonal.sum()), rel=1e-12)
    assert found.standard_error < 1e-12


def test_variance_of_one_probe():
    h = torch.randn(12, 12, generator=seeded(1)).double()
    h = h + h.T
    found = hutchinson(lambda v: h @ v, 12, StoppingRule(probes=40_000, tolerance=0.0), seeded(2))
    expected = 2 * float(h.square().sum() - h.diagonal().square().sum())
    assert (found.standard_error / SKEWNESS) ** 2 * found.products == pytest.approx(expected, rel=0.05)
    assert abs(found.trace - float(h.trace())) < 4 * found.standard_error


@pytest.mark.parametrize(
    ("spectrum", "bounds"),
    [  # rms relative errors of Hutchinson, Hutch++, XTrace from 30 products
        ("power", ((0.1, 0.25), (0, 1e-2), (0, 6e-3))),
        ("exponential", ((0.07, 0.2), (0, 2e-2), (0, 6e-3))),
        ("identity", ((0, 1e-12), (3e-3, 1.2e-2), (0, 1e-12))),
    ],
)
def test_errors_on_known_spectra(spectrum, bounds):
    truth = float(SPECTRA[spectrum].sum())
    for method, (low, high) in zip(ALL, bounds, strict=True):
        trace, _, products = estimates(method, SPECTRA[spectrum])
        assert low <= rms(trace - truth) / truth <= high, method.__name__
        assert (products == 30).all()


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("spectrum", ["power", "exponential"])
@pytest.mark.parametrize("probes", [30, 60])
def test_two_standard_errors_hold_the_truth(method, spectrum, probes):
    trace, error, _ = estimates(method, SPECTRA[spectrum], probes=probes, repeats=200)
    within = np.abs(trace - float(SPECTRA[spectrum].sum())) <= 2 * error
    assert 0.90 <= within.mean() <= 0.985


def test_stopping_early_keeps_its_word():
    """The real error is what was asked for, unlike with a rule on the change of the running mean."""
    wishart = torch.randn(200, 220, generator=seeded(3)).double()
    eigenvalues = torch.linalg.eigvalsh(wishart @ wishart.T / 220)
    trace, error, products = estimates(hutchinson, eigenvalues, 5000, 60, tolerance=0.01)
    assert 0.006 < rms(trace / float(eigenvalues.sum()) - 1) < 0.012
    assert (error <= 0.01 * np.abs(trace)).all()
    assert products.min() >= FEWEST_PROBES
    assert products.std() > 0


def test_a_trace_of_zero_is_not_believed_before_the_probes_are_spent():
    eigenvalues = torch.tensor([1.0, -1.0]).double().repeat(50)
    trace, error, products = estimates(hutchinson, eigenvalues, 200, 20, tolerance=0.05)
    assert (products > 100).mean() > 0.9
    assert (np.abs(trace) < 4 * error).all()
    _, error, products = estimates(hutchinson, eigenvalues, 200, 20, tolerance=0.05, absolute_tolerance=3.0)
    assert products.max() < 100
    assert (error <= 0.05 * 10 + 3).all()


def drawn(counts, make):
    """Vectors as they are drawn when their number grows."""
    return torch.cat([make(count) for count in counts], 1)


def on_the_sphere(count, size, generator):
    vectors = torch.randn(size, count, generator=generator, dtype=torch.float64)
    return vectors * math.sqrt(size) / vectors.norm(dim=0)


def slow_xtrace(a, omega):
    size, count = omega.shape
    y, terms = a @ omega, []
    for i in range(count):
        q = torch.linalg.qr(torch.cat([y[:, :i], y[:, i + 1 :]], 1))[0]
        w = omega[:, i] - q @ (q.T @ omega[:, i])
        terms.append((q.T @ a @ q).trace() + (size - count + 1) / (w @ w) * (w @ a @ w))
    return torch.stack(terms)


@pytest.mark.parametrize(("probes", "counts"), [(12, [6]), (24, [8, 4]), (30, [8, 4, 3])])
def test_xtrace_is_its_formula(probes, counts):
    a = matrix(torch.randn(SIZE, generator=seeded(4)).double() + 0.2)
    found = xtrace(lambda v: a @ v, SIZE, StoppingRule(probes=probes, tolerance=0.0), seeded(5))
    generator = seeded(5)
    terms = slow_xtrace(a, drawn(counts, lambda count: on_the_sphere(count, SIZE, generator)))
    assert found.trace == pytest.approx(float(terms.mean()), rel=1e-10)
    assert found.standard_error == pytest.approx(SHARED_SUBSPACE * standard_error_of_mean(terms), rel=1e-8)


@pytest.mark.parametrize(("probes", "counts"), [(12, [4]), (24, [5, 3]), (30, [5, 3, 2])])
def test_hutch_plus_plus_is_its_formula(probes, counts):
    a = matrix(0.95**INDEX)
    found = hutch_plus_plus(lambda v: a @ v, SIZE, StoppingRule(probes=probes, tolerance=0.0), seeded(6))
    generator = seeded(6)
    pairs = [[random_signs((SIZE, count), generator) for _ in range(2)] for count in counts]
    sketch, probe = (torch.cat(list(part), 1) for part in zip(*pairs, strict=True))
    q = torch.linalg.qr(a @ sketch)[0]
    rest = probe - q @ (q.T @ probe)
    terms = (rest * (a @ rest)).sum(0)
    assert found.trace == pytest.approx(float((q.T @ a @ q).trace() + terms.mean()), rel=1e-10)
    assert found.standard_error == pytest.approx(standard_error_of_mean(terms), rel=1e-8)


@pytest.mark.parametrize("method", [hutch_plus_plus, xtrace])
def test_matrices_of_low_rank_are_exact_and_of_zeros_zero(method):
    eigenvalues = torch.zeros(SIZE).double()
    trace, error, _ = estimates(method, eigenvalues, 30, 2)
    assert (trace == 0).all()
    assert (error == 0).all()
    eigenvalues[:4] = torch.tensor([3.0, -1.0, 0.5, 0.1])
    trace, error, _ = estimates(method, eigenvalues, 30, 10)
    np.testing.assert_allclose(trace, 2.6, rtol=1e-9)
    assert (error < 1e-6).all()


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_small_matrices(method, size):
    h = torch.randn(size, size, generator=seeded(7)).double()
    h = h + h.T
    found = method(lambda v: h @ v, size, StoppingRule(probes=4000, tolerance=0.01), seeded(8))
    assert abs(found.trace - float(h.trace())) <= 4 * found.standard_error + 1e-12
    assert exact(lambda v: h @ v, size).trace == pytest.approx(float(h.trace()))


def test_as_many_products_as_are_counted_and_at_most_what_is_allowed():
    for method in ALL:
        for probes in (2, 3, 17, 40):
            seen = []
            a = matrix(INDEX**-1.0)
            product = lambda v, a=a, seen=seen: seen.append(v.shape[1]) or a @ v  # noqa: E731
            found = method(product, SIZE, StoppingRule(probes=probes, tolerance=0.0), seeded(0))
            assert found.products == sum(seen)
            assert probes < 6 or found.products <= probes


def test_quantiles_of_students_t():
    published = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 15: 2.131, 60: 2.000, 1000: 1.962}
    for freedom, quantile in published.items():
        assert standard_error_factor(freedom) * 1.959964 == pytest.approx(quantile, rel=5e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 1}, "probes must be a whole number of at least 2.*got 1"),
        ({"probes": 2.5}, "got 2.5"),
        ({"tolerance": -0.1}, "tolerance must be finite and at least 0, got -0.1"),
        ({"tolerance": math.nan}, "tolerance must be finite"),
        ({"absolute_tolerance": math.inf}, "absolute_tolerance must be finite"),
    ],
)
def test_wrong_rules_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StoppingRule(**settings)
