"""`mpq demo`: the main job on the embedded model, told as a story, with what to try next."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mpq.command_group import AnswerCommand
from mpq.json_answers import SEARCH_KEYS
from mpq.search_commands import search

OPTIONS, BUDGET, DEVICE = "int2,int3,int4,int6,int8", "25%", "nvidia-t4"


@click.command(cls=AnswerCommand, answer=SEARCH_KEYS, short_help="Plan the embedded model: the main job in seconds.")
@click.option(
    "--folder", metavar="FOLDER", default="mpq-demo", show_default=True, help="Where plan, table and page are written."
)
@click.option("--size", default=BUDGET, show_default=True, metavar="LIMIT", help='Budget of size: 20%, "5 bits".')
@click.pass_context
def demo(context: click.Context, folder: str, size: str, *, as_json: bool) -> None:
    """Plan a small trained network that comes with mpq, verify the plan, and say what to try next.

    \b
    mpq demo
    mpq demo --size "4 bits"
    """  # noqa: D301 - click wants the character itself
    place = _made(folder)
    plan, table, page = (str(place / name) for name in ("plan.json", "table.parquet", "page.html"))
    files = ["--output", plan, "--table", table, "--report", page]
    command = ["mpq", "search", "demo", "--options", OPTIONS, "--budget", f"size={size}", "--hardware", DEVICE]
    if not as_json:
        click.echo(_BEGINNING.format(size=size, options=OPTIONS.replace(",", ", "), device=DEVICE))
        click.echo(f"$ {shlex.join([*command, *files])}\n")
    given = {"model": "demo", "options": OPTIONS, "budgets": (f"size={size}",), "hardware": DEVICE}
    context.invoke(search, **given, output=plan, table_path=table, report=page, as_json=as_json)
    if not as_json:
        click.echo(_NEXT.format(plan=shlex.quote(plan), table=shlex.quote(table), page=page))


_BEGINNING = """\
A residual network that reads digits has 9 layers in 32-bit floats. Its size shall be {size}, each layer in one of
{options}. mpq measures what every layer loses in every format, prices the formats on {device},
takes the best assignment, and checks it on images that it has not seen:
"""
_NEXT = """
{page} explains the plan: open it in a browser. To try next:

  another budget, at once, without the model    mpq solve {table} --budget size=15%
  what every byte buys                          mpq pareto {table} --resource size
  measured again, for a program                  mpq verify demo {plan} --table {table} --json
  the plan, for another library                 mpq export {plan} hawq
  what a microcontroller could run              mpq inspect demo --options int8/int8 --hardware stm32h743-cmsisnn
  your own: load() returns model, data          mpq search net.py:load --budget size=25%"""


def _made(folder: str) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--folder must be a folder that can be made, got {folder!r}: {error.strerror}") from error
    return Path(folder)
