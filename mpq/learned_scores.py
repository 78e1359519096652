"""What measured plans teach about a table: scores with a prior around them, and tables drawn from what is left open."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpq.arrays import FloatArray, IntArray
from mpq.problem import AllocationProblem

PRIORS = (0.1, 0.2, 0.5, 1.0, 2.0)  # standard deviation of a score around the table's, relative to it
MISFITS = (0.02, 0.05, 0.1, 0.2)  # what no sum of scores explains, relative to the measured value
# Shares of a score's variance: common to units that are alike, to all options of a unit, and of the score alone.
SHARES = ((0.0, 0.0, 1.0), (0.0, 0.9, 0.1), (0.6, 0.3, 0.1))
KNOTS = 4  # of the factor that changes slowly from the first unit to the last
MOST = 300  # plans that are learned from, the best ones
Shares = tuple[float, float, float]
_FLOOR = 0.02  # of a plan's mean score: no score is known better than that
_LEAST_EXPLORED = 0.2  # of the table's scaled score


@dataclass(frozen=True, eq=False)
class LearnedScores:
    """A Gaussian posterior of the scores (units, options), given measured plans.

    Model, for a plan with the options c, measured y:

        y = a + Σ_i θ[i, c_i] + e,   θ[i, o] = k s[i, o] + d[i, o] (√α Σ_f G[i, f] t_f + √β u_i + √γ v_io)
        d[i, o]² = (ρ k s[i, o])² + (k se[i, o])² + floor²,   a ~ N(0, y_best²),   e ~ N(0, (η y)² + se(y)²)

    with t, u, v ~ N(0, 1), the table's scores s, their standard errors se and the scale k that fits best. What a table
    gets wrong is wrong alike for all options of a unit (u), for units of the same kind and for neighbours (t): G has a
    column a kind and some that change slowly from the first unit to the last (`alike`). ρ, η and the shares α, β, γ are
    those of the largest evidence. Since the misfit grows with y, good plans count more than bad ones.

    A draw of θ is a table to be solved: where little is known the draws differ, and what they choose is worth measuring
    (Thompson 1933). Draws follow Matheron's rule: a draw of the prior is corrected by what it predicts wrongly for the
    measured plans (Wilson et al. 2020, from memory), so only a system of the size of the plans is solved.

    Args:
        scores: (units, options) of the table; 0 where not allowed.
        errors: (units, options), 0 where unknown.
        factors: (units, factors), G; none by default.

    Cost: O(plans² × units + plans³) to learn, O(plans² + units × options) a draw.

    Example:
        Plans with the second layer in its first option measured twice as bad as the table says:

        >>> known = LearnedScores(np.array([[1.0, 0.5], [1.0, 0.5]]), np.zeros((2, 2)))
        >>> plans = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> found = known.learned(plans, np.array([3.0, 1.5, 2.5, 1.0]), np.full(4, 0.01)).expected
        >>> bool(found[1, 0] - found[1, 1] > 1.2 > 0.8 > found[0, 0] - found[0, 1])
        True
    """

    scores: FloatArray
    errors: FloatArray
    factors: FloatArray | None = None

    @classmethod
    def of(cls, problem: AllocationProblem) -> LearnedScores:
        """The scores of a problem and their errors."""
        errors = np.zeros(problem.objective.shape) if problem.objective_se is None else problem.objective_se
        allowed = problem.allowed
        scores = np.where(allowed, problem.objective, 0.0)
        return cls(scores, np.where(allowed, errors, 0.0), alike(problem.layers or [""] * len(scores)))

    def learned(self, plans: Sequence[IntArray], values: FloatArray, errors: FloatArray) -> Posterior:
        """The posterior after measuring plans, (plans,) values and their standard errors.

        Raises:
            ValueError: if there is no plan.
        """
        if not len(plans):
            raise ValueError("plans must hold at least one measured plan, got none")
        order = np.argsort(values, kind="stable")[:MOST]
        chosen = np.array([plans[position] for position in order], dtype=np.int64)
        y, noise = np.asarray(values)[order], np.asarray(errors)[order]
        rows = np.arange(chosen.shape[1])
        predicted = self.scores[rows, chosen].sum(1)
        usable = (predicted > 0) & (y > 0)
        scale = float(np.median(y[usable] / predicted[usable])) if usable.any() else 1.0
        mean = scale * self.scores
        level = float(np.abs(y).min()) + 1e-30
        residual, size = y - mean[rows, chosen].sum(1), np.maximum(np.abs(y), level)
        factors = np.zeros((len(rows), 0)) if self.factors is None else self.factors
        best = (-np.inf, mean, SHARES[0], np.eye(len(y)), size)
        for prior in PRIORS:
            spread = self._spread(mean, prior, scale)
            parts = _covariances(chosen, spread[rows, chosen], factors)
            for shares, misfit in itertools.product(SHARES, MISFITS):
                common = level**2 + np.tensordot(shares, parts, 1)
                sure = (misfit * size) ** 2 + noise**2
                covariance = common + np.diag(sure + 1e-9 * np.diag(common))
                evidence = _evidence(covariance, residual)
                if evidence > best[0]:
                    best = (evidence, spread, shares, covariance, np.sqrt(sure))
        evidence, spread, shares, covariance, noise = best
        inverse: FloatArray = np.asarray(np.linalg.inv(covariance), dtype=np.float64)
        return Posterior(
            mean=mean,
            spread=spread,
            shares=shares,
            factors=factors,
            plans=chosen,
            values=y,
            noise=noise,
            inverse=inverse,
            level=level,
            evidence=evidence,
        )

    def _spread(self, mean: FloatArray, prior: float, scale: float) -> FloatArray:
        """(units, options): prior standard deviation of each score."""
        floor = _FLOOR * float(np.median(np.abs(mean).max(1)))
        return np.asarray(np.sqrt((prior * mean) ** 2 + (scale * self.errors) ** 2 + floor**2))


def alike(names: Sequence[str]) -> FloatArray:
    """(units, factors): which units have factors in common; rows have length 1.

    Units whose names differ in numbers alone are of one kind, a column each; the others are hat functions over the
    order of the units.

    Example:
        >>> alike(["0.up", "0.down", "1.up", "1.down", "head"]).round(2)[:, :2].tolist()
        [[0.0, 0.71], [0.71, 0.0], [0.0, 0.71], [0.71, 0.0], [0.0, 0.0]]
    """
    which = np.unique([re.sub(r"\d+", "#", name) for name in names], return_inverse=True)[1]
    kind = (which[:, None] == np.flatnonzero(np.bincount(which) > 1)).astype(np.float64)
    place = np.linspace(0, KNOTS - 1, len(names))[:, None]
    hats = np.maximum(0.0, 1 - np.abs(place - np.arange(KNOTS)))
    found = np.hstack([kind, hats / np.linalg.norm(hats, axis=1, keepdims=True)])
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), dtype=np.float64)


def _covariances(plans: IntArray, deviations: FloatArray, factors: FloatArray) -> FloatArray:
    """(3, plans, plans): prior covariances of what two plans' scores add up to, from the (plans, units) deviations.

    If the deviations are those of factors, of units, of scores alone: the last are common to equal options only.
    """
    common = deviations @ factors
    alone = np.empty((len(plans), len(plans)))
    for first, plan in enumerate(plans):
        alone[first] = ((plans == plan) * deviations).dot(deviations[first])
    return np.stack([common @ common.T, deviations @ deviations.T, alone])


def _evidence(covariance: FloatArray, residual: FloatArray) -> float:
    """Log probability of what the prior leaves over, but for a constant."""
    factor = np.linalg.cholesky(covariance)
    fit = float(residual @ np.linalg.solve(covariance, residual))
    return -0.5 * fit - float(np.log(np.diag(factor)).sum())


@dataclass(frozen=True, eq=False, kw_only=True)
class Posterior:
    """What is known of the scores; made by `LearnedScores.learned`."""

    mean: FloatArray
    spread: FloatArray
    shares: Shares
    factors: FloatArray
    plans: IntArray
    values: FloatArray
    noise: FloatArray
    inverse: FloatArray
    level: float
    evidence: float

    def drawn(self, rng: np.random.Generator) -> FloatArray:
        """(units, options): scores as likely as any other given the measured plans."""
        kinds, units, own = np.sqrt(self.shares)
        deviation = own * rng.standard_normal(self.mean.shape) + units * rng.standard_normal((len(self.mean), 1))
        deviation += kinds * (self.factors @ rng.standard_normal((self.factors.shape[1], 1)))
        scores = self.mean + self.spread * deviation
        constant = self.level * rng.standard_normal()
        return self._corrected(scores, constant, self.noise * rng.standard_normal(len(self.values)))

    def explored(self, rng: np.random.Generator) -> FloatArray:
        """(units, options): a draw, but no score below a fifth of the table's: what looks free is chosen everywhere."""
        draw = self.drawn(rng)
        return np.where(self.mean > 0, np.maximum(draw, _LEAST_EXPLORED * self.mean), draw)

    @property
    def expected(self) -> FloatArray:
        """(units, options): the mean of the draws."""
        return self._corrected(self.mean, 0.0, np.zeros(len(self.values)))

    def _corrected(self, scores: FloatArray, constant: float, noise: FloatArray) -> FloatArray:
        rows = np.arange(self.plans.shape[1])
        wrong = self.values - constant - scores[rows, self.plans].sum(1) - noise
        weights = self.inverse @ wrong
        own = np.zeros(self.mean.shape)  # Σ of the weights of the plans that take an option, times its deviation
        np.add.at(own, (np.broadcast_to(rows, self.plans.shape), self.plans), weights[:, None])
        own *= self.spread
        common = own.sum(1, keepdims=True)
        kinds, units, alone = self.shares
        shift = alone * own + units * common + kinds * (self.factors @ (self.factors.T @ common))
        return np.asarray(scores + self.spread * shift, dtype=np.float64)

    def __repr__(self) -> str:
        size = math.prod(self.mean.shape)
        return f"Posterior({size} scores from {len(self.values)} plans, log evidence {self.evidence:.4g})"
