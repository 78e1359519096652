"""The command line. Heavy libraries are imported by the commands that need them, so that `--help` is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import click

from mpq import __version__
from mpq.device_commands import device
from mpq.export_commands import compare, export, import_
from mpq.refine_commands import refine
from mpq.table_commands import name_value_pairs, pareto, solve, table

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL_HELP = (
    "MODEL is `demo`, `demo-transformer`, FILE.py:function (returns model, data, optionally task and held-out data), "
    "or a transformers folder (with --data TEXT)."
)

RUN = ("hardware", "batch", "phase", "context", "bops", "target")

INTERRUPTED = {
    "refine": "; with --cache FOLDER the same command goes on",
    "search": "; with --cache FOLDER a search keeps what it has measured",
    "device": "; the table keeps finished kernels, the same command goes on",
}


class OneLineErrors(click.Group):
    """A group whose commands report errors about input in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with --debug errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own, and a reader such as `head` that has seen enough
        except KeyboardInterrupt:
            click.echo("interrupted" + INTERRUPTED.get(ctx.invoked_subcommand or "", ""), err=True)
            ctx.exit(130)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {_one_line(error, ctx)}", err=True)
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
    """Which layer of a network gets which number format, on this hardware, under these budgets.

    \b
    mpq inspect demo            what is there, and what budgets can reach
    mpq search demo --options int4,int8 --budget size=18% --output plan.json
    mpq show plan.json          the plan, layer by layer
    mpq solve table.parquet --budget size=30%       another budget, without the model
    mpq pareto table.parquet --resource latency     what every bit of it buys
    mpq verify demo plan.json   measured, next to what simpler rules do at the same budget
    mpq export plan.json llama.cpp                  what other libraries read; import, compare
    mpq device show nvidia-t4   every number of a device with its source; check a file, measure this machine
    mpq list                    formats, methods, solvers, devices, exports

    Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 budgets that cannot be kept, 130 interrupted.
    """  # noqa: D301 - click wants the character itself


def model_options(command: Command) -> Command:
    """The arguments of every command that takes a model."""
    return _decorated(
        command,
        click.argument("model"),
        click.option("--data", "text", metavar="TEXT", help="Text file that calibrates a transformers folder."),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Windows of text to calibrate on; as many again are held out.",
        ),
        click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens a window."),
        click.option("--holdout", metavar="FILE.py:function", help="Function that returns held-out data."),
        click.option("--task", help="classification, causal-lm or features; chosen from the data by default."),
    )


def space_options(command: Command) -> Command:
    """The arguments of every command that takes a search space."""
    return _decorated(
        command,
        click.option(
            "--options",
            default="int2,int4,int8",
            show_default=True,
            help="Formats a layer may take: weight or weight/input, separated by commas.",
        ),
        click.option("--pin", "pins", multiple=True, metavar="PATTERN=OPTION", help="Option that these layers take."),
        click.option(
            "--ties",
            type=click.Choice(["auto", "none"]),
            default="auto",
            show_default=True,
            help="auto: one option for projections that runtimes fuse and for convolutions whose outputs are added.",
        ),
        click.option("--sensitivity", default="auto", show_default=True, help="Method of `mpq list`."),
        click.option(
            "--granularity", default="layer", show_default=True, help="What takes an option: layer, rows:16, groups:64."
        ),
    )


def run_options(command: Command) -> Command:
    """The arguments of every command that prices a run on a device."""
    return _decorated(
        command,
        click.option(
            "--hardware", metavar="NAME|FILE", help="Device, for latency and energy: a name of `mpq list` or a file."
        ),
        click.option("--target", metavar="LIBRARY", help="Only what this library of `mpq list` can hold: llama.cpp."),
        click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Samples a pass."),
        click.option(
            "--phase",
            type=click.Choice(["prefill", "decode"]),
            help="Of a language model: all positions at once, as without it, or one a sample.",
        ),
        click.option(
            "--context", type=click.IntRange(min=1), help="Positions in the cache that attention reads, in decode."
        ),
        click.option(
            "--bops",
            type=click.Choice(["hawq", "nncf", "additions"]),
            default="hawq",
            show_default=True,
            help="How bit operations are counted: HAWQ's and qonnx's way, NNCF's, or with accumulators.",
        ),
    )


def _decorated(command: Command, *decorators: Callable[[Command], Command]) -> Command:
    """The command with arguments that its help lists in this order."""
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


@main.command(epilog=MODEL_HELP)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    required=True,
    metavar="NAME=LIMIT",
    help='What the plan must keep: size=18%, "size=4.5 bits", "latency=4 ms", "energy=2 mJ", bops=20%. '
    "Percent is of the model as it stands. Several hold at once.",
)
@space_options
@run_options
@click.option("--solver", default="auto", show_default=True, help="Solver of `mpq list`.")
@click.option(
    "--refine", "evaluations", type=click.FloatRange(min=1), help="Measure so many other plans for a better one."
)
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option("--cache", metavar="FOLDER", help="Keep finished measurements: an interrupted search goes on there.")
@click.option("--output", metavar="PLAN.json", help="Write the plan.")
@click.option("--table", "table_path", metavar="TABLE.parquet", help="Write the cost table, to solve again later.")
@model_options
def search(model: str, budgets: tuple[str, ...], output: str | None, table_path: str | None, **given: Any) -> None:
    """Search a plan for MODEL.

    \b
    mpq search demo --options int4,int8 --budget size=18% --output plan.json
    mpq search net.py:load --budget "size=4.5 bits" --budget "latency=4 ms" --hardware nvidia-t4
    mpq search ./my-llm --data text.txt --budget latency=40% --hardware nvidia-h100 --phase decode --context 4096
    mpq search ./my-llm --data text.txt --budget size=25% --pin "lm_head=int8"
    """  # noqa: D301 - click wants the character itself
    from mpq.pipeline import measure
    from mpq.planning import solve_table
    from mpq.terminal import show_plan, show_verification

    _check_outputs(output, table_path)
    asked = _budgets(budgets, given["hardware"])
    source = _source(model, given)
    space = _space(given)
    table = measure(
        source.model,
        source.data,
        space,
        budgets=asked,
        solver=given["solver"],
        task=source.task,
        **{name: given[name] for name in ("sensitivity", "granularity", "seed", "cache", *RUN)},
    )
    if table_path is not None:
        table.save(table_path)
    plan = solve_table(table, asked, solver=given["solver"])
    if given["evaluations"] is not None:
        plan = _refined(source, plan, given)
    if output is not None:
        plan.save(output)  # before anything else can go wrong; saved again with what is measured
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


