"""Kernels of onnxruntime on this machine's processor.

What runs a pair of formats (onnxruntime 1.22 to 1.31, CPU):

    weights        inputs   linear                               convolution
    fp32           fp32     MatMul                               Conv, ConvTranspose
    (u)int8        (u)int8  QLinearMatMul                        QLinearConv; transposed: none
    (u)int8, 4, 2  fp32     MatMulNBits, accuracy_level 4        (u)int8, 4: DequantizeLinear, then Conv

int8 inputs are given as uint8 with a zero point of 128: the same values, and the only inputs with fast matmuls (signed
by signed took 48 times as long at 64 x 768 x 768, measured). MatMulNBits is what a DequantizeLinear in blocks before a
MatMul is fused to; at accuracy level 4 it rounds inputs to int8 a block, and below it falls back to kernels that are 50
to 180 times slower (microsoft/onnxruntime pull requests 24959, 28552). It takes blocks of 16, 32, 64, 128 or 256: a
weight with a scale a channel runs in blocks of 128 that repeat the scale. Sums over experts run one after the other on
the same weights, which caches flatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.formats import parse

from .kernels import Clock, Kernel, NoKernel, clock_of

_BYTES = ("int8", "uint8")
_BLOCKED = {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (2, 4, 8)}
_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeKernels:
    """Kernels of onnxruntime with a number of threads.

    Example:
        >>> source = OnnxRuntimeKernels()
        >>> source(Kernel("linear", 2, 16, 8)).result.shape
        (2, 8)
        >>> source(Kernel("linear", 2, 16, 8, weight="nf4"))
        Traceback (most recent call last):
        ...
        mpq.hardware_models.kernels.NoKernel: onnxruntime has no kernel for nf4 weights and fp32 inputs in a linear
    """

    threads: int = 1

    @property
    def name(self) -> str:
        """The version and the threads.

        Raises:
            ValueError: if onnxruntime or onnx is missing.
        """
        runtime, _ = _libraries()
        return f"onnxruntime {runtime.__version__}, CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def clock(self) -> Clock:
        """Processor time of one thread, passing time of several."""
        return clock_of(self.threads)

    def __call__(self, kernel: Kernel) -> SessionRun:
        """Build a model of one operator, load it, bind its input and output.

        Raises:
            NoKernel: if no operator runs the kernel.
        """
        _, onnx = _libraries()
        kernel = kernel.with_geometry()
        nodes, tensors, kind = graph_of(kernel, onnx)
        given = (*kernel.image,) if kernel.is_convolution else (kernel.m, kernel.k)
        inputs = [onnx.helper.make_tensor_value_info("x", kind, given)]
        outputs = [onnx.helper.make_tensor_value_info("y", kind, None)]
        graph = onnx.helper.make_graph(nodes, "kernel", inputs, outputs, tensors)
        model = onnx.helper.make_model(graph, opset_imports=opsets(onnx), ir_version=10)
        dtype = np.uint8 if kind == onnx.TensorProto.UINT8 else np.float32
        values = np.random.default_rng(0).integers(0, 100, given).astype(dtype)
        return SessionRun.of(
            model.SerializeToString(), values, self.threads, kernel.repeats if kernel.kind == "experts" else 1
        )


@dataclass(frozen=True)
class SessionRun:
    """A loaded model with its input and output in place: a call runs it, `times` over.

    Attributes:
        session: the model.
        binding: its input and output.
        output: where the output is.
        times: runs a call.
    """

    session: Any
    binding: Any
    output: Any
    times: int = 1

    def __call__(self) -> None:
        """Run it."""
        for _ in range(self.times):
            self.session.run_with_iobinding(self.binding)

    @property
    def result(self) -> NDArray[Any]:
        """The output of the last run."""
        return np.array(self.output.numpy())

    @classmethod
    def of(cls, model: bytes, values: NDArray[Any], threads: int = 1, times: int = 1) -> SessionRun:
        """Load a model of one input and one output.

        Raises:
            NoKernel: if onnxruntime cannot load or run it.
        """
        session, binding, output = _bound_session(model, values, threads)
        return cls(session, binding, output, times)


def _bound_session(model: bytes, values: NDArray[Any], threads: int) -> tuple[Any, Any, Any]:
    """A model in memory, its binding, and its output.

    Raises:
        NoKernel: if onnxruntime cannot load or run it.
    """
    runtime, _ = _libraries()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        result = runtime.OrtValue.ortvalue_from_numpy(np.zeros_like(session.run(None, {name: values})[0]))
        binding = session.io_binding()
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(values))
        binding.bind_ortvalue_output(session.get_outputs()[0].name, result)
    except Exception as error:  # the library has no common class of its own
        raise NoKernel(f"onnxruntime cannot run it: {' '.join(str(error).split())[:200]}") from None
    return session, binding, result


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"measuring needs {error.name}: pip install 'mpq-search[measure]'") from error
    return onnxruntime, onnx


def opsets(onnx: Any) -> list[Any]:
    """Versions of the operators."""
    return [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]


def graph_of(kernel: Kernel, onnx: Any) -> tuple[list[Any], list[Any], int]:
    """The operators of a kernel from "x" to "y", their weights, and the element type of both.

    Raises:
        NoKernel: if no operator runs the kernel.
    """
    weight, activation = parse(kernel.weight), kernel.activation
    float_type, byte_type = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    if kernel.weight == activation == "fp32":
        node, shape = _product(kernel, onnx, ("x", "w"))
        return [node], [_tensor(onnx, "w", np.random.default_rng(1).normal(size=shape))], float_type
    if weight.name in _BYTES and activation in _BYTES and not kernel.is_transposed:
        return *_integer_product(kernel, onnx), byte_type
    if activation == "fp32" and not kernel.is_convolution and weight.name in _BLOCKED:
        return *_block_product(kernel, onnx), float_type
    if activation == "fp32" and kernel.is_convolution and _BLOCKED.get(weight.name, 0) in (4, 8):
        return *_unpacked_convolution(kernel, onnx), float_type
    raise _no_kernel(kernel)


def _no_kernel(kernel: Kernel) -> NoKernel:
    pair = f"{kernel.weight} weights and {kernel.activation} inputs"
    return NoKernel(f"onnxruntime has no kernel for {pair} in a {kernel.kind}")


def _product(kernel: Kernel, onnx: Any, names: Sequence[str], prefix: str = "") -> tuple[Any, tuple[int, ...]]:
    """The node of a product or convolution, and the shape of its weight."""
    if not kernel.is_convolution:
        return onnx.helper.make_node(f"{prefix}MatMul", names, ["y"]), (kernel.k, kernel.n)
    inputs, outputs = kernel.channels
    operator, shape = "Conv", (outputs, inputs // kernel.repeats, *kernel.window)
    pads = [max(0, width - stride) for stride, width in zip(kernel.strides, kernel.window, strict=True)]
    if kernel.is_transposed:
        operator, shape = "ConvTranspose", (inputs, outputs // kernel.repeats, *kernel.window)
        pads = [0] * len(pads)
    before = [pad // 2 for pad in pads]
    node = onnx.helper.make_node(
        prefix + operator,
        names,
        ["y"],
        kernel_shape=list(kernel.window),
        strides=list(kernel.strides),
        group=kernel.repeats,
        pads=[*before, *(pad - first for pad, first in zip(pads, before, strict=True))],
    )
    return node, shape


def _integer_product(kernel: Kernel, onnx: Any) -> tuple[list[Any], list[Any]]:
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    node, shape = _product(kernel, onnx, names, "QLinear")
    dtype, signed = (np.int8, True) if parse(kernel.weight).name == "int8" else (np.uint8, False)
    values = np.random.default_rng(1).integers(-100 if signed else 0, 100, shape).astype(dtype)
    scales = {name: np.float32(0.01) for name in ("x_scale", "w_scale", "y_scale")}
    zeros = {"x_zero": np.uint8(128), "w_zero": dtype(0 if signed else 128), "y_zero": np.uint8(128)}
    tensors = [_tensor(onnx, name, value) for name, value in {**scales, **zeros}.items()]
    return [node], [onnx.numpy_helper.from_array(values, "w"), *tensors]


def _block_product(kernel: Kernel, onnx: Any) -> tuple[list[Any], list[Any]]:
    bits, block = _BLOCKED[parse(kernel.weight).name], _block_of(kernel)
    blocks = -(-kernel.k // block)
    random = np.random.default_rng(1)
    packed = random.integers(0, 256, (kernel.n, blocks, block * bits // 8)).astype(np.uint8)
    tensors = [
        onnx.numpy_helper.from_array(packed, "w"),
        _tensor(onnx, "scales", np.full((kernel.n, blocks), 0.01)),
    ]
    names = ["x", "w", "scales"]
    if kernel.weight.startswith("uint"):
        zeros = random.integers(0, 256, (kernel.n, -(-blocks * bits // 8))).astype(np.uint8)
        tensors.append(onnx.numpy_helper.from_array(zeros, "zeros"))
        names.append("zeros")
    sizes = {"K": kernel.k, "N": kernel.n, "bits": bits, "block_size": block, "accuracy_level": 4}
    return [onnx.helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **sizes)], tensors


def _block_of(kernel: Kernel) -> int:
    granularity = parse(kernel.weight).granularity
    if granularity is None:
        return next((block for block in _BLOCKS[:4] if block >= kernel.k), 128)
    if granularity.size not in _BLOCKS:
        raise NoKernel(f"onnxruntime has blocks of {', '.join(map(str, _BLOCKS))} weights, not of {granularity.size}")
    return granularity.size


def _unpacked_convolution(kernel: Kernel, onnx: Any) -> tuple[list[Any], list[Any]]:
    if "@" in kernel.weight:
        raise NoKernel("onnxruntime unpacks convolutions with a scale a channel, none with groups")
    node, shape = _product(kernel, onnx, ["x", "unpacked"])
    axis = 1 if kernel.is_transposed else 0
    values = np.random.default_rng(1).integers(0, 8, shape)
    kind = getattr(onnx.TensorProto, kernel.weight.upper())
    weight = onnx.helper.make_tensor("w", kind, shape, values.ravel().tolist())
    scales = _tensor(onnx, "scales", np.full(shape[axis], 0.01))
    return [onnx.helper.make_node("DequantizeLinear", ["w", "scales"], ["unpacked"], axis=axis), node], [weight, scales]


def _tensor(onnx: Any, name: str, value: Any) -> Any:
    array = np.asarray(value)
    return onnx.numpy_helper.from_array(array.astype(np.float32) if array.dtype == np.float64 else array, name)
