"""`ErrorDatabase`: squared quantisation errors that another program measured, in place of weights."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mpq.formats import NumberFormat
from mpq.options import Option
from mpq.plan import weight_format
from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from mpq.layers import Layer

LABELS = ["layer", "option"]


class ErrorDatabase:
    """A quantiser of which nothing is known but ||Q(W_u) - W_u||² of every unit u in every format.

    For scores that need no more: `weight_error`, `hessian_trace` and `ggn_trace`. All others, and `verify`, ask for
    weights and are refused: give them a `mpq.weight_database.WeightDatabase`. Formats without codes (fp16, bf16, fp32)
    are casts, whose errors are known.

    Args:
        errors: a frame, or a .csv or .parquet file with one: the columns `layer` (the label of a unit, `fc` or
            `fc[0:16]`) and `option`, or an index of both, and the squared errors.
        column: which has the errors, the one that `mpq.sensitivity.score_checkpoint` writes by default.

    Raises:
        ValueError: if columns are missing, an option cannot be read, an error is negative or not finite, or one is
            there twice.

    Example:
        >>> import pandas as pd
        >>> from mpq.formats import parse
        >>> rows = {"layer": ["fc", "fc"], "option": ["int4", "int8"], "weight_error": [0.5, 0.001]}
        >>> ErrorDatabase(pd.DataFrame(rows)).squared_errors(["fc"], parse("int4").bind("weight"))
        array([0.5])
    """

    def __init__(self, errors: pd.DataFrame | str | Path, *, column: str = "weight_error") -> None:
        self.column = column
        self._by_format: dict[NumberFormat, pd.Series[float]] = {}
        frame = _frame(errors, column)
        formats = {label: weight_format(Option.parse(label)) for label in frame["option"].unique().tolist()}
        for fmt in dict.fromkeys(formats.values()):
            labels = [label for label, found in formats.items() if found == fmt]
            series = frame[frame["option"].isin(labels)].set_index("layer")[column]
            if (twice := series.index.duplicated()).any():
                raise ValueError(f"errors must be given once, {series.index[twice][0]!r} has two for {fmt}")
            self._by_format[fmt] = series

    def squared_errors(self, labels: Any, fmt: NumberFormat) -> NDArray[np.float64]:
        """(units,) ||Q(W) - W||² of the units of those labels.

        Raises:
            ValueError: if one is not there.
        """
        if fmt not in self._by_format:
            raise ValueError(
                f"no errors for {fmt} in the database{did_you_mean(str(fmt), map(str, self._by_format))}: add them, or "
                "leave the option out"
            )
        found = self._by_format[fmt].reindex(labels)
        if found.isna().any():
            label = str(found.index[int(np.argmax(found.isna()))])
            near = did_you_mean(label, map(str, self._by_format[fmt].index[:10_000]))
            raise ValueError(f"no error of {label!r} for {fmt} in the database{near}: add it, or leave the option out")
        return np.asarray(found, dtype=np.float64)

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> NoReturn:
        """Refuses.

        Raises:
            ValueError: always; there are no weights.
        """
        raise ValueError(
            f"the weight of {layer.name!r} in {fmt} is not known, only its error: use weight_error, hessian_trace or "
            "ggn_trace, or a WeightDatabase"
        )

    def __repr__(self) -> str:
        return f"ErrorDatabase(sha256={self.digest[:16]!r})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all labels, formats and errors."""
        digest = hashlib.sha256()
        for fmt in sorted(self._by_format, key=str):
            series = self._by_format[fmt].sort_index()
            digest.update(f"{fmt}:{len(series)};".encode())
            digest.update("\n".join(map(str, series.index)).encode())
            digest.update(series.to_numpy(dtype=np.float64).tobytes())
        return digest.hexdigest()


def _frame(errors: pd.DataFrame | str | Path, column: str) -> pd.DataFrame:
    """Columns layer, option and the errors, checked."""
    import pandas as pd

    if isinstance(errors, str | Path):
        path = Path(errors)
        if path.suffix not in (".csv", ".parquet") or not path.is_file():
            raise ValueError(f"errors must be a frame or a .csv or .parquet file that is there, got {str(errors)!r}")
        errors = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    named = [name for name in errors.index.names if name is not None]
    frame = errors.reset_index() if set(LABELS) <= set(named) else errors
    if missing := [name for name in (*LABELS, column) if name not in frame.columns]:
        raise ValueError(f"errors must have {', '.join(map(repr, missing))}, got the columns {list(frame.columns)}")
    values = pd.to_numeric(frame[column], errors="coerce").astype(np.float64)
    frame = pd.DataFrame({"layer": frame["layer"].astype(str), "option": frame["option"].astype(str), column: values})
    checked = np.asarray(values)
    if (wrong := ~(np.isfinite(checked) & (checked >= 0))).any():
        layer, option, value = frame[wrong].iloc[0]
        raise ValueError(f"errors must be numbers of at least 0, that of {layer!r} for {option} is {value}")
    return frame
