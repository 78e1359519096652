"""Peak activation memory and conversions between layers, against plain loops; limits of a device in a search."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.buffers import Buffer
from mpq.hardware_models.device_file import parse_target
from mpq.layers import Layer, Network
from mpq.options import SearchSpace
from mpq.pipeline import price
from mpq.problem import InfeasibleError
from mpq.table_problem import totals

DEVICE = """\
schema = 1
[target]
name = "toy"
kind = "npu"
runtime = "toy kernels"
[[source]]
id = "sheet"
title = "a sheet"
kind = "datasheet"
read = "2026"
[memory.dram]
bandwidth_Bps = 1e9
efficiency = 0.5
source = "sheet"
[memory.flash]
capacity_bytes = 500
holds = "weights"
source = "sheet"
[memory.sram]
capacity_bytes = 400
holds = "activations"
source = "sheet"
[[compute]]
unit = "any"
weight = ["int4", "int8", "fp32"]
activation = ["int4", "int8", "fp32"]
ops_per_s = 1e9
efficiency = 0.5
launch_overhead_s = 1e-6
source = "sheet"
[[conversion]]
from = ["int4", "int8"]
to = "fp32"
s_per_element = 1e-9
launch_overhead_s = 1e-7
source = "sheet"
[[conversion]]
from = "fp32"
to = ["int4", "int8"]
s_per_element = 3e-9
energy_pJ_per_element = 2.0
source = "sheet"
"""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 4, 3, padding=1) for c in (2, 4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(x.relu().mean((2, 3)))


SPACE = SearchSpace(["int4/int4", "int8/int8", "int8", "fp32"])
BITS = {"int4/int4": 4, "int8/int8": 8, "int8": 32, "fp32": 32}


@pytest.fixture
def priced():
    return price(Residual(), torch.zeros(2, 2, 4, 4), SPACE, hardware=parse_target(DEVICE), batch=3)


def test_the_peak_is_that_of_a_replay_in_every_plan(priced):
    network, table = priced.network, priced.table({})
    position = {layer.name: i for i, layer in enumerate(network.layers)}
    for choices in itertools.product(range(4), repeat=4):
        labels = [table.options[c] for c in choices]
        held = {}
        for buffer in network.buffers:
            for step in range(buffer.first, buffer.last + 1):
                size = buffer.elements * 3 / 2 * BITS[labels[position[buffer.owner]]] / 8
                held[step] = held.get(step, 0) + size
        assert totals(table, np.array(choices))["activation_peak"] == pytest.approx(max(held.values()), rel=1e-12)


def test_conversions_are_paid_between_formats(priced):
    network, table = priced.network, priced.table({})
    position = {layer.name: i for i, layer in enumerate(network.layers)}
    base = table.quantity("latency")
    for choices in itertools.product(range(4), repeat=4):
        expected = base[range(4), list(choices)].sum()
        for buffer in network.buffers:
            for reader in buffer.readers:
                if not buffer.producer or buffer.producer == reader:
                    continue
                source, target = (BITS[table.options[choices[position[n]]]] for n in (buffer.producer, reader))
                elements = buffer.elements * 3 / 2
                if source < 32 == target:
                    expected += 1e-9 * elements + 1e-7
                elif target < 32 == source:
                    expected += 3e-9 * elements
        assert totals(table, np.array(choices))["latency"] == pytest.approx(expected, rel=1e-12)


def test_conversions_between_integers_are_free_without_a_row(priced):
    blocks = priced.costs.attrs["transitions"]["latency"]
    assert blocks
    for block in blocks.values():
        assert (block[:2, :2] == 0).all()
        assert (block[:2, 2:] > 0).all()
        assert (block[2:, :2] > 0).all()


def test_what_fits_on_the_device_is_kept_without_asking(priced):
    table = priced.table({})
    assert table.limits == {"size": 500.0, "activation_peak": 400.0}
    scored = mpq.CostTable(
        **{
            **{name: getattr(table, name) for name in table.__dataclass_fields__ if name != "quantities"},
            "quantities": {**table.quantities, "sensitivity": np.tile([3.0, 1.0, 0.9, 0.0], (4, 1))},
        }
    )
    plan = scored.solve({"latency": 1.0})
    assert plan.predicted["activation_peak"] <= 400
    assert plan.predicted["size"] <= 500
    assert [budget.meaning for budget in plan.budgets][1:] == [
        "size at most 500 B, all that toy has",
        "activation_peak at most 400 B, all that toy has",
    ]
    loose = scored.solve({"latency": 1.0, "size": "60%"})
    assert min(budget.limit for budget in loose.budgets if budget.quantity == "size") == 500


def test_a_model_that_cannot_fit_is_told_what_it_needs():
    device = parse_target(DEVICE.replace("capacity_bytes = 400", "capacity_bytes = 100"))
    with pytest.raises(InfeasibleError, match="activation_peak at most 100 B, all that toy has, but the smallest"):
        mpq.search(Residual(), torch.zeros(2, 2, 4, 4), ["int8/int8"], {"size": "90%"}, hardware=device, progress=False)


def test_activations_belong_to_layers_not_to_rows():
    priced = price(Residual(), torch.zeros(1, 2, 4, 4), SPACE, hardware=parse_target(DEVICE), granularity="rows")
    table = priced.table({})
    assert "activation_peak" not in table.quantities
    assert set(table.limits) == {"size"}
    assert not table.transitions


def test_a_decode_step_has_no_activation_memory_of_the_traced_run():
    layer = Layer("fc", "linear", (4, 4), 16, 160, (1, 10, 4), (1, 10, 4), weight_bytes=64)
    network = Network((layer,), total_bytes=64, buffers=(Buffer("fc", 40, 0, 0), Buffer("fc", 40, 0, 0, "fc")))
    target = parse_target(DEVICE)
    assert "activation_peak" in target.costs(network, SPACE)
    assert "activation_peak" not in target.costs(network, SPACE, phase="decode")
