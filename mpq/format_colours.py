"""One colour for every width of a format: warm for few bits, cool for many, darker from step to step.

Lightness falls with the bits, so that the order stays readable in grey print and with any colour vision. Colour is
never the only sign: pictures and pages write the format beside it.
"""

from __future__ import annotations

import math
from functools import lru_cache

from mpq.options import Option

PALETTE: dict[int, str] = {
    1: "#f4d846",
    2: "#f5b430",
    3: "#f48815",
    4: "#ee6032",
    5: "#d13a6d",
    6: "#b747a4",
    8: "#3967c1",
    16: "#194a87",
    32: "#1c2f46",
}
"""Colour of a stored value of so many bits, as ``#rrggbb``; widths between are mixed."""

UNKNOWN = "#8a8f98"
"""Of what has no width: an option that is no format."""

ACCENT = "#0f9d8a"
"""Of marks that are no format: a plan on a frontier, a budget line, a knee."""

MUTED = "#8a8f98"
"""Of what is there for comparison: baselines, unit lines."""

_INK, _PAPER = "#1a1a1a", "#ffffff"


def bits_colour(bits: float) -> str:
    """The colour of values of so many bits; an average lies between its neighbours.

    Example:
        >>> bits_colour(4), bits_colour(64), bits_colour(float("nan"))
        ('#ee6032', '#1c2f46', '#8a8f98')
    """
    if not bits > 0:
        return UNKNOWN
    widths = list(PALETTE)
    if bits <= widths[0] or bits >= widths[-1]:
        return PALETTE[widths[0] if bits <= widths[0] else widths[-1]]
    upper = next(width for width in widths if width >= bits)
    if upper == bits:
        return PALETTE[upper]
    lower = max(width for width in widths if width < bits)
    share = math.log(bits / lower) / math.log(upper / lower)
    both = zip(_channels(PALETTE[lower]), _channels(PALETTE[upper]), strict=True)
    return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in both)


@lru_cache(maxsize=4096)
def option_bits(label: str) -> float:
    """Bits of one stored weight (without a weight: of the input) of an option's label; NaN for any other text.

    Example:
        >>> option_bits("int4@group128/int8"), option_bits("-/int8"), option_bits("as it is")
        (4.0, 8.0, nan)
    """
    try:
        option = Option.parse(label)
    except ValueError:
        return math.nan
    fmt = option.weight or option.activation
    return math.nan if fmt is None else float(fmt.bits)


def option_colour(label: str) -> str:
    """The colour of an option by its label.

    Example:
        >>> option_colour("int8") == option_colour("fp8_e4m3") == PALETTE[8]
        True
    """
    return bits_colour(option_bits(label))


def text_colour(background: str) -> str:
    """Near-black or white, whichever is easier to read on a colour.

    Example:
        >>> text_colour(PALETTE[2]), text_colour(PALETTE[16])
        ('#1a1a1a', '#ffffff')
    """
    here, ink = _luminance(background), _luminance(_INK)
    return _INK if (here + 0.05) / (ink + 0.05) >= 1.05 / (here + 0.05) else _PAPER


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def _luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    shares = (channel / 255 for channel in _channels(colour))
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
