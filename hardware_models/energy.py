"""Energy: what multiply-adds, bits moved and time cost, or the power of a busy device times time.

    E = macs e_mac(w, a) + sum over memories of bits moved * e_bit + P_static t        (counted)
    E = P_active t                                                                   (measured power)

for the whole batch. Bits moved and t are those of the device file's latency family; t is calibrated where the file has
a calibration. e_mac comes from a named table (`energy_tables`), scaled to the device's process (`technology`), from one
number for all formats, or from the file's own rows; e_bit from `[memory.*]`, else from the tables of `energy_memory`.
The first form is Accelergy's (Wu, Emer and Sze, 2019) and Horowitz' (ISSCC 2014); the second is what a datasheet gives.

Good for the ratio of options on one device, and for what dominates: traffic or arithmetic. Absolute numbers differ by
factors between tables: `notes["energy"]` of a result names the one it was counted with. The arithmetic is that of the
formats: a unit that pads narrow formats needs rows of its own. Control, clocks and instruction fetch count only as far
as a table includes them. A processor spends far more on an instruction than on its multiply-add: use active power
there. At fixed traffic energy does not fall with more bits; P t falls where a format is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .attention import attention_work, moved_bits
from .cells import Cells
from .device_numbers import Entry, Number
from .device_schema import FORMAT_PAIR, MEMORIES, Key, TableSchema, integer, number
from .energy_memory import SRAM, DRAM_pJ_PER_BIT, dram_bit, sram_bit
from .energy_operations import NamedOperations, Operations, operations_of
from .energy_tables import OPERATIONS
from .kernel_rows import doubled_pairs
from .prices import DeviceTables, Family, Mask, Prices, Reasons

Floats = NDArray[np.float64]

PICO = 1e-12

_PER_MAC = "energy_pJ_per_mac"
_WAYS = ("operations", _PER_MAC, "active_W")
_COUNTED = f"operations, {_PER_MAC} or [[mac_energy]]"

SCHEMA = {
    "energy": TableSchema(
        (
            Key("operations", "text", choices=tuple(OPERATIONS)),
            number(_PER_MAC, "picojoules a multiply-add", "energy"),
            integer("accumulator_bits", "bits", "accumulator"),
            number("process_nm", "nanometres", "process"),
            number("voltage_V", "volts", "voltage"),
            Key("dram_technology", "text", choices=tuple(DRAM_pJ_PER_BIT)),
            Key("sram_table", "text", choices=tuple(SRAM)),
            number("static_W", "watts that flow whatever runs", "static"),
            number("active_W", "watts of the busy device", "active"),
        )
    ),
    "mac_energy": TableSchema(
        (*FORMAT_PAIR, number(_PER_MAC, "picojoules a multiply-add", "energy", required=True)), repeated=True
    ),
}


@dataclass(frozen=True)
class ActivePower:
    """Energy of a device of which only the power while it works is known: `active_W` of `[energy]`.

    Example:
        >>> from mpq.hardware_models import load
        >>> load("gap8").models[-1].describe()
        ['energy: 0.075 W times latency']
    """

    settings: Entry

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Energy [J]: power times latency, offsets and the way latencies add up included.

        Raises:
            ValueError: if nothing before has priced latency.
        """
        watts = float(self.settings["active_W"])
        how = so_far.aggregates.get("latency")
        return Prices(
            tables={"energy": watts * _latency(so_far, "active_W")},
            measures={"energy": "J"},
            aggregates={"energy": how} if how else {},
            offsets=_offset(watts * so_far.offsets.get("latency", 0.0)),
            attention=_with_static(None, watts, so_far),
            rests_on=lambda used: {"energy": (*self.settings.numbers, *_latency_numbers(so_far, used))},
            notes={"energy": f"{watts:g} W times latency"},
        )

    def describe(self) -> list[str]:
        """One line."""
        return [f"energy: {self.settings['active_W']:g} W times latency"]


