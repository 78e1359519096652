"""One worker of a refinement in a process of its own: python refine_worker.py STORAGE SECONDS [HANG_AT]."""

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from small_models import cnn, images

import mpq
from mpq.refinement import refine
from mpq.tasks import Distribution

DATA = images(4, 16)
RUNS = itertools.count(1)
BUDGET = {"size": "3.2 bits values"}
QUICK = {"patience": 2, "offspring": 6, "kbest": 8, "level": 0.3, "evaluations": 20, "seed": 2}


PACE = {"seconds": 0.0, "hang_at": 0}  # no part of the task: how slow it is does not change what is measured


@dataclass(frozen=True)
class Slow(Distribution):
    """Takes its time, and hangs at a run if asked."""

    def run(self, model, batch):
        if next(RUNS) == PACE["hang_at"]:
            Path(os.environ["HANGING"]).write_text("here", "utf-8")
            time.sleep(600)
        time.sleep(PACE["seconds"])
        return super().run(model, batch)


def table():
    """By the error of the weights: no measurement."""
    space = mpq.SearchSpace(["int2", "int3", "int4", "int6", "int8"], ties=None)
    return mpq.measure(cnn(), DATA, space, sensitivity="weight_error", progress=False)


def found_on(storage):
    """The refinement that all workers do."""
    return refine(cnn(), DATA, table(), BUDGET, task=Slow(), storage=storage, **QUICK)


def outcome(found):
    """What must be the same for all workers."""
    return [found.plan.options, [step.evaluations for step in found.history], found.evaluations, found.selection.best]


if __name__ == "__main__":
    import refine_worker  # the task must be of the same module for all

    torch.set_num_threads(1)
    refine_worker.PACE |= {"seconds": float(sys.argv[2]), "hang_at": int(sys.argv[3]) if len(sys.argv) > 3 else 0}
    found = refine_worker.found_on(sys.argv[1])
    print(json.dumps([found.evaluator.runs, outcome(found)]))
