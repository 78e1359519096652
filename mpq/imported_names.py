"""What importers share: the layers of theirs that an outside plan names, none of whose names may match nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mpq.layers import Layer
from mpq.suggestions import did_you_mean

Named = TypeVar("Named")


def modules_of(layers: Sequence[Layer]) -> dict[str, Layer]:
    """{module that holds the weight: layer}, tied modules included."""
    found = {}
    for layer in layers:
        for name in (layer.weight_name or f"{layer.name}.weight", *layer.aliases):
            found[name.rpartition(".")[0] or name] = layer
    return found


def first_match(
    patterns: Mapping[str, Named], names: Sequence[str], matches: Callable[[str, str], bool], source: str
) -> dict[str, Named]:
    """{name: what the first pattern that matches it says}, in the order of the names.

    Raises:
        ValueError: if a pattern matches no name: the library would pass over it in silence.
    """
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f"{source}: {pattern!r} matches no layer{did_you_mean(pattern, names)}")
    found = {}
    for name in names:
        said = next((pattern for pattern in patterns if matches(pattern, name)), None)
        if said is not None:
            found[name] = patterns[said]
    return found
