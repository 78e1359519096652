"""A killed measurement goes on where it was, and finished work is never that of another model, datum or setting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.sensitivity import KL, Fisher, GGNTrace, HessianTrace, Interactions, Linearity, estimate
from mpq.tasks import Distribution

METHODS = {
    "fisher": Fisher(),
    "kl": KL(),
    "hessian_trace": HessianTrace(probes=16, tolerance=0.2),
    "ggn_trace": GGNTrace(draws=3),
    "interactions": Interactions(),
    "linearity": Linearity(levels=(0.1, 0.2)),
}


@dataclass
class Asked:
    """The arguments of `estimate`."""

    model: nn.Module
    data: list[tuple[torch.Tensor, torch.Tensor]]
    method: object
    options: object = ("int3", "int8")
    task: object = None
    seed: int = 0
    granularity: str = "layer"
    quantizer: object = None

    def scores(self, cache: Path | None) -> np.ndarray:
        """(2, cells) scores and standard errors."""
        network, options = mpq.trace(self.model, self.data[0][0]), self.options
        options = options if isinstance(options, dict) else list(options)
        settings = {"task": self.task, "seed": self.seed, "granularity": self.granularity}
        frame = estimate(
            *(self.model, self.data, network, SearchSpace(options), self.method),
            **settings,
            quantizer=self.quantizer,
            cache=cache,
            progress=False,
        )
        return frame.to_numpy().T


def asked(method: object) -> Asked:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    data = [(torch.randn(3, 4), torch.randint(0, 3, (3,))) for _ in range(4)]
    return Asked(model, data, method)


def counting(at: Callable[[int], None]) -> list[int]:
    """Counts every run of a model in this process from now on, and calls `at` with the count before each."""
    runs: list[int] = []
    run = Distribution.run

    def counted(*given):
        at(len(runs))
        runs.append(1)
        return run(*given)

    Distribution.run = counted
    return runs


def measure_and_kill(folder: Path) -> None:
    """For each method: a whole run, and one that is killed after two thirds of its runs of the model."""
    torch.set_num_threads(1)  # so that it can be forked
    told = {}
    for name, method in METHODS.items():
        original, runs = Distribution.run, counting(lambda count: None)
        whole = asked(method).scores(None)
        Distribution.run = original
        fatal = 2 * len(runs) // 3
        child = os.fork()
        if child == 0:
            counting(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == fatal else None)
            asked(method).scores(folder / name)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        told[name] = {"runs": len(runs), "before": fatal, "signal": os.WTERMSIG(status), "whole": whole.tolist()}
    (folder / "told.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder with what killed processes left, and what they were."""
    folder = tmp_path_factory.mktemp("killed")
    paths = os.pathsep.join([str(Path(mpq.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "told.json").read_text())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of a process")
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_and_ends_as_a_whole_one(killed, name, monkeypatch):
    folder, told = killed[0] / name, killed[1][name]
    assert told["signal"] == signal.SIGKILL
    finished = {file: file.stat().st_mtime_ns for file in folder.rglob("*.npy")}
    assert finished
    monkeypatch.setattr(Distribution, "run", Distribution.run)  # so that it comes back
    runs = counting(lambda count: None)
    resumed = asked(METHODS[name]).scores(folder)
    np.testing.assert_allclose(resumed, told["whole"], rtol=1e-6, atol=1e-12)
    # at most one unfinished piece is done again, with the run in full precision that it starts from
    assert len(runs) <= told["runs"] - told["before"] + AGAIN[name]
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    runs.clear()
    np.testing.assert_array_equal(asked(METHODS[name]).scores(folder), resumed)
    assert not runs


# Runs of one piece: its options or pairs, and for measured methods the runs of its batch that pieces share.
AGAIN = {"fisher": 0, "kl": 4, "hessian_trace": 1, "ggn_trace": 0, "interactions": 6, "linearity": 4}


def nudged(tensor: torch.Tensor) -> None:
    """The least change of one number."""
    flat = tensor.data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))


def double_loss(model, batch):
    return 2 * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@dataclass(frozen=True)
class Truncating:
    """A quantiser that rounds to fewer bits than it is asked for."""

    def __call__(self, rows, fmt, layer):
        return fake_quantize(rows, "int2")


CHANGES = {
    "weight": lambda asked: nudged(asked.model[0].weight),
    "bias": lambda asked: nudged(asked.model[3].bias),
    "buffer": lambda asked: nudged(asked.model[2].running_mean),
    "module": lambda asked: setattr(asked.model[2], "eps", 1e-3),
    "datum": lambda asked: nudged(asked.data[3][0]),
    "label": lambda asked: asked.data[3][1].add_(1).remainder_(3),
    "fewer samples": lambda asked: asked.data.pop(),
    "other batches": lambda asked: asked.data.append((asked.data[0][0][:1], asked.data[0][1][:1])),
    "option": lambda asked: setattr(asked, "options", ("int3", "int4")),
    "order of options": lambda asked: setattr(asked, "options", ("int8", "int3")),
    "candidates": lambda asked: setattr(asked, "options", {"*": ["int3", "int8"], "0": ["int3"]}),
    "seed": lambda asked: setattr(asked, "seed", 1),
    "task": lambda asked: setattr(asked, "task", double_loss),
    "quantizer": lambda asked: setattr(asked, "quantizer", Truncating()),
}
SETTINGS = {
    "fisher": [{"labels": "data"}],
    "kl": [{"base": "int8"}],
    "hessian_trace": [{"probes": 3}, {"labels": "model"}, {"algorithm": "block"}],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_served_that_was_made_of_something_else(tmp_path, name):
    method = HessianTrace(probes=2) if name == "hessian_trace" else METHODS[name]
    first = asked(method)
    first.scores(tmp_path)
    pieces = {folder.name: len(list(folder.iterdir())) for folder in tmp_path.iterdir()}
    assert len(pieces) == 1
    given = dict(CHANGES)
    for fields in SETTINGS[name]:
        given[f"setting {fields}"] = lambda asked, f=fields: setattr(asked, "method", replace(asked.method, **f))
    if name == "fisher":
        given["granularity"] = lambda asked: setattr(asked, "granularity", "rows:2")
    for change, make in given.items():
        changed = asked(method)
        make(changed)
        found = changed.scores(tmp_path)
        np.testing.assert_array_equal(found, changed.scores(None), err_msg=change)
        now = {folder.name for folder in tmp_path.iterdir()}
        assert len(now) == len(pieces) + 1, change
        pieces |= dict.fromkeys(now, 0)
    first.scores(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == set(pieces)


if __name__ == "__main__":
    measure_and_kill(Path(sys.argv[1]))
