"""Which row of a device file's table of kernels serves each cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry
from .device_schema import LAYER_KINDS
from .prices import Reasons

Rows = NDArray[np.intp]  # (layers, columns)

REFUSED = -1


class FormatRow(Protocol):
    """A row of kernels: the names of formats and the kinds of layers (shell patterns) it takes."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of weight formats."""

    @property
    def activations(self) -> tuple[str, ...]:
        """Names of activation formats."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layers."""


@dataclass(frozen=True)
class TableRow:
    """A row of kernels that is one table of the device file."""

    entry: Entry

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of weight formats."""
        return self.entry.texts("weight")

    @property
    def activations(self) -> tuple[str, ...]:
        """Names of activation formats."""
        return self.entry.texts("activation")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layers, shell patterns."""
        return self.entry.texts("ops")


def first_row(rows: Sequence[FormatRow], weight: str, activation: str, kind: str) -> int:
    """Index of the first row that takes this pair of formats on this kind of layer, REFUSED without one."""
    for index, row in enumerate(rows):
        if (
            any(is_format(weight, name) for name in row.weights)
            and any(is_format(activation, name) for name in row.activations)
            and any(fnmatchcase(kind, pattern) for pattern in row.kinds)
        ):
            return index
    return REFUSED


def rows_of(rows: Sequence[FormatRow], cells: Cells) -> Rows:
    """The row of every cell: the first that takes it, len(rows) for lookups in a table, REFUSED for none.

    A lookup is not a kernel of its own: it needs weights in a format that some row reads, or in the model's own.
    """
    names = [cells.names(column) for column in range(cells.shape[1])]
    by_kind = {
        kind: [
            (len(rows) if _reads(rows, weight, cells) else REFUSED)
            if kind == "lookup"
            else first_row(rows, weight, activation, kind)
            for weight, activation in names
        ]
        for kind in dict.fromkeys(cells.kinds)
    }
    return np.array([by_kind[kind] for kind in cells.kinds], dtype=np.intp).reshape(cells.shape)


def no_kernel(rows: Rows, cells: Cells) -> Reasons:
    """Why cells without a row are refused."""
    names = [cells.names(column) for column in range(cells.shape[1])]

    def phrase(kind: str, weight: str, activation: str) -> str:
        inputs = "" if kind == "lookup" else f" and {activation} inputs"
        return f"has no kernel for {weight} weights{inputs} in a {kind}"

    by_kind = {kind: [phrase(kind, *pair) for pair in names] for kind in dict.fromkeys(cells.kinds)}
    phrases = np.array([by_kind[kind] for kind in cells.kinds], dtype=object).reshape(cells.shape)
    return np.where(rows == REFUSED, phrases, "")


def pick(values: NDArray[np.float64], rows: Rows) -> NDArray[np.float64]:
    """Each cell's entry of a vector over the rows, NaN where there is none."""
    return np.where(rows == REFUSED, np.nan, values[rows])


def is_format(fmt: str, name: str) -> bool:
    """Whether a format belongs to a name in a device file: a format without granularity, or a family.

    Example:
        >>> is_format("int4@group128", "int4"), is_format("mxfp6_e2m3", "mxfp6"), is_format("int4", "uint4")
        (True, True, False)
    """
    plain = fmt.partition("@")[0]
    return plain == name or plain.startswith(f"{name}_")


def doubled_pairs(table: str, entries: Sequence[Entry]) -> Iterable[tuple[str, str, int, str]]:
    """Rows of one table that take a pair of formats on a kind of layer that an earlier row takes."""
    taken: set[tuple[str, str, str]] = set()
    for position, entry in enumerate(entries):
        kinds = {kind for pattern in entry.texts("ops") for kind in matching(LAYER_KINDS, pattern)}
        pairs = {(w, a, kind) for w in entry.texts("weight") for a in entry.texts("activation") for kind in kinds}
        if twice := sorted(pairs & taken):
            weight, activation, kind = twice[0]
            problem = f"weight {weight!r} with activation {activation!r} on {kind} has a row already"
            yield problem, table, position, "weight"
        taken |= pairs


def _reads(rows: Sequence[FormatRow], weight: str, cells: Cells) -> bool:
    return weight == cells.dtype.name or any(is_format(weight, name) for row in rows for name in row.weights)
