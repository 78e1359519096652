"""Arguments that several commands take, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from mpq import completers

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL_HELP = (
    "MODEL is `demo`, `demo-transformer`, FILE.py:function (returns model, data, optionally task and held-out data), "
    "or a transformers folder (with --data TEXT; without, only the weights of its .safetensors are read, in parts)."
)
LOADED_MODEL_HELP = (
    "MODEL is `demo`, `demo-transformer`, FILE.py:function (returns model, data, optionally task and held-out data), "
    "or a transformers folder with --data TEXT."
)
RUN = ("hardware", "batch", "phase", "context", "bops", "target")
_METRIC_HELP = (
    ": divergence from full precision, the drop of accuracy or agreement, the rise of the loss, or "
    "the drop of a function of (outputs), one number a sample, higher is better, such as metrics.py:margin."
)
_STORAGE_HELP = (
    "Where processes share their measurements: run the same command in as many of them as you like, now or later; "
    "they do one search together. shared.log, or sqlite:///shared.db."
)
_FORMS = {"budget": "NAME=LIMIT", "name": "LAYER=THEIRS", "pin": "PATTERN=OPTION", "format-cost": "OPTION=COST"}


class CommaSeparated(click.types.StringParamType):
    """Texts separated by commas; a list in a settings file."""

    name = "text"


def together(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Arguments as one decorator; help lists them in this order."""

    def decorate(command: Command) -> Command:
        decorated: Command = command
        for one in reversed(decorators):
            decorated = one(decorated)
        return decorated

    return decorate


_DATA = (
    click.option(
        "--data",
        "text",
        metavar="TEXT",
        help="Text file that calibrates a transformers folder.",
        shell_complete=completers.among((), files=".txt"),
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Windows of text to calibrate on; as many again are held out.",
    ),
    click.option(
        "--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens in a window of text."
    ),
    click.option(
        "--task",
        metavar="TASK",
        help="classification, causal-lm or features; chosen from the data by default.",
        shell_complete=completers.task,
    ),
)

data_options = together(
    *_DATA,
    click.option("--holdout", metavar="FILE.py:function", help="Function that returns held-out data."),
)
"""The data of a model, where it does not bring its own, and the task."""

data_alone = together(*_DATA)
"""The same for a command that judges nothing on held-out data."""

model_options = together(click.argument("model", shell_complete=completers.model), data_options)
"""The arguments of every command that takes a model."""

pin_option = click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="PATTERN=OPTION",
    help="Option that these layers take.",
    shell_complete=completers.pin,
)

space_options = together(
    click.option(
        "--options",
        type=CommaSeparated(),
        metavar="FORMATS",
        default="int2,int4,int8",
        show_default=True,
        help="Formats a layer may take: weight or weight/input, separated by commas.",
        shell_complete=completers.option_list,
    ),
    pin_option,
    click.option(
        "--ties",
        type=click.Choice(["auto", "none"]),
        default="auto",
        show_default=True,
        help="auto: one option for projections that runtimes fuse and for convolutions whose outputs are added.",
    ),
    click.option(
        "--sensitivity",
        metavar="METHOD",
        default="auto",
        show_default=True,
        help="Method of `mpq list`.",
        shell_complete=completers.method,
    ),
    click.option(
        "--granularity",
        metavar="UNITS",
        default="layer",
        show_default=True,
        help="What takes an option: layer, experts, rows:16, groups:64.",
        shell_complete=completers.granularity,
    ),
)
"""The arguments of every command that takes a search space."""

run_options = together(
    click.option(
        "--hardware",
        metavar="NAME|FILE",
        help="Device, for latency and energy: a name of `mpq list` or a file.",
        shell_complete=completers.device,
    ),
    click.option(
        "--target",
        metavar="LIBRARY",
        help="Only what this library of `mpq list` can hold: llama.cpp.",
        shell_complete=completers.target,
    ),
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
"""The arguments of every command that prices a run on a device."""

quantizer_option = click.option(
    "--quantizer",
    metavar="NAME|FOLDER",
    default="nearest",
    show_default=True,
    help="What rounds weights: nearest; gptq, which compensates by the calibration data; or a FOLDER of weights that "
    "another program quantised. Give search and verify the one that is deployed.",
    shell_complete=completers.quantizer,
)

adjust_option = click.option(
    "--adjust",
    "adjustments",
    multiple=True,
    metavar="NAME",
    help="Done after quantising, on the calibration data, to the plan and to every baseline alike: adaquant, "
    "bias-correction, batch-norm-tuning. Several may be given.",
    shell_complete=completers.adjustment,
)

solver_option = click.option(
    "--solver",
    metavar="SOLVER",
    default="auto",
    show_default=True,
    help="Solver of `mpq list`.",
    shell_complete=completers.solver,
)

seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")

cache_option = click.option(
    "--cache",
    metavar="FOLDER",
    help="Keep finished measurements: after Ctrl-C the same command goes on there.",
    shell_complete=completers.among((), files="/"),
)

seconds_option = click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), help="No measurement is begun later."
)

study_options = together(
    click.option(
        "--storage", metavar="PATH|URL", help=_STORAGE_HELP, shell_complete=completers.among((), files=".log")
    ),
    click.option("--study", metavar="NAME", help="Name of the search in the storage; that of the command by default."),
)
"""Where several processes do one search together."""

measure_options = together(space_options, run_options, quantizer_option, seed_option, cache_option)
"""The arguments of every command that measures a table."""


