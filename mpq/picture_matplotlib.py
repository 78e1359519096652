"""Pictures drawn on matplotlib's Axes, in the user's own style: nothing is set globally, nothing is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.picture import Bars, Limit, Picture, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DENSE = 60  # points, from which symbols on a line are small


def draw(picture: Picture, ax: Axes | None = None) -> Axes:
    """The picture on the Axes given, or on new ones.

    Raises:
        ImportError: without matplotlib: ``pip install 'mpq-search[explore]'``.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mpq-search[explore]'") from error
    is_new = ax is None
    if ax is None:
        ax = pyplot.subplots(figsize=(picture.width, picture.height), layout="constrained")[1]
    _scale(ax, picture)
    for mark in picture.marks:
        if isinstance(mark, Bars):
            _bars(ax, mark, picture.lower_end)
        elif isinstance(mark, Limit):
            _limit(ax, mark)
        else:
            _points(ax, mark)
    if picture.y.is_log and any(isinstance(mark, Bars) for mark in picture.marks):
        ax.set_ylim(bottom=picture.lower_end)
    has_scale = any(isinstance(mark, Points) and mark.value is not None for mark in picture.marks)
    _finish(ax, picture, "outside" if is_new and not has_scale else "best")
    return ax


def _scale(ax: Axes, picture: Picture) -> None:
    if picture.x.is_log:
        ax.set_xscale("log")
    if picture.y.is_log:
        ax.set_yscale("log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def _bars(ax: Axes, bars: Bars, bottom: float) -> None:
    colours = [bars.colour] * len(bars.left) if isinstance(bars.colour, str) else list(bars.colour)
    narrow = len(bars.left) > _DENSE
    ax.bar(
        bars.left,
        np.where(np.isfinite(bars.height), bars.height, bottom) - bottom,
        bars.width,
        bottom=bottom,
        align="edge",
        color=colours,
        alpha=0.45 if bars.is_pale else 1.0,
        edgecolor="white" if not narrow else "none",
        linewidth=0.0 if narrow else 0.5,
        label=bars.label or None,
    )
    ax.margins(x=0.01)


def _points(ax: Axes, points: Points) -> None:
    style = {"none": "None", "lines": "-", "steps": "-"}[points.join]
    if points.join != "none":
        where = "steps-post" if points.join == "steps" else "default"
        label = points.label if not points.symbol else ""
        ax.plot(points.x, points.y, style, color=points.colour, drawstyle=where, linewidth=1.4, label=label or None)
    if points.error is not None:
        ax.errorbar(points.x, points.y, points.error, fmt="none", ecolor=points.colour, elinewidth=0.9, capsize=2)
    if points.symbol:
        _symbols(ax, points)
    for x, y, text in zip(points.x, points.y, points.texts, strict=False):
        ax.annotate(text, (x, y), xytext=(5, 4), textcoords="offset points", fontsize="small")


def _symbols(ax: Axes, points: Points) -> None:
    crowded = points.join != "none" and len(points.x) > _DENSE
    size = np.minimum(points.size, 8.0) if crowded else points.size
    options: dict[str, Any] = {"s": size, "marker": points.symbol, "label": points.label or None, "zorder": 3}
    if points.value is not None:
        from matplotlib.colors import LogNorm

        norm = LogNorm() if points.value_axis.is_log else None
        drawn = ax.scatter(points.x, points.y, c=points.value, norm=norm, cmap="viridis_r", **options)
        ax.figure.colorbar(drawn, ax=ax, label=points.value_axis.title)
    elif points.symbol == "_":
        ax.scatter(points.x, points.y, color=points.colour, linewidths=1.6, **options)
    elif points.is_open:
        ax.scatter(points.x, points.y, facecolors="none", edgecolors=points.colour, linewidths=1.3, **options)
    else:
        edge = {"edgecolors": "white", "linewidths": 0.8} if points.symbol in "*D" else {"edgecolors": "none"}
        ax.scatter(points.x, points.y, color=points.colour, **edge, **options)


def _limit(ax: Axes, limit: Limit) -> None:
    line = ax.axvline if limit.along == "x" else ax.axhline
    line(limit.value, color=limit.colour, linewidth=1.2, linestyle=(0, (4, 3)), label=limit.label or None)


def _finish(ax: Axes, picture: Picture, legend: str) -> None:
    ax.set_xlabel("\n".join(filter(None, [picture.x.title, picture.note])))
    ax.set_ylabel(picture.y.title)
    if picture.title:
        ax.set_title(picture.title, loc="left", fontsize="medium")
    for axis, setter in ((picture.x, ax.set_xticks), (picture.y, ax.set_yticks)):
        if axis.ticks is not None:
            turned = setter == ax.set_xticks and sum(map(len, axis.ticks[1])) > 60
            setter(axis.ticks[0], axis.ticks[1], rotation=90 if turned else 0, fontsize="small")
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if legend == "outside" else {}
        ax.legend(frameon=False, fontsize="small", **where)
