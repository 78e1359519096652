"""`mpq solve`, `mpq pareto`, `mpq table`: commands on saved cost tables, without the model and without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

TABLE_HELP = (
    "TABLE is what `mpq search --table` wrote, or a CSV file written by hand: a row a choice, columns unit, option, "
    'sensitivity and any others with their unit, such as "size [B]" or "latency [s]".'
)
_FORMS = {"budget": "NAME=LIMIT", "name": "LAYER=THEIRS", "pin": "PATTERN=OPTION", "format-cost": "OPTION=COST"}


def name_value_pairs(role: str, texts: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` arguments as a dict.

    Raises:
        ValueError: for an argument of another form, or a name that is given twice.

    Example:
        >>> name_value_pairs("budget", ["size=18%", "latency=4 ms"])
        {'size': '18%', 'latency': '4 ms'}
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"--{role} must be {_FORMS[role]}, got {text!r}")
        if name in pairs:
            raise ValueError(f"--{role} of {name!r} is given twice, as {pairs[name]!r} and as {value!r}")
        pairs[name] = value
    return pairs


def table_options(command: Command) -> Command:
    """The arguments that both commands take."""
    for decorate in reversed(
        (
            click.argument("table"),
            click.option(
                "--minimise",
                "--minimize",
                "objective",
                default="sensitivity",
                show_default=True,
                metavar="NAME",
                help="The quantity to make small; any other may have a budget.",
            ),
            click.option(
                "--pin", "pins", multiple=True, metavar="PATTERN=OPTION", help="Option that these layers (units) take."
            ),
            click.option("--csv", "as_csv", is_flag=True, help="Plain comma-separated values."),
            click.option("--json", "as_json", is_flag=True, help="JSON, values in base units."),
        )
    ):
        command = decorate(command)
    return command


@click.command(epilog=TABLE_HELP, short_help="The best plan of a saved TABLE under budgets, without the model.")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    required=True,
    metavar="NAME=LIMIT",
    help='What the plan must keep: size=18%, "size=4.5 bits", "latency=4 ms", sensitivity=0.01. Several hold at once.',
)
@click.option("--solver", default="auto", show_default=True, help="Solver of `mpq list`.")
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
    _check_form(given)
    if output is not None:
        _check_output(output, (".json", ".csv"))
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
    _say_written(output, given)


@click.command(epilog=TABLE_HELP, short_help="The frontier of a saved TABLE: what every bit of a resource buys.")
@click.option("--resource", required=True, metavar="NAME", help="The quantity to trade for sensitivity: size, latency.")
@click.option("--budget", "budgets", multiple=True, metavar="NAME=LIMIT", help="What every point must keep.")
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

    \b
    mpq pareto table.parquet --resource size
    mpq pareto table.parquet --resource latency --budget size=30% --output front.csv
    """  # noqa: D301 - click wants the character itself
    from mpq.planning import trade_off
    from mpq.table_report import front_csv, front_json, show_front
    from mpq.tables import CostTable

    asked = name_value_pairs("budget", budgets)
    _check_form(given)
    if output is not None:
        _check_output(output, (".csv",))
    loaded = CostTable.load(table)
    names = (given["resource"], given["objective"])
    front = trade_off(
        loaded,
        given["resource"],
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
    _say_written(output, given)


@click.group(short_help="Work on saved cost tables.")
def table() -> None:
    """Work on saved cost tables; needs neither the model nor torch."""


@table.command(short_help="One table from partial ones of several hosts.")
@click.argument("tables", nargs=-1, required=True, metavar="TABLE TABLE...")
@click.option("--output", required=True, metavar="TABLE.parquet", help="Write the merged table; .csv works as well.")
def merge(tables: tuple[str, ...], output: str) -> None:
    """One table from partial ones, each measured on other data, other layers or other options.

    Scores of the same choice are averaged by samples, with the standard error over all of them; choices that one table
    lacks come from the others. Costs, measures and the model must be the same.

    \b
    mpq table merge host1.parquet host2.parquet --output table.parquet
    """  # noqa: D301 - click wants the character itself
    from mpq.table_merge import merge_tables
    from mpq.tables import CostTable

    _check_output(output, (".parquet", ".csv"))
    merged = merge_tables([CostTable.load(path) for path in tables], [repr(path) for path in tables])
    merged.save(output)
    click.echo(f"written: {output} ({len(merged.units)} units, {len(merged.options)} options)")


def _check_form(given: dict[str, Any]) -> None:
    if given["as_csv"] and given["as_json"]:
        raise ValueError("--csv and --json are two forms of one output: give one of them")


def _check_output(output: str, endings: tuple[str, ...]) -> None:
    from mpq.atomic import check_writable

    if not output.endswith(endings):
        raise ValueError(f"--output must end in {' or '.join(endings)}, got {output!r}")
    check_writable(output)


def _write(path: str, text: str) -> None:
    from mpq.atomic import write_atomically

    write_atomically(path, text)


def _say_written(output: str | None, given: dict[str, Any]) -> None:
    if output is not None:
        click.echo(f"written: {output}", err=given["as_csv"] or given["as_json"])


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
