"""Traces of a symmetric matrix that is only known by its products with vectors: Hutchinson, Hutch++, XTrace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # (size, k) to (size, k): the matrix times k vectors

FEWEST_PROBES = 16  # a spread that is seen on fewer values says little
GROWTH = 1.5  # looks are few and far between: stopping at the first lucky look understates the error
NORMAL = 1.959964  # two-sided 95 % of the normal distribution
SKEWNESS = 1.1  # where few eigenvalues count, vᵀAv is skewed: 2 plain errors held the truth in 89 to 95 %, measured
SHARED_SUBSPACE = 1.2  # error of XTrace over the spread of its terms, a middle of what was measured


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """When a trace is known well enough: its standard error is at most tolerance · |trace| + absolute_tolerance.

    A standard error, and never the change of the running mean, which shrinks like 1/n whatever the spread: on a
    200-dimensional Wishart matrix that rule stopped after 14 probes, and on a matrix of zero trace on garbage.

    Args:
        probes: products with the matrix at most.
        tolerance: relative standard error that is asked for; 0 uses all probes.
        absolute_tolerance: added to it, in units of the trace; lets a trace near zero end.

    Raises:
        ValueError: if probes is below 2 or a tolerance is negative.

    Example:
        >>> rule = StoppingRule(probes=100, tolerance=0.1)
        >>> rule.met(5.0, 0.4), rule.met(5.0, 0.6)
        (True, False)
    """

    probes: int = 256
    tolerance: float = 0.05
    absolute_tolerance: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 2:
            raise ValueError(f"probes must be a whole number of at least 2, one has no spread, got {self.probes!r}")
        for name in ("tolerance", "absolute_tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)!r}")

    @property
    def takes_all(self) -> bool:
        """Whether all probes are to be taken, whatever the error."""
        return not self.tolerance and not self.absolute_tolerance

    def target(self, trace: float) -> float:
        """The standard error at which a trace is known well enough."""
        return self.tolerance * abs(trace) + self.absolute_tolerance

    def met(self, trace: float, standard_error: float) -> bool:
        """Whether a trace is known well enough. With both tolerances 0 no trace ever is."""
        return not self.takes_all and standard_error <= self.target(trace)


@dataclass(frozen=True)
class TraceEstimate:
    """A trace, its standard error (so that ±2 of it hold the truth 95 % of the time), and the products it took."""

    trace: float
    standard_error: float
    products: int


def hutchinson(product: Product, size: int, rule: StoppingRule, generator: torch.Generator) -> TraceEstimate:
    """Mean of vᵀAv over vectors v of random signs.

        Tr(A) ≈ 1/m Σ_i v_iᵀ A v_i,    Var(vᵀAv) = 2 (||A||_F² - Σ_i A_ii²)

    M.F. Hutchinson, 1990. Exact for a diagonal matrix. The error falls like 1/√m.

    Args:
        product: the matrix times the columns of a float64 (size, k).
        size: rows of the matrix.
        rule: how many probes at most, and when to stop.
        generator: of the probes.

    Example:
        >>> hutchinson(lambda vectors: 3 * vectors, 10, StoppingRule(), torch.Generator().manual_seed(0)).trace
        30.0
    """
    values = np.empty(0)
    wanted = min(FEWEST_PROBES, rule.probes)
    while True:
        vectors = random_signs((size, wanted - len(values)), generator)
        values = np.append(values, (vectors * product(vectors)).sum(0).numpy())
        trace, error = values.mean(), standard_error_of_mean(values)
        if rule.met(trace, error) or wanted == rule.probes:
            return TraceEstimate(float(trace), error, wanted)
        wanted = grown(wanted, rule.probes)


def hutch_plus_plus(product: Product, size: int, rule: StoppingRule, generator: torch.Generator) -> TraceEstimate:
    """The trace on a random subspace, exactly, and Hutchinson on what is left of the matrix.

        Q = orth(A S),  Tr(A) ≈ Tr(QᵀAQ) + 1/k Σ_i g_iᵀ (I - QQᵀ) A (I - QQᵀ) g_i,    S, G (size, k) of random signs

    R.A. Meyer, C. Musco, C. Musco, D.P. Woodruff: Hutch++ (from memory). A third of the products each for S, Q and G.
    For a positive semi-definite matrix the error falls like 1/m rather than 1/√m, and faster where the eigenvalues
    decay; the theory assumes semi-definite, the estimate is unbiased for any symmetric matrix. Products are kept when
    the subspace grows, so that nothing is done twice.

    Cost: memory of 3 k vectors, arithmetic O(size · k²). Arguments as for `hutchinson`. Matrices of up to twice as many
    rows as there are vectors are summed exactly.

    Example:
        >>> values = 0.5 ** torch.arange(100).double()
        >>> rule = StoppingRule(probes=60, tolerance=1e-4)
        >>> found = hutch_plus_plus(lambda v: values[:, None] * v, 100, rule, torch.Generator().manual_seed(0))
        >>> abs(found.trace - 2) < 1e-3, found.products < 60
        (True, True)
    """
    basis, probes, probed = _Basis(size), torch.empty(size, 0).double(), torch.empty(size, 0).double()
    products = min(FEWEST_PROBES, rule.probes)
    while True:
        wanted = max(2, products // 3)
        if 2 * wanted >= size:
            return exact(product, size)
        count = wanted - probes.shape[1]
        basis.extend(product, product(random_signs((size, count), generator)))
        fresh = random_signs((size, count), generator)
        probes, probed = torch.cat([probes, fresh], 1), torch.cat([probed, product(fresh)], 1)
        inside = basis.vectors.T @ probes
        values = (probes * probed).sum(0) - 2 * (inside * (basis.vectors.T @ probed)).sum(0)
        values += (inside * (basis.core @ inside)).sum(0)
        trace, error = float(basis.core.trace() + values.mean()), standard_error_of_mean(values)
        if rule.met(trace, error) or products == rule.probes:
            return TraceEstimate(trace, error, 3 * wanted)
        products = grown(products, rule.probes)


def xtrace(product: Product, size: int, rule: StoppingRule, generator: torch.Generator) -> TraceEstimate:
    """Hutch++ in which every vector serves as a probe of the subspace that all the others span.

        Y = A Ω;  Q_i = orth(Y without column i);  w_i = (I - Q_i Q_iᵀ) ω_i
        Tr(A) ≈ 1/k Σ_i [ Tr(Q_iᵀ A Q_i) + (n - k + 1)/||w_i||² · w_iᵀ A w_i ]

    E.N. Epperly, J.A. Tropp, R.J. Webber: XTrace (formulas from memory; the normalisation, vectors uniform on the
    sphere of radius √n and the factor that puts w_i on the sphere again, from third parties). One factorisation and
    rank-one changes of it, the matrix applied to Ω and to Q only.

    The spread of the k terms over √k understates the error, because they share most of their subspace: measured, the
    root mean square error was 1.0 to 1.5 times as large on five spectra. So Student's quantile for k - 1 degrees takes
    the normal one's place, and `SHARED_SUBSPACE` is multiplied on (our choice; without it 2 standard errors hold the
    truth in 80 to 90 %).

    Cost: memory of 3 k vectors for 2 k products, arithmetic O(size · k²). Arguments as for `hutchinson`. Matrices of up
    to twice as many rows as there are vectors are summed exactly.

    Example:
        >>> found = xtrace(lambda v: 3 * v, 50, StoppingRule(probes=20), torch.Generator().manual_seed(0))
        >>> round(found.trace, 9), found.products
        (150.0, 16)
    """
    basis, probes = _Basis(size), torch.empty(size, 0).double()
    products = min(FEWEST_PROBES, rule.probes)
    while True:
        wanted = max(2, products // 2)
        if 2 * wanted >= size:
            return exact(product, size)
        fresh = torch.randn(size, wanted - probes.shape[1], generator=generator, dtype=torch.float64)
        fresh *= math.sqrt(size) / fresh.norm(dim=0)
        basis.extend(product, product(fresh))
        probes = torch.cat([probes, fresh], 1)
        values = _exchangeable_terms(basis, probes)
        trace, error = float(values.mean()), SHARED_SUBSPACE * standard_error_of_mean(values)
        if rule.met(trace, error) or products == rule.probes:
            return TraceEstimate(trace, error, 2 * wanted)
        products = grown(products, rule.probes)


def exact(product: Product, size: int) -> TraceEstimate:
    """The sum of the diagonal, from as many products as the matrix has rows."""
    return TraceEstimate(float(product(torch.eye(size).double()).trace()), 0.0, size)


def random_signs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of +1 and -1."""
    return torch.empty(shape, dtype=dtype).random_(0, 2, generator=generator).mul_(2).sub_(1)


