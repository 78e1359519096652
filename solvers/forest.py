"""Groups and the couplings between them as trees: the order of a sweep, and the least that is left at given prices."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray

from .reduction import Core


class NotAForestError(ValueError):
    """Couplings close a circle."""


class Branch(NamedTuple):
    """A child and its terms with its parent, (1 + budgets, options of the parent, options of the child)."""

    child: int
    table: FloatArray


class Node(NamedTuple):
    """A group and its children, the largest subtree first."""

    group: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True, eq=False)
class Forest:
    """A core as trees, every number measured from the least it can be, so that none is negative.

    Attributes:
        core: where it comes from.
        own: ``(1 + budgets, groups, options)``, excess of every option over the group's least.
        base: ``(1 + budgets,)``, sum of the leasts.
        trees: nodes of every tree, children before parents, the root last; cheapest tree first.
    """

    core: Core
    own: FloatArray
    base: FloatArray
    trees: tuple[tuple[Node, ...], ...]

    @cached_property
    def options(self) -> list[list[int]]:
        """Allowed options of every group."""
        return [np.flatnonzero(row).tolist() for row in self.core.allowed]

    @cached_property
    def slack(self) -> FloatArray:
        """``(budgets,)``: how much every cost may be, with room for the rounding of a sweep."""
        limits, groups = self.core.limits, len(self.own[0])
        room = (1e-12 + 1e-14 * groups) * (np.abs(limits) + np.abs(self.base[1:]))
        return np.asarray(limits - self.base[1:] + room)


def plant(core: Core, solver: str) -> Forest:
    """The trees of a core.

    Raises:
        NotAForestError: if couplings close a circle.
    """
    masked = np.where(core.allowed, core.table, np.inf)
    least = masked.min(2)
    own = np.where(core.allowed, core.table - least[:, :, None], 0.0)
    base = least.sum(1)
    around: dict[int, dict[int, FloatArray]] = {}
    for pair in core.couplings:
        both = np.outer(core.allowed[pair.first], core.allowed[pair.second])
        low = np.where(both, pair.table, np.inf).min((1, 2))
        table = np.where(both, pair.table - low[:, None, None], 0.0)
        base = base + low
        around.setdefault(pair.first, {})[pair.second] = table
        around.setdefault(pair.second, {})[pair.first] = table.transpose(0, 2, 1)
    trees, seen = [], np.zeros(len(core.allowed), dtype=bool)
    ends = [group for group in around if len(around[group]) == 1]
    for root in [*sorted(ends), *range(len(seen))]:
        if not seen[root]:
            trees.append(_tree(root, around, seen, solver))
    weight = own[1].max(1) if len(own) > 1 else own[0].max(1)
    # Coupled trees first, while the lists are short; then the cheap groups, whose sums lie close together.
    trees.sort(key=lambda nodes: (len(nodes) == 1, weight[nodes[-1].group] if len(nodes) == 1 else 0.0))
    return Forest(core, own, base, tuple(trees))


def _tree(root: int, around: dict[int, dict[int, FloatArray]], seen: BoolArray, solver: str) -> tuple[Node, ...]:
    """Nodes of the tree of one root, children first, marked as seen."""
    parent, order, stack = {root: root}, [], [root]
    while stack:
        group = stack.pop()
        seen[group] = True
        order.append(group)
        for other in around.get(group, {}):
            if other == parent[group]:
                continue
            if other in parent:
                label = " and ".join(str(number) for number in sorted((group, other)))
                raise NotAForestError(
                    f"solver {solver!r} takes pairs and transitions that form chains or trees; those of the groups "
                    f"{label} close a circle: use solver='auto' or 'ilp', which take everything"
                )
            parent[other] = group
            stack.append(other)
    size = dict.fromkeys(order, 1)
    for group in reversed(order[1:]):
        size[parent[group]] += size[group]
    children = {g: sorted((o for o in around.get(g, {}) if o != parent[g]), key=lambda o: (-size[o], o)) for g in order}
    nodes, stack = [], [root]
    while stack:  # a node before its children, the largest child last: reversed, every child before its parent
        group = stack.pop()
        nodes.append(Node(group, tuple(Branch(child, around[group][child]) for child in children[group])))
        stack.extend(children[group])
    return tuple(reversed(nodes))


class Remainder(NamedTuple):
    """The least that weighted sums of value and costs can come to, outside of what a list of labels covers.

    ``later[t]`` is the least of all trees from t on, ``inside[g]`` that of the subtree of g for every option of g,
    ``outside[g]`` that of the rest of its tree, ``message[g]`` what that subtree adds at least for every option of its
    parent; the last three are (weightings, options).
    """

    later: FloatArray  # (trees + 1, weightings)
    inside: dict[int, FloatArray]
    outside: dict[int, FloatArray]
    message: dict[int, FloatArray]


def remainder(forest: Forest, weights: FloatArray) -> Remainder:
    """Least weighted sums, for ``weights`` of value and costs (weightings, 1 + budgets).

    Cost: a pass over the tables for every weighting.
    """
    own = np.where(forest.core.allowed, np.tensordot(weights, forest.own, 1), np.inf)
    inside: dict[int, FloatArray] = {}
    outside: dict[int, FloatArray] = {}
    message: dict[int, FloatArray] = {}
    least = np.zeros((len(forest.trees), len(weights)))
    for number, nodes in enumerate(forest.trees):
        for node in nodes:
            inside[node.group] = own[:, node.group]
            for child, table in node.branches:
                message[child] = (np.tensordot(weights, table, 1) + inside[child][:, None, :]).min(2)
                inside[node.group] = inside[node.group] + message[child]
        root = nodes[-1].group
        least[number] = inside[root].min(1)
        outside[root] = np.zeros_like(inside[root])
        for node in reversed(nodes):
            for child, table in node.branches:
                above = outside[node.group] + inside[node.group] - message[child]
                outside[child] = (np.tensordot(weights, table, 1) + above[:, :, None]).min(1)
    later = np.concatenate([np.cumsum(least[::-1], axis=0)[::-1], np.zeros((1, len(weights)))])
    return Remainder(later, inside, outside, message)
