"""A small table, its plan and a made-up verification, for the tests of report pages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpq.confidence import Estimate, mean_estimate
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, uniform_plan
from mpq.planning import predict
from mpq.tables import CostTable
from mpq.verification_report import Measured, QuantityCheck, Verification

WICKED = "block.</script><b onclick='x'>&amp;"
OPTIONS = ("int2", "int4", "int8")


def cost_table(names=("stem", WICKED, "body.conv", "fc"), measure="loss", seed=0, **fields):
    rng = np.random.default_rng(seed)
    weights = [int(10 ** rng.uniform(2, 4)) for _ in names]
    layers = tuple(Layer(n, "linear", (w, 8), 8 * w, 80 * w, (10, 8), (10, w), batch=10, weight_bytes=32 * w)
                   for n, w in zip(names, weights, strict=True))  # fmt: skip
    entries = [[Entry(layer, Option(label)).storage_bits / 8 for label in OPTIONS] for layer in layers]
    worst = np.exp(rng.normal(-3, 2, len(names)))
    scores = worst[:, None] * np.array([1.0, 0.1, 1e-4]) * rng.uniform(0.5, 1.5, (len(names), 3))
    return CostTable(
        units=list(names), options=OPTIONS, layers=layers, parameters=[layer.parameters for layer in layers],
        quantities={"sensitivity": scores, "sensitivity_se": scores * 0.1, "size": entries,
                    "latency": np.array(weights)[:, None] * np.array([2e-7, 3e-7, 4e-7])},
        measures={"sensitivity": measure, "sensitivity_se": measure}, offsets={"size": 100.0},
        reference={"size": 32.0 * sum(weights) + 100, "latency": 4.1e-7 * sum(weights)}, fingerprint="abc",
        provenance={"options": list(OPTIONS), "samples": 64, "seed": 3, "sensitivity": "Fisher(labels='auto')",
                    "estimates": ["latency"], "versions": {"mpq": "0"}, "granularity": "layer",
                    "hardware": {"target": "nvidia-t4", "runtime": "r", "batch": 2, "phase": None, "context": None,
                                 "sources": {}, "estimates": {"latency": ["memory.dram: efficiency"]}, "notes": {}}},
    )  # fmt: skip


def solved(table, **settings):
    return table.solve({"size": "20%", "latency": "90%"}, **settings)


def measured(name, plan, table, scale):
    samples = 1e-3 * scale * (1 + np.arange(20) / 40)
    costs = {} if plan is None else predict(table, plan)
    return Measured(
        name=name, size_bytes=table.reference["size"] if plan is None else plan.size_bytes, average_bits=4.0,
        estimates={"divergence": mean_estimate(samples), "divergence p99": Estimate(2e-3 * scale, 1e-3, 9e-3),
                   "loss": Estimate(0.5 + scale, 0.4, 2.0), "accuracy": Estimate(0.75, 0.7, 0.8)},
        costs=costs, fits=None if plan is None else True, per_sample=samples,
        tries=() if plan is None else ((costs["sensitivity"], float(samples.mean())),), plan=plan,
    )  # fmt: skip


def verification(plan, table):
    low, high = (uniform_plan(plan, Option(label)) for label in ("int2", "int4"))
    over = replace(measured("uniform int4", high, table, 2.0), fits=False)
    rows = (measured("full precision", None, table, 0.0), measured("plan", plan, table, 1.0),
            measured("uniform int2", low, table, 3.0), over)  # fmt: skip
    check = QuantityCheck(quantity="latency", measure="s", limit=1e-2, predicted=2e-3, found=None, how="not measured")
    return Verification(rows=rows, divergence_name="KL", samples=20, metric_name="accuracy", quantities=(check,))
