"""Hand a plan to the library that applies it: one function a target, none of which needs the target installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq.atomic import write_atomically
from mpq.attention_operators import is_operator
from mpq.export_autoround import refused_by_autoround, to_autoround
from mpq.export_compressed_tensors import refused_by_compressed_tensors, to_compressed_tensors
from mpq.export_csv import csv_text, to_csv
from mpq.export_gptqmodel import refused_by_gptqmodel, to_gptqmodel
from mpq.export_hawq import refused_by_hawq, to_hawq
from mpq.export_llama_cpp import refused_by_llama_cpp, tensor_type_file, to_llama_cpp
from mpq.export_modelopt import refused_by_modelopt, to_modelopt
from mpq.export_onnxruntime import refused_by_onnxruntime, to_onnxruntime
from mpq.export_quanto import refused_by_quanto, to_quanto
from mpq.export_torchao import refused_by_torchao, to_torchao
from mpq.exported_layers import Refusal, operator_refusal, without_operators
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Plan
from mpq.plugins import all_names, plugin_named
from mpq.suggestions import did_you_mean
from mpq.torchao_application import apply_by_torchao


def _json_text(exported: dict[str, Any]) -> str:
    return json.dumps(exported, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """A library that plans are exported to.

    Attributes:
        emit: the plan in the form the library reads, as plain data.
        refused: why the library cannot hold an option of a layer; None if it can.
        text: that data as the file the library reads.
        apply: quantises a model in place as the plan says, by the library itself, and checks what came out; None where
            only the library's own tools do that. See `mpq.application.apply`.
    """

    emit: Callable[..., dict[str, Any]]
    refused: Refusal
    text: Callable[[dict[str, Any]], str] = _json_text
    apply: Callable[..., None] | None = None


def _takes_all(layer: Layer, option: Option) -> str | None:
    return None


TARGETS = {
    "torchao": ExportTarget(emit=to_torchao, refused=refused_by_torchao, apply=apply_by_torchao),
    "llama.cpp": ExportTarget(emit=to_llama_cpp, refused=refused_by_llama_cpp, text=tensor_type_file),
    "onnxruntime": ExportTarget(emit=to_onnxruntime, refused=refused_by_onnxruntime),
    "autoround": ExportTarget(emit=to_autoround, refused=refused_by_autoround),
    "modelopt": ExportTarget(emit=to_modelopt, refused=refused_by_modelopt),
    "compressed-tensors": ExportTarget(emit=to_compressed_tensors, refused=refused_by_compressed_tensors),
    "gptqmodel": ExportTarget(emit=to_gptqmodel, refused=refused_by_gptqmodel),
    "quanto": ExportTarget(emit=to_quanto, refused=refused_by_quanto),
    "hawq": ExportTarget(emit=to_hawq, refused=refused_by_hawq),
    "csv": ExportTarget(emit=to_csv, refused=_takes_all, text=csv_text),
}


def targets() -> list[str]:
    """Names of the libraries a plan can be exported to; ours first, then those of other packages (`mpq.plugins`)."""
    return all_names("mpq.exporters", TARGETS)


def export(plan: Plan, target: str, **settings: Any) -> dict[str, Any]:
    """The plan in the form a library reads, as plain data that `json.dump` takes.

    Args:
        plan: what is exported.
        target: a name of `targets()`; the function behind it says how the result is applied.
        **settings: of that function: ``architecture`` for llama.cpp, ``names`` for HAWQ, ``source``, ``output`` and
            ``model`` for onnxruntime, which writes a file.

    Raises:
        ValueError: if the target is unknown, or cannot hold a format of the plan; nothing is mapped silently. Attention
            in other formats than floats is refused by all but CSV, which lists it.
    """
    found = target_named(target)
    return found.emit(plan if found is TARGETS["csv"] else without_operators(plan, target), **settings)


def write_export(plan: Plan, target: str, path: str | Path, **settings: Any) -> None:
    """Write the file a library reads: JSON, for llama.cpp the list for ``--tensor-type-file``, CSV, or an ONNX model.

    Raises:
        ValueError: as `export`.
    """
    if target == "onnxruntime":
        export(plan, target, output=path, **settings)
        return
    write_atomically(path, export_text(plan, target, **settings))


def export_text(plan: Plan, target: str, **settings: Any) -> str:
    """The text of the file a library reads; see `write_export`.

    Raises:
        ValueError: as `export`.
    """
    return target_named(target).text(export(plan, target, **settings))


def refusal(target: str, layer: Layer, option: Option | str) -> str | None:
    """Why a target cannot hold an option of a layer, None if it can: what restricts a search up front.

    Raises:
        ValueError: if the target is unknown.

    Example:
        >>> fc = Layer("fc", "linear", (4, 64), 256, 256, (1, 64), (1, 4), "fc.weight", "fc")
        >>> refusal("llama.cpp", fc, "q8_0"), refusal("hawq", fc, "int4"), refusal("quanto", fc, "uint4@group32")
        (None, None, "its groups in 'fc' are @channel: write uint4@channel")
    """
    found, asked = target_named(target), Option.parse(option)
    if is_operator(layer) and found is not TARGETS["csv"]:
        return operator_refusal(asked)
    return found.refused(layer, asked)


def target_named(name: str) -> ExportTarget:
    """The export target of a name: ours, or one that another package adds (`mpq.plugins`).

    Raises:
        ValueError: if the name is unknown or of two packages, or what the other package has cannot be loaded.
    """
    if plugin := plugin_named("mpq.exporters", name, TARGETS):
        loaded: ExportTarget = plugin.load()
        return loaded
    if name not in TARGETS:
        raise ValueError(f"export target {name!r} is not known{did_you_mean(name, targets())}")
    return TARGETS[name]
