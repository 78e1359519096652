"""`score_checkpoint`: a data-free score of the tensors of safetensors files, however large, without a model's code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpq.formats import TENSOR, BinaryCoded, NumberFormat
from mpq.granularity import MINMAX
from mpq.layers import Layer, Network, block_size
from mpq.options import Option, SearchSpace
from mpq.plan import weight_format
from mpq.progress import track
from mpq.quantizer import RoundToNearest, check_splittable, quantised_rows

from .measurement import ScoreArray
from .unit_sums import sum_over_units

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 2**20  # weights that are in memory at a time, or one row where that is longer
STACKED = 32  # a three-dimensional tensor whose last two axes are longer than this is a stack of matrices
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
INDEX = "model.safetensors.index.json"


def score_checkpoint(
    path: str | Path,
    options: SearchSpace | Iterable[Option | str] | Mapping[str, Iterable[Option | str]],
    *,
    pins: Mapping[str, Option | str] | None = None,
    include: str | Sequence[str] = "*",
    granularity: str = "layer",
    progress: bool = True,
) -> pd.DataFrame:
    """Relative squared quantisation error of every tensor of a checkpoint, read a few rows at a time.

        score(u, o) = ||Q_o(W_u) - W_u||² / ||W||²        u a unit of the tensor W; its SQNR is -10 log10 score in dB

    A data-free score: it knows nothing of the loss, and what it says of two layers does not compare in what they do to
    the model. It serves as a control, or where nothing else can be run; with data use `mpq.sensitivity.estimate`.
    Weights are rounded to nearest (`mpq.quantizer.RoundToNearest`).

    A floating-point tensor of two or more axes is a layer, called by its name without ".weight". Without the model's
    code the first axis is taken for the output channels, which is right for linear layers, convolutions and
    embeddings; transposed convolutions and transformers' Conv1D store inputs first, and "@channel" then runs along
    these. Three axes of which the last two are longer than 32 are a stack of (out, in) matrices, as of experts. Tied
    tensors are stored once.

    Args:
        path: a .safetensors file, or a folder with one, with several, or with shards and their index.
        options: candidates, or a `SearchSpace`; of weights alone.
        pins: name patterns and the option those layers take.
        include: pattern or patterns of the names of layers to score.
        granularity: units that take an option: "layer", "rows:16", "groups:64".
        progress: show a bar on a terminal.

    Returns:
        A frame indexed by (unit label, option label) with the columns `sensitivity` (0 for a tensor of zeros),
        `sensitivity_se` (0) and `weight_error` (||Q(W) - W||²); NaN where the option is no candidate.
        `attrs["measure"]` is "score", `attrs["skipped"]` has the names of tensors that are no layers and why.

    Raises:
        ValueError: if files are missing or broken, a pattern matches nothing, a weight holds NaN or infinity, an option
            has a format of inputs, or one has a scale a tensor that is not its largest value.

    Cost: every tensor is read once, twice for formats with a scale a tensor. Memory: a few hundred MB, or a few rows.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.tensor([[7.0, 3.5], [1.0, 0.0]])}, f"{folder}/model.safetensors")
        ...     score_checkpoint(folder, ["int4"])["sensitivity"].round(5).tolist()  # 0.5² / (7² + 3.5² + 1)
        [0.00402]
    """
    import pandas as pd

    if isinstance(options, SearchSpace) and pins is not None:
        raise ValueError("pins must be given to the SearchSpace where there is one")
    space = options if isinstance(options, SearchSpace) else SearchSpace(options, pins, ties=None)
    stored, skipped = _layers_in(_files(Path(path)), [include] if isinstance(include, str) else list(include))
    network = Network(tuple(tensor.layer for tensor in stored))
    candidates, columns = space.candidates(network), space.all_options
    for option in columns:
        _check_format(option, granularity)
    errors = []
    with torch.no_grad():
        for tensor in track(stored, "checkpoint", shown=progress):
            allowed = {weight_format(option) for option in candidates[tensor.layer.name]}
            by_format = tensor.errors(allowed, granularity)
            empty = np.full((2, len(next(iter(by_format.values()))[0])), np.nan)
            given = [o in candidates[tensor.layer.name] for o in columns]
            found = [by_format[weight_format(o)] if g else empty for o, g in zip(columns, given, strict=True)]
            errors.append(np.stack(found, axis=2))
    units = network.units(granularity).labels
    index = pd.MultiIndex.from_product([units, map(str, columns)], names=["layer", "option"])
    relative, absolute = np.concatenate(errors, axis=1).reshape(2, -1)
    values = {"sensitivity": relative, "sensitivity_se": 0 * relative, "weight_error": absolute}
    frame = pd.DataFrame(values, index=index)
    frame.attrs |= {"measure": "score", "method": "relative weight error", "skipped": skipped}
    return frame


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, seen as (rows, in...): the first axis in front, matrices of a stack one below the other."""

    file: Path
    offset: int
    dtype: str
    layer: Layer

    def errors(self, formats: Iterable[NumberFormat], granularity: str) -> dict[NumberFormat, ScoreArray]:
        """(2, units) relative and absolute squared errors under each format."""
        formats = tuple(formats)
        whole = [fmt for fmt in formats if _spans_rows(fmt)]
        limits = self._limits() if whole else torch.zeros(2)
        kind, size = block_size(granularity)
        multiple, energy = size if kind == "rows" else 1, 0.0
        parts: dict[NumberFormat, list[ScoreArray]] = {fmt: [] for fmt in formats}
        for rows in self._chunks(multiple):
            energy += float(rows.double().square().sum())
            for fmt in formats:
                rounded = _rounded(rows, fmt, limits, self.layer, granularity)
                squared = (rounded.double() - rows.double()).square_().reshape(len(rows), -1)
                parts[fmt].append(np.array(sum_over_units(squared, granularity).tolist()))  # no tensor between chunks
        join = (lambda of: np.sum(of, axis=0)) if kind == "layer" else np.concatenate
        absolute = {fmt: join(of) for fmt, of in parts.items()}
        return {fmt: np.stack([of / (energy or 1.0), of]) for fmt, of in absolute.items()}

    def _limits(self) -> Tensor:
        """(2,): smallest and largest value."""
        ends = torch.stack([torch.stack(rows.aminmax()) for rows in self._chunks(1)])
        return torch.stack([ends[:, 0].min(), ends[:, 1].max()])

    def _chunks(self, multiple: int) -> Iterator[Tensor]:
        """Some rows at a time, a multiple of so many."""
        count, *inner = self.layer.weight_shape
        step = max(1, CHUNK // (prod(inner) * multiple)) * multiple
        for start in range(0, count, step):
            yield self._read(start, min(start + step, count))

    def _read(self, start: int, stop: int) -> Tensor:
        """Rows, read rather than mapped into memory, where pages would stay."""
        size, row = FLOATS[self.dtype].itemsize, prod(self.layer.weight_shape[1:])
        content = np.empty((stop - start) * row * size, dtype=np.uint8)
        with self.file.open("rb") as opened:
            opened.seek(self.offset + start * row * size)
            opened.readinto(content.data)
        return torch.from_numpy(content).view(FLOATS[self.dtype]).reshape(stop - start, *self.layer.weight_shape[1:])


def _rounded(rows: Tensor, fmt: NumberFormat, limits: Tensor, layer: Layer, granularity: str) -> Tensor:
    if not _spans_rows(fmt):
        return quantised_rows(rows, fmt, layer, granularity, RoundToNearest())
    flat = rows.reshape(len(rows), -1)
    ends = limits.to(flat)[:, None].expand(2, flat.shape[1])  # two more rows give the chunk the whole tensor's range
    return RoundToNearest()(torch.cat([flat, ends]), fmt, layer)[:-2].reshape(rows.shape)


def _spans_rows(fmt: NumberFormat) -> bool:
    return fmt.granularity == TENSOR or bool(fmt.tensor_bits)


def _check_format(option: Option, granularity: str) -> None:
    fmt = weight_format(option)
    if option.activation is not None:
        raise ValueError(
            f"a checkpoint has weights alone, option {option} quantises inputs as well: use {option.weight}"
        )
    if block_size(granularity)[0] != "layer":
        check_splittable(fmt, granularity)
    if fmt.granularity == TENSOR and (fmt.range != MINMAX or isinstance(fmt, BinaryCoded)):
        raise ValueError(f"format {fmt} must see a whole tensor to choose its range: take a scale a channel or a group")


def _files(path: Path) -> dict[Path, list[str] | None]:
    """The files of a checkpoint, and which tensors of each count: None for all."""
    if path.is_file():
        return {path: None}
    if (path / INDEX).is_file():
        by_file: dict[Path, list[str]] = {}
        for name, file in json.loads((path / INDEX).read_text("utf-8"))["weight_map"].items():
            by_file.setdefault(path / file, []).append(name)
        return {**by_file}
    found: dict[Path, list[str] | None] = dict.fromkeys(sorted(path.glob("*.safetensors")))
    if not found:
        raise ValueError(f"a checkpoint must be a .safetensors file or a folder with some, got {str(path)!r}")
    return found


def _layers_in(files: Mapping[Path, list[str] | None], include: list[str]) -> tuple[list[_Stored], dict[str, str]]:
    stored, skipped = [], {}
    for file, names in files.items():
        try:
            with safe_open(file, framework="pt") as opened:
                offsets = _offsets(file)
                for name in opened.keys() if names is None else names:
                    found = opened.get_slice(name)
                    shape, dtype = tuple(found.get_shape()), found.get_dtype()
                    if why := _no_layer(name, shape, dtype, include):
                        skipped[name] = why
                    else:
                        stored.append(_Stored(file, offsets[name], dtype, _layer(name, shape, dtype)))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {str(file)!r}: {error}") from error
    if not stored:
        raise ValueError(f"a checkpoint must have a tensor to score, include={include} leaves none: {_some(skipped)}")
    return stored, skipped


def _offsets(file: Path) -> dict[str, int]:
    """Where in a file, which safetensors has found to be whole, each tensor starts."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _no_layer(name: str, shape: tuple[int, ...], dtype: str, include: list[str]) -> str:
    """Why a tensor is not scored, "" if it is."""
    if len(shape) < 2:
        return f"it has {len(shape)} axes"
    if dtype not in FLOATS:
        return f"it is {dtype}, not of floating point"
    if prod(shape) == 0:
        return "it is empty"
    return "" if any(fnmatchcase(_layer_name(name), pattern) for pattern in include) else "not included"


def _layer_name(name: str) -> str:
    return name.removesuffix(".weight")


def _layer(name: str, shape: tuple[int, ...], dtype: str) -> Layer:
    """The tensor as a layer of which nothing but the weight is known."""
    stack = len(shape) == 3 and min(shape[1:]) > STACKED
    seen = (shape[0] * shape[1], shape[2]) if stack else shape
    kind = "experts" if stack else "linear" if len(shape) == 2 else f"conv{len(shape) - 2}d"
    count = prod(shape)
    return Layer(
        _layer_name(name),
        kind,
        seen,
        count,
        0,
        (1,),
        (1,),
        weight_name=name,
        weight_bytes=count * FLOATS[dtype].itemsize,
    )


def _some(skipped: Mapping[str, str]) -> str:
    told = [f"{name!r}: {why}" for name, why in list(skipped.items())[:3]]
    return "; ".join([*told, *(["..."] if len(skipped) > 3 else [])]) or "it is empty"
