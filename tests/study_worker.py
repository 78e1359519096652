"""One worker of a study in a process of its own: python study_worker.py STORAGE EVALUATIONS SECONDS [HANG_AT]."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mpq.evolution import evolve
from mpq.tables import CostTable


def small_table(layers=6, options=3, seed=0):
    """Sizes and latencies that grow with the bits, scores that fall."""
    rng, bits = np.random.default_rng(seed), np.linspace(2, 8, options)
    count = rng.integers(10, 100, (layers, 1)).astype(float)
    return CostTable(
        units=[f"layer{index}" for index in range(layers)],
        options=[f"int{int(bit)}" for bit in bits],
        quantities={
            "sensitivity": count * rng.lognormal(0, 1, (layers, 1)) * 4.0**-bits,
            "size": count * bits,
            "latency": count * (1 + rng.uniform(0, 1, (layers, options)).cumsum(1)),
        },
    )


class Stand:
    """Measures what the table says plus interactions of neighbours; counts, and takes its time."""

    def __init__(self, table, seconds=0.0, interaction=0.0, hang_at=None):
        self.table, self.seconds, self.interaction, self.hang_at = table, seconds, interaction, hang_at
        self.plans = []

    def loss(self, choices):
        scores = self.table.quantity("sensitivity")[np.arange(len(choices)), choices]
        return float(scores.sum() + self.interaction * np.sqrt(scores[1:] * scores[:-1]).sum())

    def measure(self, choices):
        self.plans.append(tuple(choices.tolist()))
        if len(self.plans) == self.hang_at:
            Path(os.environ["HANGING"]).write_text(repr(self.plans[-1]), "utf-8")
            time.sleep(600)
        time.sleep(self.seconds)
        return SimpleNamespace(divergence=self.loss(choices), standard_error=0.01, samples=16)


if __name__ == "__main__":
    storage, evaluations, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    stand = Stand(small_table(), seconds, hang_at=int(sys.argv[4]) if len(sys.argv) > 4 else None)
    front = evolve(stand, ["size"], storage=storage, evaluations=evaluations, population=12, seed=os.getpid())
    print(len(stand.plans), len(front))
