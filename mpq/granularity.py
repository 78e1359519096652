"""Which values share a scale, and how the range that the scale covers is chosen."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

GranularityKind = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True, repr=False)
class Granularity:
    """The values that share one scale.

    A tensor of shape (out, in...) is seen as rows = out and columns = product of the rest; a 1-D tensor is one row.

    - ``tensor``: one scale
    - ``channel``: one a row
    - ``group{n}``: one a run of n columns within a row; the last run of a row may be shorter
    - ``token``: one a vector of the last axis, for activations (..., features)

    Example:
        >>> Granularity("group", 128).groups((10, 300))  # 128 + 128 + 44 columns, 10 rows
        30
        >>> str(Granularity("group", 128))
        'group128'
    """

    kind: GranularityKind
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "channel", "group", "token"):
            raise ValueError(f"granularity must be tensor, channel, group<n> or token, got {self.kind!r}")
        if self.kind == "group" and self.size < 1:
            raise ValueError(f"group size must be at least 1, got {self.size}: write group128")
        if self.kind != "group" and self.size != 0:
            raise ValueError(f"granularity {self.kind} takes no size, got {self.size}")

    def groups(self, shape: Sequence[int]) -> int:
        """How many scales a tensor of that shape has."""
        values = prod(shape)
        if values == 0:
            return 0
        if self.kind == "tensor":
            return 1
        if self.kind == "token":
            return values // (shape[-1] if shape else 1)
        rows = shape[0] if len(shape) > 1 else 1
        return rows if self.kind == "channel" else rows * -(-(values // rows) // self.size)

    def __str__(self) -> str:
        return f"group{self.size}" if self.kind == "group" else self.kind

    __repr__ = __str__


@dataclass(frozen=True)
class MinMax:
    """The range from the smallest to the largest value of the group, so that nothing is clipped."""

    def __str__(self) -> str:
        return "minmax"


@dataclass(frozen=True)
class MSE:
    """The min-max range times the factor, of a fixed grid up to 1, with the least squared error in the group."""

    def __str__(self) -> str:
        return "mse"


@dataclass(frozen=True)
class Percentile:
    """The p-th percentile of the magnitudes of the group; with a zero point, the (100 − p)-th and p-th of its values.

    Percentiles are interpolated linearly between order statistics, as NumPy's are.
    """

    p: float

    def __post_init__(self) -> None:
        if not 50 < self.p <= 100:
            raise ValueError(f"percentile must lie in (50, 100], got {self.p:g}: write percentile99.9")

    def __str__(self) -> str:
        return f"percentile{int(self.p) if self.p == int(self.p) else self.p}"


Range = MinMax | MSE | Percentile

TENSOR, CHANNEL, TOKEN = Granularity("tensor"), Granularity("channel"), Granularity("token")
MINMAX = MinMax()
_PLAIN: dict[str, Granularity | Range] = {
    "tensor": TENSOR,
    "channel": CHANNEL,
    "token": TOKEN,
    "minmax": MINMAX,
    "mse": MSE(),
}


def parse_suffix(text: str) -> Granularity | Range | None:
    """A granularity or a range from its text, None where it is neither.

    Raises:
        ValueError: if the number of a group or percentile breaks its rule.

    Example:
        >>> parse_suffix("group64"), parse_suffix("percentile99.9"), parse_suffix("grp")
        (group64, Percentile(p=99.9), None)
    """
    if match := re.fullmatch(r"group([0-9]+)", text):
        return Granularity("group", int(match[1]))
    if match := re.fullmatch(r"percentile([0-9]+(?:\.[0-9]+)?)", text):
        return Percentile(float(match[1]))
    return _PLAIN.get(text)
