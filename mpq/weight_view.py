"""Every weight as (out, in...): the view in which channels, rows and groups mean the same for every kind of layer."""

from __future__ import annotations

from torch import Tensor

from mpq.layers import Layer


def as_rows(weight: Tensor, layer: Layer) -> Tensor:
    """A stored weight in the (out, in...) view: output channels first; no copy where a view will do.

    Transposed convolutions store (in, out/groups, k...), transformers' Conv1D (in, out), experts (E, a, b); all become
    `layer.weight_shape`.
    """
    if layer.kind.startswith("conv_transpose"):
        return _transposed_as_rows(weight, layer.groups)
    if layer.kind == "experts":
        per_expert = weight if layer.channel_axis == 1 else weight.transpose(1, 2)
        return per_expert.reshape(layer.weight_shape)
    return weight.movedim(layer.channel_axis, 0)


def from_rows(rows: Tensor, layer: Layer) -> Tensor:
    """The way back: a tensor in the (out, in...) view as the layer stores it."""
    if layer.kind.startswith("conv_transpose"):
        return _rows_as_transposed(rows, layer.groups)
    if layer.kind == "experts":
        per_expert = rows.reshape(layer.experts, -1, layer.weight_shape[1])
        return per_expert if layer.channel_axis == 1 else per_expert.transpose(1, 2)
    return rows.movedim(0, layer.channel_axis)


def _transposed_as_rows(weight: Tensor, groups: int) -> Tensor:
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * outputs, inputs // groups, *kernel)


def _rows_as_transposed(rows: Tensor, groups: int) -> Tensor:
    outputs, inputs, *kernel = rows.shape
    grouped = rows.reshape(groups, outputs // groups, inputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * inputs, outputs // groups, *kernel)
