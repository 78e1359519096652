"""Merging partial tables, against one table of all samples."""

from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import cnn, images

from mpq.__main__ import main
from mpq.layers import Layer
from mpq.pipeline import measure
from mpq.table_merge import merge_tables
from mpq.tables import CostTable

UNITS, OPTIONS = ["a", "b", "c"], ["int4", "int8"]


def table(samples, units=UNITS, options=OPTIONS, **changes):
    """A table of the means of (samples, units, options) scores."""
    shape = (len(units), len(options))
    sizes = (
        10.0
        * (1 + np.arange(3))[[UNITS.index(unit) for unit in units], None]
        * [[1 + (option == "int8") for option in options]]
    )
    count = len(samples)
    fields = {
        "units": units,
        "options": options,
        "quantities": {
            "sensitivity": samples.mean(0).reshape(shape),
            "sensitivity_se": (samples.std(0, ddof=1) / count**0.5).reshape(shape),
            "size": sizes,
        },
        "parameters": [40 * (1 + UNITS.index(unit)) for unit in units],
        "provenance": {"samples": count, "sensitivity": "KL()"},
        "fingerprint": "f",
        "reference": {"size": 480.0},
    }
    return CostTable(**(fields | changes))


def scores(count, seed=0):
    return np.random.default_rng(seed).lognormal(size=(count, 3, 2))


def test_parts_of_the_data_come_to_the_table_of_all(tmp_path):
    samples = scores(60)
    whole = table(samples)
    parts = [table(part) for part in np.split(samples, [7, 30])]
    merged = merge_tables(parts)
    for name in whole.quantities:
        np.testing.assert_allclose(merged.quantity(name), whole.quantity(name), rtol=1e-12)
    assert merged.provenance["samples"] == 60
    assert [part["samples"] for part in merged.provenance["merged"]] == [7, 23, 30]
    assert merged.parameters.tolist() == [40, 80, 120]
    paths = [str(tmp_path / f"{i}.parquet") for i in range(3)]
    for path, part in zip(paths, parts, strict=True):
        part.save(path)
    out = tmp_path / "all.parquet"
    done = CliRunner().invoke(main, ["table", "merge", *paths, "--output", str(out)])
    assert done.exit_code == 0, done.output
    loaded = CostTable.load(out)
    np.testing.assert_array_equal(loaded.quantity("sensitivity"), merged.quantity("sensitivity"))
    assert loaded.provenance["merged"] == merged.provenance["merged"]


def test_cells_that_one_lacks_come_from_the_other_bit_for_bit():
    samples = scores(9)
    whole = table(samples)
    a, b = samples.copy(), samples.copy()
    a[:, 0, 1] = a[:, 2] = np.nan
    b[:, :2] = np.nan
    b[:, 0, 1] = samples[:, 0, 1]
    merged = merge_tables([table(a), table(b)])
    for name in whole.quantities:
        np.testing.assert_array_equal(merged.quantity(name), whole.quantity(name))
    assert merged.provenance["samples"] == 9
    neither = merge_tables([table(a), table(a)])
    assert np.isnan(neither.quantity("sensitivity")).sum() == 3
    assert np.isnan(neither.quantity("sensitivity_se")).sum() == 3


def test_other_units_and_options_are_put_together():
    samples = scores(5)
    whole = table(samples)
    parts = [
        table(samples[:, :2, :1], UNITS[:2], OPTIONS[:1], ties=[[0, 1]]),
        table(samples[:, 2:], UNITS[2:]),
        table(samples[:, [1, 0], 1:], ["b", "a"], OPTIONS[1:]),
    ]
    merged = merge_tables(parts)
    assert merged.units.tolist() == UNITS
    assert merged.options == tuple(OPTIONS)
    assert merged.ties == ((0, 1),)
    for name in whole.quantities:
        np.testing.assert_array_equal(merged.quantity(name), whole.quantity(name))
    assert merged.parameters.tolist() == [40, 80, 120]


