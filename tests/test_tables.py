"""Cost tables: labels, measures, masks, files, problems."""

import json

import numpy as np
import pytest

from mpq.layers import Layer, Network
from mpq.tables import CostTable


def table(**changes):
    fields = {
        "units": ["a", "b"],
        "options": ["int4", "int8"],
        "quantities": {"sensitivity": [[0.1 + 0.2, 1e-17], [2.5, 1 / 3]], "size": [[52.0, 102.0], [12.0, 22.0]]},
        "parameters": [100, 20],
        "layers": tuple(Layer(n, "linear", (p, 1), p, p, (1, 1), (1, p)) for n, p in (("a", 100), ("b", 20))),
        "offsets": {"size": 8.0},
        "reference": {"size": 488.0},
        "ties": [(0, 1)],
        "provenance": {"seed": 3, "sensitivity": "KL()"},
        "fingerprint": "abc",
    }
    return CostTable(**{**fields, **changes})


def same(left, right):
    assert list(left.units) == list(right.units)
    assert left.options == right.options
    assert left.quantities.keys() == right.quantities.keys()
    for name, values in left.quantities.items():
        assert values.tobytes() == right.quantities[name].tobytes()
    for name in (
        "measures",
        "aggregates",
        "layers",
        "granularity",
        "ties",
        "offsets",
        "reference",
        "provenance",
        "fingerprint",
    ):
        assert getattr(left, name) == getattr(right, name), name
    assert np.array_equal(left.parameters, right.parameters)
    assert np.array_equal(left.layer_index, right.layer_index)
    for name, steps in left.alive.items():
        assert np.array_equal(steps, right.alive[name])
    for key, block in left.pairs.items():
        assert np.array_equal(block, right.pairs[key])


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_round_trip_is_exact(tmp_path, ending):
    rng = np.random.default_rng(0)
    rich = table(
        quantities={
            "sensitivity": rng.lognormal(0, 30, (2, 2)) * [[1, -1], [1, 1]],
            "size": [[np.nan, 102.0], [12.0, np.inf]],
            "activation_peak": rng.uniform(0, 1e9, (2, 2)),
        },
        measures={"sensitivity": "score"},
        aggregates={"activation_peak": "peak"},
        alive={"activation_peak": [(0, 0), (1, 0), (1, 1)]},
        pairs={(0, 1): rng.normal(size=(2, 2))},
        transitions={"size": {(0, 1): rng.normal(size=(2, 2))}},
    )
    path = tmp_path / f"table.{ending}"
    rich.save(path)
    loaded = CostTable.load(path)
    same(rich, loaded)
    assert {p.name for p in tmp_path.iterdir()} == (
        {"table.parquet"} if ending == "parquet" else {"table.csv", "table.json"}
    )


@pytest.mark.parametrize("units", [np.array(["a", "b"], dtype="<U40"), np.array(["a", "b"], dtype=object), ("a", "b")])
def test_files_do_not_depend_on_how_labels_are_kept(tmp_path, units):
    kept = table(units=units)
    for ending in ("parquet", "csv"):
        kept.save(tmp_path / f"table.{ending}")
        same(kept, CostTable.load(tmp_path / f"table.{ending}"))


def test_frame_and_back_aligns_by_label_whatever_the_order():
    original = table()
    frame = original.frame
    assert frame.loc[("b", "int8"), "size"] == 22.0
    assert frame.attrs["measures"] == {"sensitivity": "loss", "size": "B"}
    shuffled = frame.sample(frac=1, random_state=1)
    again = CostTable.from_frame(shuffled)
    for unit in ("a", "b"):
        for option in ("int4", "int8"):
            assert again.frame.loc[(unit, option)].equals(frame.loc[(unit, option)])


def test_missing_and_repeated_rows_are_named():
    frame = table().frame
    with pytest.raises(ValueError, match=r"\('b', 'int8'\) is missing"):
        CostTable.from_frame(frame.drop(("b", "int8")))
    import pandas as pd

    with pytest.raises(ValueError, match=r"\('a', 'int4'\) is repeated"):
        CostTable.from_frame(pd.concat([frame, frame.iloc[:1]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": ["a", "a"]}, "'a' is there twice"),
        ({"options": ["int4", "int4"]}, "'int4' is there twice"),
        ({"quantities": {"size": [[1.0, 2.0]]}}, r"'size' must have the shape"),
        ({"measures": {"size": "MB"}}, "'size' must be in B, got 'MB'"),
        ({"measures": {"sensitivity": "s"}}, "'sensitivity' must be in loss or score"),
        ({"parameters": [1]}, "parameters must have one entry a unit"),
        ({"aggregates": {"size": "peak"}}, "alive must say"),
        ({"alive": {"size": [(0, 0, 1, 1)]}}, r"alive of 'size' must be \(n, 2\) of step, unit or \(n, 3\)"),
        ({"alive": {"size": [(0, 7)]}}, "steps from 0 and units below"),
        ({"alive": {"size": [(0.5, 0)]}}, "must hold whole numbers"),
        ({"units": [], "quantities": {"size": np.zeros((0, 2))}}, "at least one of its units"),
    ],
)
def test_what_breaks_the_rules_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)


