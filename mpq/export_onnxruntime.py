"""A plan as a mixed ONNX file: DequantizeLinear on the weights, blocked for groups, and quantised layer inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.atomic import write_atomically
from mpq.exported_layers import group_size, integer_refusal, taken_layers
from mpq.formats import TENSOR, Integer, NumberFormat, UnsignedInteger
from mpq.granularity import MINMAX
from mpq.input_range import InputRange
from mpq.layers import Layer
from mpq.onnx_weights import drop_unused, fold_transposes, weights_in
from mpq.options import Option
from mpq.plan import Plan, weight_format

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[Any]

_KINDS = ("linear", "embedding", "conv1d", "conv2d", "conv3d")
_BITS = (4, 8)
_GROUPS = (16, 32, 64, 128, 256)
_OPSET, _IR_VERSION = 21, 10  # the first with 4-bit integers and blocks
_HAS = (
    "ONNX Runtime has weights in int4, int8, uint4 and uint8 by tensor, channel or group with @scale=fp32, fp16 and "
    "bf16, and inputs in int8@tensor or uint8@tensor"
)
_FLOATS = ("fp32", "fp16", "bf16")


def to_onnxruntime(
    plan: Plan, *, source: str | Path | Any, output: str | Path, model: nn.Module | None = None
) -> dict[str, Any]:
    """Write the plan as an ONNX file, from the file of the model in floats; needs the package ``onnx``.

    A weight becomes its codes and a DequantizeLinear (opset 21; older files are converted). With groups the codes are
    blocked along the inputs, Gemm is taken apart into MatMul and Add, and ONNX Runtime fuses the pair to MatMulNBits.
    Layer inputs get QuantizeLinear and DequantizeLinear where the plan has a calibrated range
    (`mpq.activation_ranges`), else, for uint8@tensor, DynamicQuantizeLinear. Codes and scales are those of the
    simulation. Scales are fp32, since DequantizeLinear gives its output their type; so the plan must say so.

    As written the file computes the simulation. ONNX Runtime then optimises it: MatMulNBits quantises its input on the
    way in, unless the session entry ``session.qdq_matmulnbits_accuracy_level`` is "1", and where a layer's input is
    quantised it rounds biases and products to integers. Look at the operators it made (``optimized_model_filepath``):
    it does not fuse everywhere. Checked with onnxruntime 1.31.

    Args:
        plan: what is exported.
        source: the ONNX file in floats, or an ``onnx.ModelProto``. PyTorch's exporter folds batch norms into weights,
            which are then not found: fold them before tracing, or export with ``training=PRESERVE``.
        output: the file to write.
        model: the PyTorch model; its values find the weights that the exporter renamed.

    Returns:
        ``path``, and ``layers``: for each the option, the bytes of its weights in the file, and the initialisers'
        names; two where the float file held a tied weight twice.

    Raises:
        ValueError: if a layer is split, has a format that ONNX Runtime lacks, an input without a calibrated range, or
            no weight in the file.
        ImportError: if ``onnx`` is not installed.
    """
    import onnx

    taken = taken_layers(plan, "ONNX Runtime", refused_by_onnxruntime)
    ranges = {entry.layer.name: entry.input_range for entry in plan.entries}
    for layer, option in taken:
        _check_range(layer, option, ranges[layer.name])
    proto = _at_opset(onnx.load(str(source)) if isinstance(source, str | Path) else source)
    fold_transposes(proto.graph)
    found = weights_in(proto.graph, [layer for layer, _ in taken], model)
    graph, layers = _Graph(proto.graph), {}
    for layer, option in taken:
        size = sum(graph.quantise(name, layer, option, ranges[layer.name]) for name in found[layer.name])
        layers[layer.name] = {"option": str(option), "bytes": size, "initializers": found[layer.name]}
    graph.finish()
    onnx.checker.check_model(proto)
    write_atomically(output, partial(_save, proto))
    return {"path": str(output), "layers": layers}


def refused_by_onnxruntime(layer: Layer, option: Option) -> str | None:
    """Why ONNX Runtime cannot hold an option of a layer; None if it can."""
    weight, activation = weight_format(option), option.activation
    if option == Option("fp32") or layer.kind not in _KINDS:
        return None if option == Option("fp32") else f"a {layer.kind} is not exported: pin it to fp32"
    if activation is not None:
        kinds = isinstance(activation, Integer | UnsignedInteger) and activation.bits == 8
        if not kinds or activation.granularity != TENSOR or layer.kind == "embedding":
            return _HAS
    if weight.name in _FLOATS:
        return None
    if isinstance(weight, Integer | UnsignedInteger) and weight.bits in _BITS and weight.scale != "fp32":
        return f"its scales are fp32, those of {weight} are {weight.scale}: write {weight}@scale=fp32"
    if group_size(option) > 0 and (layer.kind.startswith("conv") or group_size(option) not in _GROUPS):
        return f"blocks are of {', '.join(map(str, _GROUPS))} inputs of a linear layer or an embedding"
    return integer_refusal(layer, _with_minmax(option), _BITS, _HAS)


def _with_minmax(option: Option) -> Option:
    """Any range will do: the codes are computed here."""
    weight = weight_format(option)
    return option if weight.range == MINMAX else Option(str(weight).replace(f"@{weight.range}", ""), option.activation)


def _check_range(layer: Layer, option: Option, given: InputRange | None) -> None:
    if option.activation is not None and given is None and not isinstance(option.activation, UnsignedInteger):
        raise ValueError(
            f"ONNX Runtime needs the range of {layer.name!r}'s {option.activation} input: calibrate it with "
            "mpq.activation_ranges.calibrate_ranges, or take uint8@tensor, which may be dynamic"
        )


def _at_opset(proto: Any) -> Any:
    from onnx import version_converter

    version = next(imported.version for imported in proto.opset_import if imported.domain in ("", "ai.onnx"))
    if version < _OPSET:
        proto = version_converter.convert_version(proto, _OPSET)
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    return proto


def _save(proto: Any, path: Path) -> None:
    import onnx

    onnx.save_model(proto, str(path))


@dataclass
class _Graph:
    """An ONNX graph whose weights and layer inputs are replaced one by one."""

    proto: Any
    inputs: dict[tuple[str, NumberFormat, InputRange | None], str] = field(default_factory=dict)

    def quantise(self, name: str, layer: Layer, option: Option, given: InputRange | None) -> int:
        """Replace one initialiser, everywhere it is read; the bytes it now takes."""
        from onnx import numpy_helper

        initializer = next(found for found in self.proto.initializer if found.name == name)
        readers = [node for node in self.proto.node if name in node.input]
        array = numpy_helper.to_array(initializer)
        if weight_format(option).name == "fp32" and option.activation is None:
            return int(array.nbytes)
        rows_first = _check_readers(layer, readers, option)
        if not rows_first or (group_size(option) > 0 and readers[0].op_type == "Gemm"):
            readers = [self._as_matmul(node) for node in readers]
        transposed = readers[0].op_type == "MatMul"
        size, values = self._stored(name, array if rows_first else array.T, option, transposed)
        for node in readers:
            node.input[list(node.input).index(name)] = values
            if option.activation is not None:
                node.input[0] = self._quantised_input(node, option.activation, given)
        return size

    def _stored(self, name: str, rows: Array, option: Option, transposed: bool) -> tuple[int, str]:
        """Write a weight, rows first, as initialisers; their bytes and the name of its dequantised values."""
        from onnx import TensorProto, helper

        weight = weight_format(option)
        values = f"{name}_{weight.name}"
        if weight.name in _FLOATS:
            kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[weight.name]
            self._add(f"{values}_stored", kind, rows.T if transposed else rows)
            self.proto.node.insert(0, helper.make_node("Cast", [f"{values}_stored"], [values], to=TensorProto.FLOAT))
            return rows.size * weight.bits // 8, values
        codes, scale, zero = quantised_codes(rows, weight)
        kind = getattr(TensorProto, f"{'U' if zero is not None else ''}INT{weight.bits}")
        parts = {"codes": (kind, codes), "scale": (TensorProto.FLOAT, scale)}
        parts |= {"zero": (kind, zero)} if zero is not None else {}
        for part, (stored, array) in parts.items():
            flat = array.reshape(()) if weight.granularity == TENSOR and part != "codes" else array
            self._add(f"{values}_{part}", stored, flat.T if transposed else flat)
        size = group_size(option)
        axis = (0 if transposed else 1) if size > 0 else (1 if transposed else 0)
        blocks: dict[str, Any] = {"block_size": size} if size > 0 else {}
        inputs = [f"{values}_{part}" for part in parts]
        self.proto.node.insert(0, helper.make_node("DequantizeLinear", inputs, [values], axis=axis, **blocks))
        bits = sum(array.size * (32 if part == "scale" else weight.bits) for part, (_, array) in parts.items())
        return -(-bits // 8), values

    def _quantised_input(self, node: Any, fmt: NumberFormat, given: InputRange | None) -> str:
        """Quantise what a node reads; nodes that read the same thing alike share it."""
        from onnx import TensorProto, helper

        read = node.input[0]
        key = (read, fmt, given)
        if key in self.inputs:
            return self.inputs[key]
        tag = f"{read}_{fmt.name}_{len(self.inputs)}"
        self.inputs[key] = f"{tag}_dequantised"
        position = list(self.proto.node).index(node)
        names = [f"{tag}_{part}" for part in ("codes", "scale", "zero")]
        if given is None:
            quantise = helper.make_node("DynamicQuantizeLinear", [read], names)
        else:
            scale, zero = input_scale(fmt, given.low[0], given.high[0])
            self._add(names[1], TensorProto.FLOAT, scale)
            self._add(names[2], TensorProto.UINT8, zero)
            quantise = helper.make_node("QuantizeLinear", [read, names[1], names[2]], [names[0]])
        self.proto.node.insert(position, helper.make_node("DequantizeLinear", names, [f"{tag}_dequantised"]))
        self.proto.node.insert(position, quantise)
        return f"{tag}_dequantised"

    def _as_matmul(self, node: Any) -> Any:
        """Gemm taken apart into MatMul and Add, in its place."""
        from onnx import helper

        if node.op_type == "MatMul":
            return node
        position, output = list(self.proto.node).index(node), node.output[0]
        product = f"{output}_product" if len(node.input) > 2 else output
        if len(node.input) > 2:
            self.proto.node.insert(position + 1, helper.make_node("Add", [product, node.input[2]], [output]))
        self.proto.node.remove(node)
        self.proto.node.insert(position, helper.make_node("MatMul", list(node.input[:2]), [product]))
        return self.proto.node[position]

    def _add(self, name: str, kind: int, array: Array) -> None:
        from onnx import helper

        self.proto.initializer.append(helper.make_tensor(name, kind, array.shape, _raw(kind, array), raw=True))

    def finish(self) -> None:
        """Drop the weights that are no longer read, inputs of their names, and shapes that no longer hold."""
        drop_unused(self.proto)
        read = {name for node in self.proto.node for name in node.input}
        for value in [value for value in self.proto.input if value.name not in read]:
            self.proto.input.remove(value)
        del self.proto.value_info[:]


def _raw(kind: int, array: Array) -> bytes:
    """Values as an ONNX tensor stores them, 4-bit ones two a byte, the first low: plain lists take up to 10 bytes each.

    Floats that fp16 or bf16 cannot hold saturate, as in the simulation.
    """
    import torch
    from onnx import TensorProto

    from mpq.rounding import float_cast

    if kind in (TensorProto.INT4, TensorProto.UINT4):
        nibbles = np.append(array.flatten(), [0] * (array.size % 2)).astype(np.uint8) & 15
        return (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        name, dtype = ("fp16", torch.float16) if kind == TensorProto.FLOAT16 else ("bf16", torch.bfloat16)
        stored = float_cast(torch.from_numpy(np.array(array, np.float32)), name).to(dtype)
        return stored.view(torch.int16).numpy().tobytes()
    dtypes: dict[int, Any] = {TensorProto.INT8: np.int8, TensorProto.UINT8: np.uint8, TensorProto.FLOAT: np.float32}
    return array.astype(dtypes[kind]).tobytes()


def quantised_codes(rows: Array, fmt: NumberFormat) -> tuple[Array, Array, Array | None]:
    """Codes (rows, columns...), fp32 scales and zero points of a weight, on the grid of the simulation.

    Scales are (rows,) for a scale a channel, (rows, groups) for groups, (1,) for a tensor; None for zero points of
    symmetric formats.
    """
    import torch

    from mpq.fake_quantize import group_limits

    matrix = torch.from_numpy(np.array(rows.reshape(len(rows), -1), np.float32))
    low, high = (ends.numpy() for ends in group_limits(matrix, fmt))
    size = fmt.granularity.size if fmt.granularity is not None else 0
    low, high = (ends[:, ::size] if size else ends[:, :1] for ends in (low, high))
    if fmt.granularity == TENSOR:
        low, high = low[:1], high[:1]
    scale, zero, (least, largest) = _grid(fmt, low, high)
    spread = np.repeat(scale, size, axis=1) if size else scale
    codes = np.rint(matrix.numpy() / np.where(spread == 0, 1, spread))
    if zero is not None:
        codes += np.repeat(zero, size, axis=1) if size else zero
    codes = np.clip(codes, least, largest).astype(np.int64).reshape(rows.shape)
    scales = scale if size else scale[:, 0]
    zeros = None if zero is None else (zero if size else zero[:, 0]).astype(np.int64)
    return codes, np.where(scales == 0, 1, scales).astype(np.float32), zeros


def input_scale(fmt: NumberFormat, low: float, high: float) -> tuple[Array, Array]:
    """Scale and zero point of a layer's input in a static range, as 0-d arrays of a uint8 quantiser.

    Symmetric codes −128 … 127 become 0 … 255 with zero point 128, which are the same values: ONNX Runtime does so
    itself on x86, and fails where it moves the quantiser over a reshape.

    Example:
        >>> from mpq.formats import parse
        >>> scale, zero = input_scale(parse("uint8@tensor"), -1.0, 1.55)
        >>> round(float(scale), 4), int(zero)
        (0.01, 100)
    """
    import torch

    from mpq.rounding import stored_scale

    scale, zero, (least, largest) = _grid(fmt, np.full((1, 1), low, np.float32), np.full((1, 1), high, np.float32))
    stored = stored_scale(torch.from_numpy(scale), fmt.scale or "fp32").numpy()
    stored = np.where(stored == 0, 1, stored).astype(np.float32)
    code = -least if zero is None else np.clip(np.rint(-min(low, 0.0) / stored), 0, largest)
    return stored.reshape(()), np.asarray(code, np.int64).reshape(())


def _grid(fmt: NumberFormat, low: Array, high: Array) -> tuple[Array, Array | None, tuple[int, int]]:
    """Scales, zero points and the least and largest code for ranges, as `mpq.fake_quantize` has them."""
    if isinstance(fmt, Integer):
        largest = 2 ** (fmt.bits - 1) - 1
        return np.maximum(-low, high) / np.float32(largest), None, (-largest - 1, largest)
    largest = 2**fmt.bits - 1
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / np.float32(largest)
    zero = np.clip(np.rint(-low / np.where(scale == 0, 1, scale)), 0, largest)
    return scale, zero, (0, largest)


def _check_readers(layer: Layer, readers: list[Any], option: Option) -> bool:
    """Whether the operators that read a weight take it rows first.

    Raises:
        ValueError: if one of them is not known here, or they differ.
    """
    orders = {_rows_first(layer, node) for node in readers}
    if len(orders) != 1 or len({node.op_type for node in readers}) != 1:
        names = ", ".join(sorted({node.op_type for node in readers})) or "nothing"
        raise ValueError(
            f"ONNX Runtime cannot hold {option} ({layer.name!r}): its weight is read by {names} in several ways: "
            "pin it to fp32"
        )
    return orders.pop()


def _rows_first(layer: Layer, node: Any) -> bool:
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "Gemm":
        plain = all(attributes[name].f == 1 for name in ("alpha", "beta") if name in attributes)
        if not plain or ("transA" in attributes and attributes["transA"].i):
            raise ValueError(
                f"the Gemm of {layer.name!r} has alpha, beta or transA, which is not exported: pin it to fp32"
            )
        return bool("transB" in attributes and attributes["transB"].i)
    if node.op_type in ("Conv", "Gather"):
        return True
    if node.op_type == "MatMul":
        return False
    raise ValueError(f"the weight of {layer.name!r} is read by {node.op_type}, which is not exported: pin it to fp32")
