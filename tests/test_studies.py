"""Evolution over measured plans: budgets, storage, many workers, deaths, and what a trial leaves on the storage."""

import os
import signal
import subprocess
import sys
import time
from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from small_models import cnn, images
from study_worker import Stand, small_table

import mpq
from mpq.evaluator import Evaluator
from mpq.evolution import evolve
from mpq.problem import InfeasibleError
from mpq.solvers import pareto_frontier
from mpq.solvers.hypervolume import hypervolume
from mpq.studies import SharedStudy, open_study, pack, quiet, unpack
from mpq.tables import CostTable

WORKER = Path(__file__).with_name("study_worker.py")
SIZES = {"journal": "study.log", "sqlite": "sqlite:///{}/study.db"}


def storage_at(folder, kind):
    """A path or URL in a folder."""
    return None if kind == "memory" else SIZES[kind].format(folder) if kind == "sqlite" else folder / SIZES[kind]


def exact_front(table, resource="size"):
    """By enumeration of the table, which `Stand` without interactions measures."""
    return pareto_frontier(table.problem({}), resource)


def trials_at(path):
    """What is on a journal: states and plans of the trials that have one."""
    study = optuna.load_study(study_name="mpq", storage=JournalStorage(JournalFileBackend(str(path))))
    found = [(trial.state.name, trial.user_attrs.get("plan")) for trial in study.trials]
    return [(state, unpack(plan[0])) for state, plan in found if plan]


# -- one worker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_the_front_of_a_small_table_is_found(sampler):
    stand = Stand(small_table(layers=4))  # 81 plans
    front = evolve(stand, ["size"], sampler=sampler, evaluations=60, population=12)
    exact = exact_front(stand.table)
    assert len(stand.plans) == len(set(stand.plans)) == 60
    assert front.resource.tolist() == pytest.approx(exact.resource.tolist())
    assert front.objective.tolist() == pytest.approx(exact.objective.tolist())


@pytest.mark.parametrize("sampler", ["tpe", optuna.samplers.RandomSampler(seed=1)])
def test_samplers_that_model_every_gene(sampler):
    stand = Stand(small_table(), interaction=1.0)
    budgets = {"size": "70%"}
    front = evolve(stand, ["size"], budgets, sampler=sampler, evaluations=24, seeds=[[0] * 6, [1] * 6])
    assert len(stand.plans) == len(set(stand.plans)) == 24
    assert all(stand.table.problem(budgets).is_feasible(plan) for plan in stand.plans)
    assert front.provenance["method"] in {"TPESampler", "RandomSampler"}
    assert stand.plans[0] == (0,) * 6


def test_every_plan_measured_keeps_budgets_ties_and_pins():
    table = small_table(layers=8, options=4)
    table = CostTable(units=table.units, options=table.options, quantities=table.quantities, ties=[(0, 3), (5, 6)])
    stand = Stand(table, interaction=2.0)
    budgets = {"size": "60%", "latency": "70%"}
    front = evolve(stand, ["size", "latency"], budgets, pins={"layer1": "int8"}, evaluations=80, population=12)
    problem = table.problem(budgets)
    assert len(stand.plans) == 80
    assert all(problem.is_feasible(plan) for plan in stand.plans)
    assert all(plan[0] == plan[3] and plan[5] == plan[6] and plan[1] == 3 for plan in stand.plans)
    assert front.names == ("size", "latency")
    assert front.resource.shape == (len(front), 2)


def test_the_front_says_what_was_measured():
    stand = Stand(small_table(), interaction=1.0)
    front = evolve(stand, ["size"], evaluations=40, population=12)
    for point in front:
        assert point.objective == pytest.approx(stand.loss(point.choices.astype(int)))
        assert tuple(point.choices.tolist()) in stand.plans
    assert front.is_measured
    assert front.standard_error.tolist() == [0.01] * len(front)
    assert front.provenance["plans"] == 40
    assert set(front.provenance["origins"]) <= {"seed", "random", "child"}
    found = front.allocation(at=float(front.resource[2]))
    assert found.objective == front.objective[2]
    assert found.proof.status == "heuristic"
    assert str(front).endswith("measured)")


