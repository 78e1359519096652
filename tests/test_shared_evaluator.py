"""Workers on one storage do one search: the same plan as alone, nothing measured twice, nothing lost by a death."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from refine_worker import DATA, found_on, outcome, table
from small_models import cnn

from mpq.evaluator import Evaluator, Exhausted
from mpq.shared_evaluator import SharedEvaluator

WORKER = Path(__file__).with_name("refine_worker.py")


@pytest.fixture(scope="module")
def alone():
    """The refinement by one process without a storage."""
    return found_on(None)


def start(*arguments, **environment):
    """A worker in a process of its own."""
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def test_two_workers_find_what_one_finds_and_share_the_work(alone, tmp_path):
    workers = [start(tmp_path / "study.log", 0.01) for _ in range(2)]
    found = [json.loads(worker.communicate(timeout=300)[0]) for worker in workers]
    for _, what in found:
        assert what == json.loads(json.dumps(outcome(alone)))
    runs = [runs for runs, _ in found]
    assert sum(runs) == alone.evaluator.runs
    assert min(runs) > 0.2 * alone.evaluator.runs


def test_a_killed_worker_loses_nothing(alone, tmp_path):
    """What it had finished is read, what it was measuring is measured again, and the end is the same."""
    storage, hanging = tmp_path / "study.log", tmp_path / "hanging"
    worker = start(storage, 0, 60, HANGING=str(hanging))
    for _ in range(1200):
        if hanging.exists():
            break
        time.sleep(0.1)
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=30)
    study = SharedEvaluator(cnn(), DATA, table(), storage=storage, seed=2, task=alone.evaluator.task).study
    done = sum(len(found.figures) for found in study.finished())
    assert done > 100
    assert [trial.state.name for trial in study.trials()].count("RUNNING") == 1
    again = found_on(storage)
    assert outcome(again) == outcome(alone)
    assert again.history == alone.history
    assert again.evaluator.runs == alone.evaluator.runs - done


def test_measures_as_an_evaluator_alone(tmp_path):
    """Growing amounts, two workers in one process, each reading what the other did."""
    storage = tmp_path / "study.log"
    one, other = (SharedEvaluator(cnn(), DATA, table(), storage=storage, evaluations=2) for _ in range(2))
    plain = Evaluator(cnn(), DATA, table())
    units = len(plain.table.units)
    coarse, fine = np.zeros(units, dtype=int), np.full(units, 3)
    one.measure(coarse, 16)
    other.measure_all([coarse, fine], 32)
    assert one.measure(fine, 32).per_sample == pytest.approx(plain.measure(fine, 32).per_sample)
    assert one.measure(coarse, 32).per_sample == pytest.approx(plain.measure(coarse, 32).per_sample)
    assert (one.runs, other.runs) == (16, 16 + 32)
    assert (one.spent, other.spent) == (1.0, 1.0)
    one.measure(coarse)
    with pytest.raises(Exhausted, match="2 evaluations are spent"):
        one.measure_all([fine, np.full(units, 1)])
    assert one.spent == 2.0


def test_another_models_study_is_refused(tmp_path):
    storage = tmp_path / "study.log"
    SharedEvaluator(cnn(), DATA, table(), storage=storage)
    with pytest.raises(ValueError, match="holds plans of another table"):
        SharedEvaluator(cnn(), DATA, table(), storage=storage, seed=1)


def test_plans_without_a_number_are_read_like_others(tmp_path):
    storage = tmp_path / "study.log"
    one, other = (SharedEvaluator(cnn(), DATA, table(), storage=storage) for _ in range(2))
    one._grown = lambda codes, values, stop: np.full(int(one._edges[stop]), np.nan)
    one.prepare([np.zeros(len(one.table.units), dtype=int)], 16)
    assert np.isnan(other.measure(np.zeros(len(one.table.units), dtype=int), 16).divergence)
    assert other.runs == 0
