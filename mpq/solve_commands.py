"""`mpq solve` and `mpq pareto`: answers from saved cost tables, without the model and without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from mpq import completers
from mpq.command_arguments import (
    budget_option,
    check_output,
    name_value_pairs,
    pin_option,
    say_written,
    solver_option,
    together,
)
from mpq.command_group import AnswerCommand
from mpq.json_answers import FRONT_KEYS, SOLUTION_KEYS
from mpq.plan_commands import check_form

TABLE_HELP = (
    "TABLE is what `mpq search --table` wrote, or a CSV file written by hand: a row a choice, columns unit, option, "
    'sensitivity and any others with their unit, such as "size [B]" or "latency [s]".'
)
_BUDGET_HELP = (
    'What the plan must keep: size=18%, "size=4.5 bits", "latency=4 ms", sensitivity=0.01. Several hold at once.'
)


table_options = together(
    click.argument("table", shell_complete=completers.among((), files=".parquet")),
    click.option(
        "--minimise",
        "--minimize",
        "objective",
        default="sensitivity",
        show_default=True,
        metavar="NAME",
        help="The quantity to make small; any other may have a budget.",
        shell_complete=completers.quantity,
    ),
    pin_option,
    click.option("--csv", "as_csv", is_flag=True, help="Plain comma-separated values."),
)
"""The arguments that both commands take."""


@click.command(
    cls=AnswerCommand,
    answer=SOLUTION_KEYS,
    epilog=TABLE_HELP,
    short_help="The best plan of a saved TABLE under budgets, without the model.",
)
@budget_option(_BUDGET_HELP)
@solver_option
@click.option("--max-formats", type=click.IntRange(min=1), metavar="N", help="At most so many different options.")
@click.option(
    "--format-cost",
    "format_costs",
    multiple=True,
    metavar="OPTION=COST",
    help="Added to what is minimised once the option is used anywhere.",
)
@click.option("--norm", metavar="1|max|P", help="Minimise the sum (1), the worst (max), or (sum of x^P)^(1/P).")
@click.option(
    "--robust",
    type=click.FloatRange(min=0),
    metavar="K",
    help="Minimise what sensitivity comes to K standard errors for the worse.",
)
@click.option("--output", metavar="PLAN.json|UNITS.csv", help="Write the plan, or the option of every unit.")
@table_options
def solve(table: str, budgets: tuple[str, ...], output: str | None, **given: Any) -> None:
    """The best plan of a saved TABLE under budgets; needs neither the model nor torch.

    \b
    mpq solve table.parquet --budget size=30%
    mpq solve table.parquet --budget "size=4.5 bits" --budget "latency=4 ms" --output plan.json
    mpq solve table.parquet --minimise size --budget sensitivity=0.01
    mpq solve by-hand.csv --budget "area=3 mm2" --max-formats 2 --output units.csv
    """  # noqa: D301 - click wants the character itself
    from mpq.planning import solve_units
    from mpq.table_report import show_solution, solution_csv, solution_json
    from mpq.tables import CostTable

    asked = name_value_pairs("budget", budgets)
    check_form(as_csv=given["as_csv"], as_json=given["as_json"])
    check_output("--output", output, (".json", ".csv"))
    loaded = CostTable.load(table)
    if output is not None and output.endswith(".json") and not loaded.layers:
        raise ValueError(f"{table!r} has no layers to make a plan for: write the units with --output NAME.csv")
    solution = solve_units(
        loaded,
        asked,
        objective=given["objective"],
        solver=given["solver"],
        pins=name_value_pairs("pin", given["pins"]),
        norm=_norm(given["norm"]),
        robust=given["robust"],
        max_formats=given["max_formats"],
        format_costs=_costs(given["format_costs"]),
    )
    if output is not None and output.endswith(".json"):
        solution.plan().save(output)
    elif output is not None:
        _write(output, solution_csv(solution))
    if given["as_csv"]:
        click.echo(solution_csv(solution), nl=False)
    elif given["as_json"]:
        click.echo(solution_json(solution))
    else:
        show_solution(solution)
    say_written(output, quiet=given["as_csv"] or given["as_json"])


@click.command(
    cls=AnswerCommand,
    answer=FRONT_KEYS,
    epilog=TABLE_HELP,
    short_help="The frontier of a saved TABLE: what every bit of a resource buys.",
)
@click.option(
    "--resource",
    "resources",
    required=True,
    multiple=True,
    metavar="NAME",
    help="The quantity to trade for sensitivity: size, latency. Up to three are traded together.",
    shell_complete=completers.quantity,
)
@budget_option("What every point must keep.", required=False)
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0),
    default=1e-4,
    show_default=True,
    help="Leave out points that are better by less than this fraction; 0 keeps every one.",
)
@click.option("--points", type=click.IntRange(min=2), default=20, show_default=True, help="Points to show.")
@click.option("--output", metavar="FRONT.csv", help="Write every point.")
@table_options
def pareto(table: str, budgets: tuple[str, ...], output: str | None, **given: Any) -> None:
    """The Pareto frontier of a saved TABLE: for every amount of a resource the best that it buys.

    With several resources: every plan that no other beats in all of them and in what is minimised.

    \b
    mpq pareto table.parquet --resource size
    mpq pareto table.parquet --resource size --resource latency --epsilon 0.01 --output front.csv
    mpq pareto table.parquet --resource latency --budget size=30% --output front.csv
    """  # noqa: D301 - click wants the character itself
    from mpq.planning import trade_off
    from mpq.table_report import front_csv, front_json, show_front
    from mpq.tables import CostTable

    asked = name_value_pairs("budget", budgets)
    check_form(as_csv=given["as_csv"], as_json=given["as_json"])
    check_output("--output", output, (".csv",))
    loaded = CostTable.load(table)
    resources = given["resources"]
    if twice := [name for name in resources if resources.count(name) > 1]:
        raise ValueError(f"--resource {twice[0]} is given twice: a quantity is traded once")
    names = (*resources, given["objective"])
    front = trade_off(
        loaded,
        resources[0] if len(resources) == 1 else resources,
        asked,
        objective=given["objective"],
        pins=name_value_pairs("pin", given["pins"]),
        epsilon=given["epsilon"],
    )
    if output is not None:
        _write(output, front_csv(loaded, front, names))
    if given["as_csv"]:
        click.echo(front_csv(loaded, front, names), nl=False)
    elif given["as_json"]:
        click.echo(front_json(loaded, front, names))
    else:
        show_front(loaded, front, names, points=given["points"])
    say_written(output, quiet=given["as_csv"] or given["as_json"])


def _write(path: str, text: str) -> None:
    from mpq.atomic import write_atomically

    write_atomically(path, text)


def _norm(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return math.inf if text == "max" else float(text)
    except ValueError:
        raise ValueError(f"--norm must be 1, max or a number above 1, got {text!r}") from None


def _costs(texts: Sequence[str]) -> dict[str, float] | None:
    costs = {}
    for option, text in name_value_pairs("format-cost", texts).items():
        try:
            costs[option] = float(text)
        except ValueError:
            raise ValueError(f"--format-cost of {option!r} must be a number, got {text!r}") from None
    return costs or None
