"""Whole mixed-precision ONNX networks, measured, next to the sum of their measured layers, and what calibrates it.

    python tests/benchmarks/measured_network.py --plans 12 --seed 0

Chains of linears (1 and 64 rows) and of convolutions in random mixtures of fp32, int8/int8 and 4-bit weights, with a
QuantizeLinear or DequantizeLinear where neighbours differ. Every layer and every network is timed in turn with the same
reference (`mpq.hardware_models.measured`), so the figures are ratios that other work on the machine moves little. One
Markdown row a family of networks: the sum by the measured latency, the sum's error, and the error after calibration,
leaving one network out; rank correlation of all of them. The last columns have conversions as layers of their own.
"""

from __future__ import annotations

import os
from itertools import pairwise

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpq.hardware_models.calibration import fit_affine
from mpq.hardware_models.kernels import Kernel, kernels_of_shapes
from mpq.hardware_models.measured import REFERENCE, Timing, measure_kernels, ratio_of
from mpq.hardware_models.onnxruntime_kernels import OnnxRuntimeKernels, SessionRun, graph_of, opsets
from mpq.progress import track
from mpq.rank_correlation import kendall

FORMATS = {"fp32": ("fp32", "fp32"), "int8": ("int8", "int8"), "int4": ("int4", "fp32")}
WIDTHS = (512, 2048, 512, 1024, 1024, 256, 2048, 768, 3072, 768, 1024)
CHANNELS = ((64, 3), (64, 3), (256, 1), (64, 1), (64, 3), (256, 1), (128, 1), (128, 3), (512, 1), (128, 1))
SIDE, FIRST = 28, 32


def linears(rows):
    return [("linear", rows, k, n, 1, 1) for k, n in pairwise(WIDTHS)]


def convolutions():
    inputs = [FIRST, *(filters for filters, _ in CHANNELS)]
    return [
        ("conv2d", SIDE**2, before * window**2, filters, 1, window**2)
        for before, (filters, window) in zip(inputs, CHANNELS, strict=False)
    ]


NETWORKS = {"linears, 1 row": linears(1), "linears, 64 rows": linears(64), "convolutions": convolutions()}


def scales(layer):
    return [
        numpy_helper.from_array(np.float32(0.01), f"{layer}/s"),
        numpy_helper.from_array(np.uint8(128), f"{layer}/z"),
    ]


def conversion(layer, source, output, to_bytes):
    operator = "QuantizeLinear" if to_bytes else "DequantizeLinear"
    return helper.make_node(operator, [source, f"{layer}/s", f"{layer}/z"], [output]), scales(layer)


def renamed(nodes, tensors, layer, source, output):
    """The operators of one layer under names of their own."""
    ends = {"x": source, "y": output}
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [ends.get(name, f"{layer}/{name}") for name in names]
    for tensor in tensors:
        tensor.name = f"{layer}/{tensor.name}"


def network(kernels):
    """One model of these kernels in a row: fp32 in and out."""
    nodes, tensors, flows, in_bytes = [], [], "x", False
    for index, kernel in enumerate(kernels):
        own, weights, kind = graph_of(kernel.with_geometry(), onnx)
        if (kind == TensorProto.UINT8) != in_bytes:
            node, extra = conversion(f"c{index}", flows, f"f{index}", not in_bytes)
            nodes, tensors, flows, in_bytes = [*nodes, node], [*tensors, *extra], f"f{index}", not in_bytes
        renamed(own, weights, f"l{index}", flows, f"h{index}")
        nodes, tensors, flows = [*nodes, *own], [*tensors, *weights], f"h{index}"
    if in_bytes:
        node, extra = conversion("last", flows, "y", False)
        nodes, tensors = [*nodes, node], [*tensors, *extra]
    else:
        nodes[-1].output[:] = ["y"]
    first = kernels[0].with_geometry()
    shape = first.image or (first.m, first.k)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, given) for name, given in (("x", shape), ("y", None))
    ]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=opsets(onnx), ir_version=10)
    return SessionRun.of(model.SerializeToString(), np.ones(shape, dtype=np.float32))


