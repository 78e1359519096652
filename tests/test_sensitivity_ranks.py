"""Several processes share a measurement: every rank returns the table that one process makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import cnn, images

import mpq
from mpq.options import SearchSpace
from mpq.ranks import Ranks
from mpq.sensitivity import (
    METHODS,
    Entropy,
    HessianTrace,
    agreement,
    available,
    estimate,
    estimate_together,
    layer_traces,
    relevance,
)
from mpq.tasks import Distribution

# What is smaller than its default here, and what is tried beside the methods' defaults.
SETTINGS = {"hessian_trace": {"probes": 12, "tolerance": 0.5}, "ggn_trace": {"draws": 3}}
VARIANTS = {
    "hutch++": HessianTrace(probes=12, algorithm="hutch++"),
    "block": HessianTrace(probes=4, algorithm="block", tolerance=0.0),
    "auto": HessianTrace(probes=40, tolerance=0.04),
    "input entropy": Entropy(kind="activation"),
}
WITHOUT_INPUTS = {"linearity", "obs"}


class Odd(torch.nn.Module):
    """With an operation that has no rule, met in batches with numbers above one only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 2)
        self.head.weight.data = torch.arange(6.0).reshape(2, 3)

    def forward(self, x):
        return self.head(x.sin() if x.max() > 1 else x)


def tables(runs: list[str]) -> dict[str, np.ndarray]:
    """{method: (2, cells) scores and standard errors} of a small model on three batches of unequal sizes.

    `runs` is a list whose last entry is the method that is being measured.
    """
    model, data = cnn(), [(x[: 3 - i], y[: 3 - i]) for i, (x, y) in enumerate(images(batches=3))]
    network = mpq.trace(model, data[0][0])
    spaces = {True: SearchSpace(["int3/int8", "int8"]), False: SearchSpace(["int3", "int8"])}
    found = {}
    for label, method in {**dict.fromkeys(available()), **VARIANTS}.items():
        runs.append(label)
        space, settings = spaces[label not in WITHOUT_INPUTS], SETTINGS.get(label, {})
        frame = estimate(model, data, network, space, method or label, seed=5, progress=False, **settings)
        found[label] = frame.to_numpy().T
        for pair, block in frame.attrs.get("pairs", {}).items():
            found[f"{label} {pair}"] = block
    runs.append("others")
    for curvature in ("hessian", "ggn"):
        frame = layer_traces(model, data, network, probes=6, tolerance=0, curvature=curvature, progress=False)
        found[f"traces {curvature}"] = frame[["trace", "standard_error"]].to_numpy()
    together = estimate_together(model, data, network, spaces[True], ["kl", "fisher", "lrp", "sqnr"], progress=False)
    table = mpq.measure(model, data, spaces[True], sensitivity="sqnr", progress=False)
    runs.append("relevance")
    flow = relevance(model, data, target="label")
    odd = relevance(Odd(), [torch.ones(2, 3), torch.full((1, 3), 2.0), torch.full((2, 3), -1.0)])
    found |= {"relevance": flow.to_numpy(), "channels": relevance(model, data, per="channel").to_numpy()}
    unruled = odd.attrs["unruled"]
    assert unruled
    found["relevance as a whole"] = np.array([flow.attrs["conservation"], odd.attrs["conservation"], *unruled.values()])
    found["unruled"] = np.frombuffer(json.dumps(unruled, sort_keys=True).encode(), np.uint8)
    runs.append("agreement")
    trusted = agreement(model, data, table, {"size": "30%"}, plans=6, bootstraps=0, progress=False)
    found |= {"plans": trusted.measured, "agreement": np.array([*trusted.plan, *trusted.uniform[1:], trusted.spearman])}
    return found | {f"together {name}": frame.to_numpy().T for name, frame in together.items()}


def counted_tables() -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """`tables`, and how many times each method ran the model in this process."""
    run, runs, threads = Distribution.run, [], torch.get_num_threads()
    Distribution.run = lambda *given: runs.append(runs[-1]) or run(*given)
    torch.set_num_threads(1)  # as the ranks have: small work is faster, and rounds alike
    try:
        found = tables(runs)
        return found, {label: count - 1 for label, count in Counter(runs).items()}
    finally:
        Distribution.run = run
        torch.set_num_threads(threads)


def as_a_rank(folder: str) -> None:
    """What each of several processes runs."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found, runs = counted_tables()
    np.savez(f"{folder}/{rank}.npz", **found)
    refusals = {"runs": runs}

    def fails(item: int) -> np.ndarray:
        if item == 1:
            raise ValueError(f"item {item} is not finite")
        return np.ones(item)

    model, data = cnn(), images(batches=3)
    network, space = mpq.trace(model, data[0][0]), SearchSpace(["int4"])
    other = [data[rank], data[2]]
    model_here = cnn()
    model_here.head.bias.data += rank
    asks = {
        "failed": lambda: list(Ranks.current().shared(range(3), fails)),
        "data": lambda: estimate(model, other, network, space, "kl", progress=False),
        "model": lambda: estimate(model_here, data, network, space, "kl", progress=False),
        "settings": lambda: estimate(model, data, network, space, "kl", seed=rank, progress=False),
    }
    for name, ask in asks.items():
        try:
            ask()
        except ValueError as error:
            refusals[name] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(refusals))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder in which two ranks left their tables and errors."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, str(folder)]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        paths = os.pathsep.join([str(Path(mpq.__file__).parents[1]), str(Path(__file__).parent)])
        environment = {**os.environ, **place, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(rank)}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def single():
    """The tables of one process, and how many times it ran the model."""
    return counted_tables()


def test_every_rank_has_the_table_of_one_process(shared, single):
    alone, _ = single
    assert {*available(), *VARIANTS} <= alone.keys()
    for rank in range(2):
        with np.load(shared / f"{rank}.npz") as found:
            assert found.keys() == alone.keys()
            for name, values in alone.items():
                np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-15, err_msg=name)


def test_ranks_hold_the_same_bits(shared):
    with np.load(shared / "0.npz") as one, np.load(shared / "1.npz") as two:
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_errors_and_differences_are_raised_on_every_rank(shared):
    told = [json.loads((shared / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["failed"] for one in told] == ["rank 1: item 1 is not finite", "item 1 is not finite"]
    for what in ("data", "model", "settings"):
        assert all(f"the same {what}, rank 1 has another" in one[what] for one in told)


def test_each_rank_runs_a_part(shared, single):
    parts = [json.loads((shared / f"{rank}.json").read_text())["runs"] for rank in range(2)]
    for label, runs in single[1].items():
        if label not in {"obs", "weight_error", "entropy"}:  # what obs shares are layers, not runs
            assert max(part[label] for part in parts) <= 0.8 * runs, label


def test_one_process_is_its_own_rank():
    assert Ranks.current() == Ranks(rank=0, world=1)
    assert [piece.tolist() for piece in Ranks().shared([1, 2], lambda item: np.full(1, item))] == [[1], [2]]
    Ranks().agree("model", "abc")
    with pytest.raises(KeyError):
        list(Ranks().shared(["missing"], METHODS.__getitem__))


if __name__ == "__main__":
    as_a_rank(sys.argv[1])
