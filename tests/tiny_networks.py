"""The four networks of MLPerf Tiny as layers, from their published definitions; all at one sample."""

from itertools import pairwise
from math import prod

from mpq.layers import Layer, Network


def convolution(name, channels, kernel, stride, size):
    """From channels[0] to channels[1], padded to keep the size at stride 1; depthwise where channels[1] is None."""
    inner, outer = channels
    groups, outer = (inner, inner) if outer is None else (1, outer)
    out = tuple(-(-length // stride) for length in size)
    shape = (outer, inner // groups, *kernel)
    extra = {"groups": groups, "kernel": kernel, "weight_bytes": 4 * prod(shape)}
    return Layer(
        name, "conv2d", shape, prod(shape), prod(shape) * prod(out), (1, inner, *size), (1, outer, *out), **extra
    )


def dense(name, inner, outer):
    return Layer(name, "linear", (outer, inner), inner * outer, inner * outer, (1, inner), (1, outer))


def network_of(layers):
    return Network(tuple(layers), total_bytes=sum(4 * layer.parameters for layer in layers))


def resnet8():
    layers = [convolution("stem", (3, 16), (3, 3), 1, (32, 32))]
    layers += [convolution(f"a{i}", (16, 16), (3, 3), 1, (32, 32)) for i in (1, 2)]
    for inner, outer, size in ((16, 32, 32), (32, 64, 16)):
        layers += [
            convolution(f"b{outer}_1", (inner, outer), (3, 3), 2, (size, size)),
            convolution(f"b{outer}_2", (outer, outer), (3, 3), 1, (size // 2, size // 2)),
            convolution(f"b{outer}_skip", (inner, outer), (1, 1), 2, (size, size)),
        ]
    return network_of([*layers, dense("fc", 64, 10)])


def ds_cnn():
    layers = [convolution("stem", (1, 64), (10, 4), 2, (49, 10))]
    for i in range(4):
        layers += [convolution(f"depth{i}", (64, None), (3, 3), 1, (25, 5))]
        layers += [convolution(f"point{i}", (64, 64), (1, 1), 1, (25, 5))]
    return network_of([*layers, dense("fc", 64, 12)])


def mobilenet():
    layers, inner, size = [convolution("stem", (3, 8), (3, 3), 2, (96, 96))], 8, 48
    blocks = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)]
    for i, (outer, stride) in enumerate(blocks):
        layers += [convolution(f"depth{i}", (inner, None), (3, 3), stride, (size, size))]
        size //= stride
        layers += [convolution(f"point{i}", (inner, outer), (1, 1), 1, (size, size))]
        inner = outer
    return network_of([*layers, dense("fc", 256, 2)])


def autoencoder():
    widths = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640]
    return network_of([dense(f"fc{i}", *pair) for i, pair in enumerate(pairwise(widths))])


NETWORKS = {"ic": resnet8(), "kws": ds_cnn(), "vww": mobilenet(), "ad": autoencoder()}
