"""`KeptWeights`: quantised weights that are asked for again and again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpq.formats import Float
from mpq.quantizer import quantised_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mpq.formats import NumberFormat
    from mpq.layers import Layer
    from mpq.quantizer import Quantizer


@dataclass(eq=False)
class KeptWeights:
    """A quantiser that remembers what it made, by layer and format, up to a number of bytes; the oldest goes first.

    It is for one model whose weights do not change.
    """

    quantizer: Quantizer
    kept_bytes: int
    _kept: OrderedDict[tuple[str, NumberFormat, str], Tensor] = field(default_factory=OrderedDict)
    _size: int = 0

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        """The quantised weight of a whole layer."""
        return self.units(rows, fmt, layer, "layer")

    def units(self, rows: Tensor, fmt: NumberFormat, layer: Layer, granularity: str) -> Tensor:
        """The quantised weight of a layer that is cut into units."""
        key = (layer.name, fmt, granularity)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = quantised_rows(rows, fmt, layer, granularity, self.quantizer)
        if isinstance(fmt, Float):
            return made  # a cast is cheaper than the room it takes
        self._kept[key] = made
        self._size += made.numel() * made.element_size()
        while self._size > self.kept_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._size -= dropped.numel() * dropped.element_size()
        return made
