"""The command line. Heavy libraries are imported by the commands that need them, so that `--help` is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import click

from mpq import __version__

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL_HELP = (
    "MODEL is `demo`, `demo-transformer`, FILE.py:function (returns model, data, optionally task and held-out data), "
    "or a transformers folder (with --data TEXT)."
)


class OneLineErrors(click.Group):
    """A group whose commands report errors about input in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with --debug errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(3 if type(error).__name__ == "InfeasibleError" else 1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command, with a suggestion for a mistyped one."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from mpq.suggestions import did_you_mean

            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mpq")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    r"""Which layer of a network gets which number format, on this hardware, under these budgets.

    \b
    mpq inspect demo                                   what is there, and what budgets can reach
    mpq search demo --options int4,int8 --budget size=18% --output plan.json
    mpq show plan.json                                 the plan, layer by layer
    mpq verify demo plan.json                          measured on held-out data, next to uniform precision
    mpq list                                           formats, methods, solvers, devices, exports

    Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 budgets that cannot be kept.
    """


def model_options(command: Command) -> Command:
    """The arguments of every command that takes a model."""
    for decorate in (
        click.argument("model"),
        click.option("--data", "text", metavar="TEXT", help="Text file that calibrates a transformers folder."),
        click.option("--samples", default=16, show_default=True, help="Windows of text to calibrate on."),
        click.option("--tokens", default=128, show_default=True, help="Tokens a window."),
        click.option("--holdout", metavar="FILE.py:function", help="Function that returns held-out data."),
        click.option("--task", help="classification, causal-lm or features; chosen from the data by default."),
    ):
        command = decorate(command)
    return command


def space_options(command: Command) -> Command:
    """The arguments of every command that takes a search space."""
    for decorate in (
        click.option(
            "--options",
            default="int2,int4,int8",
            show_default=True,
            help="Formats a layer may take: weight or weight/input, separated by commas.",
        ),
        click.option("--pin", "pins", multiple=True, metavar="PATTERN=OPTION", help="Option that these layers take."),
        click.option("--ties", type=click.Choice(["auto", "none"]), default="auto", show_default=True),
        click.option(
            "--hardware", metavar="NAME|FILE", help="Device, for latency: a name of `mpq list` or a TOML file."
        ),
        click.option("--sensitivity", default="auto", show_default=True, help="Method of `mpq list`."),
        click.option(
            "--granularity", default="layer", show_default=True, help="What takes an option: layer, rows:16, groups:64."
        ),
    ):
        command = decorate(command)
    return command


@main.command(epilog=MODEL_HELP)
@model_options
@space_options
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    required=True,
    metavar="NAME=LIMIT",
    help="size=18%, size=4.5 bits, latency=4 ms",
)
@click.option("--solver", default="auto", show_default=True, help="Solver of `mpq list`.")
@click.option("--seed", default=0, show_default=True)
@click.option("--cache", metavar="FOLDER", help="Keep finished measurements: an interrupted search goes on there.")
@click.option("--output", metavar="PLAN.json", help="Write the plan.")
@click.option("--table", "table_path", metavar="TABLE.parquet", help="Write the cost table, to solve again later.")
def search(model: str, budgets: tuple[str, ...], output: str | None, table_path: str | None, **given: Any) -> None:
    r"""Search a plan for MODEL.

    \b
    mpq search demo --options int4,int8 --budget size=18% --hardware nvidia-t4 --output plan.json
    mpq search net.py:load --options int4,int8 --budget "size=4.5 bits" --budget "latency=4 ms" --hardware nvidia-t4
    mpq search ./my-llm --data text.txt --options int3,int4,int6 --budget size=25% --pin "lm_head=int8"
    """
    from mpq.atomic import check_writable
    from mpq.pipeline import measure
    from mpq.planning import solve_table
    from mpq.terminal import show_plan, show_verification

    for path in (output, table_path):
        if path is not None:
            check_writable(path)
    asked = _pairs("budget", budgets)
    source = _source(model, given)
    space = _space(given)
    table = measure(
        source.model,
        source.data,
        space,
        budgets=asked,
        task=source.task,
        **{name: given[name] for name in ("hardware", "sensitivity", "granularity", "seed", "cache")},
    )
    if table_path is not None:
        table.save(table_path)
    plan = solve_table(table, asked, solver=given["solver"])
    verification = None
    if source.holdout is not None:
        from dataclasses import replace

        from mpq.verification import verify as verify_plan

        verification = verify_plan(source.model, source.holdout, plan, task=source.task)
        plan = replace(plan, measured=verification.measured)
    show_plan(plan)
    if verification is not None:
        show_verification(verification)
    if output is not None:
        plan.save(output)
        click.echo(f"written: {output}")


@main.command(epilog=MODEL_HELP)
@model_options
@space_options
def inspect(model: str, **given: Any) -> None:
    r"""Show what MODEL has before anything long: layers, ties, reachable budgets, refused formats, time and memory.

    \b
    mpq inspect demo --options int4,int8 --hardware nvidia-t4
    """
    from mpq.inspection import inspect_model
    from mpq.terminal import show_inspection

    source = _source(model, given)
    inspection = inspect_model(
        source.model,
        source.data,
        _space(given),
        task=source.task,
        **{name: given[name] for name in ("hardware", "sensitivity", "granularity")},
    )
    show_inspection(inspection)


@main.command(epilog=MODEL_HELP)
@model_options
@click.argument("plan")
@click.option(
    "--table", "table_path", metavar="TABLE.parquet", help="Cost table of the search, for predicted next to measured."
)
def verify(model: str, plan: str, table_path: str | None, **given: Any) -> None:
    r"""Measure PLAN on MODEL's held-out data (else on its calibration data), next to uniform precision.

    \b
    mpq verify demo plan.json --table table.parquet
    """
    from mpq.plan import Plan
    from mpq.tables import CostTable
    from mpq.terminal import show_verification
    from mpq.verification import verify as verify_plan

    loaded = Plan.load(plan)
    table = None if table_path is None else CostTable.load(table_path)
    source = _source(model, given)
    if source.holdout is None:
        click.echo("no held-out data was given: measured on the calibration data", err=True)
    data = source.data if source.holdout is None else source.holdout
    show_verification(verify_plan(source.model, data, loaded, table, task=source.task))


@main.command()
@click.argument("plan")
@click.option("--csv", "as_csv", is_flag=True, help="Plain comma-separated values.")
def show(plan: str, as_csv: bool) -> None:
    r"""Show PLAN layer by layer; needs neither the model nor torch.

    \b
    mpq show plan.json
    """
    from mpq.plan import Plan
    from mpq.terminal import plan_csv, show_plan

    loaded = Plan.load(plan)
    if as_csv:
        click.echo(plan_csv(loaded), nl=False)
    else:
        show_plan(loaded)


@main.command(name="list")
def list_names() -> None:
    """List formats, options, sensitivity methods, solvers, devices and exports."""
    from mpq.exporting import targets
    from mpq.formats import FAMILIES

    rows = {
        "formats": FAMILIES,
        "granularity": "@tensor, @channel (weights), @group{n}, @token (inputs); range @minmax, @mse, @percentile{p}",
        "options": "WEIGHT or WEIGHT/INPUT: int4, int4@group64, int4/int8, w4a8",
        "sensitivity": ", ".join(["auto", *import_module("mpq.sensitivity").available()]),
        "solvers": ", ".join(import_module("mpq.solvers").available()),
        "devices": ", ".join(import_module("mpq.hardware_models").available()),
        "export": ", ".join(targets()),
    }
    for name, text in rows.items():
        click.echo(click.wrap_text(f"{name:13}{text}", width=100, subsequent_indent=" " * 13))


def _source(model: str, given: dict[str, Any]) -> Any:
    from dataclasses import replace

    from mpq.model_source import call_function, load_source

    source = load_source(model, text=given["text"], samples=given["samples"], tokens=given["tokens"])
    if given["holdout"] is not None:
        source = replace(source, holdout=call_function(given["holdout"]))
    return source if given["task"] is None else replace(source, task=given["task"])


def _space(given: dict[str, Any]) -> Any:
    from mpq.options import SearchSpace

    options = [text.strip() for text in given["options"].split(",") if text.strip()]
    return SearchSpace(options, _pairs("pin", given["pins"]), "auto" if given["ties"] == "auto" else None)


def _pairs(role: str, texts: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ValueError(f"--{role} must be NAME=VALUE, got {text!r}")
        pairs[name.strip()] = value.strip()
    return pairs


if __name__ == "__main__":
    sys.exit(main())
