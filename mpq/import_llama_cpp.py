"""Read a plan of llama.cpp: `--tensor-type` arguments, the file of `--tensor-type-file`, or a quantised GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq.export_llama_cpp import GGML_NAMES, tensors_of
from mpq.imported_names import first_match
from mpq.layers import Layer
from mpq.options import Option

_FORMATS = {ggml: name for name, ggml in GGML_NAMES.items()}


def from_llama_cpp(data: Any, layers: Sequence[Layer], *, architecture: str | None = None) -> dict[str, Option]:
    """{layer: option} of a list of ``pattern=type``, a mapping of them, or a ``.gguf`` file.

    As llama-quantize does it, the first pattern that is found anywhere in a tensor's name counts, in lower case. From a
    file the types are those the tensors have: what llama.cpp really stored, its silent fallbacks included.

    Args:
        data: the text, {pattern: type}, what `mpq.export` returned, or the path of a GGUF file.
        layers: the layers of the network.
        architecture: as for the export.

    Raises:
        ValueError: if a pattern matches no tensor, a type has no counterpart here, gate and up experts that are one
            layer here have different types, or the file lacks a layer.
        ImportError: if a GGUF file is given and the package ``gguf`` is not installed.
    """
    tensors = {layer.name: tensors_of(layer, architecture) for layer in layers}
    if isinstance(data, Path):
        types = _types_in(data)
        missing = [name for name, alike in tensors.items() if not any(tensor in types for tensor in alike)]
        if missing:
            raise ValueError(f"llama.cpp: {data.name} has no tensor of layer {missing[0]!r}, {tensors[missing[0]][0]}")
    else:
        names = [tensor for alike in tensors.values() for tensor in alike]
        types = first_match(_patterns(data), names, lambda pattern, name: bool(re.search(pattern, name)), "llama.cpp")
    found = {}
    for layer in layers:
        kinds = {types[tensor] for tensor in tensors[layer.name] if tensor in types}
        if len(kinds) > 1:
            raise ValueError(f"llama.cpp: tensors of {layer.name!r} have several types, {', '.join(sorted(kinds))}")
        if kinds:
            found[layer.name] = _option(kinds.pop(), layer)
    return found


def _patterns(data: Any) -> dict[str, str]:
    if isinstance(data, Mapping):
        given = data.get("tensor_types", data)
        return {str(pattern): str(kind).lower() for pattern, kind in given.items()}
    patterns: dict[str, str] = {}
    for token in str(data).split():
        pattern, equals, kind = token.rpartition("=")
        if token in ("--tensor-type", "llama-quantize"):
            continue
        if not equals or not pattern or not kind:
            raise ValueError(f"llama.cpp: tensor types must be PATTERN=TYPE, got {token!r}")
        patterns.setdefault(pattern.lower(), kind.lower())
    return patterns


def _types_in(path: Path) -> dict[str, str]:
    import gguf

    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


def _option(kind: str, layer: Layer) -> Option:
    try:
        return Option(_FORMATS.get(kind, kind))
    except ValueError as error:
        raise ValueError(f"llama.cpp: type {kind!r} of {layer.name!r} has no counterpart here: {error}") from error
