"""`mpq refine`: a plan improved by measuring others on the model, from the command line."""

from __future__ import annotations

from typing import Any

import click

from mpq.table_commands import name_value_pairs


@click.command(short_help="Improve the plan of a saved TABLE by measuring others on MODEL.")
@click.argument("model")
@click.argument("table")
@click.option(
    "--budget", "budgets", multiple=True, required=True, metavar="NAME=LIMIT", help="What every plan keeps: size=18%."
)
@click.option("--pin", "pins", multiple=True, metavar="PATTERN=OPTION", help="Option that these layers take.")
@click.option("--evaluations", type=click.FloatRange(min=1), help="Measurements of the whole data; 200 by default.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="No measurement is begun later.")
@click.option("--level", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
              help="Of the test on fresh samples that a better plan must pass.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--cache", metavar="FOLDER", help="Keep measurements here: an interrupted search goes on.")
@click.option("--data", "text", metavar="TEXT", help="Text file, for a transformers folder.")
@click.option("--samples", default=64, show_default=True, help="Windows of that text; as many are held out.")
@click.option("--tokens", default=128, show_default=True, help="Tokens a window.")
@click.option("--output", metavar="PLAN.json", help="Write the plan.")
@click.option("--front", metavar="QUANTITY", help="Print the frontier of all measured plans as well: size, latency.")
def refine(model: str, table: str, budgets: tuple[str, ...], pins: tuple[str, ...], **given: Any) -> None:
    """Improve the plan of a saved TABLE by measuring others on MODEL's calibration data.

    MODEL is as for `mpq search`; TABLE is what `mpq search --table` wrote. Where MODEL comes with held-out data, the
    result is measured on it, which the search never sees.

    \b
    mpq search demo --budget "size=3 bits" --table table.parquet
    mpq refine demo table.parquet --budget "size=3 bits" --output plan.json
    """  # noqa: D301 - click wants the character itself
    from mpq.atomic import check_writable
    from mpq.model_source import load_source
    from mpq.refinement import refine as refine_table
    from mpq.tables import CostTable

    if given["output"] is not None:
        check_writable(given["output"])
    source = load_source(model, text=given["text"], samples=given["samples"], tokens=given["tokens"])
    found = refine_table(
        source.model,
        source.data,
        CostTable.load(table),
        name_value_pairs("budget", budgets),
        holdout=source.holdout,
        pins=name_value_pairs("pin", pins),
        task=source.task,
        evaluations=given["evaluations"],
        seconds=given["seconds"],
        seed=given["seed"],
        cache=given["cache"],
        level=given["level"],
    )
    click.echo(str(found))
    if given["front"] is not None:
        click.echo(found.evaluator.frontier(given["front"]).to_frame().to_csv(index=False), nl=False)
    if given["output"] is not None:
        found.plan.save(given["output"])
        click.echo(f"written: {given['output']}")