def test_seeds_come_first_and_are_worth_it():
    table = small_table(layers=30, options=5)
    seeded, blind = Stand(table, interaction=0.3), Stand(table, interaction=0.3)
    first = evolve(seeded, ["size"], evaluations=120, population=20)
    second = evolve(blind, ["size"], evaluations=120, population=20, seeds=[])
    uniform = {(option,) * 30 for option in range(5)}
    assert uniform <= set(seeded.plans[:10])
    exact = exact_front(table)
    points = {tuple(plan) for plan in exact.choices.astype(int).tolist()}
    assert len(points & set(seeded.plans[:60])) >= 50
    corner = [exact.resource.max() * 1.01, blind.loss(np.zeros(30, dtype=int)) * 1.01]
    volumes = [hypervolume(np.column_stack([front.resource, front.objective]), corner) for front in (first, second)]
    assert volumes[0] > 1.02 * volumes[1]


def test_seeds_of_the_caller_are_repaired():
    stand = Stand(small_table())
    budgets = {"size": "50%"}
    evolve(stand, ["size"], budgets, evaluations=3, seeds=[[2] * 6, [0] * 6])
    assert stand.plans[1] == (0,) * 6
    assert stand.table.problem(budgets).is_feasible(stand.plans[0])


def test_children_beat_random_plans():
    """Equal numbers of plans, no seeds: what breeding adds."""
    table = small_table(layers=30, options=5)
    stand = Stand(table, interaction=0.5)
    bred = evolve(stand, ["size"], evaluations=200, population=20, seeds=[])
    corner = [table.quantity("size").max(1).sum(), stand.loss(np.zeros(30, dtype=int))]
    breeding = np.column_stack([bred.resource, bred.objective])
    drawn = Stand(table, interaction=0.5)
    random = evolve(drawn, ["size"], evaluations=200, population=200, seeds=[])  # all of the first generation
    assert hypervolume(breeding, corner) > hypervolume(np.column_stack([random.resource, random.objective]), corner)


def test_more_plans_than_there_are_end_the_search():
    stand = Stand(small_table(layers=3))
    front = evolve(stand, ["size"], evaluations=500, population=6)
    assert len(stand.plans) == len(set(stand.plans)) <= 27
    assert front.resource.tolist() == pytest.approx(exact_front(stand.table).resource.tolist())


# -- the storage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_study_goes_on(kind, tmp_path):
    storage = storage_at(tmp_path, kind)
    first, second = Stand(small_table()), Stand(small_table())
    before = evolve(first, ["size"], storage=storage, evaluations=8, population=4)
    after = evolve(second, ["size"], storage=storage, evaluations=12, population=4)
    assert (len(first.plans), len(second.plans)) == (8, 4)
    assert not set(first.plans) & set(second.plans)
    assert after.provenance["plans"] == 12
    for point in before:
        assert ((after.resource <= point.resource) & (after.objective <= point.objective)).any()
    third = Stand(small_table())
    assert len(evolve(third, ["size"], storage=storage, evaluations=12, population=4)) == len(after)
    assert third.plans == []


def test_other_budgets_on_the_same_study(tmp_path):
    """Measurements stay good; the front is that of the plans that keep the budgets of the call."""
    storage, stand = tmp_path / "study.log", Stand(small_table())
    evolve(stand, ["size"], storage=storage, evaluations=30, population=12)
    budgets = {"size": "50%"}
    front = evolve(stand, ["size"], budgets, storage=storage, evaluations=50, population=12)
    problem = stand.table.problem(budgets)
    assert len(set(stand.plans)) == 50
    assert all(problem.is_feasible(plan) for plan in [*front.choices.astype(int), *stand.plans[30:]])
    for point in front:
        assert point.objective == pytest.approx(stand.loss(point.choices.astype(int)))


