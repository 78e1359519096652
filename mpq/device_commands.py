"""`mpq device`: what a device file says, whether it is right, and a new one measured on this machine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from mpq import completers
from mpq.command_arguments import CommaSeparated, check_output
from mpq.command_group import AnswerCommand, CommandGroup
from mpq.json_answers import CHECK_KEYS, DEVICE_KEYS, MEASURED_KEYS, json_text

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 100
_SHAPES_HELP = "CSV file with the columns kind, m, k, n and possibly repeats, taps: the shapes to measure."


@click.group(cls=CommandGroup, short_help="Show, check and measure devices.")
def device() -> None:
    """Show, check and measure devices: where latency and energy come from.

    \b
    mpq device show nvidia-t4
    mpq device check mine.toml
    mpq device measure --output mine.toml --model demo
    """  # noqa: D301 - click wants the character itself


@device.command(cls=AnswerCommand, answer=DEVICE_KEYS, short_help="Every number of a device with its unit and source.")
@click.argument("name", metavar="NAME|FILE", shell_complete=completers.device)
def show(name: str, as_json: bool) -> None:
    """Every number of a device with its unit, kind and source; estimates are marked with ~.

    A device of another package that keeps no such numbers is shown by what it says of itself.

    \b
    mpq device show nvidia-t4
    mpq device show mine.toml
    """  # noqa: D301 - click wants the character itself
    target = import_module("mpq.hardware_models").load(name)
    if not hasattr(target, "numbers"):
        target = _told_by_itself(name, target)
    if as_json:
        from mpq.json_answers import device_answer

        click.echo(json_text(device_answer(target)))
    else:
        _show(target)


def _told_by_itself(name: str, device: Any) -> Any:
    """What another package's device says, in the form of a target: it prices by a method of its own."""
    from mpq.list_commands import summary as first_paragraph
    from mpq.plugins import plugin_named

    package = plugin_named("mpq.hardware", name, ())
    costs = f"{type(device).__module__}.{type(device).__qualname__}.costs"
    priced = f"Priced by {costs}{'' if package is None else f' of {package}'}, which shows no numbers."
    return SimpleNamespace(
        name=getattr(device, "name", name),
        kind=getattr(device, "kind", "kind not told"),
        runtime=getattr(device, "runtime", "runtime not told"),
        notes=f"{first_paragraph(device)} {priced}",
        **{"numbers": (), "models": (), "sources": (), "calibration": None},
    )


def _show(target: Any) -> None:
    from mpq.terminal import open_console, print_table

    console = open_console()
    _say(console, f"{target.name}: {target.kind}, {target.runtime}")
    _say(console, " ".join(target.notes.split()))
    rows = []
    for number in target.numbers:
        kinds = "+".join(dict.fromkeys(source.kind for source in number.sources))
        value = f"{'~' if number.is_estimate else ''}{number.value:.6g}"
        sources = ", ".join(source.id for source in number.sources)
        rows.append((number.where, number.key, value, kinds, sources))
    if rows:
        print_table(console, ("table", "number", "value", "kind", "source"), rows, right=(2,))
        meanings = dict.fromkeys((number.key, number.unit) for number in target.numbers)
        _say(console, "units: " + "; ".join(f"{key}: {unit}" for key, unit in meanings))
    for model in target.models:
        for line in model.describe():
            _say(console, line, indent="  ")
    if target.calibration is not None:
        texts = [" ".join(str(target.calibration[key]).split()) for key in ("fitted_on", "method", "date")]
        _say(console, f"calibrated: {', '.join(texts)}")
    for source in target.sources:
        where = f" {source.url}" if source.url else ""
        text = f"{source.id} [{source.kind}]: {source.title}.{where} {' '.join(source.read.split())}"
        _say(console, text, indent="    ")
    if guesses := [number for number in target.numbers if number.is_estimate]:
        _say(console, f"~ marks {len(guesses)} of {len(target.numbers)} numbers that rest on an estimate")


@device.command(
    cls=AnswerCommand, answer=CHECK_KEYS, short_help="Whether a device file is right; every problem with its line."
)
@click.argument("file", metavar="FILE", shell_complete=completers.among((), files=".toml"))
@click.pass_context
def check(context: click.Context, file: str, as_json: bool) -> None:
    """Whether a device file is right: exit code 0 and what it holds, or 1 and every problem with its line.

    \b
    mpq device check mine.toml
    """  # noqa: D301 - click wants the character itself
    try:
        target = import_module("mpq.hardware_models").load(file)
    except ValueError as error:
        problems = str(error).splitlines()
        if as_json:
            click.echo(json_text({"ok": False, "problems": problems, "summary": ""}))
        else:
            click.echo("\n".join(problems), err=True)
        context.exit(1)
    found = summary(target)
    click.echo(json_text({"ok": True, "problems": [], "summary": found}) if as_json else found)


def summary(target: Any) -> str:
    """What a target holds, in a line."""
    families = ", ".join(type(model).__module__.rpartition(".")[2].replace("_", " ") for model in target.models)
    guesses = sum(number.is_estimate for number in target.numbers)
    parts = [families, _count(len(target.numbers), "number"), _count(guesses, "estimate")]
    if target.calibration is not None:
        parts.append("calibrated")
    return f"ok: {', '.join(parts)}"


