"""Lists of partial plans, each a point of costs and value, and the way back from a point to its choices."""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mpq.arrays import BoolArray, FloatArray, IntArray

ChoiceArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Keep = Callable[[FloatArray, FloatArray], BoolArray]  # costs (dims, labels), values (labels,) -> which to keep
Select = Callable[[FloatArray, FloatArray], IntArray]  # the same -> indices of the labels that stay, in order


class TracedPart(NamedTuple):
    """What a stretch of labels was made of: labels before, options taken, and one label of a side branch."""

    before: "Trace"
    size: int
    taken: tuple[tuple[int, int], ...]
    beside: "tuple[Trace, int] | None"


@dataclass(frozen=True, eq=False)
class Trace:
    """Where every label comes from: its position in the parts, one after another. Four bytes a label.

    ``depth`` is larger than that of everything it refers to.
    """

    parts: tuple[TracedPart, ...]
    source: npt.NDArray[np.uint32]
    depth: int


@dataclass(frozen=True, eq=False)
class Labels:
    """Partial plans: cost (dims, labels), value (labels,), and their trace."""

    cost: FloatArray
    value: FloatArray
    trace: Trace


class Part(NamedTuple):
    """Labels, all of them moved by one cost and value, because of the options taken and the label beside."""

    labels: Labels
    cost: FloatArray  # (dims,)
    value: float
    taken: tuple[tuple[int, int], ...] = ()
    beside: tuple[Trace, int] | None = None

    def moved(self, cost: FloatArray, value: float, *taken: tuple[int, int]) -> "Part":
        """The same with more cost and value, for taking these options as well."""
        return self._replace(cost=self.cost + cost, value=self.value + value, taken=self.taken + taken)


def nothing_yet(dims: int) -> Labels:
    """The one label before any choice."""
    return Labels(np.zeros((dims, 1)), np.zeros(1), Trace((), np.zeros(1, dtype=np.uint32), 0))


def union(parts: Sequence[Part], keep: Keep, select: Select) -> Labels:
    """All labels of the parts that ``keep`` keeps one by one and ``select`` among each other."""
    sizes = [len(part.labels.value) for part in parts]
    costs, values, sources, start = [], [], [], 0
    for part, size in zip(parts, sizes, strict=True):
        cost, value = part.labels.cost + part.cost[:, None], part.labels.value + part.value
        kept = np.flatnonzero(keep(cost, value))
        costs.append(cost[:, kept])
        values.append(value[kept])
        sources.append((kept + start).astype(np.uint32))
        start += size
    cost, value, source = np.concatenate(costs, axis=1), np.concatenate(values), np.concatenate(sources)
    chosen = select(cost, value)
    depth = 1 + max(max(part.labels.trace.depth, part.beside[0].depth if part.beside else 0) for part in parts)
    traced = [
        TracedPart(part.labels.trace, size, part.taken, part.beside) for part, size in zip(parts, sizes, strict=True)
    ]
    return Labels(cost[:, chosen], value[chosen], Trace(tuple(traced), source[chosen], depth))


def sums(many: Labels, few: Labels, keep: Keep, select: Select) -> Labels:
    """Every label of one list with every label of another (a Minkowski sum), as far as they are kept."""
    if len(few.value) > len(many.value):
        many, few = few, many
    if not len(few.value):
        return few
    each = range(len(few.value))
    parts = [Part(many, few.cost[:, j], float(few.value[j]), (), (few.trace, j)) for j in each]
    return union(parts, keep, select)


def choices(labels: Labels, index: IntArray, groups: int, options: int) -> ChoiceArray:
    """Choices of the labels at ``index``, (groups, labels); from the last list back to the first, each once."""
    found = np.zeros((groups, len(index)), dtype=np.uint8 if options <= 256 else np.uint16)
    asked: dict[Trace, list[tuple[IntArray, IntArray]]] = {labels.trace: [(np.arange(len(index)), index)]}
    number = itertools.count()
    queue = [(-labels.trace.depth, next(number), labels.trace)]
    while queue:
        trace = heapq.heappop(queue)[-1]
        requests = asked.pop(trace)
        columns, places = (np.concatenate(arrays) for arrays in zip(*requests, strict=True))
        for before, column, place in _steps_back(trace, columns, places, found):
            if before.parts and before not in asked:
                heapq.heappush(queue, (-before.depth, next(number), before))
            if before.parts:
                asked.setdefault(before, []).append((column, place))
    return found


def _steps_back(
    trace: Trace, columns: IntArray, places: IntArray, found: ChoiceArray
) -> list[tuple[Trace, IntArray, IntArray]]:
    """Write the options that a trace took, and say which labels of which traces come before."""
    source, first = trace.source[places], trace.parts[0]
    groups = [group for group, _ in first.taken]
    alike = all(
        part[:2] == first[:2] and part.beside is None and [group for group, _ in part.taken] == groups
        for part in trace.parts
    )
    if alike:
        which = source // np.uint32(first.size)
        for position, group in enumerate(groups):
            taken = np.array([part.taken[position][1] for part in trace.parts], dtype=found.dtype)
            found[group, columns] = taken[which]
        return [(first.before, columns, source - which * np.uint32(first.size))]
    starts = np.cumsum([0, *(part.size for part in trace.parts)])
    number_of_part = np.searchsorted(starts, source, "right") - 1
    place = source - starts[number_of_part]
    back = []
    order = np.argsort(number_of_part, kind="stable")
    bounds = np.searchsorted(number_of_part[order], np.arange(len(trace.parts) + 1))
    for number in np.unique(number_of_part):
        part, mine = trace.parts[number], order[bounds[number] : bounds[number + 1]]
        for group, option in part.taken:
            found[group, columns[mine]] = option
        back.append((part.before, columns[mine], place[mine]))
        if part.beside is not None:
            back.append((part.beside[0], columns[mine], np.full(len(mine), part.beside[1])))
    return back
