"""`Quantizer`: how a weight becomes its quantised self. Rounding to nearest is the default, not the only one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mpq.expert_units import granularity_in
from mpq.fake_quantize import fake_quantize
from mpq.formats import TENSOR, NumberFormat
from mpq.layers import Layer, block_size
from mpq.options import Option
from mpq.plan import Split, weight_format
from mpq.weight_view import as_rows, from_rows


class Quantizer(Protocol):
    """Quantise-dequantise a weight in the (out, in...) view.

    A score is always taken on the error of the quantiser that will be deployed: GPTQ, AWQ, AutoRound and the like are
    quantisers, as is a database of weights they made (`mpq.weight_database`), looked up by layer and format.

    Units finer than layers are quantised as tensors of their own, groups of columns as rows (`quantised_rows`). A
    quantiser that knows better has a method `units(rows, fmt, layer, granularity)` beside this one.
    """

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        """The quantised weight, same shape and dtype as `rows`; `layer` says which one it is."""


@runtime_checkable
class UnitQuantizer(Protocol):
    """What a quantiser has that decides itself how units finer than layers are quantised."""

    def units(self, rows: Tensor, fmt: NumberFormat, layer: Layer, granularity: str) -> Tensor:
        """The whole layer's weight with every unit of it quantised, same shape and dtype as `rows`."""


@dataclass(frozen=True)
class RoundToNearest:
    """Round every value to the nearest level of its format (`mpq.fake_quantize`)."""

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        """The rounded weight."""
        return fake_quantize(rows, fmt, name=layer.name)


def quantised_rows(rows: Tensor, fmt: NumberFormat, layer: Layer, granularity: str, quantizer: Quantizer) -> Tensor:
    """A weight in the (out, in...) view, every unit of it quantised as a tensor of its own.

    For whole layers and rows that is the quantiser as it is: formats that rows can take have no scale beyond a row. A
    group of columns is laid out as a row.

    Raises:
        ValueError: if the format shares a scale between rows and the layer is cut.
    """
    granularity = granularity_in(layer, granularity)
    kind, size = block_size(granularity)
    if kind != "layer":
        check_splittable(fmt, granularity)
    if isinstance(quantizer, UnitQuantizer):
        return quantizer.units(rows, fmt, layer, granularity)
    if kind == "layer":
        return quantizer(rows, fmt, layer)
    if kind == "rows":
        return quantizer(rows, fmt, layer)
    matrix = rows.reshape(rows.shape[0], -1)
    whole = matrix.shape[1] // size * size
    parts = [
        quantizer(part.reshape(-1, width), fmt, layer).reshape(part.shape)
        for part, width in ((matrix[:, :whole], size), (matrix[:, whole:], matrix.shape[1] - whole))
        if part.numel()
    ]
    return torch.cat(parts, dim=1).reshape(rows.shape)


def check_splittable(fmt: NumberFormat, granularity: str) -> None:
    """Rows and groups need a format whose scales end within a row.

    Raises:
        ValueError: if the format has a scale a tensor.
    """
    if fmt.granularity == TENSOR or fmt.tensor_bits:
        raise ValueError(
            f"format {fmt} must have no scale shared between rows to be used with granularity {granularity!r}: "
            "take a scale a channel or a group, such as int4 or int4@group64"
        )


def quantised_weight(weight: Tensor, choice: Option | Split, layer: Layer, quantizer: Quantizer) -> Tensor:
    """A stored weight under its choice, in the layout the layer stores it."""
    rows = as_rows(weight.detach(), layer)
    if isinstance(choice, Option):
        return from_rows(quantizer(rows, weight_format(choice), layer), layer).contiguous()
    codes = _code_of_each_weight(choice, layer).to(weight.device)
    result = rows.clone().reshape(codes.shape)
    for code in np.unique(choice.codes).tolist():
        fmt = weight_format(choice.options[code])
        quantised = quantised_rows(rows, fmt, layer, choice.granularity, quantizer).reshape(codes.shape)
        result = torch.where(codes == code, quantised, result)
    return from_rows(result.reshape(layer.weight_shape), layer).contiguous()


def _code_of_each_weight(split: Split, layer: Layer) -> Tensor:
    """(out, in): the option code of the unit that each weight belongs to."""
    outputs = layer.weight_shape[0]
    columns = layer.parameters // outputs
    kind, size = block_size(granularity_in(layer, split.granularity))
    codes = torch.tensor(split.codes)
    if kind == "rows":
        return codes.repeat_interleave(size)[:outputs, None].expand(outputs, columns)
    return codes.reshape(outputs, -1).repeat_interleave(size, dim=1)[:, :columns]
