"""Budget strings, and what they mean for a table."""

import numpy as np
import pytest

from mpq.budgets import format_quantity, parse_budget
from mpq.limits import apply_budgets
from mpq.tables import CostTable


@pytest.mark.parametrize(
    ("quantity", "text", "measure", "kind", "value"),
    [
        ("size", 1.2e6, "B", "absolute", 1.2e6),
        ("size", np.int64(500), "B", "absolute", 500.0),
        ("size", "18%", "B", "fraction", 0.18),
        ("size", "4.5 bits", "B", "bits", 4.5),
        ("size", "4 bits values", "B", "value bits", 4.0),
        ("size", "7.9 MB", "B", "absolute", 7.9e6),
        ("size", "2MiB", "B", "absolute", 2 * 2**20),
        ("size", "300 kB", "B", "absolute", 3e5),
        ("size", "1e6", "B", "absolute", 1e6),
        ("latency", "4 ms", "s", "absolute", 4e-3),
        ("latency", "250us", "s", "absolute", 250e-6),
        ("energy", "2 mJ", "J", "absolute", 2e-3),
        ("energy", "80 %", "J", "fraction", 0.8),
        ("bops", "34 GBOPs", "bops", "absolute", 34e9),
        ("sensitivity", "0.02", "loss", "absolute", 0.02),
        ("area", "3 mm2", "mm2", "absolute", 3.0),
    ],
)
def test_budgets_as_people_write_them(quantity, text, measure, kind, value):
    budget = parse_budget(quantity, text, measure)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))
    again = parse_budget(quantity, str(budget), measure)
    assert again.kind == kind
    assert again.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("quantity", "text", "measure"),
    [
        ("size", "4 ms", "B"),
        ("latency", "4 MB", "s"),
        ("latency", "4 bits", "s"),
        ("energy", "4 ms", "J"),
        ("size", "much", "B"),
        ("size", "-3 MB", "B"),
        ("size", "0", "B"),
        ("size", float("nan"), "B"),
        ("size", "inf", "B"),
        ("size", True, "B"),
        ("size", None, "B"),
    ],
)
def test_wrong_units_and_numbers_name_the_budget(quantity, text, measure):
    with pytest.raises(ValueError, match=f"budget of {quantity}"):
        parse_budget(quantity, text, measure)


def table(**fields):
    return CostTable(
        units=["a", "b"],
        options=["int4", "int8"],
        quantities={
            "sensitivity": [[2.0, 1.0], [2.0, 1.0]],
            "size": [[52.0, 102.0], [12.0, 22.0]],
            "value_size": [[50.0, 100.0], [10.0, 20.0]],
            "latency": [[1e-3, 2e-3], [1e-3, 2e-3]],
        },
        parameters=[100, 20],
        offsets={"size": 8.0},
        **fields,
    )


def limit(budget, **fields):
    [only] = apply_budgets(table(**fields), budget)
    return only.resource, only.value


def test_percent_is_of_the_model_as_it_stands_else_of_the_dearest_option():
    assert limit({"size": "25%"}, reference={"size": 488.0}) == ("size", 122.0)
    assert limit({"latency": "50%"}) == ("latency", pytest.approx(2e-3))
    assert limit({"size": "50%"}) == ("size", 0.5 * (102 + 22 + 8))


def test_bits_average_over_planned_weights_and_leave_the_rest_of_the_model_alone():
    assert limit({"size": "4.5 bits"}) == ("size", 4.5 * 120 / 8 + 8)
    assert limit({"size": "4 bits values"}) == ("value_size", 60.0)


def test_the_meaning_names_what_100_percent_or_the_denominator_is():
    [percent] = apply_budgets(table(reference={"size": 488.0}), {"size": "25%"})
    assert "100% is the model as it stands, 488 B" in percent.meaning
    [bits] = apply_budgets(table(), {"size": "4.5 bits"})
    assert "120 weights" in bits.meaning


def test_an_unknown_quantity_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'latncy'.*'latency'"):
        apply_budgets(table(), {"latncy": "4 ms"})


@pytest.mark.parametrize("measure", ["B", "s", "J", "bops"])
def test_formatted_quantities_read_back_to_three_digits(measure):
    rng = np.random.default_rng(0)
    low, high = (0, 13) if measure in ("B", "bops") else (-12, 0)
    for value in 10 ** rng.uniform(low, high, 200):
        text = format_quantity(value, measure)
        expected = round(value) if measure == "B" and value < 1000 else value
        assert parse_budget("x", text, measure).value == pytest.approx(expected, rel=6e-3)


@pytest.mark.parametrize(
    ("value", "measure", "text"),
    [
        (9996.0, "B", "10.0 kB"),
        (999.7, "B", "1.00 kB"),
        (999_960.0, "B", "1.00 MB"),
        (99_960.0, "B", "100 kB"),
        (9.996e-6, "s", "10.0 us"),
        (1e-3, "s", "1.00 ms"),
        (-2500.0, "B", "-2.50 kB"),
        (0.0, "B", "0 B"),
        (0.25, "loss", "0.25"),
        (2.5, "mm2", "2.5 mm2"),
    ],
)
def test_quantities_have_three_digits_and_their_unit(value, measure, text):
    assert format_quantity(value, measure) == text
