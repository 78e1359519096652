"""`CostTable`: what every choice costs, labelled, with units of measure, enough to solve without the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.arrays import whole_numbers
from mpq.layers import Layer
from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from mpq.frontier import Frontier
    from mpq.options import Option
    from mpq.plan import Plan
    from mpq.problem import AllocationProblem

Aggregate = Literal["sum", "max", "peak"]
FloatTable = NDArray[np.float64]  # (units, options)

# Base units of the quantities that mpq itself writes; other names are free to choose theirs.
MEASURES: Mapping[str, tuple[str, ...]] = {
    "sensitivity": ("loss", "score"),
    "sensitivity_se": ("loss", "score"),
    "size": ("B",),
    "value_size": ("B",),
    "bops": ("bops",),
    "latency": ("s",),
    "energy": ("J",),
    "activation_peak": ("B",),
    "cache": ("B",),
}


class Masked(NamedTuple):
    """An option that was taken from a unit because a quantity of it is not a finite number."""

    unit: str
    option: str
    quantities: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class CostTable:
    """Scores and costs of every (unit, option), with everything a problem needs.

    Args:
        units: labels of the units, in order; a whole layer is labelled by its name.
        options: labels of the options, in order.
        quantities: arrays of shape (units, options). NaN in every quantity says that the option is no candidate of that
            unit; NaN or infinity in some masks the option and is reported by `masked`.
        measures: the base unit of each quantity (`B`, `s`, `J`, `bops`, `loss`, ...); mpq's own names know theirs.
        aggregates: how units add up: `sum` (default), `max` over units, or `peak`, the largest sum over the units that
            are alive in one step.
        alive: for each `peak` quantity an array (n, 3) of (step, unit, factor): in that step the unit holds its entry
            times the factor; pairs (step, unit) have the factor 1.
        parameters: weights in each unit, needed for budgets in bits a weight.
        layers: the layers behind the units, needed to make a plan for a model.
        layer_index: which layer each unit belongs to; by default unit i is layer i.
        granularity: `"layer"`, `"rows:16"`, `"groups:64"`: how the layers were cut.
        ties: groups of unit positions that take the same option.
        offsets: what the model costs outside the plan, a quantity (norms, biases, skipped layers).
        reference: what 100 % is, a quantity: the model as it stands, unquantised.
        limits: the most that the target has, a quantity: every plan keeps them, asked or not.
        pairs, transitions: as in `AllocationProblem`, by unit positions.
        provenance: where the numbers come from.
        fingerprint: of the model's parameter names and shapes.

    Raises:
        ValueError: if labels repeat, a shape differs, or a measure is not the quantity's.

    Example:
        >>> table = CostTable(
        ...     units=["conv", "fc"], options=["int4", "int8"],
        ...     quantities={"sensitivity": [[2.0, 0.5], [3.0, 0.1]], "size": [[50, 100], [10, 20]]},
        ...     parameters=[100, 20], reference={"size": 480.0},
        ... )
        >>> table.problem({"size": "25%"}).budgets
        {'size': 120.0}
    """

    units: Sequence[str] | NDArray[np.str_]
    options: Sequence[str]
    quantities: Mapping[str, Any]
    measures: Mapping[str, str] = field(default_factory=dict)
    aggregates: Mapping[str, Aggregate] = field(default_factory=dict)
    alive: Mapping[str, Any] = field(default_factory=dict)
    parameters: Any = None
    layers: tuple[Layer, ...] = ()
    layer_index: Any = None
    granularity: str = "layer"
    ties: Sequence[Sequence[int]] = ()
    offsets: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], Any] = field(default_factory=dict)
    transitions: Mapping[str, Mapping[tuple[int, int], Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "units", np.asarray(self.units, dtype=np.str_))
        put(self, "options", tuple(map(str, self.options)))
        _check_labels("units", np.asarray(self.units))
        _check_labels("options", np.asarray(self.options))
        shape = (len(self.units), len(self.options))
        put(self, "quantities", {name: _array(name, values, shape) for name, values in self.quantities.items()})
        put(self, "measures", {name: _measure(name, self.measures.get(name)) for name in self.quantities})
        put(self, "aggregates", {name: self.aggregates.get(name, "sum") for name in self.quantities})
        if self.parameters is not None:
            put(self, "parameters", _per_unit("parameters", self.parameters, len(self.units)))
        for name, how in self.aggregates.items():
            if how not in get_args(Aggregate):
                raise ValueError(f"aggregate of {name!r} must be one of {', '.join(get_args(Aggregate))}, got {how!r}")
        index = np.arange(len(self.units)) if self.layer_index is None else self.layer_index
        put(self, "layer_index", _per_unit("layer_index", index, len(self.units)))
        for name in ("offsets", "reference", "limits"):
            put(self, name, {quantity: float(amount) for quantity, amount in getattr(self, name).items()})
        put(self, "ties", tuple(tuple(map(int, group)) for group in self.ties))
        put(self, "alive", {name: _alive(name, steps, len(self.units)) for name, steps in self.alive.items()})
        if unknown := [name for name in (*self.alive, *self.transitions) if name not in self.quantities]:
            raise ValueError(f"quantity {unknown[0]!r} is not in the table{did_you_mean(unknown[0], self.quantities)}")
        if missing := [name for name, how in self.aggregates.items() if how == "peak" and name not in self.alive]:
            raise ValueError(f"quantity {missing[0]!r} has the aggregate 'peak': alive must say which steps it sums")

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """(units, options): where every quantity is a finite number."""
        finite: NDArray[np.bool_] = np.logical_and.reduce([np.isfinite(values) for values in self.quantities.values()])
        return finite

    @cached_property
    def masked(self) -> tuple[Masked, ...]:
        """The options that some quantity, but not every one, takes away by not being finite."""
        finite = np.stack([np.isfinite(values) for values in self.quantities.values()])
        absent = np.logical_and.reduce([np.isnan(values) for values in self.quantities.values()])
        names = np.asarray(list(self.quantities))
        return tuple(
            Masked(str(self.units[u]), self.options[o], tuple(map(str, names[~finite[:, u, o]])))
            for u, o in np.argwhere(~self.allowed & ~absent)
        )

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy view: one row a (unit, option), one column a quantity, `attrs["measures"]` beside."""
        import pandas as pd

        index = pd.MultiIndex.from_product([self.units, self.options], names=["unit", "option"])
        frame = pd.DataFrame({name: values.ravel() for name, values in self.quantities.items()}, index=index)
        frame.attrs["measures"] = dict(self.measures)
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, **fields: Any) -> CostTable:
        """A table from a tidy frame; the way back from `frame`. Rows are aligned by label, in any order.

        Args:
            frame: indexed by (unit, option), one column a quantity; `attrs["measures"]` counts where `fields` has none.
            **fields: the other arguments of `CostTable`.

        Raises:
            ValueError: if a row is missing or repeated; it names the first one.
        """
        import pandas as pd

        if frame.index.nlevels != 2:
            raise ValueError(f"frame must be indexed by (unit, option), got {list(frame.index.names)}")
        unit_codes, units = pd.factorize(frame.index.get_level_values(0))
        option_codes, options = pd.factorize(frame.index.get_level_values(1))
        cell = unit_codes * len(options) + option_codes
        present = np.bincount(cell, minlength=len(units) * len(options))
        for wrong, word in ((present == 0, "missing"), (present > 1, "repeated")):
            if wrong.any():
                first = int(np.flatnonzero(wrong)[0])
                where = (units[first // len(options)], options[first % len(options)])
                raise ValueError(f"table must have one row a (unit, option): {where} is {word} ({wrong.sum()} in all)")
        order = np.argsort(cell)
        shape = (len(units), len(options))
        columns = {str(name): frame[name].to_numpy(float)[order].reshape(shape) for name in frame.columns}
        fields.setdefault("measures", {k: v for k, v in frame.attrs.get("measures", {}).items() if k in columns})
        return cls(units=list(units), options=list(map(str, options)), quantities=columns, **fields)

    def problem(
        self,
        budgets: Mapping[str, float | str],
        objective: str = "sensitivity",
        *,
        pins: Mapping[str, Option | str] | None = None,
        **features: Any,
    ) -> AllocationProblem:
        """The allocation problem of this table under budgets.

        Args:
            budgets: a limit a quantity: a number in base units or text (`mpq.budgets`).
            objective: the quantity to minimise; any other may be a budget, so "the smallest size with a predicted loss
                of at most x" is `problem({"sensitivity": x}, objective="size")`.
            pins: name patterns of layers (of units, where the table has no layers) and the option they take; a later
                pattern overrides an earlier one.
            **features: passed on to `AllocationProblem`: norm, max_formats, and format_costs, here {option: cost}.

        Raises:
            ValueError: if a quantity is unknown, a budget has the wrong unit, a unit has no option left.
        """
        from mpq.limits import apply_budgets
        from mpq.table_problem import build_problem

        labels = {pattern: str(option) for pattern, option in (pins or {}).items()}
        return build_problem(self, apply_budgets(self, budgets), objective, labels, features)

    def solve(self, budgets: Mapping[str, float | str], **settings: Any) -> Plan:
        """The best plan of this table under budgets, without the model. Arguments: `mpq.planning.solve_units`."""
        from mpq.planning import solve_table

        return solve_table(self, budgets, **settings)

    def pareto(
        self, resource: str | Sequence[str], budgets: Mapping[str, float | str] | None = None, **settings: Any
    ) -> Frontier:
        """The `Frontier` between a resource (or several) and the sensitivity. Arguments: `mpq.planning.trade_off`."""
        from mpq.planning import trade_off

        return trade_off(self, resource, budgets, **settings)

    def quantity(self, name: str) -> FloatTable:
        """One quantity's array (units, options).

        Raises:
            ValueError: if the table has none of that name.
        """
        if name not in self.quantities:
            target = self.provenance.get("hardware", {}).get("target")
            hint = did_you_mean(name, self.quantities)
            where = f"; it was priced on {target}, which has none" if target and "did you mean" not in hint else ""
            raise ValueError(f"table has no quantity {name!r}{hint}{where}")
        values: FloatTable = self.quantities[name]
        return values

    def reachable(self, name: str) -> tuple[float, float]:
        """The smallest and largest total of a quantity, offsets included, budgets and ties aside."""
        values = self.quantity(name)
        low = np.where(self.allowed, values, np.inf).min(axis=1)
        high = np.where(self.allowed, values, -np.inf).max(axis=1)
        offset = self.offsets.get(name, 0.0)
        return self._total(name, low) + offset, self._total(name, high) + offset

    def _total(self, name: str, per_unit: NDArray[np.float64]) -> float:
        """One number a unit added up as the quantity's aggregate says."""
        if self.aggregates[name] == "sum":
            return float(per_unit.sum())
        if self.aggregates[name] == "max":
            return float(per_unit.max())
        step, unit, factor = held(self.alive[name])
        return float(np.bincount(step, weights=factor * per_unit[unit]).max())

    def save(self, path: str | Path) -> None:
        """Write `table.parquet`, or `table.csv` with a `table.json` beside it. The way back is exact."""
        from mpq.table_files import save_table

        save_table(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read what `save` wrote, or a CSV file written by hand (columns unit, option, `size [B]`, ...).

        Raises:
            ValueError: if the file is missing, truncated, changed since it was written, or not a table.
        """
        from mpq.table_files import load_table

        return load_table(Path(path))

    def plot(self, ax: Any = None, *, interactive: bool = False, **shown: Any) -> Any:
        """A line an option over the layers, or one quantity against another; it is not shown yet.

        Args:
            ax: matplotlib's Axes to draw on; new ones by default.
            interactive: a plotly Figure instead.
            **shown: as in `mpq.table_picture.table_picture`: quantity, against, plan.

        Returns:
            Axes to build on, or the Figure.

        Raises:
            ImportError: without matplotlib or plotly: ``pip install 'mpq-search[explore]'``.
        """
        from mpq.table_picture import table_picture

        return table_picture(self, **shown).drawn(ax, interactive=interactive)

    def _repr_html_(self) -> str:
        from mpq.notebook_cards import table_card

        return table_card(self)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} [{self.measures[name]}]" for name in self.quantities)
        return f"CostTable({len(self.units)} units x {len(self.options)} options: {columns})"


def held(alive: FloatTable) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The steps, units and factors of a peak's entries, each (n,)."""
    step, unit = alive[:, :2].astype(np.int64).T
    return step, unit, alive[:, 2]


def _check_labels(role: str, labels: NDArray[np.str_]) -> None:
    if labels.size == 0:
        raise ValueError(f"table must have at least one of its {role}, got none")
    words = labels.tolist()
    if len(set(words)) < len(words):
        twice = next(word for word, times in Counter(words).items() if times > 1)
        raise ValueError(f"table's {role} must differ, {twice!r} is there twice")


def _array(name: str, values: ArrayLike, shape: tuple[int, int]) -> FloatTable:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"quantity {name!r} must have the shape (units, options) = {shape}, got {array.shape}")
    view = array.view()
    view.flags.writeable = False
    return view


def _alive(name: str, entries: ArrayLike, units: int) -> FloatTable:
    array = np.asarray(entries, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] not in (2, 3):
        raise ValueError(f"alive of {name!r} must be (n, 2) of step, unit or (n, 3) with a factor, got {array.shape}")
    whole_numbers(f"steps and units of {name!r}", array[:, :2])
    step, unit = array[:, :2].T
    if len(array) and (step.min() < 0 or unit.min() < 0 or unit.max() >= units):
        raise ValueError(f"alive of {name!r} must have steps from 0 and units below {units}")
    return array if array.shape[1] == 3 else np.column_stack([array, np.ones(len(array))])


def _per_unit(name: str, values: ArrayLike, count: int) -> NDArray[np.int64]:
    array = whole_numbers(name, values)
    if array.shape != (count,):
        raise ValueError(f"{name} must have one entry a unit, ({count},), got {array.shape}")
    return array


def _measure(name: str, given: str | None) -> str:
    known = MEASURES.get(name)
    if known is None:
        return given or ""
    if given is not None and given not in known:
        raise ValueError(f"quantity {name!r} must be in {' or '.join(known)}, got {given!r}")
    return given or known[0]
