"""`mpq evolve`: the frontier of measured plans, from the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from mpq import completers
from mpq.command_arguments import (
    LOADED_MODEL_HELP,
    budget_option,
    cache_option,
    check_output,
    data_alone,
    independent_option,
    metric_of,
    metric_option,
    name_value_pairs,
    pin_option,
    quantizer_of,
    quantizer_option,
    say_written,
    seconds_option,
    seed_option,
    source_of,
    study_of,
    study_options,
)
from mpq.command_group import AnswerCommand
from mpq.json_answers import json_text
from mpq.measured_answers import EVOLUTION_KEYS

_HOW = "--output FRONT.csv lists all, --plans FOLDER writes each"


@click.command(
    cls=AnswerCommand,
    answer=EVOLUTION_KEYS,
    epilog=LOADED_MODEL_HELP,
    short_help="The frontier of plans measured on MODEL, by evolution from a saved TABLE.",
)
@click.argument("model", shell_complete=completers.model)
@data_alone
@click.argument("table", shell_complete=completers.among((), files=".parquet"))
@click.option(
    "--resource",
    "resources",
    multiple=True,
    required=True,
    metavar="NAME",
    help="A quantity to make small besides what is lost: size, latency. Any number of them.",
    shell_complete=completers.quantity,
)
@budget_option("What every plan must keep.", required=False)
@pin_option
@click.option(
    "--sampler",
    type=click.Choice(["nsga2", "nsga3", "tpe"]),
    default="nsga2",
    show_default=True,
    help="nsga3 for four objectives or more; tpe models every layer, half a second a plan at 200 layers.",
)
@click.option(
    "--evaluations", type=click.IntRange(min=1), default=200, show_default=True, help="Plans measured in the study."
)
@seconds_option
@click.option(
    "--population",
    type=click.IntRange(min=2),
    default=24,
    show_default=True,
    help="Plans that survive a generation of NSGA.",
)
@quantizer_option
@independent_option
@metric_option("divergence")
@seed_option
@cache_option
@study_options
@click.option("--points", type=click.IntRange(min=2), default=20, show_default=True, help="Points to show.")
@click.option("--output", metavar="FRONT.csv", help="Write every point with the option of every unit.")
@click.option("--plans", metavar="FOLDER", help="Write the plan of every point, numbered, to a new folder.")
def evolve(model: str, table: str, budgets: tuple[str, ...], pins: tuple[str, ...], **given: Any) -> None:
    """The frontier of plans that are measured on MODEL's calibration data: what every bit of a resource buys.

    Evolution (NSGA-II) over measurements, from the exact frontier of a saved TABLE. Every plan keeps budgets, ties and
    pins. With --storage several processes search together, and with more --evaluations it goes on where it ended. The
    figures are of the data that chose the plans: `mpq verify` judges one on other data.

    \b
    mpq search demo --options int2,int3,int4,int8 --budget size=20% --table table.parquet
    mpq evolve demo table.parquet --resource size --evaluations 100
    mpq evolve demo table.parquet --resource size --resource bops --budget size=25% --plans front
    mpq evolve demo table.parquet --resource size --storage shared.log    in each of several terminals
    """  # noqa: D301 - click wants the character itself
    from mpq.evaluator import Evaluator
    from mpq.evolution import evolve as evolved
    from mpq.table_report import show_front
    from mpq.tables import CostTable

    check_output("--output", given["output"], (".csv",))
    _check_folder(given["plans"], given["output"])
    loaded, shared = CostTable.load(table), {"study": "evolve"} | study_of(given)
    asked, pinned = name_value_pairs("budget", budgets), name_value_pairs("pin", pins)
    metric = metric_of(given["metric"])
    for name in given["resources"]:
        loaded.quantity(name)  # before anything long starts
    source = source_of(model, given)
    quantizer = quantizer_of(given, source, scored_by=loaded.provenance.get("quantizer"))
    how = {"task": source.task, "quantizer": quantizer, "metric": metric}
    how |= {name: given[name] for name in ("cache", "seed", "independent")}
    evaluator = Evaluator(source.model, source.data, loaded, **how)
    seconds = math.inf if given["seconds"] is None else given["seconds"]
    search = {name: given[name] for name in ("sampler", "evaluations", "population", "seed")} | shared
    front = evolved(evaluator, given["resources"], asked, pins=pinned, seconds=seconds, **search)
    written = _written(front, given["output"], given["plans"])
    if given["as_json"]:
        from mpq.measured_answers import evolution_answer

        click.echo(json_text(evolution_answer(front, written=written)))
        return
    show_front(loaded, front, (*front.names, front.objective_name), points=given["points"], how=_HOW)
    found = f"{front.provenance['plans']} plans measured on {evaluator.samples} {evaluator.independent}"
    click.echo(f"{found}, which chose them; {front.provenance['stopped']}")
    say_written(*written)


def _check_folder(plans: str | None, output: str | None) -> None:
    """Make the folder before long work; refuse one where plans of another front would stay among the new ones.

    Raises:
        ValueError: if it is a file, has files, or cannot be made.
    """
    if plans is None:
        return
    folder = Path(plans)
    if (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))) or plans == output:
        raise ValueError(f"--plans must be a new or an empty folder, got {plans!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--plans must be a folder that can be made, got {plans!r}: {error.strerror}") from None
    check_output("--plans", str(folder / "01.json"))


def _written(front: Any, output: str | None, plans: str | None) -> list[str]:
    """The files asked for."""
    from mpq.atomic import write_atomically

    written = []
    if output is not None:
        write_atomically(output, front.to_frame().to_csv(index=False))
        written.append(output)
    if plans is not None:
        for number, point in enumerate(front, start=1):
            path = Path(plans) / f"{number:0{max(2, len(str(len(front))))}}.json"
            front.plan(point).save(path)
            written.append(str(path))
    return written
