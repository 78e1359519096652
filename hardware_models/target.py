"""A target: a chip and a runtime, described by numbers that each name their source."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .costs import costs_frame

if TYPE_CHECKING:
    import pandas as pd

    from mpq.layers import Network
    from mpq.options import SearchSpace


@dataclass(frozen=True)
class Source:
    """Where numbers come from.

    `kind` is datasheet, paper, code, secondary, measured, derived (computed from published or measured numbers, as
    `read` says) or estimate (from memory, or a guess).
    """

    id: str
    title: str
    kind: str
    read: str
    url: str | None = None


@dataclass(frozen=True)
class Number:
    """One number of a device file; `where` is its table, `key` its name there, `unit` in words."""

    where: str
    key: str
    value: float
    unit: str
    sources: tuple[Source, ...]

    @property
    def is_estimate(self) -> bool:
        """Whether one of its sources is an estimate."""
        return any(source.kind == "estimate" for source in self.sources)


@dataclass(frozen=True)
class Memory:
    """The memory that weights and activations come from: bytes/s that kernels reach, pJ a bit where known."""

    bytes_per_s: float
    pj_per_bit: float | None
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class ComputeUnit:
    """A kernel family and the format pairs it multiplies natively; `ops_per_s` includes the efficiency."""

    name: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    kinds: tuple[str, ...]
    ops_per_s: float
    launch_overhead_s: float
    align_k: int
    align_n: int
    dequant_s_per_weight: float
    pj_per_mac: float | None
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class Fallback:
    """Format pairs that another unit runs; `dequant_s_per_weight` replaces the unit's own."""

    runs_as: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    kinds: tuple[str, ...]
    dequant_s_per_weight: float
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class Target:
    """A chip and its runtime; read one with `load`, or take `storage()` where no hardware is given.

    Example:
        >>> import mpq.hardware_models
        >>> t4 = mpq.hardware_models.load("nvidia-t4")
        >>> t4.unit(t4.row("int4@group128", "int8@tensor", "linear")).name
        'imma-int8'
        >>> t4.row("bf16", "bf16", "linear") is None
        True
    """

    name: str
    kind: str
    runtime: str
    notes: str = ""
    memory: Memory | None = None
    units: tuple[ComputeUnit, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    sources: tuple[Source, ...] = ()
    calibration: tuple[tuple[str, str], ...] = ()
    calibration_numbers: tuple[Number, ...] = ()

    @property
    def rows(self) -> tuple[ComputeUnit | Fallback, ...]:
        """The table of format pairs in the order in which it is read: native units, then fallbacks."""
        return (*self.units, *self.fallbacks)

    @property
    def numbers(self) -> tuple[Number, ...]:
        """Every number of the file."""
        tables = [*([self.memory] if self.memory else []), *self.rows]
        return (*(number for table in tables for number in table.numbers), *self.calibration_numbers)

    def unit(self, row: int) -> ComputeUnit:
        """The unit that runs a row of the table."""
        entry = self.rows[row]
        if isinstance(entry, ComputeUnit):
            return entry
        return next(unit for unit in self.units if unit.name == entry.runs_as)

    def row(self, weight: str, activation: str, kind: str) -> int | None:
        """Index in `rows` of the first one that takes this pair of formats on this kind of layer, None without one."""
        for index, entry in enumerate(self.rows):
            if (
                any(is_format(weight, name) for name in entry.weights)
                and any(is_format(activation, name) for name in entry.activations)
                and any(fnmatchcase(kind, pattern) for pattern in entry.kinds)
            ):
                return index
        return None

    def reads(self, weight: str) -> bool:
        """Whether any row takes weights of this format: what a lookup of table rows needs."""
        return any(is_format(weight, name) for entry in self.rows for name in entry.weights)

    def costs(
        self,
        network: Network,
        space: SearchSpace,
        batch: int = 1,
        phase: str | None = None,
        context: int | None = None,
    ) -> pd.DataFrame:
        """What every option of every layer costs on this target.

        Args:
            network: the traced model; its example inputs give the positions (pixels, tokens) a sample.
            space: the options; each layer's row of an option outside its own candidates is NaN.
            batch: samples a pass; size and bops do not depend on it.
            phase: None or "prefill" prices the positions as traced, "decode" one position a sample.
            context: must be None: attention over a cache holds no weights and is not priced.

        Returns:
            A frame indexed by (layer, option label) with the columns size [B] (scales included), value_size [B]
            (values alone), bops (a sample), and, where the target computes, latency [s] and energy [J] (energy only
            if the file has energies). Its attrs: measures {column: unit}, reference {column: value of the model as
            it stands, unquantised}, reference_meaning {column: what that is}, offsets {"size": bytes outside the
            layers}, estimates (columns that rest on a number marked estimate), refused {(layer, option): reason},
            provenance (target, runtime, batch, phase, sources, estimates by name).

        Raises:
            ValueError: if batch is not positive, the phase is unknown or does not fit the layers, or context is given.
        """
        return costs_frame(self, network, space, batch=batch, phase=phase, context=context)

    def describe(self) -> str:
        """Every number with its unit, kind and source, then the rows of the format table and the sources."""
        lines = [f"{self.name} ({self.kind}), runtime: {self.runtime}", self.notes.strip(), ""]
        for number in self.numbers:
            kinds = "+".join(dict.fromkeys(source.kind for source in number.sources))
            ids = ", ".join(source.id for source in number.sources)
            lines.append(f"{number.where}: {number.key} = {number.value:g} ({number.unit}) [{kinds}: {ids}]")
        lines += ["", *(self._describe_row(row) for row in range(len(self.rows)))]
        lines += ["", *(f"calibration: {key} = {' '.join(text.split())}" for key, text in self.calibration)]
        for source in self.sources:
            lines.append(f"source {source.id} [{source.kind}]: {source.title}. {' '.join(source.read.split())}")
        return "\n".join(lines)

    def _describe_row(self, row: int) -> str:
        entry, unit = self.rows[row], self.unit(row)
        how = "natively" if entry is unit else "as a fallback"
        return f"{unit.name} runs {how}: {' '.join(entry.weights)} x {' '.join(entry.activations)}" + (
            "" if entry.kinds == ("*",) else f" ({' '.join(entry.kinds)} only)"
        )


def storage() -> Target:
    """The target of a search without hardware: size, value_size and bops, no latency.

    Example:
        >>> storage().name, storage().units
        ('storage', ())
    """
    return Target(name="storage", kind="none", runtime="none")


def is_format(fmt: str, name: str) -> bool:
    """Whether a format belongs to a name in a device file: a format without granularity, or a family.

    Example:
        >>> is_format("int4@group128", "int4"), is_format("mxfp6_e2m3", "mxfp6"), is_format("int4", "uint4")
        (True, True, False)
    """
    plain = fmt.partition("@")[0]
    return plain == name or plain.startswith(f"{name}_")
