"""`mpq table`: measure cost tables, show what they hold, merge them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from mpq import completers
from mpq.command_arguments import (
    MODEL_HELP,
    budget_option,
    budgets_of,
    check_output,
    measure_options,
    model_options,
    quantizer_of,
    say_written,
    source_of,
)
from mpq.command_group import AnswerCommand, CommandGroup
from mpq.json_answers import TABLE_KEYS, json_text
from mpq.plan_commands import check_form
from mpq.search_commands import measured_table

_ENDINGS = (".parquet", ".csv")


@click.group(cls=CommandGroup, short_help="Measure, show and merge cost tables.")
def table() -> None:
    """Measure, show and merge cost tables: what every choice of every layer loses and costs.

    \b
    mpq table measure demo --options int4,int8 --output table.parquet
    mpq table show table.parquet
    mpq table merge host1.parquet host2.parquet --output table.parquet
    """  # noqa: D301 - click wants the character itself


@table.command(
    cls=AnswerCommand, answer=TABLE_KEYS, epilog=MODEL_HELP, short_help="Measure MODEL into a table; solve it later."
)
@click.option(
    "--output", required=True, metavar="TABLE.parquet", help="Write the table; .csv works as well.", default=None
)
@budget_option("Refused before anything is measured if no plan can keep it; several hold at once.", required=False)
@measure_options
@model_options
def measure(model: str, output: str, budgets: tuple[str, ...], **given: Any) -> None:
    """Measure MODEL into a table, which is solved for any budget without the model.

    \b
    mpq table measure demo --options int2,int4,int8 --output table.parquet
    mpq table measure net.py:load --hardware nvidia-t4 --cache measured --output table.parquet
    mpq table measure demo --options int2,int3,int4 --quantizer gptq --output gptq.parquet
    mpq solve table.parquet --budget size=30%
    """  # noqa: D301 - click wants the character itself
    check_output("--output", output, _ENDINGS)
    asked, source = budgets_of(budgets, given["hardware"]), source_of(model, given, files=True)
    measured = measured_table(source, given, budgets=asked or None, quantizer=quantizer_of(given, source))
    measured.save(output)
    _print(measured, [output], as_json=given["as_json"])


@table.command(cls=AnswerCommand, answer=TABLE_KEYS, short_help="What a table holds and what budgets can reach.")
@click.argument("table", shell_complete=completers.among((), files=".parquet"))
@click.option("--csv", "as_csv", is_flag=True, help="Every choice as plain comma-separated values, in base units.")
def show(table: str, as_csv: bool, as_json: bool) -> None:
    """What TABLE holds: its options, the sensitivity of every layer, what budgets can reach, where it came from.

    \b
    mpq table show table.parquet
    mpq table show table.parquet --csv > choices.csv
    """  # noqa: D301 - click wants the character itself
    from mpq.tables import CostTable

    check_form(as_csv=as_csv, as_json=as_json)
    loaded = CostTable.load(table)
    if as_csv:
        click.echo(loaded.frame.to_csv(), nl=False)
    else:
        _print(loaded, [], as_json=as_json)


@table.command(cls=AnswerCommand, answer=TABLE_KEYS, short_help="One table from partial ones of several hosts.")
@click.argument(
    "tables",
    nargs=-1,
    required=True,
    metavar="TABLE TABLE...",
    shell_complete=completers.among((), files=".parquet"),
)
@click.option("--output", required=True, metavar="TABLE.parquet", help="Write the merged table; .csv works as well.")
def merge(tables: tuple[str, ...], output: str, as_json: bool) -> None:
    """One table from partial ones, each measured on other data, other layers or other options.

    Scores of the same choice are averaged by samples, with the standard error over all of them; choices that one table
    lacks come from the others. Costs, measures and the model must be the same.

    \b
    mpq table merge host1.parquet host2.parquet --output table.parquet
    """  # noqa: D301 - click wants the character itself
    from mpq.table_merge import merge_tables
    from mpq.tables import CostTable

    check_output("--output", output, _ENDINGS)
    merged = merge_tables([CostTable.load(path) for path in tables], [repr(path) for path in tables])
    merged.save(output)
    if as_json:
        _print(merged, [output], as_json=True)
    else:
        click.echo(f"written: {output} ({len(merged.units)} units, {len(merged.options)} options)")


def _print(measured: Any, written: Iterable[str], *, as_json: bool) -> None:
    if as_json:
        from mpq.json_answers import table_answer

        click.echo(json_text(table_answer(measured, written=list(written))))
        return
    from mpq.table_contents import show_table

    show_table(measured)
    say_written(*written)
