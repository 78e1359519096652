"""Objective and usage of many plans at once, from their choices: sums that carry their rounding along."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray
from mpq.problem import BUDGET_TOLERANCE, AllocationProblem

from .labels import ChoiceArray

Blocks = Mapping[tuple[int, int], FloatArray]
Chosen = IntArray | ChoiceArray  # (layers, plans)


class Totals(NamedTuple):
    """One sum a plan, (plans,), and how much sums of the same numbers may differ by where they cancel out."""

    total: FloatArray
    noise: float


def objectives(problem: AllocationProblem, chosen: Chosen) -> Totals:
    """Objective of every plan, for sums and p-norms; equal to that of `AllocationProblem.evaluate` to 1e-12."""
    table = np.where(problem.allowed, problem.objective, 0.0)
    if problem.norm == 1:
        return _sum(chosen, table, problem.pairs, 0.0)
    largest = np.zeros(chosen.shape[1])
    for row, picked in zip(table, chosen, strict=True):
        np.maximum(largest, row[picked], out=largest)
    total, scale = np.zeros_like(largest), np.where(largest > 0, largest, 1.0)
    for row, picked in zip(table, chosen, strict=True):
        total += (row[picked] / scale) ** problem.norm
    return Totals(largest * total ** (1 / float(problem.norm)), 0.0)


def usages(problem: AllocationProblem, name: str, chosen: Chosen) -> Totals:
    """Usage of one resource by every plan."""
    table = np.where(problem.allowed, problem.resources[name], 0.0)
    return _sum(chosen, table, problem.transitions.get(name, {}), problem.offsets.get(name, 0.0))


def within(problem: AllocationProblem, chosen: Chosen) -> BoolArray:
    """``(plans,)``: whether every budget holds, to the promised 1e-9 of it."""
    fits = np.ones(chosen.shape[1], dtype=bool)
    for name, budget in problem.budgets.items():
        fits &= usages(problem, name, chosen).total - budget <= BUDGET_TOLERANCE * abs(budget)
    return fits


def _sum(chosen: Chosen, table: FloatArray, blocks: Blocks, start: float) -> Totals:
    """Start + table + blocks at the choices; where numbers can cancel out, the rounding is summed up beside.

    The error of every addition is known exactly (Knuth's two-sum), and their sum is added in the end.
    """
    is_signed = start < 0 or bool((table < 0).any()) or any(bool((block < 0).any()) for block in blocks.values())
    total, error = np.full(chosen.shape[1], start), np.zeros(chosen.shape[1])
    for term in _terms(chosen, table, blocks):
        new = total + term
        if is_signed:
            back = new - total
            error += (total - (new - back)) + (term - back)
        total = new
    size = float(np.abs(table).max(1).sum()) + abs(start)
    return Totals(total + error, 1e-15 * size if is_signed else 0.0)


def _terms(chosen: Chosen, table: FloatArray, blocks: Blocks) -> Iterable[FloatArray]:
    for row, picked in zip(table, chosen, strict=True):
        yield row[picked]
    for (first, second), block in blocks.items():
        yield block[chosen[first], chosen[second]]
