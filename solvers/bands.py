"""The front of one resource: bounds around its convex hull keep the lists short."""

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .dominance import staircase
from .forest import Forest, Remainder, remainder
from .labels import Labels
from .prices import prices
from .pruning import ROOM, NearTheFront
from .sweep import sweep

PRICES = 256
APPROACHES = (0.0, 0.01, 1.0)  # the same for an epsilon: what is near enough is not looked for again
FRACTIONS = (0.0, 1.0)  # of the way from the hull to what the front found so far leaves open


def front_lists(forest: Forest, epsilon: float, origin: FloatArray) -> list[tuple[Labels, IntArray]]:
    """Lists that hold the front of a forest with one cost, and which of their labels: all for ``epsilon`` 0.

    At a price λ every plan is worth at least the hull: the least value + λ · cost there is. A plan of the front lies
    between the hull and the front found so far, so that all its parts lie as close to the hull of their own. The first
    sweep keeps what lies on the hull, the second what lies within the bounds that the first gives: nothing else can be
    on the front. With an ``epsilon``, a sweep near the hull comes between them, and plans close to a point found
    already are not looked for; amounts count from ``−origin``.
    """
    price = prices(forest, PRICES)
    least = remainder(forest, np.stack([np.ones(len(price)), price], axis=1))
    hull = least.later[0]
    ceiling = hull
    lists: list[Labels] = []
    for fraction in APPROACHES if epsilon else FRACTIONS:
        if lists:
            top = _ceiling(forest, price, hull, _shifted(lists, epsilon, origin))
            # Nothing is left open at a price whose ceiling is below the hull.
            ceiling = np.where(top < hull * (1 - ROOM), -np.inf, hull + fraction * (np.maximum(top, hull) - hull))
        live = ceiling > -np.inf
        if live.any():
            near = NearTheFront(price=price[live], ceiling=ceiling[live], slack=float(forest.slack[0]))
            lists.append(sweep(forest, _only(least, live), near))
    if not epsilon:
        return [(lists[-1], np.arange(len(lists[-1].value)))]
    together = staircase(*_joined(lists))
    ends = np.cumsum([len(labels.value) for labels in lists])
    return [
        (labels, together[(together >= end - len(labels.value)) & (together < end)] - end + len(labels.value))
        for labels, end in zip(lists, ends, strict=True)
    ]


def _joined(lists: list[Labels]) -> FloatArray:
    """(2, labels): cost and value of all lists."""
    return np.concatenate([np.stack([labels.cost[0], labels.value]) for labels in lists], axis=1)


def _only(least: Remainder, live: BoolArray) -> Remainder:
    """The same at fewer prices."""
    inner = ({group: table[live] for group, table in tables.items()} for tables in least[1:])
    return Remainder(least.later[:, live], *inner)


def _shifted(lists: list[Labels], epsilon: float, origin: FloatArray) -> FloatArray:
    """(2, points): cost and value of the front so far, nearer by what ``epsilon`` allows."""
    points = _joined(lists)
    points = points[:, staircase(*points)]
    return np.asarray(points - epsilon / (1 + epsilon) * (points + origin[::-1, None]))


def _ceiling(forest: Forest, price: FloatArray, hull: FloatArray, points: FloatArray) -> FloatArray:
    """For every price, the largest value + price · cost of a plan there that no point stands for; (prices,).

    A plan that costs less than the next point and is no worse than this one may be missing. Every such stretch is
    looked at with the price of the hull at its dear end.
    """
    far = remainder(forest, np.array([[0.0, 1.0], [0.0, -1.0]])).later[0]
    end = min(float(forest.slack[0]), -float(far[1]))
    cost, value = points
    stretch = np.append(cost[1:], max(end, float(cost[-1]))) if len(cost) else np.zeros(0)
    turns = np.minimum.accumulate(np.diff(hull) / np.diff(price))  # costs at which the hull changes its price
    at = np.searchsorted(-turns, -stretch)
    ceiling = np.full(len(price), -np.inf)
    nearby = np.clip(at + np.array([[-1], [0], [1]]), 0, len(price) - 1)
    is_open = (hull[nearby] - price[nearby] * stretch < value).all(0)
    np.maximum.at(ceiling, at[is_open], (value + price[at] * stretch)[is_open])
    if not len(cost) or cost[0] > far[0] * (1 + ROOM):
        ceiling[-1] = 1e300  # cheaper plans than the first point
    return ceiling
