"""Read the plan of another library into a `Plan`, so that it can be priced, verified and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.import_autoround import from_autoround
from mpq.import_hawq import from_hawq
from mpq.import_llama_cpp import from_llama_cpp
from mpq.import_modelopt import from_modelopt
from mpq.layers import Network
from mpq.options import Option
from mpq.plan import Entry, Plan
from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    from mpq.layers import Layer

_SOURCES: dict[str, Callable[..., dict[str, Option]]] = {
    "autoround": from_autoround,
    "hawq": from_hawq,
    "llama.cpp": from_llama_cpp,
    "modelopt": from_modelopt,
}


def sources() -> list[str]:
    """Names of the libraries whose plans can be read."""
    return list(_SOURCES)


def import_plan(
    data: Any, source: str, network: Network | Plan, *, default: Option | str | None = None, **settings: Any
) -> Plan:
    """A plan of another library, for a network.

    Args:
        data: what the library takes: a dict, a list, its text, or the path of a file of it; for llama.cpp also that of
            a quantised GGUF file.
        source: a name of `sources()`.
        network: `mpq.trace(model, example)`, or a plan for the same model.
        default: what layers take that the plan does not name; for llama.cpp the last argument of ``llama-quantize``,
            for AutoRound its scheme. Without it they must all be named.
        **settings: ``names`` of HAWQ, ``architecture`` of llama.cpp, as for the export.

    Returns:
        The plan, with its size predicted; nothing is proved about it.

    Raises:
        ValueError: if the source is unknown, a name matches no layer, a format has no counterpart here, or a layer is
            not named and there is no default.
        TypeError: if the network is neither a `Network` nor a `Plan`.

    Example:
        >>> from mpq.layers import Layer
        >>> stem, head = (Layer(name, "linear", (4, 8), 32, 32, (1, 8), (1, 4), f"{name}.weight", name) for name in
        ...     ("stem", "head"))
        >>> import_plan('{"stem": 8, "head": 4}', "hawq", Network((stem, head))).options
        {'stem': 'int8', 'head': 'int4'}
    """
    if source not in _SOURCES:
        raise ValueError(f"import source {source!r} is not known{did_you_mean(source, _SOURCES)}")
    layers, fingerprint, outside = _layers_of(network)
    named = _SOURCES[source](_content(data, source), layers, **settings)
    fallback = None if default is None else Option.parse(default)
    missing = [layer.name for layer in layers if layer.name not in named]
    if missing and fallback is None:
        raise ValueError(
            f"{source}: the plan says nothing of layer {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ": say what such layers take with default="
        )
    entries = tuple(Entry(layer, named.get(layer.name, fallback or Option("fp32"))) for layer in layers)
    plan = Plan(entries, fingerprint, outside=outside, provenance={"imported": source})
    return Plan(
        entries,
        fingerprint,
        predicted={"size": plan.size_bytes},
        measures={"size": "B"},
        outside=outside,
        provenance=plan.provenance,
    )


def _layers_of(network: Network | Plan) -> tuple[list[Layer], str, Mapping[str, float]]:
    if isinstance(network, Network):
        return list(network.layers), network.fingerprint, {"size": float(network.outside_bytes)}
    if isinstance(network, Plan):
        return [entry.layer for entry in network.entries], network.fingerprint, dict(network.outside)
    raise TypeError(f"network must be mpq.trace(model, example) or a Plan, got {type(network).__name__}")


def _content(data: Any, source: str) -> Any:
    """The data, read where it is a path; JSON where the source is not llama.cpp."""
    if not isinstance(data, str | Path):
        return data
    path = Path(data)
    is_file = os.path.isfile(path)  # False for texts too long to be a path, where Path.is_file raises
    if not is_file and (isinstance(data, Path) or path.suffix in (".json", ".txt", ".gguf")):
        raise ValueError(f"{source}: there is no file {str(data)!r}")
    if source == "llama.cpp" and is_file and path.suffix == ".gguf":
        return path
    text = path.read_text("utf-8") if is_file else str(data)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if source == "llama.cpp":
            return text
        raise ValueError(f"{source}: the plan must be JSON or the path of a JSON file: {error}") from error