def test_a_study_of_another_problem_is_refused(tmp_path):
    storage = tmp_path / "study.log"
    evolve(Stand(small_table()), ["size"], storage=storage, evaluations=2)
    for stand, resources in (
        (Stand(small_table(seed=1)), ["size"]),
        (Stand(small_table()), ["latency"]),
        (Stand(small_table()), ["size", "latency"]),
    ):
        with pytest.raises(ValueError, match="study 'mpq' holds plans of another table.*another name"):
            evolve(stand, resources, storage=storage, evaluations=4)
    other = evolve(Stand(small_table(seed=1)), ["size"], storage=storage, study="other", evaluations=2)
    assert other.provenance["study"] == "other"


def test_a_study_of_other_weights_data_or_quantizers_is_refused(tmp_path):
    data, storage = images(2, 8), tmp_path / "study.log"
    table = mpq.measure(cnn(), data, ["int4", "int8"], sensitivity="weight_error", progress=False)
    evolve(Evaluator(cnn(), data, table), ["size"], storage=storage, evaluations=2)
    evolve(Evaluator(cnn(), data, table), ["size"], storage=storage, evaluations=3)
    other = cnn()
    with torch.no_grad():
        other.head.weight.mul_(2)
    gptq = mpq.gptq.GPTQ(hessians=mpq.gptq.input_hessians(cnn(), data, table.layers))

    class Own:
        def __call__(self, rows, fmt, layer):
            return rows * 0.99

    for storage_or_none in (None, tmp_path / "own.log"):  # one that only its address tells from others
        evolve(Evaluator(cnn(), data, table, quantizer=Own()), ["size"], storage=storage_or_none, evaluations=2)
    for evaluator in (
        Evaluator(other, data, table),
        Evaluator(cnn(), [(x + 1, y) for x, y in data], table),
        Evaluator(cnn(), data, table, quantizer=gptq),
    ):
        with pytest.raises(ValueError, match="study 'mpq' holds plans of another"):
            evolve(evaluator, ["size"], storage=storage, evaluations=4)


def test_records_a_trial_do_not_grow_with_the_layers(tmp_path):
    """A storage that many hosts share is asked five times a plan, and reads little."""
    lines = {}
    for layers in (4, 200):
        storage = tmp_path / f"{layers}.log"
        stand = Stand(small_table(layers=layers))
        evolve(stand, ["size"], storage=storage, evaluations=20, population=8, seeds=[])
        before, size = len(storage.read_text().splitlines()), storage.stat().st_size
        evolve(stand, ["size"], storage=storage, evaluations=50, population=8, seeds=[])
        lines[layers] = (len(storage.read_text().splitlines()) - before) / 30
        assert (storage.stat().st_size - size) / 30 < 1500
    assert lines[200] == pytest.approx(lines[4], abs=0.5)
    assert lines[200] < 6


def test_plans_are_packed_as_they_are():
    rng = np.random.default_rng(0)
    for options in (2, 200, 256, 1000):
        plan = rng.integers(0, options, 50)
        assert unpack(pack(plan)).tolist() == plan.tolist()
    assert len(pack(np.full(200, 255))) < 300


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_evaluator_whose_budget_is_spent_ends_the_search(tmp_path):
    class Exhausted(RuntimeError):
        pass

    class Limited(Stand):
        def measure(self, choices):
            if len(self.plans) == 15:
                raise Exhausted
            return super().measure(choices)

    stand = Limited(small_table())
    front = evolve(stand, ["size"], storage=tmp_path / "study.log", evaluations=40, population=12)
    assert front.provenance["plans"] == 15
    more = Stand(small_table())
    assert evolve(more, ["size"], storage=tmp_path / "study.log", evaluations=40).provenance["plans"] == 40
    assert len(more.plans) == 25
    spent = SimpleNamespace(table=stand.table, measure=None, left=0.0)
    with pytest.raises(ValueError, match="no plan was measured: give more evaluations"):
        evolve(spent, ["size"], evaluations=5)


