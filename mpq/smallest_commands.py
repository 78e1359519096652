"""`mpq smallest`: how small a model can be that loses no more than allowed, from the command line."""

from __future__ import annotations

from typing import Any

import click

from mpq import completers
from mpq.command_arguments import (
    LOADED_MODEL_HELP,
    budget_option,
    cache_option,
    check_output,
    independent_option,
    metric_of,
    metric_option,
    model_options,
    name_value_pairs,
    pin_option,
    quantizer_of,
    quantizer_option,
    say_written,
    seconds_option,
    seed_option,
    source_of,
)
from mpq.command_group import AnswerCommand
from mpq.json_answers import json_text
from mpq.measured_answers import SMALLEST_KEYS


@click.command(
    cls=AnswerCommand,
    answer=SMALLEST_KEYS,
    epilog=LOADED_MODEL_HELP,
    short_help="The smallest plan of a saved TABLE that is measured to lose no more than allowed.",
)
@model_options
@click.argument("table", shell_complete=completers.among((), files=".parquet"))
@click.option("--drop", required=True, metavar="LIMIT", help="The most that may be lost on average: 1%, 0.01.")
@independent_option
@metric_option("accuracy", "What --drop limits")
@click.option(
    "--resource",
    metavar="NAME",
    default="size",
    show_default=True,
    help="The quantity to make small: size, latency.",
    shell_complete=completers.quantity,
)
@budget_option("What the plan must keep besides.", required=False)
@pin_option
@click.option(
    "--level",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Of the test that the drop is below the limit.",
)
@click.option("--evaluations", type=click.IntRange(min=1), help="Plans measured at most; 60 by default.")
@seconds_option
@quantizer_option
@seed_option
@cache_option
@click.option("--output", metavar="PLAN.json", help="Write the plan.")
def smallest(model: str, table: str, budgets: tuple[str, ...], pins: tuple[str, ...], **given: Any) -> None:
    """The smallest plan of a saved TABLE that is measured on MODEL's data to lose at most --drop.

    Bisection along the table's frontier finds where the drop is within the limit; then plans from there on are tested,
    smallest first, until the test is sure; where it is of none, nothing is written and the exit code is 3. Data that
    the TABLE was not made on says more; where MODEL comes with held-out data, the drop of the result is measured on
    that as well. With few samples no small drop can be sure: 300 without a single flip show one of at most 1%.

    \b
    mpq search demo --options int2,int3,int4,int8 --budget size=20% --table table.parquet
    mpq smallest demo table.parquet --drop 1%
    mpq smallest demo table.parquet --drop 2% --metric agreement --output plan.json
    mpq smallest demo table.parquet --drop 0.01 --metric divergence --budget "size=4 bits"
    """  # noqa: D301 - click wants the character itself
    from mpq.accuracy_constraint import smallest as smallest_plan
    from mpq.tables import CostTable

    check_output("--output", given["output"])
    drop, loaded = _share(given["drop"]), CostTable.load(table)
    loaded.quantity(given["resource"])
    how: dict[str, Any] = {"budgets": name_value_pairs("budget", budgets), "pins": name_value_pairs("pin", pins)}
    source = source_of(model, given)
    how |= {"quantizer": quantizer_of(given, source, scored_by=loaded.provenance.get("quantizer")), "task": source.task}
    how |= {name: given[name] for name in ("resource", "level", "seconds", "seed", "cache", "independent")}
    how |= {} if given["evaluations"] is None else {"evaluations": given["evaluations"]}
    metric = metric_of(given["metric"])
    found = smallest_plan(source.model, source.data, loaded, drop=drop, metric=metric, holdout=source.holdout, **how)
    written = []
    if found.plan is not None and given["output"] is not None:
        found.plan.save(given["output"])
        written.append(given["output"])
    if given["as_json"]:
        from mpq.measured_answers import smallest_answer

        click.echo(json_text(smallest_answer(found, written=written)))
    else:
        click.echo(str(found))
        say_written(*written)
    if found.plan is None:
        click.get_current_context().exit(3)


def _share(text: str) -> float:
    """A number, or a percentage.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> _share("1%"), _share("0.5")
        (0.01, 0.5)
    """
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise ValueError(f"--drop must be a number or a percentage, such as 0.01 or 1%, got {text!r}") from None
