"""`Plan`: the option of every layer, what was predicted, how good it is, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.attention_operators import is_operator
from mpq.formats import NumberFormat
from mpq.input_range import InputRange
from mpq.layers import Layer, Network
from mpq.options import Option, matching
from mpq.problem import Proof
from mpq.suggestions import did_you_mean
from mpq.unit_storage import unit_storage_bits

if TYPE_CHECKING:
    import pandas as pd

    from mpq.tables import CostTable
    from mpq.verification_report import Verification


@dataclass(frozen=True, eq=False)
class Split:
    """Options of a layer that is cut into rows or groups.

    Args:
        granularity: how it is cut: `"rows:16"`, `"groups:64"`.
        options: the options its units may take.
        codes: position in `options` of every unit, in the order of `Units`.
    """

    granularity: str
    options: tuple[Option, ...]
    codes: NDArray[np.uint8]

    @property
    def index_bits(self) -> int:
        """Bits that say which unit takes which option: ceil(log2(options)) a unit."""
        return len(self.codes) * math.ceil(math.log2(len(self.options))) if len(self.options) > 1 else 0

    def counts(self) -> dict[str, int]:
        """Units that take each option."""
        found = np.bincount(self.codes, minlength=len(self.options))
        return {str(option): int(count) for option, count in zip(self.options, found, strict=True) if count}

    def __str__(self) -> str:
        return f"{self.granularity}({', '.join(f'{label} x{count}' for label, count in self.counts().items())})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Split):
            return NotImplemented
        same = (self.granularity, self.options) == (other.granularity, other.options)
        return same and np.array_equal(self.codes, other.codes)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Entry:
    """One layer of a plan and what it takes: one option, or a `Split` where its units differ.

    The layer may be an operator of attention (`mpq.attention_operators`): it takes an option without weight, stores
    nothing, and its bits are those of its inputs.

    `input_range` is the calibrated range of the layer's input; None: dynamic, every batch has its own.

    Raises:
        ValueError: if an operator's option has a weight, or the range is for another format or number of channels.
    """

    layer: Layer
    choice: Option | Split
    input_range: InputRange | None = None

    def __post_init__(self) -> None:
        if is_operator(self.layer) and any(option.weight is not None for option in self.options):
            raise ValueError(f"{self.layer.name!r} has no weights, {self.choice} has a weight format: write -/int8")
        if self.input_range is not None:
            self.input_range.check(self.layer, self.activation)

    def with_choice(self, choice: Option | Split) -> Entry:
        """The same layer with another choice; the range of its input is dropped where the input's format changes."""
        changed = Entry(self.layer, choice)
        kept = self.input_range is not None and self.input_range.fmt == changed.activation
        return replace(changed, input_range=self.input_range) if kept else changed

    @property
    def activation(self) -> NumberFormat | None:
        """The format of the layer's input.

        Raises:
            ValueError: if the layer is split and its units differ in it.
        """
        formats = {option.activation for option in self.options}
        if len(formats) > 1:
            names = sorted(map(str, formats))
            raise ValueError(f"units of {self.layer.name!r} must share one activation format, got {names}")
        return next(iter(formats), None)

    @property
    def options(self) -> tuple[Option, ...]:
        """Every option the layer uses."""
        if isinstance(self.choice, Option):
            return (self.choice,)
        return tuple(self.choice.options[code] for code in np.unique(self.choice.codes))

    @property
    def storage_bits(self) -> int:
        """Bits of the stored weight: values, scales, zero points and the index of a split layer."""
        if is_operator(self.layer):
            return 0
        if isinstance(self.choice, Option):
            return weight_format(self.choice).storage_bits(self.layer.weight_shape)
        units = Network((self.layer,)).units(self.choice.granularity)
        each = np.stack([unit_storage_bits(units, weight_format(option)) for option in self.choice.options])
        return self.choice.index_bits + int(each[self.choice.codes, np.arange(len(units))].sum())

    @property
    def value_bits(self) -> float:
        """Bits of one stored value, averaged over the layer's weights; of an operator, bits of one input."""
        if is_operator(self.layer) and self.activation is not None:
            return self.activation.bits
        if isinstance(self.choice, Option):
            return weight_format(self.choice).bits
        units = Network((self.layer,)).units(self.choice.granularity)
        bits = np.array([weight_format(option).bits for option in self.choice.options], float)
        return float(np.average(bits[self.choice.codes], weights=units.parameters))


_SOLVED = ("price_of_pins", "binding")  # provenance that holds for the plan as it was solved, not as it is edited


