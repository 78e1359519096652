"""One of everything that mpq takes from other packages; the `pyproject.toml` beside this file registers it."""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpq.exported_layers import integer_refusal, taken_layers
from mpq.exporting import ExportTarget
from mpq.hardware_models import Target
from mpq.hardware_models.prices import Prices
from mpq.problem import InfeasibleError


@dataclass(frozen=True, kw_only=True)
class LargestError:
    """The largest error of a layer's weights, to a power: a method without data."""

    power: float = 2.0

    def __call__(self, measurement):
        from mpq.sensitivity import Scores  # imports torch, so only when the method runs
        from mpq.surgery import layer_parameters
        from mpq.weight_view import as_rows

        if measurement.granularity != "layer":
            raise ValueError(f"example-error scores whole layers, got granularity {measurement.granularity!r}")
        mean = measurement.empty()  # NaN where an option is no candidate
        for row, layer in enumerate(measurement.network.layers):
            weight = as_rows(layer_parameters(measurement.model, layer)[0].detach(), layer)
            for column, option in enumerate(measurement.options):
                if measurement.is_candidate(layer, option):
                    error = measurement.quantizer(weight, option.weight, layer) - weight
                    mean[row, column] = float(error.abs().max()) ** self.power
        return Scores(mean, np.where(np.isnan(mean), np.nan, 0.0), "score")


@dataclass(frozen=True, kw_only=True)
class EveryPlan:
    """Looks at every plan there is."""

    limit: int = 1_000_000
    exact: ClassVar[bool] = True

    def solve(self, problem):
        layers, options = problem.objective.shape
        if options**layers > self.limit:
            raise ValueError(f"example-every looks at {self.limit:,} plans at most, use solver='auto'")
        if plans := self._feasible(problem):
            return problem.allocation(min(plans, key=lambda plan: problem.evaluate(plan)[0]), status="optimal")
        budgets = {**problem.budgets, **problem.peak_budgets}
        reachable = {name: self._least(problem, name) for name in budgets}
        told = "; ".join(f"{name} {reachable[name]:.9g} (budget {budgets[name]:.9g})" for name in budgets)
        raise InfeasibleError(
            f"no plan keeps the budgets. The smallest that can be reached: {told}", reachable, budgets
        )

    def _feasible(self, problem):
        layers, options = problem.objective.shape
        return [plan for plan in itertools.product(range(options), repeat=layers) if problem.is_feasible(plan)]

    def _least(self, problem, name):
        """The least of one budget, with the others in force where that can be."""
        others = {key: value for key, value in problem.budgets.items() if key != name}
        peaks = {key: value for key, value in problem.peak_budgets.items() if key != name}
        for kept, kept_peaks in ((others, peaks), ({}, {})):
            relaxed = replace(problem, budgets=kept, peak_budgets=kept_peaks)
            if plans := self._feasible(relaxed):
                return min(relaxed.evaluate(plan)[1][name] for plan in plans)
        return np.inf


@dataclass(frozen=True)
class BitSerial:
    """A cost model: multiply-adds take the product of both operands' bits, at so many bit operations a second."""

    rate: float
    limits: ClassVar[dict[str, float]] = {}

    def price(self, cells, so_far):
        operations = np.outer(cells.work.macs, cells.weight_bits * cells.activation_bits)
        return Prices(tables={"latency": operations / self.rate}, measures={"latency": "s"})

    def describe(self):
        return [f"{self.rate:g} bit operations a second"]


def example_chip():
    """A device; one of known numbers is better a file `example-chip.toml`, in which each has its source."""
    return Target(name="example-chip", kind="asic", runtime="bit-serial, 1e12 a second", models=(BitSerial(1e12),))


def to_lines(plan):
    """The plan as a line a layer: its name and its option."""
    return {layer.name: str(option) for layer, option in taken_layers(plan, "example-lines", refused)}


def refused(layer, option):
    """Why the library cannot hold an option of a layer; None if it can."""
    if option.activation is not None:
        return "it leaves inputs alone"
    return integer_refusal(layer, option, (4, 8), "weights in int4 and int8, a scale a channel or a group")


LINES = ExportTarget(
    emit=to_lines,
    refused=refused,
    text=lambda exported: "".join(f"{name} {option}\n" for name, option in exported.items()),
)