def test_a_plan_that_was_interrupted_is_measured_by_the_next(tmp_path):
    class Failing(Stand):
        def measure(self, choices):
            if len(self.plans) == 7:
                self.failed = tuple(choices.tolist())
                raise KeyboardInterrupt
            return super().measure(choices)

    storage, stand, more = tmp_path / "study.log", Failing(small_table()), Stand(small_table())
    with pytest.raises(KeyboardInterrupt):
        evolve(stand, ["size"], storage=storage, evaluations=20, population=12)
    front = evolve(more, ["size"], storage=storage, evaluations=20, population=12)
    assert stand.failed in more.plans
    assert front.provenance["plans"] == 20
    assert len(more.plans) == 13


def test_plans_without_a_number_are_not_measured_again():
    class Diverging(Stand):
        def measure(self, choices):
            found = super().measure(choices)
            return SimpleNamespace(divergence=np.nan) if 0 in choices else found

    stand = Diverging(small_table(layers=4))
    front = evolve(stand, ["size"], evaluations=60, population=12)
    assert len(stand.plans) == len(set(stand.plans)) == 60
    assert (front.choices > 0).all()
    assert front.provenance["plans"] < 60
    assert front.standard_error is not None


def test_what_is_wrong_is_named():
    stand = Stand(small_table())
    for how, message in (
        ({"resources": ["sise"]}, "'sise'"),
        ({"resources": ["sensitivity"]}, "other than the objective"),
        ({"resources": []}, "one or more different quantities"),
        ({"resources": ["size", "size"]}, "one or more different quantities"),
        ({"sampler": "nsga"}, "there is no sampler 'nsga': did you mean 'nsga"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"storage": "no/such/folder/study.log"}, "the folder .* does not exist"),
        ({"storage": str(WORKER)}, "is a file, but no journal of studies"),
        ({"seeds": [[9] * len(stand.table.units)]}, "option indices below"),
        ({"seeds": [[0, 1]]}, "seeds must be"),
        ({"seeds": [[0.7] * len(stand.table.units)]}, "seeds must be"),
    ):
        with pytest.raises(ValueError, match=message):
            evolve(stand, **{"evaluations": 5, **how})
    with pytest.raises(TypeError, match="evaluator must measure plans.*got SmallCNN"):
        evolve(cnn())
    with pytest.raises(TypeError, match="sampler must be one of nsga2, nsga3, tpe or a sampler of Optuna"):
        evolve(stand, sampler=3)
    with pytest.raises(InfeasibleError, match="size"):
        evolve(stand, budgets={"size": "1%"})
    assert stand.plans == []


def test_optunas_settings_are_left_alone():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    evolve(Stand(small_table()), ["size"], evaluations=3)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


# -- many workers ----------------------------------------------------------------------------------------------------