independent_option = click.option(
    "--independent",
    type=click.Choice(["samples", "batches"]),
    default="samples",
    show_default=True,
    help="What tests count: batches where those of one batch belong together, such as crops of one photo.",
)


def metric_option(default: str, role: str = "What is made small") -> Callable[[Command], Command]:
    """`--metric`: what is measured of a sample, and what for."""
    return click.option(
        "--metric",
        metavar="NAME|FILE.py:function",
        default=default,
        show_default=True,
        help=role + _METRIC_HELP,
        shell_complete=completers.metric,
    )


def budget_option(help_text: str, *, required: bool = True) -> Callable[[Command], Command]:
    """`--budget NAME=LIMIT`, as often as there are limits."""
    return click.option(
        "--budget",
        "budgets",
        multiple=True,
        required=required,
        metavar="NAME=LIMIT",
        help=help_text,
        shell_complete=completers.budget,
    )


def name_value_pairs(role: str, texts: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` arguments as a dict.

    Raises:
        ValueError: for an argument of another form, or a name that is given twice.

    Example:
        >>> name_value_pairs("budget", ["size=18%", "latency=4 ms"])
        {'size': '18%', 'latency': '4 ms'}
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"--{role} must be {_FORMS[role]}, got {text!r}")
        if name in pairs:
            raise ValueError(f"--{role} of {name!r} is given twice, as {pairs[name]!r} and as {value!r}")
        pairs[name] = value
    return pairs


def source_of(model: str, given: Mapping[str, Any], *, files: bool = False) -> Any:
    """The model and data of `model_options`; with `files` a checkpoint may come without data."""
    from dataclasses import replace

    from mpq.batches import batches_of
    from mpq.model_source import call_function, check_holdout, load_source

    how = {name: given[name] for name in ("text", "samples", "tokens")}
    holdout = given.get("holdout")
    source = load_source(model, **how, files=files and holdout is None)
    for note in source.notes:
        click.echo(note, err=True)
    if holdout is not None:
        source = replace(source, holdout=call_function(holdout))
    if source.data is not None:
        source = replace(source, data=batches_of(source.data))  # read once: a generator ends, a loader may shuffle
    source = check_holdout(source)
    return source if given["task"] is None else replace(source, task=given["task"])


def quantizer_of(given: Mapping[str, Any], source: Any, *, scored_by: str | None = None) -> Any:
    """The quantiser of `quantizer_option`; None rounds to nearest.

    Args:
        given: the arguments of the command.
        source: of `source_of`.
        scored_by: the quantiser that a plan or table names; where it is another, standard error says so.

    Raises:
        ValueError: if there is none of that name, or no model to quantise.
    """
    from mpq.quantizer_choice import NEAREST, choose_quantizer

    name = given["quantizer"]
    if source.data is None and name != NEAREST:
        raise ValueError(f"--quantizer {name} needs the model, and weights are read in parts: give --data TEXT")
    found = None if source.data is None else choose_quantizer(name, source.model, source.data)
    own = "RoundToNearest" if found is None else type(found).__name__
    if scored_by is not None and (theirs := scored_by.partition("(")[0]) != own:
        click.echo(f"scored by the error of {theirs}, measured with {own} here: see --quantizer", err=True)
    return found


def metric_of(name: str) -> Any:
    """The metric of `metric_option`: a name of `mpq.drops`, or a function of a file, told apart by all of the file."""
    from mpq.model_source import FileFunction

    return FileFunction.load(name) if name.rpartition(":")[0].endswith(".py") else name


def study_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `study_options`.

    Raises:
        ValueError: for a study without a storage.
    """
    if given["study"] is not None and given["storage"] is None:
        raise ValueError(f"--study {given['study']} is the name of a search in a storage: give --storage PATH")
    return {name: given[name] for name in ("storage", "study") if given[name] is not None}


def adjust_of(given: Mapping[str, Any], source: Any) -> Any:
    """What `adjust_option` asks for, on the calibration data; None without.

    Raises:
        ValueError: if there is none of that name.
    """
    from mpq.adjuster import Adjuster

    return Adjuster(given["adjustments"], source.data) if given["adjustments"] else None


def space_of(given: Mapping[str, Any]) -> Any:
    """The search space of `space_options`."""
    from mpq.options import SearchSpace

    options = [text.strip() for text in given["options"].split(",") if text.strip()]
    return SearchSpace(options, name_value_pairs("pin", given["pins"]), "auto" if given["ties"] == "auto" else None)


def budgets_of(texts: Sequence[str], hardware: str | None) -> dict[str, str]:
    """The budgets, checked for what needs a device.

    Raises:
        ValueError: for a budget of another form, or of a quantity that only a device has.
    """
    budgets = name_value_pairs("budget", texts)
    if hardware is None and (needs := sorted({"latency", "energy"} & set(budgets))):
        raise ValueError(f"a budget of {needs[0]} needs a device: give --hardware NAME (mpq list names them)")
    return budgets


def check_output(option: str, path: str | None, endings: Sequence[str] = ()) -> None:
    """Refuse, before long work, a file that cannot be written.

    Raises:
        ValueError: if it has another ending, or cannot be written.
    """
    from mpq.atomic import check_writable

    if path is None:
        return
    if endings and not path.endswith(tuple(endings)):
        raise ValueError(f"{option} must end in {' or '.join(endings)}, got {path!r}")
    check_writable(path)


def say_written(*paths: str | None, quiet: bool = False) -> None:
    """Name the files that were written; on standard error where standard output is an answer for machines."""
    for path in paths:
        if path is not None:
            click.echo(f"written: {path}", err=quiet)