main.add_command(solve)
main.add_command(pareto)
main.add_command(table)
main.add_command(device)
main.add_command(refine)
main.add_command(export)
main.add_command(import_)
main.add_command(compare)


@main.command(epilog=MODEL_HELP, short_help="Layers, ties, reachable budgets, time and memory of MODEL.")
@space_options
@run_options
@model_options
def inspect(model: str, **given: Any) -> None:
    """Show what MODEL has before anything long: layers, ties, reachable budgets, refused formats, time and memory.

    \b
    mpq inspect demo --options int4,int8 --hardware nvidia-t4
    """  # noqa: D301 - click wants the character itself
    from mpq.inspection import inspect_model
    from mpq.terminal import show_inspection

    source = _source(model, given)
    inspection = inspect_model(
        source.model,
        source.data,
        _space(given),
        task=source.task,
        **{name: given[name] for name in ("sensitivity", "granularity", *RUN)},
    )
    show_inspection(inspection)


@main.command(epilog=MODEL_HELP, short_help="Measure PLAN on MODEL's data, next to what simpler rules do.")
@model_options
@click.argument("plan")
@click.option(
    "--table", "table_path", metavar="TABLE.parquet", help="Cost table of the search, for predicted next to measured."
)
def verify(model: str, plan: str, table_path: str | None, **given: Any) -> None:
    """Measure PLAN on MODEL's held-out data (else on its calibration data), next to simpler rules.

    \b
    mpq verify demo plan.json --table table.parquet
    """  # noqa: D301 - click wants the character itself
    from mpq.plan import Plan
    from mpq.tables import CostTable
    from mpq.terminal import show_verification
    from mpq.verification import verify as verify_plan

    loaded = Plan.load(plan)
    table = None if table_path is None else CostTable.load(table_path)
    source = _source(model, given)
    if source.holdout is None:
        click.echo("no held-out data was given: measured on the calibration data", err=True)
    data, kind = (source.data, "calibration") if source.holdout is None else (source.holdout, "held-out")
    show_verification(verify_plan(source.model, data, loaded, table, task=source.task), data=kind)


@main.command()
@click.argument("plan")
@click.option("--csv", "as_csv", is_flag=True, help="Plain comma-separated values.")
def show(plan: str, as_csv: bool) -> None:
    """Show PLAN layer by layer; needs neither the model nor torch.

    \b
    mpq show plan.json
    """  # noqa: D301 - click wants the character itself
    from mpq.plan import Plan
    from mpq.terminal import plan_csv, show_plan

    loaded = Plan.load(plan)
    if as_csv:
        click.echo(plan_csv(loaded), nl=False)
    else:
        show_plan(loaded)


@main.command(name="list")
def list_names() -> None:
    """List formats, methods, solvers, devices and exports."""
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

    from mpq.model_source import call_function, check_holdout, load_source

    source = load_source(model, text=given["text"], samples=given["samples"], tokens=given["tokens"])
    if given["holdout"] is not None:
        source = replace(source, holdout=call_function(given["holdout"]))
    source = check_holdout(source)
    return source if given["task"] is None else replace(source, task=given["task"])


def _refined(source: Any, plan: Any, given: dict[str, Any]) -> Any:
    from mpq.refinement import refine as refine_plan

    how = {name: given[name] for name in ("evaluations", "seed", "cache")}
    found = refine_plan(source.model, source.data, plan, task=source.task, **how)
    click.echo(str(found))
    return found.plan


def _space(given: dict[str, Any]) -> Any:
    from mpq.options import SearchSpace

    options = [text.strip() for text in given["options"].split(",") if text.strip()]
    return SearchSpace(options, name_value_pairs("pin", given["pins"]), "auto" if given["ties"] == "auto" else None)


def _budgets(texts: tuple[str, ...], hardware: str | None) -> dict[str, str]:
    budgets = name_value_pairs("budget", texts)
    if hardware is None and (needs := sorted({"latency", "energy"} & set(budgets))):
        raise ValueError(f"a budget of {needs[0]} needs a device: give --hardware NAME (mpq list names them)")
    return budgets


def _check_outputs(output: str | None, table_path: str | None) -> None:
    from mpq.atomic import check_writable

    for path in (output, table_path):
        if path is not None:
            check_writable(path)
    if table_path is not None and not table_path.endswith((".parquet", ".csv")):
        raise ValueError(f"--table must end in .parquet or .csv, got {table_path!r}")
    if output is not None and output == table_path:
        raise ValueError(f"--output and --table must be two files, got {output!r} twice")


def _one_line(error: Exception, ctx: click.Context) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (`mpq --debug {ctx.invoked_subcommand} ...` shows where)"


if __name__ == "__main__":
    sys.exit(main())
