"""A target: a chip and a runtime, described by numbers that each name their source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .costs import costs_frame
from .device_numbers import Entry, Number, Source
from .prices import CostModel

if TYPE_CHECKING:
    import pandas as pd

    from mpq.layers import Network
    from mpq.options import SearchSpace

HOLDS = {"weights": "size", "activations": "activation_peak"}


@dataclass(frozen=True, repr=False)
class Target:
    """A chip and its runtime; read one with `load`, or take `storage()` where no hardware is given.

    Attributes:
        name, kind, runtime, notes: of the device file.
        models: the families that price on it, in the order in which they are asked.
        entries: the file's tables that hold numbers, in order.
        sources: where the numbers come from.
        calibration: how predictions are corrected, and what that was fitted on; None where it was not.
        conversions: what a tensor costs that is converted from one format into another between layers.

    Example:
        >>> import mpq.hardware_models
        >>> t4 = mpq.hardware_models.load("nvidia-t4")
        >>> t4.models[0].describe()[1]
        'imma-int8 runs natively: int8 uint8 x int8 uint8'
    """

    name: str
    kind: str
    runtime: str
    notes: str = ""
    models: tuple[CostModel, ...] = ()
    entries: tuple[Entry, ...] = ()
    sources: tuple[Source, ...] = ()
    calibration: Entry | None = None
    conversions: tuple[Entry, ...] = ()

    @property
    def numbers(self) -> tuple[Number, ...]:
        """Every number of the file."""
        return tuple(number for entry in self.entries for number in entry.numbers)

    @property
    def limits(self) -> dict[str, float]:
        """The most that fits on the device, a quantity in base units: capacities of memories, lookup tables."""
        found: dict[str, float] = {}
        for entry in self.entries:
            if entry.where.startswith("memory.") and "capacity_bytes" in entry:
                for what in entry.texts("holds", default="") if "holds" in entry else ():
                    found[HOLDS[what]] = float(entry["capacity_bytes"])
        for model in self.models:
            found |= model.limits
        return found

    def costs(
        self,
        network: Network,
        space: SearchSpace,
        batch: int = 1,
        phase: str | None = None,
        context: int | None = None,
        *,
        bops: str = "hawq",
    ) -> pd.DataFrame:
        """What every option of every layer costs on this target.

        Args:
            network: the traced model; its example inputs give the positions (pixels, tokens) a sample.
            space: the options; each layer's row of an option outside its own candidates is NaN.
            batch: samples a pass; size and bops do not depend on it.
            phase: None or "prefill" prices the positions as traced, "decode" one position a sample.
            context: positions in the cache that attention reads, in "decode" only; None: as many as in the trace.
            bops: convention of bit operations: "hawq" (and qonnx), "nncf" or "additions" (`hardware_models.bops`).

        Returns:
            A frame indexed by (layer, option label) with the columns size [B] (scales included), value_size [B]
            (values alone), bops (a sample), and whatever the target's families price: latency [s], energy [J], luts.
            Operators of attention that the space names follow the layers; with caches among them there is a column
            cache [B], of keys and values for the whole batch (`hardware_models.attention_units`).
            Its attrs: measures {column: unit}, aggregates and alive {column: how layers add up where that is no sum},
            reference {column: value of the model as it stands, unquantised}, reference_meaning {column: what that is},
            offsets {column: what lies outside the layers}, limits {column: the most that the device has}, transitions
            {column: {(producer, reader) by position: costs of converting, (options, options)}}, estimates (columns that
            rest on a number marked estimate), refused {(layer, option): reason}, provenance (target, runtime, batch,
            phase, context, sources, estimates by name, notes by column).

        Raises:
            ValueError: if batch is not positive, the phase is unknown or does not fit the layers, or a context comes
                without the phase "decode".
        """
        return costs_frame(self, network, space, batch=batch, phase=phase, context=context, bops=bops)

    def describe(self) -> str:
        """Every number with its unit, kind and source, then how the families read them, and the sources."""
        lines = [f"{self.name} ({self.kind}), runtime: {self.runtime}", self.notes.strip(), ""]
        for number in self.numbers:
            kinds = "+".join(dict.fromkeys(source.kind for source in number.sources))
            ids = ", ".join(source.id for source in number.sources)
            lines.append(f"{number.where}: {number.key} = {number.value:g} ({number.unit}) [{kinds}: {ids}]")
        lines += ["", *(line for model in self.models for line in model.describe()), ""]
        if self.calibration is not None:
            texts = {key: self.calibration[key] for key in ("fitted_on", "method", "date")}
            lines += [f"calibration: {key} = {' '.join(text.split())}" for key, text in texts.items()]
        for source in self.sources:
            lines.append(f"source {source.id} [{source.kind}]: {source.title}. {' '.join(source.read.split())}")
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """Every number of the file, a row each: table, key, value, unit, kind (estimate, if one source is) and source.

        Example:
            >>> import mpq.hardware_models
            >>> mpq.hardware_models.load("nvidia-t4").to_frame().loc[0, ["table", "key", "unit", "kind"]].tolist()
            ['memory.dram', 'capacity_bytes', 'bytes', 'estimate']
        """
        import pandas as pd

        columns = ("table", "key", "value", "unit", "kind", "source", "title", "read")
        rows = []
        for number in self.numbers:
            kinds = dict.fromkeys(source.kind for source in number.sources)
            kind = "estimate" if number.is_estimate else "+".join(kinds)
            said = [", ".join(getattr(source, name) for source in number.sources) for name in ("id", "title", "read")]
            rows.append((number.where, number.key, number.value, number.unit, kind, *said))
        return pd.DataFrame(rows, columns=list(columns))

    def plot(self, ax: Any = None, *, interactive: bool = False, key: str | None = None) -> Any:
        """Numbers of one key side by side, rates of kernels by default: Axes, or a plotly Figure; it is not shown yet.

        Raises:
            ImportError: without matplotlib or plotly: ``pip install 'mpq-search[explore]'``.
            ValueError: if the target has no such number.
        """
        from .device_picture import device_picture

        return device_picture(self, key=key).drawn(ax, interactive=interactive)

    def __repr__(self) -> str:
        estimates = sum(number.is_estimate for number in self.numbers)
        rests = f", {estimates} of them estimates" if estimates else ""
        families = ", ".join(type(model).__name__ for model in self.models) or "storage alone"
        return f"Target({self.name!r}, {self.kind}, {families}; {len(self.numbers)} numbers{rests})"

    def _repr_html_(self) -> str:
        from .device_card import device_card

        return device_card(self)


def storage() -> Target:
    """The target of a search without hardware: size, value_size and bops, no latency.

    Example:
        >>> storage().name, storage().models
        ('storage', ())
    """
    return Target(name="storage", kind="none", runtime="none")
