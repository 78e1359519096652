"""Read HAWQ's `bit_config`: {module: bits}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpq.imported_names import first_match, modules_of
from mpq.layers import Layer
from mpq.options import Option


def from_hawq(data: Any, layers: Sequence[Layer], *, names: Mapping[str, str] | None = None) -> dict[str, Option]:
    """{layer: option} of a `bit_config`: int{bits} weights with a scale a channel.

    Args:
        data: {HAWQ's name: bits}; entries of ``quant_act`` modules, bits of layer inputs, are left out.
        layers: the layers of the network.
        names: HAWQ's name of a layer, where it differs, as for the export.

    Raises:
        ValueError: if a name is no layer's, or bits are no width of an integer.
    """
    ours_of: dict[str, str] = {theirs: ours for ours, theirs in (names or {}).items()}
    bits: dict[str, Any] = {ours_of.get(name, name): width for name, width in data.items() if "quant_act" not in name}
    modules = modules_of(layers)
    found = first_match(bits, list(modules), lambda pattern, name: pattern == name, "hawq")
    return {modules[name].name: Option(f"int{int(width)}") for name, width in found.items()}
