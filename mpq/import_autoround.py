"""Read AutoRound's `layer_config`: {module or regular expression: scheme}."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.imported_names import first_match, modules_of
from mpq.layers import Layer
from mpq.options import Option

_INTEGER_SCHEME = re.compile(r"W([2-8])A16(?:G(\d+))?", re.IGNORECASE)
_NAMED = {"MXFP4": "mxfp4", "MXFP8": "mxfp8_e4m3", "NVFP4": "nvfp4"}
_DEFAULTS: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "data_type": "int"}  # AutoRound's own
_FLOATS = {("mx_fp", 4): "mxfp4", ("mx_fp", 8): "mxfp8_e4m3", ("nv_fp", 4): "nvfp4"}
_UNQUANTISED_BITS = 16


def from_autoround(data: Any, layers: Sequence[Layer]) -> dict[str, Option]:
    """{layer: option} of a `layer_config`.

    A key is a module's name, or a regular expression that is searched in the names; exact names go first. Fields that
    a scheme lacks are those of W4A16, AutoRound's default. Layers with 16 bits stay as they are stored.

    Raises:
        ValueError: if a key matches no layer, or a scheme has no counterpart here.
    """
    modules = modules_of(layers)
    names = list(modules)
    exact = {key: scheme for key, scheme in dict(data).items() if key in modules}
    patterns = {key: scheme for key, scheme in dict(data).items() if key not in modules}
    schemes = first_match(patterns, names, lambda pattern, name: re.search(pattern, name) is not None, "autoround")
    return {modules[name].name: _option(scheme, modules[name]) for name, scheme in (schemes | exact).items()}


def stored_format(layer: Layer) -> str:
    """The float format a layer's weight has as it stands."""
    return {8: "fp64", 2: "bf16"}.get(layer.weight_bytes // max(layer.parameters, 1), "fp32")


def _option(scheme: Any, layer: Layer) -> Option:
    if isinstance(scheme, str):
        if named := _NAMED.get(scheme.upper()):
            return Option(named)
        if short := _INTEGER_SCHEME.fullmatch(scheme):
            return Option(f"int{short[1]}@group{short[2] or 128}")
        if scheme.upper() in ("BF16", "FP16"):
            return Option(scheme.lower())
        raise ValueError(
            f"autoround: scheme {scheme!r} of {layer.name!r} has no counterpart here: give it as a dict, or one of "
            f"W4A16 (W2 to W8, W4A16G32), {', '.join(_NAMED)}"
        )
    return _from_fields(dict(scheme), layer)


def _from_fields(scheme: Mapping[str, Any], layer: Layer) -> Option:
    given = {key: value for key, value in scheme.items() if value is not None}
    fields = _DEFAULTS | given
    bits, kind, size = int(fields["bits"]), str(fields["data_type"]), int(fields["group_size"])
    if bits >= _UNQUANTISED_BITS:
        return Option(stored_format(layer))
    activation = _activation(given, layer)
    if weight := _FLOATS.get((kind, bits)):
        return Option(weight, activation)
    if kind != "int":
        raise ValueError(f"autoround: data_type {kind!r} with {bits} bits ({layer.name!r}) has no counterpart here")
    granularity = {-1: "channel", 0: "tensor"}.get(size, f"group{size}")
    return Option(f"{'' if fields['sym'] else 'u'}int{bits}@{granularity}", activation)


def _activation(given: Mapping[str, Any], layer: Layer) -> str | None:
    bits = int(given.get("act_bits", _UNQUANTISED_BITS))
    if bits >= _UNQUANTISED_BITS:
        return None
    kind = str(given.get("act_data_type", given.get("data_type", "int")))
    if format_ := _FLOATS.get((kind, bits)):
        return format_
    if kind != "int":
        raise ValueError(f"autoround: act_data_type {kind!r} ({layer.name!r}) has no counterpart here")
    prefix = "" if given.get("act_sym", True) else "u"
    return f"{prefix}int{bits}@{'token' if given.get('act_dynamic', True) else 'tensor'}"