@dataclass(frozen=True)
class AskedBudget:
    """A budget as it was asked, the limit it meant in base units, and what its 100 % or denominator was."""

    quantity: str
    asked: str
    limit: float
    measure: str
    meaning: str


@dataclass(frozen=True)
class Plan:
    """A bit-width plan.

    Args:
        entries: one a planned layer, in execution order, then one a planned operator of attention.
        fingerprint: of the parameter names and shapes of the model it is for.
        predicted: what the table predicts, a quantity in base units (`measures`): never a measurement.
        measures: base unit of each predicted quantity.
        proof: how good the solver proved the plan to be for its table; None after an edit by hand.
        budgets: what was asked.
        outside: what the model costs outside the plan, a quantity.
        measured: what `verify` found on held-out data, where the search was given some.
        edited: layers whose option was set by hand.
        provenance: space, method, data, seeds, versions.
        table: the cost table the plan was solved from; not saved with it.
    """

    entries: tuple[Entry, ...]
    fingerprint: str
    predicted: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=dict)
    proof: Proof | None = None
    budgets: tuple[AskedBudget, ...] = ()
    outside: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    edited: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    table: CostTable | None = field(default=None, repr=False, compare=False)

    @property
    def options(self) -> dict[str, str]:
        """{layer name: option label}."""
        return {entry.layer.name: str(entry.choice) for entry in self.entries}

    @property
    def weight_bits(self) -> dict[str, float]:
        """{layer name: bits of one stored weight}; an average where a layer is split. Operators have none."""
        return {entry.layer.name: entry.value_bits for entry in self.of_layers}

    @property
    def of_layers(self) -> tuple[Entry, ...]:
        """The entries of layers: all but those of attention's operators."""
        return tuple(entry for entry in self.entries if not is_operator(entry.layer))

    @property
    def average_bits(self) -> float:
        """Stored bits, scales and zero points counted, over the weights of the planned layers."""
        weights = sum(entry.layer.parameters for entry in self.entries)
        return sum(entry.storage_bits for entry in self.entries) / weights

    @property
    def value_bytes(self) -> float:
        """Bytes of the planned layers' values alone, without scales, zero points and indices."""
        return sum(entry.value_bits * entry.layer.parameters for entry in self.entries) / 8

    @property
    def full_bytes(self) -> float:
        """Bytes of the whole model as it stands, unquantised."""
        return sum(entry.layer.weight_bytes for entry in self.entries) + self.outside.get("size", 0.0)

    @property
    def full_bits(self) -> float:
        """Bits a planned weight as it stands."""
        return 8 * sum(e.layer.weight_bytes for e in self.entries) / sum(e.layer.parameters for e in self.entries)

    @property
    def size_bytes(self) -> float:
        """Bytes of the whole model under this plan."""
        return sum(entry.storage_bits for entry in self.entries) / 8 + self.outside.get("size", 0.0)

    @property
    def help(self) -> tuple[str, ...]:
        """What was done after the formats were chosen, in order: ``GPTQ``, ``bias correction``; see `with_help`."""
        return tuple(self.provenance.get("help", ()))

    def with_help(self, *names: str) -> Plan:
        """The same plan that names one more thing done to make its formats lose less. What it did is not in the plan.

        Example:
            >>> Plan((), "").with_help("bias correction").help
            ('bias correction',)
        """
        return replace(self, provenance={**self.provenance, "help": [*self.help, *names]})

    def with_options(self, options: Mapping[str, Option | str]) -> Plan:
        """The same plan with some layers set by hand. Predictions and the proof no longer hold and are dropped.

        Args:
            options: name patterns and the option those layers take.

        Raises:
            ValueError: if a pattern matches no layer.
        """
        chosen: dict[str, Option] = {}
        names = [entry.layer.name for entry in self.entries]
        for pattern, option in options.items():
            chosen |= dict.fromkeys(matching(pattern, names, "with_options"), Option.parse(option))
        entries = tuple(e.with_choice(chosen.get(e.layer.name, e.choice)) for e in self.entries)
        changed = replace(
            self,
            entries=entries,
            proof=None,
            measured={},
            edited=tuple(dict.fromkeys([*self.edited, *chosen])),
            provenance={name: value for name, value in self.provenance.items() if name not in _SOLVED},
        )
        size = {"size": changed.size_bytes} if "size" in self.predicted else {}
        return replace(changed, predicted=size)

    def pins(self, *layers: str) -> dict[str, str]:
        """What these layers take (all edited ones by default), in the form `pins=` takes.

        Raises:
            ValueError: if a layer is not in the plan, or is split.
        """
        choices = {entry.layer.name: entry.choice for entry in self.entries}
        for name in layers or self.edited:
            if name not in choices:
                raise ValueError(f"plan has no layer {name!r}{did_you_mean(name, choices)}")
            if isinstance(choices[name], Split):
                raise ValueError(f"layer {name!r} is split, {choices[name]}: a pin is one option for a whole layer")
        return {name: str(choices[name]) for name in (layers or self.edited)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        from mpq.plan_file import write_plan

        write_plan(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            ValueError: if the file is missing, truncated, of another version, changed by hand, or no plan.
        """
        from mpq.plan_file import read_plan

        return read_plan(Path(path))

    def to_frame(self) -> pd.DataFrame:
        """One row a layer: its option, bits, size, and what the table predicts for it; see `mpq.plan_frame`."""
        from mpq.plan_frame import plan_frame

        return plan_frame(self)

    def plot(self, ax: Any = None, *, interactive: bool = False, quantity: str | None = None) -> Any:
        """The layers in order as a strip: format as colour, weights as width, `quantity` as height; not shown yet.

        Args:
            ax: matplotlib's Axes to draw on; new ones by default.
            interactive: a plotly Figure instead.
            quantity: "bits", or a quantity of the plan's table; see `mpq.plan_picture.plan_picture`.

        Returns:
            Axes to build on, or the Figure.

        Raises:
            ImportError: without matplotlib or plotly: ``pip install 'mpq-search[explore]'``.
            ValueError: if the quantity needs a table that the plan does not know.
        """
        from mpq.plan_picture import plan_picture

        return plan_picture(self, quantity=quantity).drawn(ax, interactive=interactive)

    def report(
        self,
        path: str | Path,
        table: CostTable | None = None,
        verification: Verification | None = None,
        **extra: Any,
    ) -> Path:
        """Write a page that explains the plan: one HTML file that needs no network, for screens and paper.

        Args:
            path: of the file.
            table: the cost table the plan was solved from; the plan's own by default, if it still has it.
            verification: what `mpq.verify` found: measured figures next to predicted ones and to baselines.
            **extra: those of `mpq.reporting.report_html`: `device`, `model`, `data`.

        Returns:
            The path.

        Raises:
            ValueError: if the table or the device is not the plan's, or the file cannot be written.
        """
        from mpq.reporting import write_report

        return write_report(self, path, table, verification, **extra)

    def _repr_html_(self) -> str:
        from mpq.notebook_cards import plan_card

        return plan_card(self)

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for label in self.options.values():
            counts[label] = counts.get(label, 0) + 1
        listed = ", ".join(f"{count} {label}" for label, count in sorted(counts.items(), key=lambda pair: -pair[1])[:6])
        operators = len(self.entries) - len(self.of_layers)
        count = f"{len(self.of_layers)} layers" + (f" and {operators} operators" if operators else "")
        return f"Plan({count}: {listed}; {self.average_bits:.3f} bits a weight)"


def uniform_plan(plan: Plan, option: Option) -> Plan:
    """The plan that gives every layer the same option; what uniform precision would be. Operators keep theirs.

    Layers that may not take the option (pinned, or with candidates of their own) keep what they have.
    """
    candidates = plan.provenance.get("candidates") or {}
    entries = tuple(
        entry.with_choice(option)
        if str(option) in candidates.get(entry.layer.name, [str(option)]) and not is_operator(entry.layer)
        else entry
        for entry in plan.entries
    )
    return Plan(entries=entries, fingerprint=plan.fingerprint, outside=plan.outside, measures=plan.measures)


def check_layers(plan: Plan, names: Iterable[str]) -> None:
    """Check that plan and model have the same layers.

    Raises:
        ValueError: if a layer is missing or extra; it names both.
    """
    mine, theirs = list(plan.options), list(names)
    missing, extra = [n for n in mine if n not in theirs], [n for n in theirs if n not in mine]
    if missing or extra:
        parts = [f"the plan has {missing[0]!r}, the model does not" + _more(missing)] if missing else []
        parts += [f"the model has {extra[0]!r}, the plan does not" + _more(extra)] if extra else []
        raise ValueError("plan is for another model: " + "; ".join(parts))


def weight_format(option: Option) -> NumberFormat:
    """The weight's format; an option of a layer with weights always has one.

    Raises:
        ValueError: if it has none.
    """
    if option.weight is None:
        raise ValueError(f"option {option} has no weight format: a layer with weights needs one")
    return option.weight


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
