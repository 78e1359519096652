"""Granularity "experts": each matrix of a stack of experts takes an option of its own, every other layer one."""

from __future__ import annotations

from mpq.layers import Layer


def granularity_in(layer: Layer, granularity: str) -> str:
    """How one layer is cut: "experts" is blocks of rows in a stack and nothing in other layers, the rest as it is.

    Example:
        >>> up = Layer("up", "experts", (8 * 32, 16), 4096, 0, (1, 16), (1, 32), channel_axis=1, experts=8)
        >>> granularity_in(up, "experts"), granularity_in(up, "layer")
        ('rows:32', 'layer')
    """
    if granularity != "experts":
        return granularity
    return f"rows:{layer.weight_shape[0] // layer.experts}" if layer.experts > 1 else "layer"
