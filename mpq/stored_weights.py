"""Tensors of safetensors files, read some rows at a time; `StoredWeight` is the weight of a layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpq.layers import Layer
from mpq.weight_view import as_rows

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The types of safetensors whose tensors can be quantised."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its name in the file.
        file: the .safetensors file.
        offset: the byte at which it starts.
        dtype: its type as safetensors calls it: "BF16", "F32", "U8".
        shape: its shape.
        stored_bytes: bytes it takes in the file.
    """

    name: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int

    def read(self, start: int, count: int) -> Tensor:
        """So many values from a position on, flat; read rather than mapped into memory, where pages would stay.

        Raises:
            ValueError: if the file has become shorter.
        """
        dtype = FLOATS[self.dtype]
        content = np.empty(count * dtype.itemsize, dtype=np.uint8)
        with self.file.open("rb") as opened:
            opened.seek(self.offset + start * dtype.itemsize)
            if opened.readinto(content.data) != len(content):
                raise ValueError(f"cannot read {self.name!r}: {str(self.file)!r} ends before it does")
        return torch.from_numpy(content).view(dtype)


@dataclass(frozen=True)
class Block:
    """Rows of a layer's weight that lie together in one stored tensor.

    Attributes:
        tensor: where they are.
        start: position of their first value in the tensor.
        shape: (rows, in...) of the block in the (out, in...) view.
        layer: how the block is turned into that view where it is stored otherwise, transposed for instance; such a
            block is read whole.
    """

    tensor: StoredTensor
    start: int
    shape: tuple[int, ...]
    layer: Layer | None = None

    def chunks(self, values: int) -> Iterator[Tensor]:
        """Some rows at a time, in order: as many as have so many values, at least one."""
        width = prod(self.shape[1:])
        step = max(1, values // width)
        if self.layer is not None:
            whole = self.tensor.read(self.start, prod(self.shape))
            stored = whole.reshape(stored_shape(self.layer))
            yield from torch.split(as_rows(stored, self.layer), step)
            return
        for first in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - first)
            yield self.tensor.read(self.start + first * width, rows * width).reshape(rows, *self.shape[1:])


@dataclass(frozen=True)
class StoredWeight:
    """Where the weight of a layer is stored: blocks of its rows, the first on top."""

    layer: Layer
    blocks: tuple[Block, ...]

    def chunks(self, values: int) -> Iterator[Tensor]:
        """(rows, in...) after (rows, in...): some rows of the (out, in...) view at a time, in order."""
        for block in self.blocks:
            yield from block.chunks(values)


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint: of a .safetensors file, or of a folder with one, with several, or with an index.

    Raises:
        ValueError: if there is no such file, one is broken or incomplete, or the index names what is not there.
    """
    found: dict[str, StoredTensor] = {}
    for file, names in _files(Path(path)).items():
        try:
            with safe_open(file, framework="pt") as opened:  # checks that the file is whole
                known = set(opened.keys())
            header, start = _header(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {str(file)!r}: {error}") from error
        for name in sorted(known) if names is None else names:
            if name not in known:
                raise ValueError(f"cannot read {name!r}: the index says that it is in {str(file)!r}, which lacks it")
            entry = header[name]
            first, end = entry["data_offsets"]
            found[name] = StoredTensor(name, file, start + first, entry["dtype"], tuple(entry["shape"]), end - first)
    return found


def stored_weight(layer: Layer, tensor: StoredTensor) -> StoredWeight:
    """The weight of a layer that one tensor holds as the layer stores it.

    Raises:
        ValueError: if the tensor has another shape.
    """
    if tensor.shape != stored_shape(layer):
        raise ValueError(
            f"the weight of {layer.name!r} must be stored as {stored_shape(layer)}, {tensor.name!r} is {tensor.shape} "
            f"in {str(tensor.file)!r}"
        )
    if layer.kind == "experts" and layer.channel_axis != 1:
        rows, inputs = layer.weight_shape[0] // layer.experts, layer.weight_shape[1]
        expert = replace(layer, kind="linear", weight_shape=(rows, inputs), channel_axis=1, experts=1)
        size = rows * inputs
        return StoredWeight(layer, tuple(Block(tensor, e * size, (rows, inputs), expert) for e in range(layer.experts)))
    as_stored = layer.kind == "experts" or (layer.channel_axis == 0 and not layer.kind.startswith("conv_transpose"))
    return StoredWeight(layer, (Block(tensor, 0, layer.weight_shape, None if as_stored else layer),))


def stored_shape(layer: Layer) -> tuple[int, ...]:
    """The shape in which a layer's weight is stored, which `mpq.weight_view.as_rows` brings into (out, in...).

    Example:
        >>> stored_shape(Layer("up", "experts", (8 * 32, 16), 4096, 0, (1, 16), (1, 32), channel_axis=2, experts=8))
        (8, 16, 32)
    """
    rows, *inner = layer.weight_shape
    if layer.kind == "experts":
        height = rows // layer.experts
        return (layer.experts, *((height, inner[0]) if layer.channel_axis == 1 else (inner[0], height)))
    if layer.kind.startswith("conv_transpose"):
        return (inner[0] * layer.groups, rows // layer.groups, *inner[1:])
    return layer.weight_shape if layer.channel_axis == 0 else (inner[0], rows)


def _files(path: Path) -> Mapping[Path, list[str] | None]:
    """The files of a checkpoint, and which tensors of each count: None for all."""
    if path.is_file():
        return {path: None}
    if (path / INDEX).is_file():
        by_file: dict[Path, list[str] | None] = {}
        for name, file in _weight_map(path / INDEX).items():
            names = by_file.setdefault(path / file, [])
            if names is not None:
                names.append(name)
        return by_file
    found: dict[Path, list[str] | None] = dict.fromkeys(sorted(path.glob("*.safetensors")))
    if not found:
        raise ValueError(f"a checkpoint must be a .safetensors file or a folder with some, got {str(path)!r}")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {str(index)!r}: it must be JSON with a weight_map ({error!r})") from error
    return found


def _header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """What a file says of its tensors, and the byte at which their values start."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length