def test_non_finite_entries_mask_the_option_and_are_reported():
    masked = table(quantities={"sensitivity": [[1.0, np.nan], [np.nan, 1.0]], "size": [[1.0, 2.0], [np.nan, np.inf]]})
    assert masked.allowed.tolist() == [[True, False], [False, False]]
    assert masked.masked == (("a", "int8", ("sensitivity",)), ("b", "int8", ("size",)))  # (b, int4) is no candidate
    with pytest.raises(ValueError, match="'b' has no option left: int8 has no finite size"):
        masked.problem({"size": 100})


def test_a_problem_has_budgets_in_base_units_offsets_ties_and_pins():
    problem = table().problem({"size": "50%"}, pins={"b": "int8"})
    assert problem.budgets == {"size": 244.0}
    assert problem.offsets == {"size": 8.0}
    assert problem.ties == ((0, 1),)
    assert problem.objective[1].tolist() == [np.inf, 1 / 3]
    assert problem.evaluate([1, 1]) == (pytest.approx(1 / 3), {"size": 132.0})


def test_any_quantity_may_be_the_objective_and_any_other_a_budget():
    problem = table(ties=()).problem({"sensitivity": 0.4}, objective="size")
    assert problem.evaluate([0, 1])[0] == 74.0
    assert problem.budgets == {"sensitivity": 0.4}
    with pytest.raises(ValueError, match="'size' must be the objective or have a budget"):
        table().problem({"size": "50%"}, objective="size")


def test_pins_that_match_nothing_or_take_an_unknown_option_are_named():
    with pytest.raises(ValueError, match="'zzz' matches no layer"):
        table().problem({}, pins={"zzz": "int8"})
    with pytest.raises(ValueError, match="pin of 'a' must be an option.*'int4'"):
        table().problem({}, pins={"a": "int44"})


def test_max_and_peak_aggregates_become_peak_resources():
    peaks = table(
        quantities={
            "sensitivity": np.zeros((2, 2)),
            "stage": [[3.0, 5.0], [4.0, 1.0]],
            "activation_peak": [[10.0, 20.0], [30.0, 40.0]],
        },
        aggregates={"stage": "max", "activation_peak": "peak"},
        alive={"activation_peak": [(0, 0), (1, 0), (1, 1)]},
        ties=(),
        offsets={},
    )
    problem = peaks.problem({"stage": 4.5, "activation_peak": 45.0})
    for choices in np.ndindex(2, 2):
        stage = max([3.0, 5.0][choices[0]], [4.0, 1.0][choices[1]])
        alive = [10.0, 20.0][choices[0]]
        peak = max(alive, alive + [30.0, 40.0][choices[1]])
        assert problem.evaluate(choices)[1] == {"stage": stage, "activation_peak": peak}


def test_a_csv_written_by_hand_is_a_table(tmp_path):
    path = tmp_path / "hand.csv"
    path.write_text("unit, option, sensitivity, size [B]\nfc, int4, 0.5, 10\nfc, int8, 0.1, 20\n")
    hand = CostTable.load(path)
    assert hand.measures == {"sensitivity": "loss", "size": "B"}
    assert hand.problem({"size": "80%"}).budgets == {"size": 16.0}
    with pytest.raises(ValueError, match="needs the table's parameters"):
        hand.problem({"size": "4 bits"})
    with pytest.raises(ValueError, match="no layers to make a plan for"):
        hand.solve({"size": "80%"})


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_truncated_missing_and_foreign_files_are_errors(tmp_path, ending):
    path = tmp_path / f"table.{ending}"
    with pytest.raises(ValueError, match="no such file"):
        CostTable.load(path)
    table().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"table\.(parquet|csv)"):
        CostTable.load(path)
    path.write_bytes(b"\x00\xff nonsense")
    with pytest.raises(ValueError, match=r"table\.(parquet|csv)"):
        CostTable.load(path)


