"""`merge_tables`: one table from the partial ones of hosts that measured other data, other layers or other options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.layers import Layer
from mpq.tables import CostTable

Matrix = NDArray[np.float64]

SCORE, ERROR = "sensitivity", "sensitivity_se"
TOLERANCE = 1e-9  # relative; costs that two hosts computed
_METHOD = ("sensitivity", "task", "quantizer")  # of the provenance: how scores were made


def merge_tables(tables: Sequence[CostTable], names: Sequence[str] = ()) -> CostTable:
    """Put partial tables of one model together.

    Where several tables have a score for a cell (unit, option), each from data of its own,

        s = Σ_k N_k s_k / N,    N = Σ_k N_k samples,    e² = Σ_k [ N_k (N_k - 1) e_k² + N_k (s_k - s)² ] / (N (N - 1))

    which are the mean over all samples and its standard error, as if they had been measured at once, for scores and
    errors that are means over samples; for others it is an approximation. A cell that is NaN or absent in one table
    comes from the others. Costs must agree where several tables have them. Units and options come in order of first
    mention.

    Args:
        tables: at least two; with `provenance["samples"]`, as `mpq.pipeline.measure` writes it, where cells are shared.
        names: what errors call them; "table 1", "table 2", ... by default.

    Returns:
        A table with the provenance of the first, `samples` being the most that any cell has, and the provenance of all
        in `provenance["merged"]`.

    Raises:
        ValueError: if models, measures, methods, layers or costs differ; if a cell is shared and its samples are not
            known; or if a table has terms for pairs, transitions or steps, whose positions other tables do not share.

    Example:
        >>> def part(score, error, samples):
        ...     quantities = {"sensitivity": [[score]], "sensitivity_se": [[error]], "size": [[10.0]]}
        ...     return CostTable(units=["fc"], options=["int4"], quantities=quantities, provenance={"samples": samples})
        >>> merged = merge_tables([part(1.0, 0.5, 10), part(3.0, 0.5, 30)])
        >>> float(merged.quantity("sensitivity")[0, 0]), merged.provenance["samples"]
        (2.5, 40)
    """
    called = list(names) or [f"table {number}" for number in range(1, len(tables) + 1)]
    if len(tables) < 2:
        raise ValueError(f"at least two tables are needed to merge, got {len(tables)}")
    parts = [_Part(table, name) for table, name in zip(tables, called, strict=True)]
    for part in parts:
        _check_like(parts[0], part)
    units = list(dict.fromkeys(str(unit) for table in tables for unit in table.units))
    options = list(dict.fromkeys(option for table in tables for option in table.options))
    placed = [part.placed(units, options) for part in parts]
    first = tables[0]
    quantities = {name: _agreed(name, placed, (units, options)) for name in first.quantities if name != SCORE}
    samples = first.provenance.get("samples")
    if SCORE in first.quantities:
        scores, samples = _scores(placed, (units, options))
        quantities |= scores
    layers = tuple({layer.name: layer for table in tables for layer in table.layers}.values())
    provenance = {**first.provenance, "options": options, "merged": [dict(table.provenance) for table in tables]}
    provenance |= {} if samples is None else {"samples": samples}
    return CostTable(
        units=units,
        options=options,
        quantities={name: quantities[name] for name in first.quantities},
        measures=first.measures,
        aggregates=first.aggregates,
        alive=first.alive,
        parameters=_parameters(placed, units),
        layers=layers,
        layer_index=_layer_index(parts, units, layers),
        granularity=first.granularity,
        ties=_ties(parts, units),
        offsets=_agreed_totals("offsets", parts),
        reference=_agreed_totals("reference", parts),
        limits=_agreed_totals("limits", parts),
        pairs=first.pairs,
        transitions=first.transitions,
        provenance=provenance,
        fingerprint=first.fingerprint,
    )


@dataclass(frozen=True)
class _Part:
    """One of the tables, with its name."""

    table: CostTable
    name: str

    def placed(self, units: list[str], options: list[str]) -> _Placed:
        row = {unit: place for place, unit in enumerate(units)}
        column = {option: place for place, option in enumerate(options)}
        rows = [row[unit] for unit in self.table.units.tolist()]  # type: ignore[union-attr]
        columns = [column[option] for option in self.table.options]
        return _Placed(self.table, self.name, rows, columns, (len(units), len(options)))


@dataclass(frozen=True)
class _Placed:
    """A table within the merged one: where its rows and columns go."""

    table: CostTable
    name: str
    rows: list[int]
    columns: list[int]
    shape: tuple[int, int]

    def quantity(self, name: str) -> Matrix:
        """NaN where the table has nothing."""
        whole = np.full(self.shape, np.nan)
        whole[np.ix_(self.rows, self.columns)] = self.table.quantities[name]
        return whole


def _check_like(first: _Part, other: _Part) -> None:
    """Check that two tables are of one model, measured one way."""
    a, b = first.table, other.table
    both = f"{first.name} and {other.name}"
    if a.fingerprint and b.fingerprint and a.fingerprint != b.fingerprint:
        raise ValueError(f"{both} are of two models: the fingerprints of their parameters' names and shapes differ")
    if a.granularity != b.granularity:
        raise ValueError(f"{both} must have the same granularity, got {a.granularity!r} and {b.granularity!r}")
    if odd := sorted(a.quantities.keys() ^ b.quantities.keys()):
        raise ValueError(f"{both} must have the same quantities, only one has {', '.join(odd)}")
    for name, measure in a.measures.items():
        if measure != b.measures[name]:
            raise ValueError(f"{both} must measure {name!r} alike, got {measure!r} and {b.measures[name]!r}")
        if a.aggregates[name] != b.aggregates[name]:
            raise ValueError(f"{both} must add up {name!r} alike, got {a.aggregates[name]} and {b.aggregates[name]}")
    for name in _METHOD:
        made = [table.provenance.get(name) for table in (a, b)]
        if None not in made and made[0] != made[1]:
            raise ValueError(f"{both} must be scored alike, their {name} is {made[0]} and {made[1]}")
    _check_places(a, b, both)


def _check_places(a: CostTable, b: CostTable, both: str) -> None:
    """Check that layers are the same, and that nothing goes by the position of units that differ."""
    theirs = {layer.name: layer for layer in a.layers}
    for layer in b.layers:
        if theirs.get(layer.name, layer) != layer:
            raise ValueError(f"{both} must have the same layer {layer.name!r}: its shape or its work differs")
    if a.pairs or b.pairs:
        raise ValueError(
            f"{both} must have no terms for pairs of layers, which cannot be merged: measure all data at once"
        )
    by_position = a.alive or b.alive or a.transitions or b.transitions
    if by_position and not (_same(a.alive, b.alive) and _same(a.transitions, b.transitions)):
        raise ValueError(f"{both} must have the same steps and transitions")
    if by_position and list(a.units) != list(b.units):
        raise ValueError(f"{both} must have the same units in the same order, as their steps and transitions go by it")


def _scores(placed: list[_Placed], labels: tuple[list[str], list[str]]) -> tuple[dict[str, Matrix], int | None]:
    """Scores with their standard errors if all have some, and the most samples of a cell."""
    scores = np.stack([part.quantity(SCORE) for part in placed])
    has = ~np.isnan(scores)
    shared = has.sum(0) > 1
    counts = [part.table.provenance.get("samples") for part in placed]
    for part, count, own in zip(placed, counts, has, strict=True):
        if (own & shared).any() and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            where = _where(own & shared, labels)
            raise ValueError(
                f"{part.name} must say in its provenance how many samples it was measured on, as {where} is in another "
                f"table as well, got samples={count!r}"
            )
    weights = has * np.array([count or 1 for count in counts], dtype=np.float64)[:, None, None]
    total = weights.sum(0)
    safe = np.where(total > 0, total, 1)
    known_scores = np.where(has, scores, 0.0)
    single = known_scores.sum(0)  # exact where one table has the cell, as the weighted mean might not be
    mean = np.where(shared, (weights * known_scores).sum(0) / safe, single)
    mean[total == 0] = np.nan
    merged = {SCORE: mean}
    if ERROR in placed[0].table.quantities:
        errors = np.stack([part.quantity(ERROR) for part in placed])
        merged[ERROR] = _errors(errors, known_scores, weights, shared)
        merged[ERROR][total == 0] = np.nan
    return merged, None if None in counts else int(total.max())


def _errors(errors: Matrix, scores: Matrix, weights: Matrix, shared: NDArray[np.bool_]) -> Matrix:
    """Standard errors over all samples of the cells that tables share, a cell's own elsewhere."""
    has = weights > 0
    errors = np.where(has, errors, 0.0)
    total = np.maximum(weights.sum(0), 2)
    mean = (weights * scores).sum(0) / total
    spread = weights * (weights - 1) * errors**2 + weights * (scores - mean) ** 2
    merged: Matrix = np.where(shared, np.sqrt(spread.sum(0) / (total * (total - 1))), errors.sum(0))
    return merged