def seed_of(*parts: int) -> int:
    """A seed for each thing that needs one of its own."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def grown(probes: int, most: int) -> int:
    """The number of probes at the next look."""
    return min(most, math.ceil(GROWTH * probes))


def standard_error_of_mean(values: ArrayLike | Tensor) -> float:
    """Standard error of a mean of few values: ±2 of it are Student's 95 % interval, not the normal one's.

    std/√n times t(97.5 %, n - 1)/z(97.5 %), 1.09 for 16 values, 1.01 for 200, times `SKEWNESS` (our choice).

    Example:
        >>> round(standard_error_of_mean([1.0, 3.0] * 50), 4), standard_error_of_mean([2.0, 2.0])
        (0.1119, 0.0)
    """
    array = np.asarray(values, dtype=np.float64)
    return SKEWNESS * float(array.std(ddof=1) / math.sqrt(array.size)) * standard_error_factor(array.size - 1)


def standard_error_factor(freedom: int) -> float:
    """Student's 97.5 % quantile over the normal one: what a spread seen with few degrees of freedom is stretched by."""
    return _student(freedom) / NORMAL


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2 degrees, Fisher's expansion in 1/degrees (to .2 %) above."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))


class _Basis:
    """An orthonormal basis of the columns of Y = A Ω that grows: Y = vectors · factors, core = vectorsᵀ A vectors."""

    def __init__(self, size: int) -> None:
        self.vectors = torch.empty(size, 0).double()
        self.products = torch.empty(size, 0).double()
        self.factors = torch.empty(0, 0).double()

    @property
    def core(self) -> Tensor:
        """vectorsᵀ A vectors."""
        core: Tensor = self.vectors.T @ self.products
        return (core + core.T) / 2

    def extend(self, product: Product, columns: Tensor) -> None:
        """Add columns to Y. Gram-Schmidt against the old vectors is done twice: once loses their orthogonality."""
        old, count = self.vectors.shape[1], columns.shape[1]
        above = torch.zeros(old, count).double()
        rest, square = columns, torch.eye(count).double()
        for _ in range(2):
            inside = self.vectors.T @ rest
            above += inside @ square
            rest, factor = torch.linalg.qr(rest - self.vectors @ inside)
            square = factor @ square
        upper, lower = torch.cat([self.factors, above], 1), torch.cat([torch.zeros(count, old).double(), square], 1)
        self.factors = torch.cat([upper, lower])
        self.products = torch.cat([self.products, product(rest)], 1)
        self.vectors = torch.cat([self.vectors, rest], 1)