def test_a_parquet_file_that_was_changed_is_refused(tmp_path):
    import pyarrow.parquet as pq

    path = tmp_path / "table.parquet"
    table().save(path)
    arrow = pq.read_table(path)
    metadata = arrow.schema.metadata
    frame = arrow.to_pandas()
    assert frame["size [B] | int8"].tolist() == [102.0, 22.0]
    import pyarrow as pa

    def write(changed):
        pq.write_table(pa.Table.from_pandas(changed, preserve_index=False).replace_schema_metadata(metadata), path)

    write(frame)
    same(table(), CostTable.load(path))
    changes = {"unit": ["a", "c"], "layer": [1, 0], "parameters": [100, 21], "size [B] | int8": [102.0, 22.5]}
    swapped = {"size [B] | int4": frame["size [B] | int8"], "size [B] | int8": frame["size [B] | int4"]}
    for wrong in ({column: values} for column, values in changes.items()), [swapped]:
        for columns in wrong:
            write(frame.assign(**columns))
            with pytest.raises(ValueError, match="changed after mpq wrote it"):
                CostTable.load(path)
    write(frame.drop(columns="size [B] | int4"))
    with pytest.raises(ValueError, match="changed after mpq wrote it"):
        CostTable.load(path)
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)
    with pytest.raises(ValueError, match="not an mpq table"):
        CostTable.load(path)


def test_a_csv_of_another_version_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    table().save(path)
    beside = path.with_suffix(".json")
    record = json.loads(beside.read_text())
    record["schema_version"] = 99
    beside.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="schema_version 99"):
        CostTable.load(path)


@pytest.mark.parametrize("path", ["table.txt", "no/such/folder/table.parquet", "no/such/folder/table.csv"])
def test_paths_that_cannot_be_written_are_errors(tmp_path, path):
    with pytest.raises(ValueError, match="table"):
        table().save(tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_a_million_units_are_arrays(tmp_path):
    layer = Layer("fc", "linear", (1000, 1000), 10**6, 10**6, (1, 1000), (1, 1000))
    units = Network((layer,)).units("groups:1")
    rng = np.random.default_rng(0)
    large = CostTable(
        units=units.labels,
        options=["int2", "int4"],
        quantities={"sensitivity": rng.random((len(units), 2)), "size": np.tile([0.25, 0.5], (len(units), 1))},
        parameters=units.parameters,
        layers=(layer,),
        layer_index=units.layer_index,
        granularity="groups:1",
    )
    assert len(large.units) == 10**6
    problem = large.problem({"size": "3 bits"})
    assert problem.budgets["size"] == 375000.0
    large.save(tmp_path / "large.parquet")
    same(large, CostTable.load(tmp_path / "large.parquet"))


def test_reachable_totals_include_what_no_option_touches():
    assert table().reachable("size") == (72.0, 132.0)


def test_totals_follow_the_aggregate():
    other = table(
        quantities={"stage": [[3.0, 5.0], [4.0, 1.0]], "peak": [[10.0, 20.0], [30.0, 40.0]]},
        aggregates={"stage": "max", "peak": "peak"},
        alive={"peak": [(0, 0), (1, 0), (1, 1), (2, 1)]},
    )
    assert other.reachable("stage") == (3.0, 5.0)
    assert other.reachable("peak") == (40.0, 60.0)
    worst = other.problem({"peak": "50%"}, objective="stage")
    assert (worst.peak_budgets, worst.norm) == ({"peak": 30.0}, np.inf)
    with pytest.raises(ValueError, match="'peak' is a peak over steps: it can have a budget"):
        other.problem({}, objective="peak")


def test_weights_are_whole_numbers_and_aggregates_have_a_name():
    with pytest.raises(ValueError, match="parameters must hold whole numbers"):
        table(parameters=[100.5, 20])
    with pytest.raises(ValueError, match="aggregate of 'size' must be one of sum, max, peak, got 'mean'"):
        table(aggregates={"size": "mean"})


def test_a_later_pin_overrides_an_earlier_one_and_may_be_an_option():
    from mpq.options import Option

    problem = table(ties=()).problem({}, pins={"*": "int8", "b": Option("int4")})
    assert problem.allowed.tolist() == [[False, True], [True, False]]


def test_a_csv_whose_rows_were_moved_is_refused_where_positions_count(tmp_path):
    path = tmp_path / "table.csv"
    table().save(path)
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[2:], *rows[:2]]) + "\n")
    with pytest.raises(ValueError, match="in the order mpq wrote them"):
        CostTable.load(path)
    path.with_suffix(".json").unlink()
    assert list(CostTable.load(path).units) == ["b", "a"]


def test_a_csv_does_not_overwrite_somebody_elses_json(tmp_path):
    (tmp_path / "run.json").write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match=r"run\.json.*describes no table"):
        table().save(tmp_path / "run.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    table().save(tmp_path / "other.csv")
    table().save(tmp_path / "other.csv")
