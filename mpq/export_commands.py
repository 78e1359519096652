"""`mpq export`, `mpq import`, `mpq compare`: plans to and from other libraries; needs neither the model nor torch."""

from __future__ import annotations

from typing import Any

import click

from mpq import completers
from mpq.command_arguments import check_output, name_value_pairs, together
from mpq.command_group import AnswerCommand, ToldCommand
from mpq.json_answers import COMPARISON_KEYS, PLAN_KEYS, json_text
from mpq.plan_commands import check_form

_ARCHITECTURE = (
    "Architecture, as the gguf package names it, for models whose names are not those of Llama and its kind."
)
_plan_file = completers.among((), files=".json")
_name_options = together(
    click.option("--architecture", metavar="NAME", help=_ARCHITECTURE),
    click.option(
        "--name",
        "names",
        multiple=True,
        metavar="LAYER=THEIRS",
        help="HAWQ's name of a layer.",
        shell_complete=completers.pin,
    ),
)
_TARGETS_HELP = "`mpq list` names the TARGETs: torchao, llama.cpp, onnxruntime, compressed-tensors, and others."


@click.command(cls=ToldCommand, epilog=_TARGETS_HELP, short_help="Write PLAN in the form that TARGET reads.")
@click.argument("plan", shell_complete=_plan_file)
@click.argument("target", shell_complete=completers.target)
@click.option("--output", metavar="FILE", help="File to write; by default the text is printed.")
@click.option("--source", metavar="MODEL.onnx", help="The model in floats, for onnxruntime.")
@_name_options
def export(plan: str, target: str, output: str | None, **given: Any) -> None:
    """Write PLAN in the form that TARGET reads. Formats that TARGET lacks are refused, by layer.

    \b
    mpq export plan.json llama.cpp --output types.txt
    mpq export plan.json autoround --output layer_config.json
    mpq export plan.json onnxruntime --source model.onnx --output mixed.onnx
    """  # noqa: D301 - click wants the character itself
    from mpq.exporting import export_text, write_export
    from mpq.plan import Plan

    settings = _settings(target, given)
    loaded = Plan.load(plan)
    if output is not None:
        write_export(loaded, target, output, **settings)
        click.echo(f"wrote {output}")
    elif target == "onnxruntime":
        raise ValueError("onnxruntime takes a file: give --output MIXED.onnx")
    else:
        click.echo(export_text(loaded, target, **settings), nl=False)


@click.command(
    name="import", cls=AnswerCommand, answer=PLAN_KEYS, short_help="Read the plan of another library into ours."
)
@click.argument("source", shell_complete=completers.source)
@click.argument("file")
@click.option(
    "--like",
    required=True,
    metavar="PLAN.json",
    help="Any plan of mpq for the same model: it has the layers.",
    shell_complete=_plan_file,
)
@click.option("--default", metavar="OPTION", help="What layers take that the file does not name.")
@_name_options
@click.option("--output", required=True, metavar="PLAN.json", help="The plan to write.")
def import_(source: str, file: str, like: str, default: str | None, output: str, **given: Any) -> None:
    """Read FILE, the plan of SOURCE (autoround, hawq, llama.cpp or modelopt), into a plan of mpq.

    For llama.cpp FILE may be a quantised GGUF file: the plan is then what it really holds.

    \b
    mpq import autoround layer_config.json --like plan.json --output theirs.json
    mpq import llama.cpp model.Q4_K_M.gguf --like plan.json --output theirs.json
    mpq compare plan.json theirs.json
    """  # noqa: D301 - click wants the character itself
    from pathlib import Path

    from mpq.importing import import_plan
    from mpq.plan import Plan

    as_json = given.pop("as_json")
    check_output("--output", output)
    plan = import_plan(Path(file), source, Plan.load(like), default=default, **_settings(source, given))
    plan.save(output)
    if as_json:
        from mpq.json_answers import plan_answer

        click.echo(json_text(plan_answer(plan)))
    else:
        click.echo(f"{plan}\nwrote {output}")


@click.command(cls=AnswerCommand, answer=COMPARISON_KEYS, short_help="Where two plans differ, layer by layer.")
@click.argument("first", shell_complete=_plan_file)
@click.argument("second", shell_complete=_plan_file)
@click.option(
    "--table",
    metavar="TABLE",
    help="Cost table that has the options of both: predicts what each difference loses.",
    shell_complete=completers.among((), files=".parquet"),
)
@click.option("--csv", "as_csv", is_flag=True, help="Plain comma-separated values.")
def compare(first: str, second: str, table: str | None, *, as_csv: bool, as_json: bool) -> None:
    """Where the plans FIRST and SECOND differ, layer by layer: bytes and, with a table, predicted loss.

    \b
    mpq compare ours.json theirs.json --table table.parquet
    """  # noqa: D301 - click wants the character itself
    from mpq.comparison import compare as compare_plans
    from mpq.comparison import comparison_csv
    from mpq.plan import Plan
    from mpq.tables import CostTable

    check_form(as_csv=as_csv, as_json=as_json)
    loaded = None if table is None else CostTable.load(table)
    comparison = compare_plans(Plan.load(first), Plan.load(second), loaded)
    if as_json:
        from mpq.json_answers import comparison_answer

        click.echo(json_text(comparison_answer(comparison)))
    else:
        click.echo(comparison_csv(comparison) if as_csv else f"{comparison}\n", nl=False)


def _settings(library: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the command that belong to a library.

    Raises:
        ValueError: if an option of another library is given.
    """
    belongs = {"source": "onnxruntime", "architecture": "llama.cpp", "names": "hawq"}
    settings = {name: value for name, value in given.items() if value}
    for name in settings:
        if belongs[name] != library:
            raise ValueError(f"--{name.removesuffix('s')} is for {belongs[name]}, not for {library!r}")
    if "names" in settings:
        settings["names"] = name_value_pairs("name", settings["names"])
    if library == "onnxruntime" and "source" not in settings:
        raise ValueError("onnxruntime needs the model in floats: give --source MODEL.onnx")
    return settings
