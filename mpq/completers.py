"""What the shell offers for the values of options: names of devices, formats, solvers, methods, layers."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

FORMATS = (
    *("int2", "int3", "int4", "int6", "int8", "int16", "uint4", "uint8", "int4@group64", "int4@group128"),
    *("int4/int8", "int8/int8", "fp16", "bf16", "fp32", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "nf4"),
    *("mxfp4", "mxfp8_e4m3", "mxint8", "nvfp4", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0"),
)
QUANTITIES = ("size", "latency", "energy", "bops", "activation_peak", "sensitivity")
GRANULARITIES = ("layer", "rows:16", "rows:64", "groups:64", "groups:128")
TASKS = ("classification", "causal-lm", "features")
QUANTIZERS = ("nearest", "gptq")
ADJUSTMENTS = ("adaquant", "bias-correction", "batch-norm-tuning")
METRICS = ("divergence", "accuracy", "agreement", "loss")
MODELS = ("demo", "demo-transformer")
MOST_NAMES = 2000


def among(names: Callable[[], Iterable[str]] | Iterable[str], *, files: str = "") -> Completer:
    """Complete one name; `files` is the ending of files that may stand there as well."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        known = names() if callable(names) else names
        found = [CompletionItem(name) for name in known if name.startswith(incomplete)]
        return [*_files(incomplete, files), *found]  # files first: shells forget what stands before that mark

    return complete


def comma_separated(names: Callable[[], Iterable[str]] | Iterable[str]) -> Completer:
    """Complete the last of several names between commas."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        known = names() if callable(names) else names
        return [CompletionItem(f"{before}{comma}{name}") for name in known if name.startswith(last)]

    return complete


def before_equals(names: Callable[[], Iterable[str]] | Iterable[str]) -> Completer:
    """Complete NAME of NAME=VALUE."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        known = names() if callable(names) else names
        return [CompletionItem(f"{name}=") for name in known if name.startswith(incomplete)]

    return complete


def devices() -> list[str]:
    """Names of the devices."""
    found: list[str] = import_module("mpq.hardware_models").available()
    return found


def solvers() -> list[str]:
    """Names of the solvers."""
    found: list[str] = import_module("mpq.solvers").available()
    return found


def methods() -> list[str]:
    """Names of the sensitivity methods."""
    return ["auto", *import_module("mpq.sensitivity").available()]


def targets() -> list[str]:
    """Names of the libraries that plans are exported to."""
    found: list[str] = import_module("mpq.exporting").targets()
    return found


def sources() -> list[str]:
    """Names of the libraries whose plans are imported."""
    found: list[str] = import_module("mpq.importing").sources()
    return found


def layer_names() -> list[str]:
    """Layers of the first plan or table on the command line that can be read."""
    for path in map(Path, os.environ.get("COMP_WORDS", "").split()):  # click knows no arguments before an open option
        try:
            if path.suffix == ".json":
                return [entry["layer"]["name"] for entry in json.loads(path.read_text("utf-8"))["layers"]]
            if path.suffix == ".csv":
                with path.open(encoding="utf-8") as file:
                    rows = islice(csv.DictReader(file), MOST_NAMES)
                    return list(dict.fromkeys(row["unit"] for row in rows))
            if path.suffix == ".parquet":
                return _units(path)
        except (OSError, ValueError, KeyError, TypeError):  # no such file, or another one: nothing to offer
            continue
    return []


def _units(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names: Sequence[str] = pq.ParquetFile(path).read(columns=["unit"])["unit"].to_pylist()
    except (pa.ArrowException, KeyError):
        return []
    return list(names[:MOST_NAMES])


def _files(incomplete: str, ending: str) -> list[CompletionItem]:
    """A mark that lets the shell complete files."""
    return [CompletionItem(incomplete, type="file")] if ending else []


model = among(MODELS, files=".py")
device = among(devices, files=".toml")
solver = among(solvers)
method = among(methods)
target = among(targets)
source = among(sources)
option_list = comma_separated(FORMATS)
budget = before_equals(QUANTITIES)
pin = before_equals(layer_names)
quantity = among(QUANTITIES)
granularity = among(GRANULARITIES)
task = among(TASKS)
quantizer = among(QUANTIZERS, files="/")
adjustment = among(ADJUSTMENTS)
metric = among(METRICS, files=".py")
