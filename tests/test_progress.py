"""Long work shows how far it is, on a terminal alone."""

import io
import re
import sys

import pytest
import torch

import mpq
from mpq.evaluator import Evaluator
from mpq.progress import meter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """Called in the test itself: pytest sets standard error anew between fixtures and the test."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def shown(terminal):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def table_of(model, data):
    return mpq.measure(model, data, ["int2", "int3", "int4"], sensitivity="weight_error", progress=False)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = (torch.randn(64, 4), torch.randint(0, 3, (64,)))
    return model, data, table_of(model, data)


def test_a_meter_shows_what_it_is_told_and_never_goes_back(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with meter("work", 4, "steps") as tell:
        tell(1, ", 3 plans")
        tell(0.5, ", 5 plans")
    assert "1 of 4 steps, 5 plans" in shown(terminal)
    assert "0.5 of 4" not in shown(terminal)


def test_nothing_is_shown_elsewhere(monkeypatch, small):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    model, data, table = small
    mpq.refine(model, data, table, {"size": "3 bits values"}, evaluations=4)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("progress", [True, False])
def test_searches_say_how_much_is_measured(monkeypatch, small, progress):
    pytest.importorskip("optuna", reason="the extra mpq-search[evolve] is not installed")
    model, data, table = small
    terminal = on_terminal(monkeypatch)
    mpq.refine(model, data, table, {"size": "3 bits values"}, evaluations=4, progress=progress)
    mpq.smallest(model, data, table, drop=0.5, metric="divergence", evaluations=5, progress=progress)
    mpq.evolve(Evaluator(model, data, table), ["size"], evaluations=6, progress=progress)
    text = shown(terminal)
    for part in (r"refine .* of 4 evaluations, \d+ plans", r"smallest .* of 5 evaluations", r"evolve .*\d of 6 plans"):
        assert (re.search(part, text) is not None) == progress, text


def test_what_is_under_way_counts(small):
    """Told piece by piece, up to what the measurement comes to; what was measured before counts no more."""
    model, (inputs, labels), table = small
    batches = list(zip(inputs.split(16), labels.split(16), strict=True))
    evaluator, told = Evaluator(model, batches, table, evaluations=8), []
    evaluator._tell = lambda done, more: told.append((done, more))
    evaluator.measure([0, 0])
    assert told[0][0] < told[-1][0] == pytest.approx(1)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    evaluator.measure([0, 0])
    evaluator.slopes([1, 1])
    assert told[-1] == (pytest.approx(evaluator.spent), ", 1 plans")
    assert max(done for done, _ in told) == pytest.approx(evaluator.spent)