def conversions(kernels):
    """(elements, whether to bytes) of each conversion in a network."""
    found, in_bytes = [], False
    for kernel in kernels:
        if (kernel.activation == "int8") != in_bytes:
            found.append((kernel.m * kernel.k // kernel.taps, not in_bytes))
            in_bytes = not in_bytes
    last = kernels[-1]
    return [*found, (last.m * last.n, False)] if in_bytes else found


def converting(elements, to_bytes):
    node, tensors = conversion("c", "x", "y", to_bytes)
    kinds = (TensorProto.FLOAT, TensorProto.UINT8) if to_bytes else (TensorProto.UINT8, TensorProto.FLOAT)
    ends = [helper.make_tensor_value_info(name, kind, [1, elements]) for name, kind in zip("xy", kinds, strict=True)]
    model = helper.make_model(
        helper.make_graph([node], "conversion", ends[:1], ends[1:], tensors), opset_imports=opsets(onnx), ir_version=10
    )
    values = np.ones((1, elements), dtype=np.float32 if to_bytes else np.uint8)
    return SessionRun.of(model.SerializeToString(), values)


def plans_of(layers, count, seed):
    """Uniform plans, then random ones in runs of equal formats of random length, as searches find them."""
    random = np.random.default_rng(seed)
    plans = [[name] * layers for name in FORMATS]
    while len(plans) < count + len(FORMATS):
        change = random.random(layers) < random.uniform(0.2, 0.9)
        names = random.choice(list(FORMATS), layers)
        plans.append(
            [str(names[np.flatnonzero(change[: i + 1])[-1] if change[: i + 1].any() else 0]) for i in range(layers)]
        )
    return plans


@click.command()
@click.option("--plans", default=12, help="Random plans a family, besides the uniform ones.")
@click.option("--seed", default=0)
def main(plans: int, seed: int) -> None:
    """Print a row a family of networks."""
    source, timing = OnnxRuntimeKernels(), Timing()
    reference = source(REFERENCE)
    click.echo(f"{source.name}, load average {os.getloadavg()[0]:.1f} before")
    click.echo("| networks | measured, us | sum / measured | MAPE | calibrated, in-sample | left out | tau |"
               " with conversions | MAPE | left out | tau |")  # fmt: skip
    click.echo("|---" * 11 + "|")
    wide, count = 0, 0
    for name, shapes in NETWORKS.items():
        kernels = kernels_of_shapes(shapes, list(FORMATS.values()))
        measured = measure_kernels(kernels, source, timing=timing)
        table = measured.table
        wide, count = wide + measured.wide, count + len(table)
        ratio = dict(zip(table.kernel_keys, map(float, table.remarks["ratio"]), strict=True))
        fastest = min(map(float, table.remarks["reference [s]"]))
        convert = {}
        whole, summed, more = [], [], []
        for plan in track(plans_of(len(shapes), plans, seed), name):
            chain = [Kernel(*shape, *FORMATS[fmt]).with_geometry() for shape, fmt in zip(shapes, plan, strict=True)]
            timed = ratio_of(network(chain), reference, timing, source.clock)
            wide, count = wide + (timed.spread > 0.15), count + 1
            whole.append(timed.ratio)
            summed.append(sum(ratio[kernel.key] for kernel in chain))
            for key in conversions(chain):
                if key not in convert:
                    convert[key] = ratio_of(converting(*key), reference, timing, source.clock).ratio
            more.append(summed[-1] + sum(convert[key] for key in conversions(chain)))
        p, q, t = (fastest * np.array(values) for values in (summed, more, whole))
        cells = [name, f"{1e6 * t.min():.0f} to {1e6 * t.max():.0f}"]
        for predicted in (p, q):
            fit = fit_affine(predicted, t)
            cells += [f"{np.median(predicted / t):.2f}", f"{np.mean(np.abs(predicted / t - 1)):.1%}"]
            cells += [f"{fit.mape:.1%} (alpha {fit.alpha:.2f}, beta {1e6 * fit.beta:.0f} us)"] if predicted is p else []
            cells += [f"{fit.held_out_mape:.1%}", f"{kendall(predicted, t):.2f}"]
        click.echo(f"| {' | '.join(cells)} |")
    click.echo(
        f"{wide} of {count} ratios differ by more than 15 % between repeats; load {os.getloadavg()[0]:.1f} after"
    )


if __name__ == "__main__":
    main()
