"""Small pages for notebooks: a title, facts, tables. Texts are escaped, colours follow the notebook's theme.

No scripts, no style sheets, nothing from elsewhere: styles stand in the elements, text has the colour of its
surroundings, lines and bars are translucent grey, and only colours of formats have a background of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from mpq.format_colours import option_colour, text_colour

ROWS = 20  # of a table; of a longer one the first and the last are shown
_CELLS = 240  # of a strip; neighbours alike are one from there on
_LINE = "1px solid rgba(128,128,128,.35)"
_CELL = "padding:2px 10px 2px 0;border:0;background:none;vertical-align:top;"

Text = str | Markup


def card(title: Text, *parts: Text) -> str:
    """The page: a title above its parts, those that are empty left out.

    Example:
        >>> card("<b>", Markup("<i>x</i>"))[-40:]
        '&lt;b&gt;</div><div><i>x</i></div></div>'
    """
    head = Markup('<div style="font-weight:600;margin-bottom:4px">{}</div>').format(title)
    body = Markup("").join(Markup("<div>{}</div>").format(part) for part in parts if part)
    outer = '<div style="border:{};border-radius:6px;padding:8px 12px;max-width:64em;overflow-x:auto;line-height:1.45">'
    return str(Markup(outer).format(Markup(_LINE)) + head + body + Markup("</div>"))


def facts(pairs: Iterable[tuple[str, Text]]) -> Markup:
    """Names and what is to be said of them, a line each."""
    row = '<div style="margin:1px 0"><span style="opacity:.65">{}:</span> {}</div>'
    return Markup("").join(Markup(row).format(name, value) for name, value in pairs if value != "")


def table(header: Sequence[str], rows: Sequence[Sequence[Text]], *, left: Sequence[int] = (0,), what: str) -> Markup:
    """A table; columns stand right but for those named. Of more than 20 rows the first and last are shown, and a count.

    Args:
        header: titles of the columns.
        rows: texts, escaped unless they are `Markup`.
        left: columns of words.
        what: what a row is, for the count: "layers".
    """
    shown = [_row("td", row, left) for row in rows]
    if len(rows) > ROWS:
        first, last = ROWS * 3 // 4, ROWS // 4
        gap = Markup('<tr style="background:none"><td colspan="{}" style="{}text-align:left;opacity:.65">{}</td></tr>')
        hidden = f"… {len(rows) - first - last} more {what}, {len(rows)} in all"
        shown = [*shown[:first], gap.format(len(header), Markup(_CELL), hidden), *shown[-last:]]
    body = Markup("").join(shown)
    style = "border-collapse:collapse;margin:6px 0 0;font-size:.92em;border:0"
    whole = '<table style="{}"><thead>{}</thead><tbody>{}</tbody></table>'
    return Markup(whole).format(Markup(style), _row("th", header, left), body)


def chip(label: str, text: str = "") -> Markup:
    """An option in its colour, with its name on it (or another text)."""
    colour = option_colour(label)
    style = f"background:{colour};color:{text_colour(colour)};border-radius:3px;padding:0 5px;white-space:nowrap"
    return Markup('<span style="{}">{}</span>').format(style, text or label)


def chips(counts: Iterable[tuple[str, int]]) -> Markup:
    """Options and how often each is there."""
    return Markup(" ").join(chip(label, f"{label} × {count}") for label, count in counts)


def strip(cells: Sequence[tuple[float, str, str]]) -> Markup:
    """A band of cells: (width, colour, title shown under the pointer)."""
    if len(cells) > _CELLS:
        cells = _merged(cells)
    each = '<div title="{}" style="flex:{} 1 0;min-width:1px;background:{}"></div>'
    style = Markup("display:flex;height:16px;border-radius:3px;overflow:hidden;margin:4px 0")
    whole = '<div role="img" aria-label="{}" style="{}">{}</div>'
    inner = Markup("").join(Markup(each).format(title, f"{width:.6g}", colour) for width, colour, title in cells)
    return Markup(whole).format("formats of the layers in order", style, inner)


def bar(share: float, longest: float = 1.0) -> Markup:
    """A share of the whole as a bar with its percentage, on a scale that ends at the longest."""
    width = f"{60 * share / (longest or 1.0):.1f}px"
    style = f"display:inline-block;height:.6em;width:{width};background:rgba(128,128,128,.6);margin-right:4px"
    return Markup('<span style="{}"></span>{}').format(style, f"{share:.1%}")


def staircase(x: Sequence[float], y: Sequence[float], label: str) -> Markup:
    """A small picture of values that fall in steps, each coordinate from its least to its largest."""
    wide, high = 300, 90
    if min(y) > 0 and max(y) > 100 * min(y):
        y, label = [math.log10(value) for value in y], f"{label}, on a logarithmic scale"
    across = [4 + (wide - 8) * (value - min(x)) / ((max(x) - min(x)) or 1.0) for value in x]
    down = [high - 4 - (high - 8) * (value - min(y)) / ((max(y) - min(y)) or 1.0) for value in y]
    steps = [f"M{across[0]:.1f} {down[0]:.1f}"]
    steps += [f"H{right:.1f}V{level:.1f}" for right, level in zip(across[1:], down[1:], strict=True)]
    whole = (
        '<svg role="img" aria-label="{}" width="{}" height="{}" style="display:block;margin:4px 0">'
        '<path d="{}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )
    return Markup(whole).format(label, wide, high, "".join(steps))


def _row(kind: str, cells: Sequence[Text], left: Sequence[int]) -> Markup:
    border = f"border-bottom:{_LINE};" if kind == "th" else ""
    scope = ' scope="col"' if kind == "th" else ""
    found = [
        Markup("<{}{} style=\"{}\">{}</{}>").format(
            Markup(kind),
            Markup(scope),
            Markup(f"{_CELL}{border}text-align:{'left' if column in left else 'right'}"),
            cell,
            Markup(kind),
        )
        for column, cell in enumerate(cells)
    ]  # fmt: skip
    return Markup('<tr style="background:none">{}</tr>').format(Markup("").join(found))


def _merged(cells: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    merged: list[tuple[float, str, str]] = []
    for width, colour, title in cells:
        if merged and merged[-1][1] == colour:
            before = merged[-1]
            merged[-1] = (before[0] + width, colour, f"{before[2].split(' … ')[0]} … {title}")
        else:
            merged.append((width, colour, title))
    return merged
