"""`mpq report`: a page that explains a plan."""

from __future__ import annotations

from typing import Any

import click

from mpq import completers
from mpq.command_arguments import (
    MODEL_HELP,
    adjust_option,
    check_output,
    data_options,
    quantizer_option,
    say_written,
    seed_option,
    source_of,
    together,
)
from mpq.command_group import ToldCommand
from mpq.plan_commands import measured_verification

_TABLE_HELP = "Cost table of the search: brings the frontier, the prices of budgets and the sensitivity of layers."
_MODEL_OPTION_HELP = "Measure the plan and simpler rules on this model's held-out data."
_HARDWARE_HELP = "The plan's device file, where it is no device of `mpq list`: brings every number and source."


@click.command(cls=ToldCommand, epilog=MODEL_HELP, short_help="A page that explains PLAN, in one HTML file.")
@click.argument("plan", shell_complete=completers.among((), files=".json"))
@click.option(
    "--table",
    "table_path",
    metavar="TABLE.parquet",
    help=_TABLE_HELP,
    shell_complete=completers.among((), files=".parquet"),
)
@click.option("--model", metavar="MODEL", help=_MODEL_OPTION_HELP, shell_complete=completers.model)
@click.option("--hardware", metavar="FILE", help=_HARDWARE_HELP, shell_complete=completers.device)
@click.option("--output", default="report.html", show_default=True, metavar="REPORT.html", help="Write the page.")
@together(quantizer_option, adjust_option, seed_option, data_options)
def report(plan: str, table_path: str | None, model: str | None, output: str, **given: Any) -> None:
    """A page that explains PLAN: one HTML file that needs no network.

    It has what is known: sizes and formats from PLAN alone, predictions, the frontier and prices of budgets with
    --table, measured figures and baselines with --model. What is missing names what brings it.

    \b
    mpq report plan.json --table table.parquet --output report.html
    mpq report plan.json --table table.parquet --model demo
    mpq report plan.json --table table.parquet --model ./my-llm --data text.txt
    mpq report plan.json --table table.parquet --model demo --quantizer gptq --adjust bias-correction
    """  # noqa: D301 - click wants the character itself
    from mpq.plan import Plan
    from mpq.tables import CostTable

    check_output("--output", output, (".html", ".htm"))
    loaded = Plan.load(plan)
    table = None if table_path is None else CostTable.load(table_path)
    found, data = None, "verification"
    if model is not None:
        found, data = measured_verification(source_of(model, given), loaded, table, given)
    elif given["adjustments"] or given["quantizer"] != "nearest":
        raise ValueError("--quantizer and --adjust say how the plan is measured: give --model MODEL")
    from mpq.reporting import write_report

    write_report(loaded, output, table, found, device=given["hardware"], model=model or "MODEL", data=data)
    say_written(output)
