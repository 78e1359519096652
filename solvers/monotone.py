"""The front of the plans that keep an order: no layer of larger priority takes an earlier option."""

import numpy as np

from mpq.arrays import FloatArray, IntArray

from .forest import Forest
from .labels import Labels, Part, nothing_yet, union
from .sweep import Rules


def monotone_lists(forest: Forest, priority: FloatArray, rules: Rules) -> list[Labels]:
    """The list of plans whose options do not fall, in the order of the columns, as the priority of their groups rises.

    The restriction of HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852, the rule from memory of the paper): the layer with
    the larger average trace never gets fewer bits, which leaves C(groups + options − 1, options − 1) plans instead of
    options^groups. One list is kept for every largest option so far. Groups of equal priority are free among
    themselves. Cost: as a sweep, times the options.
    """
    columns, dims = forest.own.shape[2], len(forest.own) - 1
    states = {0: nothing_yet(dims)}
    for level in np.unique(priority):
        tied = np.flatnonzero(priority == level)
        following: dict[int, Labels] = {}
        for last in range(columns):
            parts = []
            for first, labels in states.items():
                if first > last:
                    continue
                if len(tied) == 1:
                    parts += _taken(forest, labels, int(tied[0]), range(last, last + 1))
                else:
                    parts += _class(forest, labels, tied, (first, last), rules)
            if parts:
                following[last] = union(parts, *rules)
        states = following
    parts = [Part(labels, np.zeros(dims), 0.0) for labels in states.values()]
    return [union(parts, *rules)] if parts else []


def _taken(forest: Forest, labels: Labels, group: int, options: range) -> list[Part]:
    """Labels followed by each of some options of a group."""
    own = forest.own[:, group]
    allowed = [option for option in options if forest.core.allowed[group, option]]
    return [Part(labels, own[1:, k], float(own[0, k]), ((group, k),)) for k in allowed]


def _class(forest: Forest, labels: Labels, tied: IntArray, span: tuple[int, int], rules: Rules) -> list[Part]:
    """Labels followed by groups of one priority, each free between the first and the last option."""
    for group in tied.tolist():
        parts = _taken(forest, labels, group, range(span[0], span[1] + 1))
        if not parts:
            return []
        labels = union(parts, *rules)
    return [Part(labels, np.zeros(len(forest.own) - 1), 0.0)]
