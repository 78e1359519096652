"""Find a plan's weights in an ONNX graph: by their names, or by their values where an exporter renamed them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.layers import Layer

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[Any]


def weights_in(graph: Any, layers: Iterable[Layer], model: nn.Module | None = None) -> dict[str, list[str]]:
    """{layer: names of the initialisers that hold its weight}; a tied weight may be there twice, once transposed.

    Args:
        graph: an ONNX ``GraphProto``.
        layers: what is looked for.
        model: where a name is not found, its values are; PyTorch's exporter renames the weights it transposes.

    Raises:
        ValueError: if a layer is not there.
    """
    from onnx import numpy_helper

    layers = list(layers)
    found: dict[str, list[str]] = {layer.name: [] for layer in layers}
    by_name = {name: layer.name for layer in layers for name in (layer.weight_name, *layer.aliases)}
    by_value = _digests(layers, model) if model is not None else {}
    for initializer in graph.initializer:
        name = by_name.get(initializer.name)
        if name is None and by_value and len(initializer.dims) > 1:
            name = by_value.get(_digest(numpy_helper.to_array(initializer)))
        if name is not None:
            found[name].append(initializer.name)
    if missing := [name for name, names in found.items() if not names]:
        way_out = "pass model=, to look for its values" if model is None else "was the file made from this model?"
        raise ValueError(
            f"the ONNX file has no weight of layer {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f": {way_out}"
        )
    return found


def fold_transposes(graph: Any) -> None:
    """Replace ``Transpose(initialiser)`` by a transposed initialiser, as exporters that do not fold leave it."""
    from onnx import numpy_helper

    initializers = {initializer.name: initializer for initializer in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in initializers]:
        array = numpy_helper.to_array(initializers[node.input[0]])
        axes = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array.transpose(axes)), node.output[0]))
        graph.node.remove(node)
    drop_unused(graph)


def drop_unused(graph: Any) -> None:
    """Remove the initialisers that no node reads and the graph does not return."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for initializer in [initializer for initializer in graph.initializer if initializer.name not in used]:
        graph.initializer.remove(initializer)


def _digests(layers: Iterable[Layer], model: nn.Module) -> dict[bytes, str]:
    digests = {}
    for layer in layers:
        weight = model.get_parameter(layer.weight_name).detach().cpu().numpy()
        digests[_digest(weight)] = layer.name
        if weight.ndim == 2:
            digests[_digest(weight.T)] = layer.name
    return digests


def _digest(array: Array) -> bytes:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).digest()