@dataclass(frozen=True)
class CountedEnergy:
    """Energy by counting: multiply-adds by `operations`, bits moved by `bits` (a number a memory), and static power.

    Example:
        >>> from mpq.hardware_models import load
        >>> print(load("bitfusion").models[-1].operations.title)
        bitfusion-45nm-fusion (BitFusion's synthesis, 8/2-bit element: 45 nm)
    """

    settings: Entry
    operations: Operations
    bits: Mapping[str, Number]

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Energy [J] of every cell; refused where the table has no multiply-add of the formats.

        Raises:
            ValueError: if no family counted accesses, a memory has no energy, or static power meets a pipeline.
        """
        self._check_countable(so_far)
        macs = cells.work.macs[:, None]
        each = np.where(macs > 0, self.operations.pJ(cells), 0.0)
        energy = PICO * (macs * each + self._moved(so_far))
        watts = float(self.settings.get("static_W", 0.0))
        if watts:
            energy = energy + watts * _latency(so_far, "static_W")
        if so_far.reasons is not None:
            energy = np.where(so_far.reasons.astype(bool), np.nan, energy)
        attention, each_run, note = self._attention(cells, so_far)
        return Prices(
            tables={"energy": energy},
            measures={"energy": "J"},
            reasons=_no_energy(np.isnan(each), cells),
            offsets=_offset(attention + watts * so_far.offsets.get("latency", 0.0)),
            attention=_with_static(each_run, watts, so_far),
            rests_on=lambda used: {"energy": self._numbers(cells, so_far, used)},
            notes={"energy": "; ".join(filter(None, [*self.describe(), note])).removeprefix("energy: ")},
        )

    def describe(self) -> list[str]:
        """The table of operations, and the memories."""
        parts = [self.operations.title, *(f"{level} {bit.value:.3g} pJ a bit" for level, bit in self.bits.items())]
        if "static_W" in self.settings:
            parts.append(f"static {self.settings['static_W']:g} W")
        return ["energy: " + "; ".join(parts)]

    def _check_countable(self, so_far: Prices) -> None:
        if not so_far.accesses:
            rule = (
                "[energy] counts the bits that a latency family moves, and this device file describes none that counts"
            )
            raise ValueError(f"{rule}: describe one ([[compute]], [array], ...), or give active_W instead")
        for level in so_far.accesses:
            if level not in self.bits:
                way = "give it energy_pJ_per_bit, or [energy] a dram_technology or sram_table"
                raise ValueError(f"[memory.{level}] is accessed but has no energy: {way}")
        if "static_W" in self.settings and so_far.aggregates.get("latency", "sum") != "sum":
            raise ValueError(
                "static_W cannot be shared out over layers that work at the same time (latencies that do not add up): "
                "leave it out of [energy], or give active_W instead"
            )

    def _moved(self, so_far: Prices) -> Floats:
        levels = so_far.accesses.items()
        moved: Floats = np.sum([bits * self.bits[level].value for level, bits in levels], axis=0)
        return moved

    def _attention(self, cells: Cells, so_far: Prices) -> tuple[float, Floats | None, str]:
        """Joules of attention, its traffic to the DRAM included; of each run in "decode"; and a word on it."""
        runs = attention_work(cells)
        if not runs or "dram" not in so_far.accesses:
            return 0.0, None, "attention is left out: the device has no dram" if runs else ""
        each = self.operations.pJ(cells)[cells.work.macs > 0, -1]  # of a layer that multiplies in the model's own dtype
        if not each.size or np.isnan(each[0]):
            return 0.0, None, f"attention is left out: no multiply-add of two {cells.dtype.name} numbers"
        macs, elements = sum(run.macs for run in runs), sum(run.elements for run in runs)
        joules = PICO * (macs * float(each[0]) + elements * cells.dtype.bits * self.bits["dram"].value)
        each_run = None
        if cells.phase == "decode":
            arithmetic = np.array([run.macs for run in runs])[:, None] * float(each[0])
            each_run = PICO * (arithmetic + moved_bits(cells) * self.bits["dram"].value)
        return joules, each_run, f"{joules:.4g} J of attention are an offset, in {cells.dtype.name}"

    def _numbers(self, cells: Cells, so_far: Prices, used: Mask) -> Iterator[Number]:
        yield from self.operations.numbers(cells, used)
        yield from (self.bits[level] for level in so_far.accesses)
        if "static_W" in self.settings:
            yield from _latency_numbers(so_far, used)


def _no_energy(missing: NDArray[np.bool_], cells: Cells) -> Reasons:
    names = [cells.names(column) for column in range(cells.shape[1])]
    phrases = [f"has no energy of a multiply-add of {weight} weights and {inputs} inputs" for weight, inputs in names]
    return np.where(missing, np.array(phrases, dtype=object), "")


def _latency(so_far: Prices, key: str) -> Floats:
    if "latency" not in so_far.tables:
        raise ValueError(f"{key} needs latency, and nothing in this device file prices it: describe a latency family")
    return so_far.tables["latency"]


def _latency_numbers(so_far: Prices, used: Mask) -> Iterable[Number]:
    return so_far.rests_on(used).get("latency", ())


def _with_static(joules: Floats | None, watts: float, so_far: Prices) -> dict[str, Floats]:
    """Energy of each run of attention, (runs, columns), static power times its latency included."""
    seconds = so_far.attention.get("latency")
    if joules is None:
        return {} if seconds is None or not watts else {"energy": watts * seconds}
    return {"energy": joules if seconds is None else joules + watts * seconds}


def _offset(joules: float) -> dict[str, float]:
    return {"energy": joules} if joules else {}


def _bits(settings: Entry, tables: DeviceTables) -> dict[str, Number]:
    """What a bit costs at every memory of which that is known."""
    found = {}
    for level in MEMORIES:
        for entry in tables[f"memory.{level}"]:
            own = [number for number in entry.numbers if number.key == "energy_pJ_per_bit"]
            if own:
                found[level] = own[0]
            elif level == "dram" and "dram_technology" in settings:
                found[level] = dram_bit(settings["dram_technology"])
            elif level not in ("dram", "flash") and "sram_table" in settings and "capacity_bytes" in entry:
                found[level] = sram_bit(settings["sram_table"], level, entry["capacity_bytes"])
    return found


def _settings(tables: DeviceTables) -> Entry:
    return next(iter(tables["energy"]), Entry("energy", {}, ()))


def _read(tables: DeviceTables) -> ActivePower | CountedEnergy | None:
    if not tables["energy"] and not tables["mac_energy"]:
        return None
    settings = _settings(tables)
    if "active_W" in settings:
        return ActivePower(settings)
    return CountedEnergy(settings, operations_of(settings, tables["mac_energy"]), _bits(settings, tables))


def _check(tables: DeviceTables) -> Iterator[tuple[str, str, int, str]]:
    if not tables["energy"] and not tables["mac_energy"]:
        return
    settings = _settings(tables)
    ways = [way for way in _WAYS if way in settings] + ["[[mac_energy]]"] * bool(tables["mac_energy"])
    if len(ways) != 1:
        got = " and ".join(ways) or "none of them"
        yield f"energy is counted ({_COUNTED}) or active_W times latency, one of these four: got {got}", "energy", 0, ""
        return
    if ways == ["active_W"]:
        yield from (
            (f"{key} has no meaning beside active_W", "energy", 0, key)
            for key in settings.values
            if key != "active_W" and not key.endswith("source")
        )
        return
    yield from doubled_pairs("mac_energy", tables["mac_energy"])
    yield from _check_scaling(settings)
    yield from _check_memories(settings, tables)


def _check_scaling(settings: Entry) -> Iterator[tuple[str, str, int, str]]:
    given = [key for key in ("process_nm", "voltage_V", "accumulator_bits") if key in settings]
    if "operations" not in settings:
        yield from ((f"{key} scales a named table: give operations", "energy", 0, key) for key in given)
        return
    table = OPERATIONS[settings["operations"]]
    if table.has_own_adder and "accumulator_bits" in settings:
        yield f"{table.source.id} has an adder of its own: leave accumulator_bits out", "energy", 0, "accumulator_bits"
    if ("process_nm" in settings) != ("voltage_V" in settings):
        yield "process_nm and voltage_V scale a table together: give both or neither", "energy", 0, given[0]
        return
    try:
        _ = NamedOperations(settings, table).factor
    except ValueError as error:
        yield str(error), "energy", 0, "process_nm"


def _check_memories(settings: Entry, tables: DeviceTables) -> Iterator[tuple[str, str, int, str]]:
    try:
        known = _bits(settings, tables)
    except ValueError as error:
        yield str(error), "energy", 0, "sram_table"
        return
    for level in MEMORIES:
        for entry in tables[f"memory.{level}"]:
            if "bandwidth_Bps" in entry and level not in known:
                way = "energy_pJ_per_bit is missing: [energy] counts what passes here"
                yield f"{way} (or name a dram_technology or sram_table in [energy])", f"memory.{level}", 0, ""


FAMILY = Family("energy", SCHEMA, _read, _check)
