"""`mpq show` and `mpq verify`: what a plan is, and what it does on the real model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mpq import completers
from mpq.command_arguments import (
    MODEL_HELP,
    CommaSeparated,
    adjust_of,
    adjust_option,
    check_output,
    model_options,
    quantizer_of,
    quantizer_option,
    say_written,
    seed_option,
    source_of,
)
from mpq.command_group import AnswerCommand
from mpq.json_answers import PLAN_KEYS, VERIFICATION_KEYS, json_text

if TYPE_CHECKING:
    from mpq.plan import Plan
    from mpq.verification_report import Verification

_BASELINES = ("auto", "all", "none", "uniform", "protected", "smallest", "sorted", "shuffled", "random")
_BASELINES_HELP = (
    "What to compare with: auto (as many as are cheap), all, none, or names out of "
    "uniform, protected, smallest, sorted, shuffled, random."
)
_METRIC_HELP = (
    "Your own figure, reported beside the others: a function of (model, batch), one number or one a sample, "
    "such as metrics.py:f1."
)
_NEAREST = "RoundToNearest"
_QUANTIZERS = (_NEAREST, "GPTQ", "WeightDatabase")
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
@quantizer_option
@adjust_option
@click.option(
    "--metric",
    metavar="FILE.py:function",
    help=_METRIC_HELP,
    shell_complete=completers.among((), files=".py"),
)
@click.option("--output", metavar="PLAN.json", help="Write the plan with what was measured and what it was done with.")
@seed_option
def verify(model: str, plan: str, table_path: str | None, **given: Any) -> None:
    """Measure PLAN on MODEL's held-out data (else on its calibration data), next to simpler rules.

    The table of the search brings the predictions and the rules that keep the same budgets; without it PLAN is compared
    with uniform precisions. With --adjust every one of them is adjusted for its own formats, so that the comparison is
    of formats alone; what it gained on PLAN stands in a row of its own.

    \b
    mpq verify demo plan.json --table table.parquet
    mpq verify demo plan.json --baselines uniform
    mpq verify net.py:load theirs.json --holdout net.py:test_images
    mpq verify demo plan.json --quantizer gptq
    mpq verify demo plan.json --adjust bias-correction --adjust batch-norm-tuning --output adjusted.json
    mpq verify net.py:load plan.json --metric net.py:f1
    """  # noqa: D301 - click wants the character itself
    from mpq.plan import Plan
    from mpq.tables import CostTable

    check_output("--output", given["output"])
    loaded = Plan.load(plan)
    table = None if table_path is None else CostTable.load(table_path)
    source = source_of(model, given)
    if given["output"] is not None and source.holdout is None:
        raise ValueError("--output writes figures of held-out data: give --holdout FILE.py:function")
    how = {"baselines": _baselines(given["baselines"]), "metric": _function(given["metric"])}
    found, kind = measured_verification(source, loaded, table, given, **how)
    written = [given["output"]] if given["output"] is not None else []
    for path in written:
        as_measured(loaded, found).save(path)
    if given["as_json"]:
        from mpq.json_answers import verification_answer

        click.echo(json_text(verification_answer(found, data=kind, written=written)))
        return
    from mpq.terminal import show_verification

    show_verification(found, data=kind)
    say_written(*written)


def measured_verification(source: Any, plan: Plan, table: Any, given: dict[str, Any], **how: Any) -> tuple[Any, str]:
    """The verification of a plan on held-out data, else on calibration data, and which of them it was."""
    from mpq.verification import verify as verify_plan

    quantizer = quantizer_of(given, source, scored_by=plan.provenance.get("quantizer"))
    adjust = adjust_of(given, source)
    if source.holdout is None:
        too_good = ", by which it was adjusted: too good to be true" if adjust is not None else ""
        click.echo(f"no held-out data was given: measured on the calibration data{too_good}", err=True)
    data, kind = (source.data, "calibration") if source.holdout is None else (source.holdout, "held-out")
    how |= {"quantizer": quantizer, "adjust": adjust, "task": source.task, "seed": given["seed"]}
    return verify_plan(source.model, data, plan, table, **how), kind


def as_measured(plan: Plan, found: Verification) -> Plan:
    """The plan with the figures of a verification, which names quantiser and adjustments behind them, and no others."""
    from mpq.adjuster import ADJUSTMENTS

    kind, scored_by = (text.partition("(")[0] for text in (found.quantizer, plan.provenance.get("quantizer", _NEAREST)))
    used = ([] if kind == scored_by else [kind]) + list(found.adjustments)
    kept = [name for name in plan.help if name not in {*ADJUSTMENTS.values(), *_QUANTIZERS}]
    provenance = {name: value for name, value in plan.provenance.items() if name != "help"}
    done = replace(plan, provenance=provenance, measured=found.measured)
    return done.with_help(*kept, *used) if kept or used else done


def _function(name: str | None) -> Any:
    from mpq.model_source import load_function

    return None if name is None else load_function(name)


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