def start(*arguments, **environment):
    """A worker in a process of its own."""
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def test_two_workers_share_one_population(tmp_path):
    """Each measures about half, none twice, and together they find the front that one finds."""
    storage = tmp_path / "study.log"
    workers = [start(storage, 150, 0.05) for _ in range(2)]
    shares = [int(worker.communicate(timeout=120)[0].split()[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert 150 <= sum(shares) <= 151
    assert min(shares) > 30
    done = [tuple(plan.tolist()) for state, plan in trials_at(storage) if state == "COMPLETE"]
    assert len(set(done)) == len(done) == sum(shares)
    reader, alone = Stand(small_table()), Stand(small_table())
    together = evolve(reader, ["size"], storage=storage, evaluations=150, population=12)
    single = evolve(alone, ["size"], evaluations=150, population=12)
    assert reader.plans == []
    exact = exact_front(reader.table)
    corner = [exact.resource.max() * 1.1, exact.objective.max() * 1.1]
    best, *found = (
        hypervolume(np.column_stack([front.resource, front.objective]), corner) for front in (exact, together, single)
    )
    assert min(found) > 0.999 * best


def test_a_killed_worker_loses_nothing(tmp_path):
    """Finished plans stay, and the one that was being measured is measured by the next worker."""
    storage, hanging = tmp_path / "study.log", tmp_path / "hanging"
    worker = start(storage, 40, 0, 9, HANGING=str(hanging))
    for _ in range(600):
        if hanging.exists() and hanging.read_text():
            break
        time.sleep(0.1)
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=30)
    states = trials_at(storage)
    lost = literal_eval(hanging.read_text())
    assert sum(state == "COMPLETE" for state, _ in states) == 8
    assert [tuple(plan.tolist()) for state, plan in states if state == "RUNNING"] == [lost]
    stand = Stand(small_table())
    front = evolve(stand, ["size"], storage=storage, evaluations=40, population=12)
    assert front.provenance["plans"] == 40
    assert len(stand.plans) == 32
    assert stand.plans.count(lost) == 1
    assert {(option,) * 6 for option in range(3)} <= {tuple(plan.tolist()) for _, plan in trials_at(storage)}


def shared(folder, **how):
    """A study as a worker sees it."""
    with quiet():
        return SharedStudy(open_study(folder / "study.log", "mpq", 2, "x", None), **how)


def test_a_plan_is_taken_up_once_and_by_nobody_who_is_late(tmp_path):
    first, second = shared(tmp_path), shared(tmp_path)
    with quiet():
        first.enqueue(["a", "b", "a"], "seed")
        second.enqueue(["b", "c"], "seed")
        taken = [first.take(), second.take(), first.take(), second.take()]
        assert [one and one.plan for one in taken] == ["a", "b", "c", None]
        first.enqueue(["a"], "seed")  # being measured: not queued
        assert not second.queued()


def test_a_plan_that_two_workers_propose_at_once_is_measured_by_one(tmp_path):
    first, second = shared(tmp_path), shared(tmp_path)
    with quiet():
        mine, theirs = (one.sign(one.study.ask(), "a", "bred") for one in (first, second))
        assert first.is_held_twice(mine)
        first.give_back(mine)
        assert not first.queued()  # the other has it
        assert not second.is_held_twice(theirs)
        second.give_back(theirs)
        assert first.take().plan == "a"  # nobody had it any more


def test_living_workers_keep_their_plans_and_others_come_back_in_time(tmp_path):
    worker, other = shared(tmp_path), shared(tmp_path, stale=0.0)
    with quiet(), worker.working():
        worker.enqueue(["a", "b"], "seed")
        mine = worker.take()
        assert other.reclaim() == 0
        far = worker.take()
        far.trial.set_user_attr("plan", ["b", "seed", f"elsewhere|{os.getpid()}|0"])
        assert worker.reclaim() == 0  # an hour is not over
        assert other.reclaim() == 1
        again = other.take()
        assert again.plan == "b"
        other.tell(again, [1.0, 2.0], [0.1, 4])
        worker.tell(far, [1.0, 2.0], [])  # late: it counts once
        worker.tell(mine, [3.0, 1.0], [0.1, 4])
        assert sorted(one.plan for one in other.finished()) == ["a", "b"]
    with quiet():
        worker.enqueue(["d"], "seed")
        worker.take()
        assert shared(tmp_path).reclaim() == 1  # of this process, but no longer working


def test_late_results_of_plans_that_were_given_up_still_count(tmp_path):
    worker, other = shared(tmp_path), shared(tmp_path)
    with quiet():
        worker.enqueue(["a"], "seed")
        mine = worker.take()
        assert other.reclaim() == 1
        worker.tell(mine, [1.0, 2.0], [])
        assert [one.plan for one in other.finished()] == ["a"]
        assert other.take() is None
