"""What every number format has in common: its bits of values, scales and zero points, and its canonical text."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from mpq.granularity import CHANNEL, MINMAX, TENSOR, Granularity, Range

SCALE_BITS = {"fp16": 16, "bf16": 16, "fp32": 32, "e8m0": 8}
"""Bits of the formats that a free scale may be stored in. e8m0 is a power of two, 2^-127 … 2^127."""


@dataclass(frozen=True)
class Layout:
    """How a format lies in memory.

    Attributes:
        name: the format's text without suffixes.
        bits: bits of one stored value.
        granularity: the values that share a scale where that is part of the format; None: the user chooses.
        scale: the format of the scales where none is named; None: no scales.
        scales: how many scales of that format a group stores.
        header: further bits a group stores: zero point, scales of a format that cannot be chosen.
        tensor_bits: bits stored once a tensor.
    """

    name: str
    bits: int
    granularity: Granularity | None = None
    scale: str | None = "fp16"
    scales: int = 1
    header: int = 0
    tensor_bits: int = 0


@dataclass(frozen=True, repr=False)
class NumberFormat(ABC):
    """How the values of a tensor are stored. Frozen and hashable; ``str(fmt)`` is canonical and parses back.

    Made by `mpq.formats.parse` or by the subclass of its family.

    Attributes:
        granularity: which values share a scale; None: not bound yet (see `bind`), or the format has no scale.
        range: how the range that a scale covers is chosen.
        scale: the float format that scales are stored in; None: the format has none.

    Example:
        >>> from mpq.formats import parse
        >>> fmt = parse("int4@group128")
        >>> fmt.bits, fmt.storage_bits((2, 130))  # 260 values of 4 bits, 4 scales of 16
        (4, 1104)
    """

    takes: ClassVar[frozenset[str]] = frozenset({"granularity", "range", "scale"})
    """The suffixes that the family leaves to its user."""

    _: KW_ONLY
    granularity: Granularity | None = None
    range: Range = MINMAX
    scale: str | None = None

    @abstractmethod
    def _layout(self) -> Layout:
        """The layout, or a ValueError where the family's own fields break a rule."""

    @cached_property
    def layout(self) -> Layout:
        """How the format lies in memory, suffixes apart."""
        return self._layout()

    @property
    def name(self) -> str:
        """The text without suffixes."""
        return self.layout.name

    @property
    def bits(self) -> int:
        """Bits of one stored value, scales and zero points apart."""
        return self.layout.bits

    @property
    def group_bits(self) -> int:
        """Bits stored once a group: scales, zero point, block header."""
        return self.layout.header + self.layout.scales * SCALE_BITS.get(self.scale or "", 0)

    @property
    def tensor_bits(self) -> int:
        """Bits stored once a tensor: a scale above those of the groups."""
        return self.layout.tensor_bits

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Bits of a tensor of that shape, (out, in...): values, scales, zero points.

        A format without granularity counts as bound to a weight. A short last group has its scale, but no padding.

        Raises:
            ValueError: if a size in the shape is negative.
        """
        sizes = [int(size) for size in shape]
        if any(size < 0 for size in sizes):
            raise ValueError(f"shape must have no negative size, got {tuple(sizes)}")
        values = math.prod(sizes)
        granularity = self.bind("weight").granularity
        groups = granularity.groups(sizes) if granularity else 0
        return values * self.bits + groups * self.group_bits + (self.tensor_bits if values else 0)

    def bits_per_value(self, shape: Sequence[int]) -> float:
        """`storage_bits` by number of values.

        Raises:
            ValueError: if the shape has no values.

        Example:
            >>> from mpq.formats import parse
            >>> [parse(text).bits_per_value((4096, 4096)) for text in ("int4@group128", "mxfp4", "q4_k")]
            [4.125, 4.25, 4.5]
        """
        values = math.prod(int(size) for size in shape)
        if values == 0:
            raise ValueError(f"shape must have at least one value, got {tuple(shape)}")
        return self.storage_bits(shape) / values

    def bind(self, role: Literal["weight", "activation"]) -> NumberFormat:
        """The format with a granularity: a weight has a scale a channel, an activation one a tensor.

        A granularity that is set or built in stays, and a format without scales keeps none.

        Raises:
            ValueError: if the role is neither of the two.

        Example:
            >>> from mpq.formats import parse
            >>> parse("int8").bind("activation"), parse("int8@token").bind("activation"), parse("fp16").bind("weight")
            (int8@tensor, int8@token, fp16)
        """
        if role not in ("weight", "activation"):
            raise ValueError(f"role must be 'weight' or 'activation', got {role!r}")
        if self.granularity is not None or "granularity" not in self.takes:
            return self
        return replace(self, granularity=CHANNEL if role == "weight" else TENSOR)

    def __post_init__(self) -> None:
        name, own = self.name, self.layout.granularity
        scale = self.scale or self.layout.scale
        if "granularity" not in self.takes and self.granularity not in (None, own):
            why = f"has its granularity built in, blocks of {own.size}" if own else "has no scale"
            raise ValueError(f"{name} {why}: it takes no granularity, got @{self.granularity}; write {name}")
        if "range" not in self.takes and self.range != MINMAX:
            raise ValueError(f"{name} leaves no range to choose, got @{self.range}; write {name}")
        if "scale" not in self.takes and scale != self.layout.scale:
            why = f"stores its scales as {self.layout.scale}" if self.layout.scale else "has no scale"
            raise ValueError(f"{name} {why}: it takes no scale format, got @scale={scale}; write {name}")
        if "scale" in self.takes and scale not in SCALE_BITS:
            raise ValueError(f"scale of {name} must be one of {', '.join(SCALE_BITS)}, got {scale!r}")
        object.__setattr__(self, "granularity", self.granularity or own)
        object.__setattr__(self, "scale", scale)

    def __str__(self) -> str:
        granularity = f"@{self.granularity}" if self.granularity != self.layout.granularity else ""
        chosen = f"@{self.range}" if self.range != MINMAX else ""
        scale = f"@scale={self.scale}" if self.scale != self.layout.scale else ""
        return f"{self.name}{granularity}{chosen}{scale}"

    def __repr__(self) -> str:
        return str(self)
