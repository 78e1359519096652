"""`mpq search` and `mpq inspect`: what takes a model and a search space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from mpq.command_arguments import (
    MODEL_HELP,
    RUN,
    budget_option,
    budgets_of,
    check_output,
    measure_options,
    model_options,
    quantizer_of,
    run_options,
    say_written,
    solver_option,
    source_of,
    space_of,
    space_options,
)
from mpq.command_group import AnswerCommand
from mpq.json_answers import INSPECTION_KEYS, SEARCH_KEYS, json_text

_MEASURED = ("sensitivity", "granularity", "seed", "cache", *RUN)
_BUDGET_HELP = (
    'What the plan must keep: size=18%, "size=4.5 bits", "latency=4 ms", "energy=2 mJ", bops=20%. '
    "Percent is of the model as it stands. Several hold at once."
)


@click.command(cls=AnswerCommand, answer=SEARCH_KEYS, epilog=MODEL_HELP, short_help="Search a plan for MODEL.")
@budget_option(_BUDGET_HELP)
@measure_options
@solver_option
@click.option(
    "--refine", "evaluations", type=click.FloatRange(min=1), help="Measure so many other plans for a better one."
)
@click.option("--output", metavar="PLAN.json", help="Write the plan.")
@click.option("--table", "table_path", metavar="TABLE.parquet", help="Write the cost table, to solve again later.")
@click.option("--report", metavar="PAGE.html", help="Write a page that explains the plan in a browser.")
@model_options
def search(model: str, budgets: tuple[str, ...], output: str | None, table_path: str | None, **given: Any) -> None:
    """Search a plan for MODEL: measure it, price it, solve, and verify the plan where there is held-out data.

    \b
    mpq search demo --options int4,int8 --budget size=18% --output plan.json --report page.html
    mpq search net.py:load --budget "size=4.5 bits" --budget "latency=4 ms" --hardware nvidia-t4
    mpq search ./my-llm --data text.txt --budget latency=40% --hardware nvidia-h100 --phase decode --context 4096
    mpq search ./my-llm --data text.txt --budget size=25% --pin "lm_head=int8" --cache measured --refine 50
    mpq search demo --options int2,int3,int4 --budget "size=3 bits" --quantizer gptq
    """  # noqa: D301 - click wants the character itself
    from mpq.planning import solve_table

    check_outputs(output, table_path, given["report"])
    asked = budgets_of(budgets, given["hardware"])
    source = source_of(model, given, files=True)
    quantizer = quantizer_of(given, source)
    table = measured_table(source, given, budgets=asked, solver=given["solver"], quantizer=quantizer)
    if table_path is not None:
        table.save(table_path)
    plan = solve_table(table, asked, solver=given["solver"])
    if given["evaluations"] is not None:
        plan = _refined(source, plan, given, quantizer)
    if output is not None:
        plan.save(output)  # before anything else can go wrong; saved again with what is measured
    plan, verification = verified(source, plan, quantizer)
    if output is not None:
        plan.save(output)
    if given["report"] is not None:
        from mpq.reporting import write_report

        how = {"device": given["hardware"], "model": model, "data": "held-out"}
        write_report(plan, given["report"], table, verification, **how)
    show_found(plan, verification, (output, table_path, given["report"]), as_json=given["as_json"])


def measured_table(source: Any, given: dict[str, Any], **settings: Any) -> Any:
    """The cost table of a model."""
    from mpq.pipeline import measure

    how = {name: given[name] for name in _MEASURED}
    return measure(source.model, source.data, space_of(given), task=source.task, **how, **settings)


def verified(source: Any, plan: Any, quantizer: Any) -> tuple[Any, Any]:
    """The plan with what was measured on held-out data, and the verification; None where there is no such data."""
    if source.holdout is None:
        return plan, None
    from mpq.verification import verify

    found = verify(source.model, source.holdout, plan, task=source.task, quantizer=quantizer)
    return replace(plan, measured=found.measured), found


def show_found(plan: Any, verification: Any, paths: tuple[str | None, ...], *, as_json: bool) -> None:
    """Print what a search found, and the files it wrote."""
    written = [path for path in paths if path is not None]
    if as_json:
        from mpq.json_answers import plan_answer, verification_answer

        checked = None if verification is None else verification_answer(verification, data="held-out")
        click.echo(json_text({"plan": plan_answer(plan), "verification": checked, "written": written}))
        return
    from mpq.terminal import show_plan, show_verification

    show_plan(plan)
    if verification is not None:
        show_verification(verification)
    say_written(*written)


def check_outputs(output: str | None, table_path: str | None, report: str | None) -> None:
    """Refuse files that cannot be written, before anything long.

    Raises:
        ValueError: if one of them cannot be written, or two are the same.
    """
    check_output("--output", output)
    check_output("--table", table_path, (".parquet", ".csv"))
    check_output("--report", report, (".html",))
    if output is not None and output == table_path:
        raise ValueError(f"--output and --table must be two files, got {output!r} twice")
    if output is not None and output == report:
        raise ValueError(f"--output and --report must be two files, got {output!r} twice")


def _refined(source: Any, plan: Any, given: dict[str, Any], quantizer: Any) -> Any:
    from mpq.refinement import refine

    how = {name: given[name] for name in ("evaluations", "seed", "cache")}
    found = refine(source.model, source.data, plan, task=source.task, quantizer=quantizer, **how)
    click.echo(str(found), err=given["as_json"])
    return found.plan


@click.command(
    cls=AnswerCommand,
    answer=INSPECTION_KEYS,
    epilog=MODEL_HELP,
    short_help="Layers, ties, reachable budgets, time and memory of MODEL.",
)
@space_options
@run_options
@model_options
def inspect(model: str, **given: Any) -> None:
    """Show what MODEL has before anything long: layers, ties, reachable budgets, refused formats, time and memory.

    \b
    mpq inspect demo --options int4,int8 --hardware nvidia-t4
    mpq inspect net.py:load --options int4/int8,int8/int8 --hardware stm32h743-cmsisnn
    """  # noqa: D301 - click wants the character itself
    from mpq.inspection import inspect_model

    source = source_of(model, given, files=True)
    how = {name: given[name] for name in ("sensitivity", "granularity", *RUN)}
    inspection = inspect_model(source.model, source.data, space_of(given), task=source.task, **how)
    if given["as_json"]:
        from mpq.json_answers import inspection_answer

        click.echo(json_text(inspection_answer(inspection)))
        return
    from mpq.terminal import show_inspection

    show_inspection(inspection)