def _exchangeable_terms(basis: _Basis, probes: Tensor) -> Tensor:
    """(k,): the estimate of each probe, with the basis of the others.

    Q_i Q_iᵀ = Q (I - s sᵀ) Qᵀ, where s is column i of the inverse transpose of R, normalised.
    """
    size, count = probes.shape
    core, factors = basis.core, basis.factors.clone()
    largest = float(factors.abs().max())
    if largest == 0:  # a matrix of zeros
        return torch.zeros(count).double()
    diagonal = factors.diagonal()
    tiny = 1e-14 * largest  # a column in the span of the others: any direction that is left will do
    diagonal[diagonal.abs() < tiny] = tiny
    directions = torch.linalg.solve_triangular(factors, torch.eye(count).double(), upper=True).T
    directions = directions / directions.norm(dim=0)
    inside = basis.vectors.T @ probes
    kept = inside - directions * (directions * inside).sum(0)
    subspace = core.trace() - (directions * (core @ directions)).sum(0)
    curvature = (inside * basis.factors).sum(0) - 2 * (kept * basis.factors).sum(0) + (kept * (core @ kept)).sum(0)
    length = (size - kept.square().sum(0)).clamp_min(1e-12)
    terms: Tensor = subspace + (size - count + 1) / length * curvature
    return terms
