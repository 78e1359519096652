"""Pictures as plotly Figures: what matplotlib draws, with names and numbers under the pointer."""

from __future__ import annotations

import math
from html import escape
from importlib import import_module
from typing import Any

import numpy as np

from mpq.picture import Axis, Bars, Limit, Picture, Points

Figure = Any  # plotly says nothing of its types
_SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "*": "star", "_": "line-ew", "": "circle"}
_FLAT = {"star": "diamond", "triangle-up": "diamond", "line-ew": "cross"}  # what three dimensions have in their place
_MODES = {"none": "markers", "lines": "lines+markers", "steps": "lines+markers"}


def plotly_figure(picture: Picture) -> Figure:
    """The picture as a Figure. Texts are escaped: plotly reads a part of HTML in them.

    Raises:
        ImportError: without plotly: ``pip install 'mpq-search[explore]'``.
    """
    try:
        graph_objects = import_module("plotly.graph_objects")
    except ImportError as error:
        raise ImportError("interactive plots need plotly: pip install 'mpq-search[explore]'") from error
    figure = graph_objects.Figure()
    for mark in picture.marks:
        if isinstance(mark, Bars):
            _bars(figure, mark, picture)
        elif isinstance(mark, Limit):
            _limit(figure, mark, picture)
        elif picture.z is not None:
            if mark.z is not None:
                _points_3d(figure, mark)
        else:
            _points(figure, mark)
    _finish(figure, picture)
    return figure


def _bars(figure: Figure, bars: Bars, picture: Picture) -> None:
    base = picture.lower_end
    figure.add_bar(
        x=bars.left,
        y=np.nan_to_num(bars.height, nan=base) - base,
        base=base,
        width=bars.width,
        offset=0,
        marker={"color": bars.colour, "line": {"width": 0.5 if len(bars.left) <= 60 else 0, "color": "white"}},
        opacity=0.45 if bars.is_pale else 1.0,
        name=escape(bars.label),
        showlegend=bool(bars.label),
        **_hover(bars.hover),
    )


def _points(figure: Figure, points: Points) -> None:
    texts = {"text": [escape(text) for text in points.texts], "textposition": "top right"} if points.texts else {}
    mode = _MODES[points.join] if points.symbol else "lines"
    error = {} if points.error is None else {"error_y": {"array": points.error, "thickness": 1, "width": 3}}
    shape = {"line": {"shape": "hv" if points.join == "steps" else "linear", "color": points.colour, "width": 1.6}}
    figure.add_scatter(
        x=points.x,
        y=points.y,
        mode=mode + ("+text" if points.texts else ""),
        marker=_marker(points),
        name=escape(points.label),
        showlegend=bool(points.label),
        **(shape if points.join != "none" else {}),
        **error,
        **texts,
        **_hover(points.hover),
    )


def _points_3d(figure: Figure, points: Points) -> None:
    marker = _marker(points)
    marker["size"] = marker["size"] * 0.6
    marker["symbol"] = _FLAT.get(marker["symbol"], marker["symbol"]).removesuffix("-open")
    figure.add_scatter3d(
        x=points.x,
        y=points.y,
        z=points.z,
        mode="markers",
        marker=marker,
        name=escape(points.label),
        showlegend=bool(points.label),
        **_hover(points.hover),
    )


def _marker(points: Points) -> dict[str, Any]:
    symbol = _SYMBOLS[points.symbol] + ("-open" if points.is_open and points.symbol != "_" else "")
    marker: dict[str, Any] = {"symbol": symbol, "size": np.sqrt(points.size) * 1.2}
    if points.symbol == "_":
        return marker | {"line": {"width": 2, "color": points.colour}}
    if points.value is None:
        edge = {"line": {"width": 0.8, "color": "white"}} if points.symbol in "*D" else {}
        return marker | {"color": points.colour} | edge
    shown: Any = points.value
    bar: dict[str, Any] = {"len": 0.8, "title": {"text": escape(points.value_axis.title)}}
    if points.value_axis.is_log:
        shown = np.log10(points.value)
        ends = range(int(np.floor(shown.min())), int(np.ceil(shown.max())) + 1)
        bar |= {"tickvals": list(ends), "ticktext": [f"{10.0**end:g}" for end in ends]}
    return marker | {"color": shown, "colorscale": "Viridis", "reversescale": True, "showscale": True, "colorbar": bar}


def _limit(figure: Figure, limit: Limit, picture: Picture) -> None:
    if picture.z is not None:
        return
    other = "y" if limit.along == "x" else "x"
    ends = {f"{limit.along}0": limit.value, f"{limit.along}1": limit.value, f"{other}0": 0, f"{other}1": 1}
    across = {f"{other}ref": "paper"}
    figure.add_shape(type="line", line={"color": limit.colour, "dash": "dash", "width": 1.4}, **ends, **across)
    axis = picture.x if limit.along == "x" else picture.y
    place = math.log10(limit.value) if axis.is_log else limit.value  # notes on logarithmic axes take exponents
    where = {limit.along: place, other: 1, **across}
    figure.add_annotation(text=escape(limit.label), showarrow=False, font={"color": limit.colour}, **where)


def _hover(texts: Any) -> dict[str, Any]:
    if not len(texts):
        return {}
    return {"hovertext": ["<br>".join(map(escape, text.split("\n"))) for text in texts], "hoverinfo": "text"}


def _finish(figure: Figure, picture: Picture) -> None:
    axes = {"xaxis": _axis(picture.x, picture.note), "yaxis": _axis(picture.y)}
    if picture.z is not None:
        scene = {name: axis for name, axis in axes.items() if name != "xaxis"} | {"xaxis": _axis(picture.x)}
        axes = {"scene": scene | {"zaxis": _axis(picture.z)}}
    figure.update_layout(
        title={"text": escape(picture.title), "font": {"size": 15}},
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 50 if picture.title else 30, "b": 60},
        barmode="overlay",
        legend={"itemsizing": "constant"} | ({"orientation": "h", "y": 0.0} if picture.z is not None else {}),
        **axes,
    )


def _axis(axis: Axis, note: str = "") -> dict[str, Any]:
    text = "<br>".join(map(escape, filter(None, [axis.title, note])))
    found: dict[str, Any] = {"title": {"text": text}, "type": "log" if axis.is_log else "linear"}
    if axis.is_log:
        found |= {"dtick": 1, "exponentformat": "power"}
    if axis.ticks is not None:
        found |= {"tickvals": list(axis.ticks[0]), "ticktext": [escape(text) for text in axis.ticks[1]]}
    return found