@device.command(
    cls=AnswerCommand, answer=MEASURED_KEYS, short_help="Time kernels on this machine and write a device file."
)
@click.option("--output", required=True, metavar="MINE.toml", help="The device file; the table stands beside it.")
@click.option(
    "--model",
    metavar="MODEL",
    help="Measure the shapes of this model's layers.",
    shell_complete=completers.model,
)
@click.option("--shapes", metavar="SHAPES.csv", help=_SHAPES_HELP)
@click.option(
    "--options",
    type=CommaSeparated(),
    metavar="FORMATS",
    default="int4,int8,int8/int8",
    show_default=True,
    help="Formats to measure, besides the model's own.",
    shell_complete=completers.option_list,
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of a kernel.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Samples a pass.")
@click.option("--phase", type=click.Choice(["prefill", "decode"]), help="decode: one position a sample.")
@click.option(
    "--runtime", type=click.Choice(["onnxruntime", "torch"]), default="onnxruntime", show_default=True, help="Kernels."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Ratios a kernel.")
@click.option("--name", help="Name of the target; that of the file by default.")
@click.option("--data", "text", metavar="TEXT", help="Text file for a transformers folder.")
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens a window.")
def measure(output: str, model: str | None, shapes: str | None, **given: Any) -> None:
    """Time kernels on this machine, each in turn with a reference, and write a device file for `--hardware`.

    Finished kernels are kept: the same command after an interruption goes on where it stopped.

    \b
    mpq device measure --output mine.toml --model demo
    mpq search demo --options int4,int8 --budget latency=80% --hardware mine.toml
    """  # noqa: D301 - click wants the character itself
    from mpq.atomic import write_atomically

    check_output("--output", output, (".toml",))
    if (model is None) == (shapes is None):
        raise ValueError("give what to measure: --model MODEL or --shapes SHAPES.csv, one of them")
    path = Path(output)
    table = path.with_suffix(".csv")
    if shapes is not None and table.resolve() == Path(shapes).resolve():
        raise ValueError(f"the table would overwrite {shapes!r}: give --output another name")
    kernels = _model_kernels(model, given) if model is not None else _shape_kernels(str(shapes), given)
    measured_module = import_module("mpq.hardware_models.measured")
    timing = measured_module.Timing(repeats=given["repeats"])
    result = measured_module.measure_kernels(kernels, _runtime(given), path=table, timing=timing)
    text = import_module("mpq.hardware_models.measured_device").device_text(
        given["name"] or path.stem, table.name, result, timing
    )
    write_atomically(path, text)
    _report(result, [str(path), table.name], as_json=given["as_json"])


def _report(result: Any, written: list[str], *, as_json: bool) -> None:
    reasons: dict[str, int] = {}
    for reason in result.refused.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    if as_json:
        found = {"kernels": len(result.table), "spread": result.wide, "refused": reasons, "written": written}
        click.echo(json_text(found))
        return
    for reason, count in reasons.items():
        click.echo(f"not measured, {_count(count, 'kernel')}: {reason}")
    click.echo(f"{_count(len(result.table), 'kernel')}, {result.wide} with repeats more than 15 % apart")
    click.echo(f"written: {', '.join(written)}")


def _runtime(given: dict[str, Any]) -> Any:
    if given["runtime"] == "torch":
        return import_module("mpq.hardware_models.torch_kernels").TorchKernels(threads=given["threads"])
    return import_module("mpq.hardware_models.onnxruntime_kernels").OnnxRuntimeKernels(threads=given["threads"])


def _options(given: dict[str, Any]) -> list[Any]:
    from mpq.options import Option

    return [Option.parse(text) for text in map(str.strip, given["options"].split(",")) if text]


def _model_kernels(model: str, given: dict[str, Any]) -> Any:
    from mpq.batches import batches_of, model_inputs
    from mpq.model_source import load_source
    from mpq.tracing import trace

    source = load_source(model, text=given["text"], samples=1, tokens=given["tokens"])
    network = trace(source.model, model_inputs(source.model, batches_of(source.data)[0]))
    cells = import_module("mpq.hardware_models.cells").Cells.of(
        network, _options(given), batch=given["batch"], phase=given["phase"]
    )
    return import_module("mpq.hardware_models.kernels").kernels_of(cells)


def _shape_kernels(shapes: str, given: dict[str, Any]) -> Any:
    pairs = [("fp32", "fp32")]
    for option in _options(given):
        keys = import_module("mpq.hardware_models.lookup_table").format_keys
        weight, activation = ("fp32" if fmt is None else keys(fmt)[0] for fmt in (option.weight, option.activation))
        pairs.append((weight, activation))
    table = import_module("mpq.hardware_models.lookup_table").read_shapes(shapes)
    return import_module("mpq.hardware_models.kernels").kernels_of_shapes(table, pairs)


def _say(console: Console, text: str, indent: str = "") -> None:
    lines: Iterable[str] = textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_long_words=False)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
