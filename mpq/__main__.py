"""The command line. Heavy libraries are imported by the commands that need them, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from mpq import __version__, completers
from mpq.command_group import SETTINGS, TYPED, OneLineErrors
from mpq.config_commands import completion, config
from mpq.config_file import FILE_NAME
from mpq.demo_commands import demo
from mpq.device_commands import device
from mpq.evolve_commands import evolve
from mpq.export_commands import compare, export, import_
from mpq.list_commands import list_
from mpq.plan_commands import show, verify
from mpq.refine_commands import refine
from mpq.report_commands import report
from mpq.search_commands import inspect, search
from mpq.smallest_commands import smallest
from mpq.solve_commands import pareto, solve
from mpq.table_commands import table

COMMANDS: tuple[click.Command, ...] = (
    *(demo, inspect, search, show, verify, report),
    *(refine, smallest, evolve),
    *(table, solve, pareto),
    *(export, import_, compare),
    *(device, list_, config, completion),
)
_CONFIG_HELP = f"What options are when they are not typed; {FILE_NAME} of this folder by default. See `mpq config`."


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mpq")
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    help=_CONFIG_HELP,
    shell_complete=completers.among((), files=".toml"),
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(context: click.Context, config_path: str | None, debug: bool) -> None:
    """Which layer of a network gets which number format, on this hardware, under these budgets.

    \b
    mpq demo                     the main job in seconds, and what to try next
    mpq inspect demo             what is there, and what budgets can reach
    mpq search demo --options int4,int8 --budget size=18% --output plan.json
    mpq show plan.json           the plan, layer by layer
    mpq verify demo plan.json    measured, next to what simpler rules do
    mpq refine demo table.parquet --budget size=18%
    mpq smallest demo table.parquet --drop 1%      how small may it be?
    mpq evolve demo table.parquet --resource size  the frontier, measured
    mpq report plan.json --table table.parquet    a page that explains the plan
    mpq table measure demo --output table.parquet
    mpq solve table.parquet --budget size=30%      without the model
    mpq pareto table.parquet --resource latency    what every bit of it buys
    mpq export plan.json llama.cpp    for other libraries; import, compare
    mpq device show nvidia-t4    its numbers with their sources; check, measure
    mpq list                     formats, methods, solvers, devices, exports
    mpq config > mpq.toml        settings for repeated runs

    Every command has examples in its --help. With --json the answer alone is on standard output, in base units;
    progress and warnings are on standard error.

    Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 budgets or a drop that cannot be kept,
    130 interrupted.
    """  # noqa: D301 - click wants the character itself
    if "torch" not in sys.modules:  # threads that wait shall not spin: it costs a busy machine many times the work
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    path = FILE_NAME if config_path is None and Path(FILE_NAME).is_file() else config_path
    if path is not None and not asks_for_help(context):
        from mpq.config_file import settings

        context.default_map = settings(path, main)
        context.meta[SETTINGS] = path


def asks_for_help(context: click.Context) -> bool:
    """Whether the command prints about itself, for which a settings file with a mistake is no obstacle."""
    typed: list[Any] = context.meta.get(TYPED, [])
    return bool({"-h", "--help"} & set(typed)) or context.invoked_subcommand in {"config", "completion"}


for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
