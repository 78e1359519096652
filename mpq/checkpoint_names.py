"""The layers of a checkpoint by the names and shapes of its tensors, where the model's code is not at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from mpq.layers import Layer, Network
from mpq.routers import without_routers
from mpq.stored_weights import FLOATS, StoredTensor

STACKED = 32
"""A tensor of three axes whose last two are longer than this is a stack of matrices, as of experts."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))
"""Last parts of the names of linears that runtimes fuse, where they share what is before."""

_EXPERT = re.compile(r"(.*\.experts\.)\d+\.(.+)")
_FUSED_PARTS = {"up_proj": "gate_proj", "w3": "w1"}
_FLOAT_NAMES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}


def network_of_names(tensors: Mapping[str, StoredTensor]) -> Network:
    """The network that names and shapes tell: no multiply-adds, no edges, and what is tied by its name.

    A floating-point tensor of two or more axes is a layer, called by its name without ".weight". The first axis is
    taken for the output channels, which is right for linear layers, convolutions and embeddings; transposed
    convolutions and transformers' Conv1D store inputs first, and "@channel" then runs along these. Three axes of which
    the last two are longer than 32 are a stack of (out, in) matrices.

    Siblings are linears whose names differ in the last part alone, q_proj, k_proj and v_proj for instance, and all
    experts of a block, gate and up together, down on their own: one option for all, as if they were stacked, unless
    ties are none. Routers of mixtures are left out (`mpq.routers`).

    Example:
        >>> from pathlib import Path
        >>> stored = StoredTensor("fc.weight", Path("a.safetensors"), 0, "BF16", (4, 8), 64)
        >>> network_of_names({"fc.weight": stored})["fc"].weight_bytes
        64
    """
    layers, skipped = [], {}
    for name, tensor in tensors.items():
        if why := no_layer(tensor):
            skipped[name] = why
        else:
            layers.append(layer_of(tensor))
    layers = _in_order(layers)
    total = sum(tensor.stored_bytes for tensor in tensors.values())
    network = Network(
        tuple(layers),
        siblings=_siblings(layers),
        total_bytes=total,
        outside_bytes=total - sum(layer.weight_bytes for layer in layers),
        dtype=usual_dtype(tensors[layer.weight_name] for layer in layers),
        skipped={name: why for name, why in skipped.items() if len(tensors[name].shape) > 1},
    )
    return without_routers(network)


def no_layer(tensor: StoredTensor) -> str:
    """Why a tensor is no layer, "" if it is one."""
    if len(tensor.shape) < 2:
        return f"it has {len(tensor.shape)} axes"
    if tensor.dtype not in FLOATS:
        return f"it is {tensor.dtype}, not of floating point"
    return "" if prod(tensor.shape) else "it is empty"


def layer_of(tensor: StoredTensor) -> Layer:
    """The tensor as a layer of which nothing but the weight is known."""
    name, shape, count = tensor.name.removesuffix(".weight"), tensor.shape, prod(tensor.shape)
    stack = len(shape) == 3 and min(shape[1:]) > STACKED
    kind = "experts" if stack else "linear" if len(shape) == 2 else f"conv{len(shape) - 2}d"
    if kind == "linear" and re.search(r"embed|(^|\.)wte$|(^|\.)wpe$", name):
        kind = "embedding"
    return Layer(
        name,
        kind,
        (shape[0] * shape[1], shape[2]) if stack else shape,
        count,
        0,
        (1,),
        (1,),
        weight_name=tensor.name,
        module=name if tensor.name != name and not stack else None,
        channel_axis=1 if stack else 0,
        experts=shape[0] if stack else 1,
        weight_bytes=tensor.stored_bytes,
    )


def usual_dtype(tensors: Iterable[StoredTensor]) -> str:
    """The format of most of the tensors' values."""
    values: dict[str, int] = {}
    for tensor in tensors:
        values[tensor.dtype] = values.get(tensor.dtype, 0) + prod(tensor.shape)
    most = max(values, key=lambda dtype: values[dtype], default="F32")
    return _FLOAT_NAMES.get(most, most.lower())


def _siblings(layers: Sequence[Layer]) -> tuple[tuple[str, ...], ...]:
    names = {layer.name: layer for layer in layers if layer.kind == "linear" and not _EXPERT.fullmatch(layer.name)}
    groups = []
    for name in names:
        parent, dot, leaf = name.rpartition(".")
        for parts in FUSED:
            if leaf == parts[0]:
                found = tuple(each for part in parts if (each := f"{parent}{dot}{part}") in names)
                groups += [found] if len(found) == len(parts) else []
    experts: dict[str, list[str]] = {}
    for layer in layers:
        if match := _EXPERT.fullmatch(layer.name):
            experts.setdefault(f"{match[1]}{_FUSED_PARTS.get(match[2], match[2])}", []).append(layer.name)
    return (*groups, *(tuple(group) for group in experts.values() if len(group) > 1))


def _in_order(layers: Iterable[Layer]) -> list[Layer]:
    """Embeddings first, the output layer last, blocks by their numbers, as files sort neither."""

    def place(layer: Layer) -> tuple[int, list[tuple[int, int | str]]]:
        parts = re.split(r"(\d+)", layer.name)
        natural = [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
        last = layer.name.rpartition(".")[2] in ("lm_head", "output", "head", "classifier")
        return (0 if layer.kind == "embedding" else 2 if last else 1), natural

    return sorted(layers, key=place)
