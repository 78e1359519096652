"""Composition: a target whose quantities come from different targets, as latency from one and energy from another.

A measured table of latencies knows no energy, and a model of an accelerator's energy may know no runtime. What either
refuses is refused; the device has the least of what either has, and needs the most that either adds to what all have
(scratch memory). Each part is priced whole, with its own calibration:
the energy of a part rests on the latency and the traffic of that part, not on those of its neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cells import Cells
from .device_numbers import Entry, Number
from .prices import Prices, Reasons
from .pricing import price
from .target import Target

EVERY_TARGET = ("size", "value_size", "bops", "activation_peak")


@dataclass(frozen=True)
class Part:
    """A target and the quantities that are taken from it."""

    target: Target
    quantities: tuple[str, ...]

    @property
    def limits(self) -> Mapping[str, float]:
        """What the target has."""
        return self.target.limits

    def price(self, cells: Cells) -> Prices:
        """The part's quantities.

        Raises:
            ValueError: if the target does not price one of them.
        """
        whole = price(self.target, cells)
        if unknown := [name for name in self.quantities if name not in whole.tables]:
            known = ", ".join(name for name in whole.tables if name not in EVERY_TARGET) or "nothing of its own"
            raise ValueError(f"{self.target.name} does not price {unknown[0]!r}: it prices {known}")
        return Prices(
            tables=self._own(whole.tables),
            measures=self._own(whole.measures),
            reasons=self._named(whole.reasons),
            aggregates=self._own(whole.aggregates),
            alive=self._own(whole.alive),
            offsets=self._offsets(whole.offsets),
            rests_on=lambda used: self._own(self._numbers(whole.rests_on(used))),
            notes={
                name: f"{self.target.name}: {whole.notes.get(name, self.target.runtime)}" for name in self.quantities
            },
            attention=self._own(whole.attention),
        )

    def _own(self, by_quantity: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in by_quantity.items() if name in self.quantities}

    def _offsets(self, by_quantity: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in by_quantity.items() if name in (*self.quantities, *EVERY_TARGET)}

    def _named(self, reasons: Reasons | None) -> Reasons | None:
        if reasons is None:
            return None
        return np.where(reasons.astype(bool), reasons + f" (on {self.target.name})", "")

    def _numbers(self, by_quantity: Mapping[str, Iterable[Number]]) -> dict[str, list[Number]]:
        return {name: [_placed(self.target, number) for number in found] for name, found in by_quantity.items()}


@dataclass(frozen=True)
class Composition:
    """The cost model of a composed target."""

    parts: tuple[Part, ...]

    @property
    def limits(self) -> Mapping[str, float]:
        """The least that any part has of a quantity."""
        names = {name for part in self.parts for name in part.limits}
        return {name: min(part.limits[name] for part in self.parts if name in part.limits) for name in sorted(names)}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Every part's quantities; what one refuses is refused."""
        parts = [part.price(cells) for part in self.parts]
        shared = {
            name: max(part.offsets.get(name, 0.0) for part in parts) - so_far.offsets.get(name, 0.0)
            for name in EVERY_TARGET
            if any(name in part.offsets for part in parts)
        }
        prices = Prices()
        for part in parts:
            prices += replace(part, offsets={name: x for name, x in part.offsets.items() if name not in EVERY_TARGET})
        return replace(prices, offsets={**prices.offsets, **{name: more for name, more in shared.items() if more}})

    def describe(self) -> list[str]:
        """What comes from where, then each part's own lines."""
        lines = []
        for part in self.parts:
            lines.append(f"{' and '.join(part.quantities)} of {part.target.name}, {part.target.runtime}")
            lines += [f"{part.target.name}: {line}" for model in part.target.models for line in model.describe()]
            if part.target.calibration is not None:
                lines.append(f"{part.target.name}: calibrated, {part.target.calibration['fitted_on']}")
        return lines


def compose(**targets: Target) -> Target:
    """A target that takes each quantity from the target named for it.

    Args:
        targets: by quantity: `latency=..., energy=...`, or whatever else the targets price (`luts`).

    Returns:
        A target of all of them: cells that one refuses are refused, limits are the least of all, numbers and notes say
        which target they belong to. Conversions between layers are those of the target that latency is from, without
        their energies unless energy is from it too.

    Raises:
        ValueError: if no quantity is named, or one that every target has (size, bops, activation_peak).
        TypeError: if what is named is no target.

    Example:
        >>> from mpq.hardware_models import load
        >>> compose(latency=load("nvidia-t4"), energy=load("x86-amx")).name
        'latency of nvidia-t4, energy of x86-amx'
    """
    if not targets:
        raise ValueError("compose needs targets by quantity: compose(latency=one, energy=another)")
    for quantity, target in targets.items():
        if quantity in EVERY_TARGET:
            raise ValueError(f"{quantity} is priced on every target, on the composed one too: leave it out of compose")
        if not isinstance(target, Target):
            raise TypeError(f"{quantity} must come from a Target, as load(name) returns, got {type(target).__name__}")
    by_target: dict[int, list[str]] = {}
    for quantity, target in targets.items():
        by_target.setdefault(id(target), []).append(quantity)
    parts = tuple(Part(targets[names[0]], tuple(names)) for names in by_target.values())
    whole = [part.target for part in parts]
    entries = [replace(entry, where=f"{one.name}: {entry.where}", numbers=tuple(_placed(one, n) for n in entry.numbers))
               for one in whole for entry in one.entries]  # fmt: skip
    return Target(
        name=", ".join(f"{' and '.join(part.quantities)} of {part.target.name}" for part in parts),
        kind=" + ".join(dict.fromkeys(target.kind for target in whole)),
        runtime="; ".join(dict.fromkeys(target.runtime for target in whole)),
        notes="\n".join(f"{target.name}: {target.notes.strip()}" for target in whole if target.notes.strip()),
        models=(Composition(parts),),
        entries=tuple(entries),
        sources=tuple({source: None for target in whole for source in target.sources}),
        conversions=_conversions(parts),
    )


def _conversions(parts: Iterable[Part]) -> tuple[Entry, ...]:
    for part in parts:
        if "latency" in part.quantities:
            dropped = () if "energy" in part.quantities else ("energy_pJ_per_element",)
            return tuple(_without(row, dropped) for row in part.target.conversions)
    return ()


def _without(row: Entry, dropped: Sequence[str]) -> Entry:
    values = {key: value for key, value in row.values.items() if key not in dropped}
    return replace(row, values=values, numbers=tuple(number for number in row.numbers if number.key not in dropped))


def _placed(target: Target, number: Number) -> Number:
    return replace(number, where=f"{target.name}: {number.where}")