def _agreed(name: str, placed: list[_Placed], labels: tuple[list[str], list[str]]) -> Matrix:
    """A cost from whichever tables have it."""
    merged = placed[0].quantity(name)
    if name == ERROR:
        return merged
    for part in placed[1:]:
        other = part.quantity(name)
        both = ~np.isnan(merged) & ~np.isnan(other)
        wrong = both & ~np.isclose(merged, other, rtol=TOLERANCE, atol=0)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"tables must agree on {name!r}, that of {_where(wrong, labels)} is {merged[row, column]:g} and, in "
                f"{part.name}, {other[row, column]:g}"
            )
        merged = np.where(np.isnan(merged), other, merged)
    return merged


def _agreed_totals(what: str, parts: list[_Part]) -> dict[str, float]:
    """One number a quantity: offsets, reference or limits."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in getattr(part.table, what).items():
            if not np.isclose(merged.setdefault(name, value), value, rtol=TOLERANCE, atol=0):
                raise ValueError(f"tables must agree on the {what} of {name!r}, got {merged[name]:g} and {value:g}")
    return merged


def _parameters(placed: list[_Placed], units: list[str]) -> NDArray[np.int64] | None:
    known = [(part, part.table.parameters) for part in placed if part.table.parameters is not None]
    counts = np.full(len(units), -1)
    for part, given in known:
        clash = (counts[part.rows] >= 0) & (counts[part.rows] != given)
        if clash.any():
            unit = units[part.rows[int(np.argmax(clash))]]
            raise ValueError(f"tables must agree on the parameters of {unit!r}, {part.name} has another number")
        counts[part.rows] = given
    return counts if known and (counts >= 0).all() else None


def _layer_index(parts: list[_Part], units: list[str], layers: Sequence[Layer]) -> list[int] | None:
    if not layers:
        return None
    place = {layer.name: position for position, layer in enumerate(layers)}
    of_unit = {
        str(unit): place[part.table.layers[index].name]
        for part in parts
        if part.table.layers
        for unit, index in zip(part.table.units, part.table.layer_index, strict=True)
    }
    if lost := [unit for unit in units if unit not in of_unit]:
        raise ValueError(f"all tables must have layers or none, the layer of unit {lost[0]!r} is not known")
    return [of_unit[unit] for unit in units]


def _ties(parts: list[_Part], units: list[str]) -> list[list[int]]:
    """Groups of units; tables that have the same units must have the same groups."""
    place = {unit: position for position, unit in enumerate(units)}
    groups: dict[tuple[int, ...], None] = {}
    for part in parts:
        for group in part.table.ties:
            groups[tuple(sorted(place[str(part.table.units[unit])] for unit in group))] = None
    members = [unit for group in groups for unit in group]
    if twice := [unit for unit in members if members.count(unit) > 1]:
        raise ValueError(f"tables must tie units alike, {units[twice[0]]!r} is in two groups")
    return [list(group) for group in groups]


def _where(cells: NDArray[np.bool_], labels: tuple[list[str], list[str]]) -> str:
    row, column = np.argwhere(cells)[0]
    return f"({labels[0][row]}, {labels[1][column]})"


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of mappings and arrays are equal."""
    if hasattr(one, "keys") and hasattr(other, "keys"):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return np.array_equal(np.asarray(one), np.asarray(other))
