"""`mpq show` and `mpq verify`: what a plan is, and what it does on the real model."""

from __future__ import annotations

from typing import Any

import click

from mpq import completers
from mpq.command_arguments import MODEL_HELP, CommaSeparated, model_options, seed_option, source_of
from mpq.command_group import AnswerCommand
from mpq.json_answers import PLAN_KEYS, VERIFICATION_KEYS, json_text

_BASELINES = ("auto", "all", "none", "uniform", "protected", "smallest", "sorted", "shuffled", "random")
_BASELINES_HELP = (
    "What to compare with: auto (as many as are cheap), all, none, or names out of "
    "uniform, protected, smallest, sorted, shuffled, random."
)
_plan_file = completers.among((), files=".json")


@click.command(cls=AnswerCommand, answer=PLAN_KEYS, short_help="Show PLAN layer by layer.")
@click.argument("plan", shell_complete=_plan_file)
@click.option("--csv", "as_csv", is_flag=True, help="Plain comma-separated values.")
def show(plan: str, as_csv: bool, as_json: bool) -> None:
    """Show PLAN layer by layer; needs neither the model nor torch.

    \b
    mpq show plan.json
    mpq show plan.json --csv > plan.csv
    """  # noqa: D301 - click wants the character itself
    from mpq.plan import Plan

    check_form(as_csv=as_csv, as_json=as_json)
    loaded = Plan.load(plan)
    if as_json:
        from mpq.json_answers import plan_answer

        click.echo(json_text(plan_answer(loaded)))
        return
    from mpq.terminal import plan_csv, show_plan

    if as_csv:
        click.echo(plan_csv(loaded), nl=False)
    else:
        show_plan(loaded)


@click.command(
    cls=AnswerCommand,
    answer=VERIFICATION_KEYS,
    epilog=MODEL_HELP,
    short_help="Measure PLAN on MODEL's data, next to what simpler rules do.",
)
@model_options
@click.argument("plan", shell_complete=_plan_file)
@click.option(
    "--table",
    "table_path",
    metavar="TABLE.parquet",
    help="Cost table of the search, for predicted next to measured.",
    shell_complete=completers.among((), files=".parquet"),
)
@click.option(
    "--baselines",
    type=CommaSeparated(),
    metavar="NAMES",
    default="auto",
    show_default=True,
    help=_BASELINES_HELP,
    shell_complete=completers.comma_separated(_BASELINES),
)
@seed_option
def verify(model: str, plan: str, table_path: str | None, **given: Any) -> None:
    """Measure PLAN on MODEL's held-out data (else on its calibration data), next to simpler rules.

    The table of the search brings the predictions and the rules that keep the same budgets; without it PLAN is compared
    with uniform precisions.

    \b
    mpq verify demo plan.json --table table.parquet
    mpq verify demo plan.json --baselines uniform
    mpq verify net.py:load theirs.json --holdout net.py:test_images
    """  # noqa: D301 - click wants the character itself
    from mpq.plan import Plan
    from mpq.tables import CostTable

    loaded = Plan.load(plan)
    table = None if table_path is None else CostTable.load(table_path)
    source = source_of(model, given)
    if source.holdout is None:
        click.echo("no held-out data was given: measured on the calibration data", err=True)
    data, kind = (source.data, "calibration") if source.holdout is None else (source.holdout, "held-out")
    from mpq.verification import verify as verify_plan

    baselines = _baselines(given["baselines"])
    found = verify_plan(source.model, data, loaded, table, task=source.task, baselines=baselines, seed=given["seed"])
    if given["as_json"]:
        from mpq.json_answers import verification_answer

        click.echo(json_text(verification_answer(found, data=kind)))
        return
    from mpq.terminal import show_verification

    show_verification(found, data=kind)


def check_form(*, as_csv: bool, as_json: bool) -> None:
    """Refuse two forms of one output.

    Raises:
        ValueError: if both are asked for.
    """
    if as_csv and as_json:
        raise ValueError("--csv and --json are two forms of one output: give one of them")


def _baselines(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return []
    return names[0] if names in (["auto"], ["all"]) else names
