"""Data-free scores of the tensors of safetensors files, however large, without the model in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.checkpoint_names import layer_of, no_layer
from mpq.expert_units import granularity_in
from mpq.formats import TENSOR, BinaryCoded, NumberFormat
from mpq.granularity import MINMAX
from mpq.layers import Layer, Network, block_size
from mpq.options import Option, SearchSpace
from mpq.plan import weight_format
from mpq.progress import track
from mpq.quantizer import RoundToNearest, check_splittable, quantised_rows
from mpq.stored_weights import StoredTensor, StoredWeight, stored_tensors, stored_weight

from .measurement import ScoreArray
from .unit_sums import sum_over_row_blocks, sum_over_units

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 2**20
"""Weights that are in memory at a time, or one row where that is longer."""


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

    Layers are what names and shapes tell (`mpq.checkpoint_names`): a floating-point tensor of two or more axes, called
    by its name without ".weight", its first axis the output channels. Tied tensors are stored once. For a plan use
    `mpq.search(path, None, ...)`, which knows the model's graph where the folder has a config.json.

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
    if isinstance(options, SearchSpace) and pins is not None:
        raise ValueError("pins must be given to the SearchSpace where there is one")
    space = options if isinstance(options, SearchSpace) else SearchSpace(options, pins, ties=None)
    tensors, skipped = _included(stored_tensors(path), [include] if isinstance(include, str) else list(include))
    weights = [stored_weight(layer_of(tensor), tensor) for tensor in tensors]
    frame = score_stored(weights, space, granularity=granularity, progress=progress)
    frame.attrs["skipped"] = skipped
    return frame


def score_stored(
    weights: Sequence[StoredWeight], space: SearchSpace, *, granularity: str = "layer", progress: bool = True
) -> pd.DataFrame:
    """Relative squared quantisation error of stored weights, read a few rows at a time; see `score_checkpoint`.

    Args:
        weights: where the weight of every layer is stored, in the order of the layers.
        space: options, of weights alone, and pins.
        granularity: units that take an option.
        progress: show a bar on a terminal.

    Raises:
        ValueError: as `score_checkpoint`.
    """
    import pandas as pd

    network = Network(tuple(weight.layer for weight in weights))
    candidates, columns = space.candidates(network), space.all_options
    for option in columns:
        _check_format(option, granularity)
    errors = []
    with torch.no_grad():
        for weight in track(weights, "checkpoint", shown=progress):
            given = [option in candidates[weight.layer.name] for option in columns]
            allowed = dict.fromkeys(weight_format(o) for o, g in zip(columns, given, strict=True) if g)
            by_format = _errors(weight, tuple(allowed), granularity)
            empty = np.full((2, len(next(iter(by_format.values()))[0])), np.nan)
            found = [by_format[weight_format(o)] if g else empty for o, g in zip(columns, given, strict=True)]
            errors.append(np.stack(found, axis=2))
            _give_memory_back()
    units = network.units(granularity).labels
    index = pd.MultiIndex.from_product([units, map(str, columns)], names=["layer", "option"])
    relative, absolute = np.concatenate(errors, axis=1).reshape(2, -1)
    values = {"sensitivity": relative, "sensitivity_se": 0 * relative, "weight_error": absolute}
    frame = pd.DataFrame(values, index=index)
    frame.attrs |= {"measure": "score", "method": "relative weight error"}
    return frame


def _errors(
    weight: StoredWeight, formats: tuple[NumberFormat, ...], granularity: str
) -> dict[NumberFormat, ScoreArray]:
    """(2, units) relative and absolute squared errors under each format."""
    limits = _limits(weight) if any(map(_spans_rows, formats)) else torch.zeros(2)
    cut, energy, first = granularity_in(weight.layer, granularity), 0.0, 0
    # Filled in place: memory that is kept between chunks would lie between them and keep the heap from shrinking.
    cells = Network((weight.layer,)).units(cut if block_size(cut)[0] == "groups" else "rows")
    sums = {fmt: np.zeros(len(cells)) for fmt in formats}
    for rows in weight.chunks(CHUNK):
        exact = rows.reshape(len(rows), -1).to(torch.promote_types(rows.dtype, torch.float32))
        energy += float(exact.square().sum(1).sum(dtype=torch.float64))
        last = first + len(rows) * len(cells) // weight.layer.weight_shape[0]
        for fmt in formats:
            rounded = _rounded(rows, fmt, limits, weight.layer, granularity)
            squared = rounded.reshape(exact.shape).to(exact.dtype, copy=True).sub_(exact).square_()
            sums[fmt][first:last] = _sums(squared, cut)
        first = last
    absolute = {fmt: _units(of, cut) for fmt, of in sums.items()}
    return {fmt: np.stack([of / (energy or 1.0), of]) for fmt, of in absolute.items()}


def _give_memory_back() -> None:
    """Return freed memory to the system where the C library can be told to.

    Left alone, glibc's heap is now and then cut up by arrays of many sizes and keeps some megabytes a layer: 0.8 GB
    over the 226 layers of Llama-3-8B, in some runs and not in others.
    """
    with suppress(AttributeError, OSError, TypeError):  # no glibc: macOS, Windows, musl
        ctypes.CDLL(None).malloc_trim(0)


def _sums(squared: Tensor, granularity: str) -> NDArray[np.float64]:
    """A sum a row, or one a group of each row: what units are made of, however a chunk cuts them."""
    if block_size(granularity)[0] == "groups":
        sums: NDArray[np.float64] = sum_over_units(squared.double(), granularity).numpy()
    else:
        sums = squared.sum(1).double().numpy()  # PyTorch adds in pairs: float32 is right to some 1e-7
    return sums


def _units(sums: NDArray[np.float64], granularity: str) -> NDArray[np.float64]:
    if block_size(granularity)[0] == "groups":
        return sums
    units: NDArray[np.float64] = sum_over_row_blocks(torch.from_numpy(sums), granularity).numpy()
    return units


def _limits(weight: StoredWeight) -> Tensor:
    """(2,): smallest and largest value."""
    ends = torch.stack([torch.stack(rows.aminmax()) for rows in weight.chunks(CHUNK)])
    return torch.stack([ends[:, 0].min(), ends[:, 1].max()])


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


def _included(tensors: Mapping[str, StoredTensor], include: list[str]) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors to score, and why the others are not."""
    chosen, skipped = [], {}
    for name, tensor in tensors.items():
        layer_name = name.removesuffix(".weight")
        why = no_layer(tensor) or (
            "" if any(fnmatchcase(layer_name, pattern) for pattern in include) else "not included"
        )
        if why:
            skipped[name] = why
        else:
            chosen.append(tensor)
    if not chosen:
        raise ValueError(f"a checkpoint must have a tensor to score, include={include} leaves none: {_some(skipped)}")
    return chosen, skipped


def _some(skipped: Mapping[str, str]) -> str:
    told = [f"{name!r}: {why}" for name, why in list(skipped.items())[:3]]
    return "; ".join([*told, *(["..."] if len(skipped) > 3 else [])]) or "it is empty"
