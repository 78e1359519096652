"""Where a network's weights and its work are: shares of both, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpq.format_colours import ACCENT, PALETTE
from mpq.picture import Axis, Bars, Mark, Picture, Points, layer_ticks

if TYPE_CHECKING:
    from mpq.layers import Network

BARS = 60  # layers, up to which two bars each can be told apart; then there are lines


def network_picture(network: Network) -> Picture:
    """Two bars a layer, in order: its share of the weights and of the multiply-adds; lines where layers are many."""
    layers = network.layers
    marks: list[Mark] = []
    for place, (label, colour, name) in enumerate((("weights", PALETTE[8], "parameters"), ("MACs", ACCENT, "macs"))):
        counts = np.array([getattr(layer, name) for layer in layers], dtype=np.float64)
        share = 100 * counts / max(counts.sum(), 1.0)
        hover = [
            f"{layer.name} ({layer.kind})\n{count:,.0f} {label}, {part:.3g} %"
            for layer, count, part in zip(layers, counts, share, strict=True)
        ]
        if len(layers) > BARS:
            across = np.arange(len(layers), dtype=np.float64)
            marks.append(Points(x=across, y=share, colour=colour, join="lines", symbol="", label=label, hover=hover))
            continue
        left = np.arange(len(layers), dtype=np.float64) - 0.4 + 0.4 * place
        width = np.full(len(layers), 0.4)
        marks.append(Bars(left=left, width=width, height=share, colour=colour, label=label, hover=hover))
    x = Axis(title="layer", ticks=layer_ticks([layer.name for layer in layers]))
    weights, macs = (sum(getattr(layer, name) for layer in layers) for name in ("parameters", "macs"))
    samples = f"{network.batch} sample{'s' * (network.batch != 1)}"
    title = f"{len(layers)} layers, {weights:,} weights, {macs:,} MACs for {samples}"
    return Picture(x=x, y=Axis(title="share of the network [%]"), marks=tuple(marks), title=title)
