"""The sweep over all groups: lists of partial plans, merged group by group, pruned as they grow."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mpq.arrays import FloatArray

from .forest import Forest, Node, Remainder
from .labels import Keep, Labels, Part, Select, nothing_yet, sums, union


class Rules(NamedTuple):
    """Which labels go on: each for itself, and among each other."""

    keep: Keep
    select: Select


Pruning = Callable[[FloatArray], Rules]  # from the least of what the labels do not cover, one number a weighting
States = dict[int, Part]  # labels for every option of a group


def sweep(forest: Forest, least: Remainder, pruning: Pruning) -> Labels:
    """The plans of a forest that pruning leaves, each a label of costs and value above the forest's base.

    Nemhauser & Ullmann 1969 (Management Science 15(9)): a partial plan that costs no less than another and is no better
    is in no plan that is needed. Of coupled groups there is one list for every option of the parent, and the branches
    of a node are added up pair by pair. Cost: labels × options a group, × options again where groups are coupled.
    """
    dims = len(forest.own) - 1
    labels = nothing_yet(dims)
    for number, nodes in enumerate(forest.trees):
        after, before = least.later[number + 1], least.later[0] - least.later[number]
        spine = _spine(nodes)  # carries the labels of the trees before; the other branches start from nothing
        states: dict[int, States] = {}
        for node in nodes:
            others = after if node.group in spine else after + before
            rest = others[:, None] + least.outside[node.group]
            if node.branches:
                states[node.group] = _joined(forest, node, states, _Merge(least, rest, pruning))
            else:
                start = labels if node.group in spine else nothing_yet(dims)
                states[node.group] = _leaf(forest, node.group, start)
            for branch in node.branches:
                del states[branch.child]
        labels = union(list(states[nodes[-1].group].values()), *pruning(after))
    return labels


def _spine(nodes: tuple[Node, ...]) -> set[int]:
    """Groups from the first node up to the root, along the largest branches."""
    by_group = {node.group: node for node in nodes}
    node, spine = nodes[-1], {nodes[-1].group}
    while node.branches:
        node = by_group[node.branches[0].child]
        spine.add(node.group)
    return spine


def _leaf(forest: Forest, group: int, start: Labels) -> States:
    options = np.flatnonzero(forest.core.allowed[group]).tolist()
    own = forest.own[:, group]
    return {k: Part(start, own[1:, k], float(own[0, k]), ((group, k),)) for k in options}


class _Merge(NamedTuple):
    """What pruning needs at one node: the least of everything outside its subtree, (weightings, options)."""

    least: Remainder
    rest: FloatArray
    pruning: Pruning


def _joined(forest: Forest, node: Node, states: dict[int, States], merge: _Merge) -> States:
    """Labels of a node for each of its options: the first branch, then the others added pair by pair."""
    joined: States = {}
    for option in np.flatnonzero(forest.core.allowed[node.group]).tolist():
        own = forest.own[:, node.group, option]
        waiting = sum((merge.least.message[branch.child][:, option] for branch in node.branches), np.zeros(()))
        missing = merge.rest[:, option] + waiting
        labels: Labels | None = None
        for child, table in node.branches:
            terms = table[:, option]
            parts = [part.moved(terms[1:, k], float(terms[0, k])) for k, part in states[child].items()]
            message = merge.least.message[child][:, option]
            if labels is None:
                missing = missing - message
                parts = [part.moved(own[1:], float(own[0]), (node.group, option)) for part in parts]
                labels = union(parts, *merge.pruning(missing))
                continue
            everything_else = merge.rest[:, option] + merge.least.inside[node.group][:, option] - message
            side = union(parts, *merge.pruning(everything_else))
            missing = missing - message
            labels = sums(labels, side, *merge.pruning(missing))
        if labels is not None:
            joined[option] = Part(labels, np.zeros(len(own) - 1), 0.0)
    return joined
