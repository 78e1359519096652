"""The conformance tests are strong: each kind's catch plug-ins with a seeded fault, by the test that is meant to."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from mpq import hardware_models
from mpq.conformance import expect, in_another_process
from mpq.device_conformance import DeviceConformance
from mpq.estimator_conformance import EstimatorConformance
from mpq.exporter_conformance import ExporterConformance
from mpq.exporting import ExportTarget
from mpq.formats import Integer
from mpq.options import Option
from mpq.problem import InfeasibleError, Proof
from mpq.sensitivity import Scores, WeightError
from mpq.solver_conformance import SolverConformance
from mpq.solvers import ExhaustiveSolver
from mpq.surgery import layer_parameters


def promises_of(conformance) -> list[str]:
    return [name for name in dir(conformance) if name.startswith("test_")]


def passes(conformance, subject) -> None:
    """Run every test."""
    names = promises_of(conformance)
    assert len(names) > 5
    for name in names:
        getattr(conformance, name)(subject)


def catches(conformance, subject, name: str) -> None:
    """Run the test that must fail."""
    with pytest.raises((AssertionError, ValueError)):
        getattr(conformance, f"test_{name}")(subject)


def test_expect_tells_the_promise():
    expect(1, "never told")
    with pytest.raises(AssertionError, match="not kept: sums add up"):
        expect([], "sums add up")


def test_another_process_hashes_in_another_way():
    assert in_another_process(os.getpid) != os.getpid()
    assert in_another_process(os.getpid) == in_another_process(os.getpid)
    assert in_another_process(os.getenv, "PYTHONHASHSEED") == "7"


# -- solvers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faulty:
    """The exhaustive solver with a fault."""

    fault: str
    exact = False

    def solve(self, problem):
        return getattr(self, self.fault)(problem)

    def rounds_costs(self, problem):
        rounded = {name: np.floor(table) for name, table in problem.resources.items()}
        found = ExhaustiveSolver().solve(replace(problem, resources=rounded))
        return problem.allocation(found.choices, status="heuristic")

    def ignores_ties(self, problem):
        found = ExhaustiveSolver().solve(replace(problem, ties=[]))
        return problem.allocation(found.choices, status="heuristic")

    def says_optimal(self, problem):
        found = ExhaustiveSolver().solve(replace(problem, objective=np.floor(problem.objective)))
        return problem.allocation(found.choices, status="optimal")

    def bounds_too_high(self, problem):
        found = ExhaustiveSolver().solve(problem)
        return replace(found, proof=Proof("heuristic", found.objective + 0.1 * abs(found.objective) + 1e-6, 0.0))

    def misses_exact_fits(self, problem):
        tighter = {name: budget - 1e-3 * abs(budget) for name, budget in problem.budgets.items()}
        try:
            found = ExhaustiveSolver().solve(replace(problem, budgets=tighter))
        except InfeasibleError as error:
            raise InfeasibleError(str(error), error.reachable, problem.budgets) from None
        return problem.allocation(found.choices, status="heuristic")

    def has_absolute_tolerance(self, problem):
        flat = np.where(np.isfinite(problem.objective), np.round(problem.objective, 3), np.inf)
        found = ExhaustiveSolver().solve(replace(problem, objective=flat))
        return problem.allocation(found.choices, status="heuristic")

    def ignores_pairs(self, problem):
        found = ExhaustiveSolver().solve(replace(problem, pairs={}, transitions={}))
        return problem.allocation(found.choices, status="optimal")

    def goes_by_the_process(self, problem):
        try:
            return ExhaustiveSolver().solve(problem)
        except InfeasibleError as error:
            raise InfeasibleError(f"{error} ({hash('size')})", error.reachable, error.budgets) from None

    def returns_where_there_is_no_plan(self, problem):
        try:
            return ExhaustiveSolver().solve(problem)
        except InfeasibleError:
            return problem.allocation(np.argmin(problem.objective, axis=1), status="heuristic")


class Remembering(ExhaustiveSolver):
    """Gives the second problem of a shape the answer to the first."""

    def solve(self, problem):
        found = super().solve(problem)
        before, SEEN[problem.objective.shape] = SEEN.get(problem.objective.shape, found.choices), found.choices
        return problem.allocation(before, status="heuristic")


SEEN: dict = {}


SOLVER_FAULTS = {
    "rounds_costs": "plans_are_feasible_bounds_are_bounds_and_exact_is_exact",
    "ignores_ties": "plans_are_feasible_bounds_are_bounds_and_exact_is_exact",
    "says_optimal": "plans_are_feasible_bounds_are_bounds_and_exact_is_exact",
    "bounds_too_high": "plans_are_feasible_bounds_are_bounds_and_exact_is_exact",
    "misses_exact_fits": "a_budget_that_is_just_met_is_met",
    "has_absolute_tolerance": "units_do_not_matter",
    "ignores_pairs": "what_it_does_not_take_it_refuses",
    "goes_by_the_process": "another_process_gives_the_same_answer",
    "returns_where_there_is_no_plan": "infeasible_in_words",
}


@pytest.fixture
def solver_promises():
    promises = SolverConformance()
    promises.seeds = range(16)
    return promises


def test_a_right_solver_passes(solver_promises):
    passes(solver_promises, ExhaustiveSolver())


@pytest.mark.parametrize("fault", SOLVER_FAULTS)
def test_faults_of_solvers_are_caught(solver_promises, fault):
    catches(solver_promises, Faulty(fault), SOLVER_FAULTS[fault])


def test_a_solver_that_remembers_is_caught(solver_promises):
    SEEN.clear()
    catches(solver_promises, Remembering(), "solving_again_gives_the_same_answer")


# -- estimators --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaultyMethod:
    """The weight error with a fault."""

    fault: str

    def __call__(self, measurement):
        scores = WeightError()(measurement)
        return getattr(self, self.fault)(measurement, scores)

    def transposes(self, measurement, scores):
        return Scores(scores.mean.T, scores.standard_error.T, "score")

    def scores_everything(self, measurement, scores):
        return Scores(np.nan_to_num(scores.mean), np.nan_to_num(scores.standard_error), "score")

    def is_not_finite(self, measurement, scores):
        return Scores(np.log(scores.mean), scores.standard_error, "score")

    def draws(self, measurement, scores):
        return Scores(scores.mean * (1 + 0.01 * torch.rand(1).item()), scores.standard_error, "score")

    def leaves_a_weight_changed(self, measurement, scores):
        weight = layer_parameters(measurement.model, measurement.network.layers[0])[0]
        with torch.no_grad():
            weight.mul_(1.0001)
        return scores

    def leaves_a_hook(self, measurement, scores):
        next(measurement.model.modules()).register_forward_hook(lambda *_: None)
        return scores

    def unfreezes(self, measurement, scores):
        for parameter in measurement.model.parameters():
            parameter.requires_grad_(True)
        return scores

    def is_better_with_fewer_bits(self, measurement, scores):
        return Scores(-scores.mean, scores.standard_error, "score")

    def counts_bits(self, measurement, scores):
        bits = np.array([32 / option.weight.bits for option in measurement.options])
        return Scores(np.where(np.isnan(scores.mean), np.nan, bits), scores.standard_error, "score")

    def has_negative_errors(self, measurement, scores):
        return Scores(scores.mean, scores.standard_error - 0.1, "score")

    def goes_by_the_process(self, measurement, scores):
        return Scores(scores.mean * (1 + hash("layer") % 100), scores.standard_error, "score")


class Addressed:
    """A method whose settings no cache can tell."""

    def __call__(self, measurement):
        return WeightError()(measurement)


METHOD_FAULTS = {
    "transposes": "candidates_have_finite_scores_and_the_others_none",
    "scores_everything": "candidates_have_finite_scores_and_the_others_none",
    "is_not_finite": "candidates_have_finite_scores_and_the_others_none",
    "draws": "the_same_whatever_was_drawn_before",
    "leaves_a_weight_changed": "candidates_have_finite_scores_and_the_others_none",
    "leaves_a_hook": "candidates_have_finite_scores_and_the_others_none",
    "unfreezes": "a_model_in_training_with_gradients_and_hooks_comes_back",
    "is_better_with_fewer_bits": "full_precision_costs_nothing_and_two_bits_more_than_eight",
    "counts_bits": "weights_that_a_format_holds_lose_nothing",
    "has_negative_errors": "candidates_have_finite_scores_and_the_others_none",
    "goes_by_the_process": "another_process_gives_the_same_scores",
}


def test_a_right_method_passes():
    passes(EstimatorConformance(), WeightError())


@pytest.mark.parametrize("fault", METHOD_FAULTS)
def test_faults_of_methods_are_caught(fault):
    catches(EstimatorConformance(), FaultyMethod(fault), METHOD_FAULTS[fault])


def test_a_method_without_a_repr_is_caught():
    catches(EstimatorConformance(), Addressed(), "settings_are_a_value_that_a_cache_can_tell")


# -- devices -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaultyDevice:
    """A device with a fault."""

    fault: str

    def costs(self, network, space, batch=1, phase=None, context=None, *, bops="hawq"):
        frame = hardware_models.load("gap8").costs(network, space, batch, phase, context, bops=bops)
        changed = frame.copy()
        changed.attrs = dict(frame.attrs)
        getattr(self, self.fault)(changed, network, batch)
        return changed

    def forgets_a_reason(self, frame, network, batch):
        frame.attrs["refused"] = dict(list(frame.attrs["refused"].items())[1:])

    def forgets_a_unit(self, frame, network, batch):
        frame.attrs["measures"] = {name: unit for name, unit in frame.attrs["measures"].items() if name != "latency"}

    def is_negative(self, frame, network, batch):
        frame["latency"] -= 1.0

    def forgets_scales(self, frame, network, batch):
        frame["size"] = frame["value_size"]

    def sorts_rows(self, frame, network, batch):
        frame.index = frame.index[::-1]

    def shares_a_batch(self, frame, network, batch):
        frame["latency"] /= batch**2

    def divides_by_the_layers(self, frame, network, batch):
        frame["latency"] /= len(network.layers)

    def measures_the_time(self, frame, network, batch):
        frame["latency"] += time.perf_counter()

    def has_no_whole(self, frame, network, batch):
        frame.attrs["reference"] = {**frame.attrs["reference"], "size": 0.0}

    def prices_every_option(self, frame, network, batch):
        frame.fillna(1.0, inplace=True)


DEVICE_FAULTS = {
    "forgets_a_reason": "a_price_is_finite_or_refused_with_a_reason",
    "forgets_a_unit": "every_layer_and_option_has_a_row",
    "is_negative": "a_price_is_finite_or_refused_with_a_reason",
    "forgets_scales": "sizes_are_those_that_are_stored",
    "sorts_rows": "every_layer_and_option_has_a_row",
    "shares_a_batch": "more_work_never_takes_less",
    "divides_by_the_layers": "layers_are_priced_one_by_one",
    "measures_the_time": "the_same_again_and_options_do_not_disturb_one_another",
    "has_no_whole": "limits_offsets_and_references_are_amounts",
    "prices_every_option": "what_is_no_candidate_has_no_price",
}


@pytest.mark.parametrize("fault", DEVICE_FAULTS)
def test_faults_of_devices_are_caught(fault):
    catches(DeviceConformance(), FaultyDevice(fault), DEVICE_FAULTS[fault])


# -- export targets ----------------------------------------------------------------------------------------------------


def refused(layer, option):
    if isinstance(option.weight, Integer) and option.activation is None:
        return None
    return f"{layer.name} cannot hold {option}: integers only"


def emit(plan):
    for entry in plan.entries:
        if (
            reason := refused(entry.layer, entry.choice)
            if hasattr(entry.choice, "weight")
            else f"split {entry.layer.name}"
        ):
            raise ValueError(reason)
    return {entry.layer.name: str(entry.choice) for entry in plan.entries}


def rounded(model, plan):
    from mpq.fake_quantize import fake_quantize

    for entry in plan.entries:
        weight = model.get_parameter(entry.layer.weight_name)
        weight.data = fake_quantize(weight.data, entry.choice.weight)


def leaves_the_model(model, plan):
    pass


def rounds_to_eight_bits(model, plan):
    rounded(model, replace(plan, entries=tuple(replace(e, choice=Option("int8")) for e in plan.entries)))


def rounds_every_layer(model, plan):
    for name in ("0.weight", "1.weight"):
        model.get_parameter(name).data = model.get_parameter(name).data.bfloat16().float()


RIGHT = ExportTarget(emit=emit, refused=refused, apply=rounded)
EXPORT_FAULTS = {
    "emits less than it says": (
        replace(RIGHT, refused=lambda layer, option: None),
        "what_is_not_refused_is_exported_and_what_is_refused_is_an_error",
    ),
    "emits what it refuses": (
        replace(RIGHT, emit=lambda plan: {entry.layer.name: str(entry.choice) for entry in plan.entries}),
        "what_is_not_refused_is_exported_and_what_is_refused_is_an_error",
    ),
    "forgets a layer": (
        replace(RIGHT, emit=lambda plan: dict([*emit(plan).items()][:1])),
        "every_layer_gets_its_own_option",
    ),
    "forgets the names": (
        replace(RIGHT, emit=lambda plan: {"options": sorted(emit(plan).values())}),
        "every_layer_gets_its_own_option",
    ),
    "forgets the scales": (
        replace(RIGHT, emit=lambda plan: {name: option.partition("@")[0] for name, option in emit(plan).items()}),
        "every_layer_gets_its_own_option",
    ),
    "emits tensors": (
        replace(RIGHT, emit=lambda plan: {name: torch.ones(1) for name in emit(plan)}, text=str),
        "exports_are_plain_data_and_text",
    ),
    "emits the time": (
        replace(RIGHT, emit=lambda plan: {**emit(plan), "at": time.perf_counter_ns()}),
        "exports_are_plain_data_and_text",
    ),
    "holds nothing": (
        replace(RIGHT, refused=lambda layer, option: "no"),
        "it_holds_some_formats_and_says_why_not_the_others",
    ),
    "applies nothing": (replace(RIGHT, apply=leaves_the_model), "what_it_applies_is_what_was_planned"),
    "applies other bits": (replace(RIGHT, apply=rounds_to_eight_bits), "what_it_applies_is_what_was_planned"),
    "applies to all": (replace(RIGHT, apply=rounds_every_layer), "what_it_applies_is_what_was_planned"),
}


def test_a_right_target_passes():
    passes(ExporterConformance(), RIGHT)


@pytest.mark.parametrize("fault", EXPORT_FAULTS)
def test_faults_of_targets_are_caught(fault):
    target, test = EXPORT_FAULTS[fault]
    catches(ExporterConformance(), target, test)
