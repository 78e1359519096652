"""`mpq refine`: a plan improved by measuring others on the model, from the command line."""

from __future__ import annotations

from dataclasses import replace
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
    study_of,
    study_options,
)
from mpq.command_group import AnswerCommand
from mpq.json_answers import json_text
from mpq.measured_answers import REFINEMENT_KEYS

_LEVEL_HELP = "Of the test on fresh samples that a better plan must pass; 0.05 where a change must be sure."


@click.command(
    cls=AnswerCommand,
    answer=REFINEMENT_KEYS,
    epilog=LOADED_MODEL_HELP,
    short_help="Improve the plan of a saved TABLE by measuring others on MODEL.",
)
@model_options
@click.argument("table", shell_complete=completers.among((), files=".parquet"))
@budget_option("What every plan keeps: size=18%; with --start that plan's own by default.", required=False)
@pin_option
@click.option("--start", metavar="PLAN.json", help="Go on from this plan of the table rather than from its best.")
@click.option("--evaluations", type=click.FloatRange(min=1), help="Measurements of the whole data; 200 by default.")
@seconds_option
@click.option(
    "--level",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    help=_LEVEL_HELP,
)
@quantizer_option
@independent_option
@metric_option("divergence")
@seed_option
@cache_option
@study_options
@click.option("--output", metavar="PLAN.json", help="Write the plan.")
@click.option(
    "--front",
    metavar="QUANTITY",
    help="Print the frontier of all measured plans as well: size, latency.",
    shell_complete=completers.quantity,
)
def refine(model: str, table: str, budgets: tuple[str, ...], pins: tuple[str, ...], **given: Any) -> None:
    """Improve the plan of a saved TABLE by measuring others on MODEL's calibration data.

    TABLE is what `mpq search --table` or `mpq table measure` wrote. Where MODEL comes with held-out data, the result is
    measured on it, which the search never sees. Give a folder of text more --samples than a search: 64 or more.

    \b
    mpq search demo --budget "size=3 bits" --table table.parquet
    mpq refine demo table.parquet --budget "size=3 bits" --cache measured --output plan.json
    mpq refine demo table.parquet --budget "size=3 bits" --evaluations 50 --front size
    mpq refine demo table.parquet --start plan.json --seed 1
    mpq refine demo table.parquet --budget "size=3 bits" --quantizer gptq --metric agreement
    mpq refine demo table.parquet --budget "size=3 bits" --storage shared.log    in each of several terminals
    """  # noqa: D301 - click wants the character itself
    from mpq.plan import Plan
    from mpq.tables import CostTable

    check_output("--output", given["output"])
    shared = study_of(given)
    asked, pinned, loaded = name_value_pairs("budget", budgets), name_value_pairs("pin", pins), CostTable.load(table)
    if not asked and given["start"] is None:
        raise ValueError(
            "what plans must keep has to be given: --budget size=18%, or --start with a plan that has budgets"
        )
    if given["front"] is not None:
        loaded.quantity(given["front"])  # before anything long starts
    source = source_of(model, given)
    quantizer = quantizer_of(given, source, scored_by=loaded.provenance.get("quantizer"))
    from mpq.refinement import refine as refine_table

    how = {name: given[name] for name in ("evaluations", "seconds", "seed", "level", "cache", "independent")}
    how |= {"task": source.task, "quantizer": quantizer, "metric": metric_of(given["metric"]), "pins": pinned}
    start = loaded if given["start"] is None else replace(Plan.load(given["start"]), table=loaded)
    found = refine_table(source.model, source.data, start, asked or None, holdout=source.holdout, **how, **shared)
    written = [given["output"]] if given["output"] is not None else []
    for path in written:
        found.plan.save(path)
    if given["as_json"]:
        from mpq.measured_answers import refinement_answer

        click.echo(json_text(refinement_answer(found, front=given["front"], written=written)))
        return
    click.echo(str(found))
    if given["front"] is not None:
        click.echo(found.evaluator.frontier(given["front"]).to_frame().to_csv(index=False), nl=False)
    say_written(*written)
