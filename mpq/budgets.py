"""Budgets as people write them: `"18%"`, `"4.5 bits"`, `"7.9 MB"`, `"4 ms"`, `"2 mJ"`, or a number in base units."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Literal

_SI = {"p": 1e-12, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_LARGE = {prefix: factor for prefix, factor in _SI.items() if factor >= 1}
_SMALL = {prefix: factor for prefix, factor in _SI.items() if factor <= 1}

# What a measure's units are called, and which prefixes make sense before them.
_UNITS: dict[str, dict[str, float]] = {
    "B": {f"{prefix}B": factor for prefix, factor in (_LARGE | {"K": 1e3} | _BINARY).items()},
    "s": {f"{prefix}s": factor for prefix, factor in _SMALL.items()},
    "J": {f"{prefix}J": factor for prefix, factor in _SMALL.items()},
    "bops": {f"{prefix}{word}": factor for prefix, factor in _LARGE.items() for word in ("", "BOPs", "bops")},
    "loss": {"nats": 1.0, "": 1.0},
    "score": {"": 1.0},
}
_EXAMPLES = {"B": "'7.9 MB' or '4.5 bits'", "s": "'4 ms'", "J": "'2 mJ'", "bops": "'34 GBOPs'"}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*")

Kind = Literal["absolute", "fraction", "bits", "value bits"]


@dataclass(frozen=True)
class Budget:
    """A limit on one quantity, not yet applied to a model.

    `value` is in base units for "absolute", a fraction of the unquantised model for "fraction", and an average over the
    planned weights for "bits" (scales and zero points counted) and "value bits" (values alone).
    """

    quantity: str
    kind: Kind
    value: float

    def __str__(self) -> str:
        if self.kind == "fraction":
            return f"{self.value * 100:g}%"
        return f"{self.value:g}" + {"absolute": "", "bits": " bits", "value bits": " bits values"}[self.kind]


def parse_budget(quantity: str, limit: float | str, measure: str) -> Budget:
    """Read one budget.

    Args:
        quantity: what is limited, for messages and for the bits rule: only `size` can be given in bits a weight.
        limit: a number in base units, or text.
        measure: the quantity's unit in base units: `B`, `s`, `J`, `bops`, `loss`, or any other word, which then only
            takes numbers and percent.

    Raises:
        ValueError: if the limit is not a positive finite number with a unit of that measure.

    Example:
        >>> parse_budget("size", "7.9 MB", "B").value
        7900000.0
        >>> parse_budget("latency", "4 ms", "s")
        Budget(quantity='latency', kind='absolute', value=0.004)
        >>> parse_budget("size", "4.5 bits", "B").kind
        'bits'
        >>> parse_budget("size", "4 ms", "B")
        Traceback (most recent call last):
        ...
        ValueError: budget of size must have a unit of B, got '4 ms': write for example '18%', '7.9 MB' or '4.5 bits'
    """
    if isinstance(limit, bool) or not isinstance(limit, Real | str):
        raise ValueError(f"budget of {quantity} must be a number or text, got {limit!r}")
    if not isinstance(limit, str):
        return _checked(Budget(quantity, "absolute", float(limit)), limit, measure)
    match = _NUMBER.fullmatch(limit)
    if match is None:
        raise ValueError(f"budget of {quantity} must start with a number, got {limit!r}: {_hint(measure)}")
    number, unit = float(match[1]), re.sub(r"\s+", " ", match[2])
    units = _UNITS.get(measure, {"": 1.0, measure: 1.0})
    if unit == "%":
        budget = Budget(quantity, "fraction", number / 100)
    elif unit in ("bits", "bit") and quantity == "size":
        budget = Budget(quantity, "bits", number)
    elif unit in ("bits values", "bit values") and quantity == "size":
        budget = Budget(quantity, "value bits", number)
    elif unit in units or not unit:
        budget = Budget(quantity, "absolute", number * units.get(unit, 1.0))
    else:
        raise ValueError(f"budget of {quantity} must have a unit of {measure}, got {limit!r}: {_hint(measure)}")
    return _checked(budget, limit, measure)


def format_quantity(value: float, measure: str) -> str:
    """A value with a unit a person reads.

    Example:
        >>> format_quantity(7_900_000, "B"), format_quantity(0.0042, "s"), format_quantity(3.4e10, "bops")
        ('7.90 MB', '4.20 ms', '34.0 GBOPs')
        >>> format_quantity(13_000, "luts"), format_quantity(0.123456, "loss")
        ('13,000 luts', '0.1235')
    """
    if measure not in ("B", "s", "J", "bops") or not math.isfinite(value):
        unit = "" if measure in ("", "loss", "score") else f" {measure}"
        return f"{value:,.0f}{unit}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}{unit}"
    prefixes = _LARGE if measure in ("B", "bops") else _SMALL
    rounded = float(f"{value:.2e}")  # what is shown decides about prefix and digits: 9.996 is 10.0, not 10.00
    usable = [(factor, prefix) for prefix, factor in prefixes.items() if abs(rounded) >= factor and prefix != "µ"]
    factor, prefix = max(usable, default=(1.0, ""))
    scaled = value / factor
    digits = max(0, 2 - math.floor(math.log10(abs(rounded / factor)) + 1e-9)) if rounded else 0
    if measure == "B" and not prefix:
        digits = 0
    return f"{scaled:.{digits}f} {prefix}{'BOPs' if measure == 'bops' else measure}"


def _checked(budget: Budget, limit: object, measure: str) -> Budget:
    positive = budget.value > 0 or measure in ("loss", "score")
    if not math.isfinite(budget.value) or not positive:
        raise ValueError(f"budget of {budget.quantity} must be finite and above 0, got {limit!r}")
    return budget


def _hint(measure: str) -> str:
    example = _EXAMPLES.get(measure)
    return "write for example '18%'" + (f", {example}" if example else " or a plain number")
