"""What a family of hardware models says of cells, and what it is: a frozen object that prices them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry, Number
from .device_schema import Schema

Table = NDArray[np.float64]  # (layers, columns)
Mask = NDArray[np.bool_]  # (layers, columns)
Reasons = NDArray[np.object_]  # (layers, columns) of text, empty where a cell is priced

DeviceTables = Mapping[str, Sequence[Entry]]


def rests_on_nothing(used: Mask) -> Mapping[str, Iterable[Number]]:
    """No number of a device file, whatever cells are used."""
    return {}


@dataclass(frozen=True, eq=False)
class Prices:
    """What the cells of a network cost, a quantity; all tables (layers, columns).

    Attributes:
        tables: by quantity, in base units for the whole batch (size, value_size and bops: of the model, a sample); NaN
            where refused.
        measures: base unit of each quantity.
        reasons: why a cell is refused, a phrase that follows the target's name ("has no kernel for ..."); None where
            nothing is.
        aggregates: how layers add up where that is not a sum: "max", or "peak" with `alive`.
        alive: of a peak, (entries, 3): step, layer, and the factor on the layer's table entry that is held then.
        offsets: what the run costs outside the layers, a quantity.
        accesses: bits read and written at a memory, by its name in the device file: what energy is counted from.
        rests_on: numbers of the device file behind each quantity, given the cells in use.
        notes: what a quantity was counted with, in words: the named table of energies, the convention of BOPs.
        attention: what every run of attention costs with its cache in each column's activation format, (runs, columns):
            only quantities that depend on it. They are in the offsets, in the model's own format, the last column.
    """

    tables: Mapping[str, Table] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=dict)
    reasons: Reasons | None = None
    aggregates: Mapping[str, str] = field(default_factory=dict)
    alive: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    offsets: Mapping[str, float] = field(default_factory=dict)
    accesses: Mapping[str, Table] = field(default_factory=dict)
    rests_on: Callable[[Mask], Mapping[str, Iterable[Number]]] = rests_on_nothing
    notes: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, Table] = field(default_factory=dict)

    def __add__(self, other: Prices) -> Prices:
        """Both together; offsets and accesses of one name add up, a quantity belongs to one of them."""
        if twice := sorted(self.tables.keys() & other.tables.keys()):
            raise ValueError(f"{twice[0]} is priced twice, by two families of one target: name one of them for it")
        return Prices(
            tables={**self.tables, **other.tables},
            measures={**self.measures, **other.measures},
            reasons=_first(self.reasons, other.reasons),
            aggregates={**self.aggregates, **other.aggregates},
            alive={**self.alive, **other.alive},
            offsets=_summed(self.offsets, other.offsets),
            accesses=_summed(self.accesses, other.accesses),
            rests_on=_both(self.rests_on, other.rests_on),
            notes={**self.notes, **other.notes},
            attention={**self.attention, **other.attention},
        )


class CostModel(Protocol):
    """One family with the numbers of one device."""

    @property
    def limits(self) -> Mapping[str, float]:
        """The most that the device has of a quantity (lookup tables of an FPGA), in base units."""

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Price cells. `so_far` holds what the families before have said: latencies, accesses."""

    def describe(self) -> list[str]:
        """How it reads its numbers, in lines: which kernels run which formats."""


@dataclass(frozen=True)
class Family:
    """A family of hardware models: the tables of a device file that describe one, and how they are read.

    `read` returns None where the device file has no such tables. `check` tells what is wrong across tables, as
    (problem, table, position, key); it is called when every key by itself is right.
    """

    name: str
    tables: Schema
    read: Callable[[DeviceTables], CostModel | None]
    check: Callable[[DeviceTables], Iterable[tuple[str, str, int, str]]] = lambda tables: ()


def _summed(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: left[name] + right[name] for name in left.keys() & right.keys()}
    return {**left, **right, **both}


def _first(left: Reasons | None, right: Reasons | None) -> Reasons | None:
    if left is None or right is None:
        return right if left is None else left
    return np.where(left.astype(bool), left, right)


def _both(
    left: Callable[[Mask], Mapping[str, Iterable[Number]]], right: Callable[[Mask], Mapping[str, Iterable[Number]]]
) -> Callable[[Mask], Mapping[str, Iterable[Number]]]:
    def rests_on(used: Mask) -> Mapping[str, Iterable[Number]]:
        found = {name: tuple(numbers) for name, numbers in left(used).items()}
        for name, numbers in right(used).items():
            found[name] = (*found.get(name, ()), *numbers)
        return found

    return rests_on
