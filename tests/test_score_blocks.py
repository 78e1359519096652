"""Blocks of units that are about as sensitive."""

import numpy as np
import pytest

import mpq
from mpq.score_blocks import sorted_blocks
from mpq.solvers import solve

BITS = np.array([2.0, 4, 8])


def table_of(layers=(10, 7, 1), seed=0, **more):
    """Rows of layers of different scale, some of them without their first option."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(layers)), layers)
    scores = (
        rng.lognormal(0, 1, (len(index), 1))
        * 4.0**-BITS
        * rng.lognormal(0, 0.3, (len(index), 3))
        * 10.0 ** index[:, None]
    )
    sizes = np.tile(BITS, (len(index), 1))
    scores[2, 0] = sizes[2, 0] = np.nan
    return mpq.CostTable(
        units=[f"{layer}[{row}]" for row, layer in enumerate(index)],
        options=["int2", "int4", "int8"],
        quantities={"sensitivity": scores, "size": sizes},
        layer_index=index,
        granularity="rows:1",
        **more,
    )


def test_blocks_by_a_loop_over_layers():
    table = table_of()
    wanted = []
    for layer in range(3):
        units = [unit for unit in range(18) if table.layer_index[unit] == layer]
        scores = table.quantity("sensitivity")[units]
        place = np.nanmean(scores / np.nanmean(scores, 0), 1)
        ranked = [units[position] for position in np.argsort(place)]
        wanted += [tuple(ranked[first : first + 4]) for first in range(0, len(ranked), 4)]
    assert sorted_blocks(table, 4).ties == tuple(wanted)


def test_sorted_blocks_lose_less_than_blocks_as_they_come_and_more_than_single_rows():
    lost = {"rows": [], "sorted": [], "as they come": []}
    for seed in range(10):
        table = table_of((64, 48, 32), seed)
        blocks = sorted_blocks(table, 8)
        kinds = {"rows": (), "sorted": blocks.ties, "as they come": np.arange(144).reshape(-1, 8).tolist()}
        for kind, ties in kinds.items():
            problem = mpq.AllocationProblem(
                np.where(table.allowed, table.quantity("sensitivity"), np.inf),
                resources={"size": np.nan_to_num(table.quantity("size"))},
                budgets={"size": 144 * 4.0},
                ties=ties,
            )
            lost[kind].append(solve(problem).objective)
    rows, ordered, mixed = (np.array(lost[kind]) for kind in ("rows", "sorted", "as they come"))
    assert (rows <= ordered).all()
    assert (ordered < mixed).all()
    assert np.mean((ordered - rows) / (mixed - rows)) < 0.5


def test_what_cannot_be_sorted_is_said():
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        sorted_blocks(table_of(), 0)
    with pytest.raises(ValueError, match="1 groups of them are tied"):
        sorted_blocks(table_of(ties=[(0, 1)]))
    layers = mpq.CostTable(units=["a"], options=["int4"], quantities={"sensitivity": [[1.0]]})
    with pytest.raises(ValueError, match='measure with granularity="rows:1"'):
        sorted_blocks(layers)
