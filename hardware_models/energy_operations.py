"""Where a device file's energies of multiply-adds come from: a named table, one number, or a row a pair of formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry, Number
from .energy_tables import OPERATIONS, MacEnergy, OperationTable, mac_energy
from .kernel_rows import TableRow, pick, rows_of
from .prices import Mask
from .technology import energy_factor, is_interpolated

Floats = NDArray[np.float64]

ACCUMULATOR_BITS = 32
UNIT = "picojoules a multiply-add"


class Operations(Protocol):
    """What a multiply-add costs on one device."""

    @property
    def title(self) -> str:
        """The table's name and what was made of it."""

    def pJ(self, cells: Cells) -> Floats:
        """Energy of a multiply-add, (layers, columns), NaN where there is none."""

    def numbers(self, cells: Cells, used: Mask) -> Iterable[Number]:
        """What the energies of the used cells rest on."""


@dataclass(frozen=True)
class NamedOperations:
    """`operations = "..."`: a named table, scaled to the device's process where the file names one."""

    settings: Entry
    table: OperationTable

    @property
    def title(self) -> str:
        """The table's name, its source, and the scaling."""
        title = f"{self.table.source.id} ({self.table.source.title})"
        if not self.table.has_own_adder:
            title += f", accumulators of {self._accumulator_bits} bits"
        if "process_nm" in self.settings:
            node = f"{self.settings['process_nm']:g} nm at {self.settings['voltage_V']:g} V"
            title += f", scaled by {self.factor:.3g} to {node} (Stillmaker and Baas)"
        return title

    @property
    def factor(self) -> float:
        """Energy on the device over that of the table.

        Raises:
            ValueError: if the scaling does not reach the device's process or voltage.
        """
        if "process_nm" not in self.settings:
            return 1.0
        to_nm, to_V = self.settings["process_nm"], self.settings["voltage_V"]
        return energy_factor(self.table.process_nm, self.table.voltage_V or to_V, to_nm, to_V)

    def pJ(self, cells: Cells) -> Floats:
        """The table's energies by formats, the same for every layer."""
        found = [self._found(cells, column) for column in range(cells.shape[1])]
        row = np.array([np.nan if energy is None else energy.pJ for energy in found])
        return np.broadcast_to(self.factor * row, cells.shape)

    def numbers(self, cells: Cells, used: Mask) -> Iterator[Number]:
        """The settings, and one number a used pair of formats, marked as the table knows it."""
        yield from self.settings.numbers
        multiplied = used & (cells.work.macs[:, None] > 0)
        for column in np.flatnonzero(multiplied.any(axis=0)).tolist():
            if (energy := self._found(cells, column)) is not None:
                yield self._number(energy, " x ".join(cells.names(column)))

    @property
    def _accumulator_bits(self) -> int:
        return int(self.settings.get("accumulator_bits", ACCUMULATOR_BITS))

    def _found(self, cells: Cells, column: int) -> MacEnergy | None:
        formats = cells.weights[column] or cells.dtype, cells.activations[column] or cells.dtype
        return mac_energy(self.table, *formats, accumulator_bits=self._accumulator_bits)

    def _number(self, energy: MacEnergy, pair: str) -> Number:
        scaled = "process_nm" in self.settings and is_interpolated(self.settings["process_nm"])
        kind = "derived" if scaled and energy.kind != "estimate" else energy.kind
        where = f"energy table {self.table.source.id}"
        source = replace(self.table.source, kind=kind)
        return Number(where, f"{pair} multiply-add", self.factor * energy.pJ, UNIT, (source,))


@dataclass(frozen=True)
class OneEnergy:
    """`energy_pJ_per_mac = ...`: whatever the formats, as ZigZag counts."""

    settings: Entry

    @property
    def title(self) -> str:
        """The number, and where it is from."""
        (number,) = (number for number in self.settings.numbers if number.key == "energy_pJ_per_mac")
        sources = ", ".join(source.title for source in number.sources)
        return f"{number.value:g} pJ a multiply-add in every format ({sources})"

    def pJ(self, cells: Cells) -> Floats:
        """The same everywhere."""
        return np.full(cells.shape, float(self.settings["energy_pJ_per_mac"]))

    def numbers(self, cells: Cells, used: Mask) -> Iterable[Number]:
        """The settings."""
        return self.settings.numbers


@dataclass(frozen=True)
class EnergyRows:
    """`[[mac_energy]]`: the device's own table."""

    settings: Entry
    rows: tuple[TableRow, ...]

    @property
    def title(self) -> str:
        """Where the rows are from."""
        sources = {source.title: None for row in self.rows for number in row.entry.numbers for source in number.sources}
        return f"the device's own multiply-adds ({', '.join(sources)})"

    def pJ(self, cells: Cells) -> Floats:
        """The energy of the first row that takes a cell."""
        energies = np.array([*(float(row.entry["energy_pJ_per_mac"]) for row in self.rows), 0.0])
        return pick(energies, rows_of(self.rows, cells))

    def numbers(self, cells: Cells, used: Mask) -> Iterator[Number]:
        """The settings and the rows in use."""
        yield from self.settings.numbers
        for index in np.unique(rows_of(self.rows, cells)[used]).tolist():
            if 0 <= index < len(self.rows):
                yield from self.rows[index].entry.numbers


def operations_of(settings: Entry, rows: Iterable[Entry]) -> Operations:
    """What a device file says about its multiply-adds."""
    if "operations" in settings:
        return NamedOperations(settings, OPERATIONS[settings["operations"]])
    if "energy_pJ_per_mac" in settings:
        return OneEnergy(settings)
    return EnergyRows(settings, tuple(map(TableRow, rows)))