def test_layers_are_found_again():
    layers = [Layer(name, "linear", (4, 5), 20, 20, (1, 5), (1, 4)) for name in UNITS]
    samples = scores(4)
    one = table(samples[:, :2], UNITS[:2], layers=tuple(layers[:2]))
    two = table(samples[:, [2, 1]], ["c", "b"], layers=(layers[2], layers[1]))
    merged = merge_tables([one, two])
    assert [merged.layers[index].name for index in merged.layer_index] == UNITS
    with pytest.raises(ValueError, match="the layer of unit 'c' is not known"):
        merge_tables([one, table(samples[:, 2:], ["c"])])
    other = replace(layers[1], weight_shape=(5, 4))
    with pytest.raises(ValueError, match="the same layer 'b'"):
        merge_tables([one, table(samples[:, 1:2], ["b"], layers=(other,))])


def test_real_halves_of_the_data_come_to_the_whole():
    model, data = cnn(), images(batches=3)
    parts = [measure(model, part, ["int4", "int8"], progress=False) for part in (data[:1], data[1:], data)]
    merged = merge_tables(parts[:2])
    for name in parts[2].quantities:
        np.testing.assert_allclose(merged.quantity(name), parts[2].quantity(name), rtol=1e-6, err_msg=name)
    assert merged.provenance["samples"] == parts[2].provenance["samples"] == 9
    assert merged.layers == parts[2].layers
    assert merged.ties == parts[2].ties
    assert merged.offsets == parts[2].offsets
    problems = [table.problem({"size": "20%"}) for table in (merged, parts[2])]
    np.testing.assert_allclose(problems[0].objective, problems[1].objective, rtol=1e-6)


SCORES = scores(4)
GOOD = table(SCORES)
WRONG = {
    "fingerprints": {"fingerprint": "g"},
    "must measure 'sensitivity' alike, got 'loss' and 'score'": {"measures": {"sensitivity": "score"}},
    "must measure 'sensitivity_se' alike": {"measures": {"sensitivity_se": "score"}},
    "must add up 'size' alike": {"aggregates": {"size": "max"}},
    "must have the same granularity": {"granularity": "rows:2"},
    "their sensitivity is KL\\(\\) and Fisher\\(\\)": {"provenance": {"samples": 4, "sensitivity": "Fisher()"}},
    "must say in its provenance how many samples .*\\(a, int4\\)": {"provenance": {}},
    "agree on the parameters of 'b'": {"parameters": [40, 81, 120]},
    "agree on the reference of 'size'": {"reference": {"size": 481.0}},
    "no terms for pairs": {"pairs": {(0, 1): np.ones((2, 2))}},
    "only one has latency": {"quantities": {**GOOD.quantities, "latency": np.ones((3, 2))}},
    "agree on 'size', that of \\(a, int4\\) is 10 and, in table 2, 11": {
        "quantities": {**GOOD.quantities, "size": GOOD.quantities["size"] + 1}
    },
    "must have the same steps": {"transitions": {"size": {(0, 1): np.ones((2, 2))}}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=message):
        merge_tables([GOOD, table(SCORES, **WRONG[message])])


def test_ties_must_not_overlap_and_one_table_is_none(tmp_path):
    with pytest.raises(ValueError, match="'b' is in two groups"):
        merge_tables([table(SCORES, ties=[[0, 1]]), table(SCORES, ties=[[1, 2]])])
    with pytest.raises(ValueError, match="at least two tables"):
        merge_tables([GOOD])
    GOOD.save(tmp_path / "a.parquet")
    table(SCORES, fingerprint="g").save(tmp_path / "b.parquet")
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    refused = CliRunner().invoke(main, ["table", "merge", *files, "--output", str(tmp_path / "c.parquet")])
    assert refused.exit_code != 0
    assert "a.parquet' and " in refused.output
    assert not (tmp_path / "c.parquet").exists()
