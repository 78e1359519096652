"""What is planned: the layers of a network, how they feed each other, and the units a layer can be cut into."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from mpq.attention import Attention
from mpq.buffers import Buffer, peak_elements

if TYPE_CHECKING:
    import pandas as pd

Integers: TypeAlias = NDArray[np.int64]  # (units,)

_GRANULARITY = re.compile(r"(?P<layer>layer)|rows(:(?P<rows>\d+))?|groups:(?P<groups>\d+)")


def block_size(granularity: str) -> tuple[str, int]:
    """What a granularity cuts, into blocks of how many: ``("rows", n)``, ``("groups", n)``, 0 for layers and experts.

    Raises:
        ValueError: If ``granularity`` is none of these.

    Example:
        >>> block_size("rows:16"), block_size("rows"), block_size("layer")
        (('rows', 16), ('rows', 1), ('layer', 0))
    """
    if granularity == "experts":
        return "experts", 0
    match = _GRANULARITY.fullmatch(granularity) if isinstance(granularity, str) else None
    kind = "layer" if match and match["layer"] else "groups" if match and match["groups"] else "rows"
    size = int(match["rows"] or match["groups"] or kind != "layer") if match else 0
    if not match or (kind != "layer" and size < 1):
        raise ValueError(
            "granularity must be 'layer', 'experts', 'rows', 'rows:N' (blocks of N output rows) or 'groups:N' "
            f"(blocks of N inputs of one row) with N at least 1, got {granularity!r}"
        )
    return kind, size


@dataclass(frozen=True)
class Layer:
    """One weight that takes a number format, and the work it did on the example inputs.

    Kinds: ``linear``, ``conv1d`` … ``conv3d``, ``conv_transpose1d`` … ``conv_transpose3d``, ``embedding``, ``experts``
    (a stack of linears in one 3-D parameter).

    ``weight_shape`` is the (out, in…) view in which rows are output channels: for most layers the stored shape, for a
    transposed convolution (out, in/groups, kernel…), for transformers' Conv1D (out, in), for experts (E·out, in).

    Attributes:
        name: Name of the module whose weight it is, else the parameter's name.
        kind: See above.
        weight_shape: Shape of the weight, rows first.
        parameters: Number of weights, ``prod(weight_shape)``; the bias is not among them.
        macs: Multiply-adds on the example inputs, all samples and all calls. A lookup in an embedding is none.
        input_shape: Shape of the layer's input at its first call.
        output_shape: Shape of the layer's output at its first call.
        weight_name: Name of the parameter.
        module: Name of the module whose forward applies the weight; None where a function applies it instead, as
            nn.MultiheadAttention does with its projections and mixtures of experts with their 3-D weights.
        aliases: Other names of the same parameter.
        channel_axis: Axis of the output channels in the stored weight. A transposed convolution in groups keeps
            (in, out/groups, kernel…): its group is the outer part of the first axis.
        weight_bytes: Bytes of the weight as it is stored now.
        calls: How often the weight is applied. Experts that each take their own tokens count as one call.
        groups: Groups of a convolution.
        kernel: Kernel size of a convolution.
        experts: Number of stacked matrices.
        batch: Samples in the example inputs, to which ``macs`` and the two element counts belong.
        input_elements: Elements read from inputs, all calls; of ``input_shape`` unless given.
        output_elements: Elements written to outputs, all calls; of ``output_shape`` unless given.

    Example:
        A linear layer from 8 to 32 features on 2 samples of 12 tokens is a (24, 8) × (8, 32) product:

        >>> from mpq.layers import Layer
        >>> fc = Layer("fc", "linear", (32, 8), 256, 6144, (2, 12, 8), (2, 12, 32), batch=2)
        >>> fc.matmul(), fc.matmul(batch=1)
        ((24, 8, 32, 1), (12, 8, 32, 1))
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    parameters: int
    macs: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_name: str = ""
    module: str | None = None
    aliases: tuple[str, ...] = ()
    channel_axis: int = 0
    weight_bytes: int = 0
    calls: int = 1
    groups: int = 1
    kernel: tuple[int, ...] = ()
    experts: int = 1
    batch: int = 1
    input_elements: int = 0
    output_elements: int = 0

    def __post_init__(self) -> None:
        if not self.input_elements:
            object.__setattr__(self, "input_elements", prod(self.input_shape))
        if not self.output_elements:
            object.__setattr__(self, "output_elements", prod(self.output_shape))

    def matmul(self, batch: int | None = None) -> tuple[int, int, int, int]:
        """The layer as ``repeats`` products of an (M, K) by a (K, N) matrix, for ``batch`` samples.

        ======================  ============================  ===============  ==========================  =======
        kind                    M                             K                N                           repeats
        ======================  ============================  ===============  ==========================  =======
        linear                  positions                     in               out                         1
        convolution             output positions              in/groups·|k|    out/groups                  groups
        transposed convolution  input positions               in/groups        out/groups·|k|              groups
        experts                 tokens of one expert (mean)   in               out                         experts
        embedding               0 for lookups                 width            entries                     1
        ======================  ============================  ===============  ==========================  =======

        K·N·repeats is the number of weights, and M·K·N·repeats equals ``macs`` at the batch of the example inputs, the
        M of several calls added up. M is rounded up where experts do not share the tokens evenly or where a part of
        the weight sees fewer positions than the rest.

        Raises:
            ValueError: If ``batch`` is below 1.
        """
        samples = self.batch if batch is None else batch
        if samples < 1:
            raise ValueError(f"batch must be at least 1, got {batch} for layer {self.name!r}")
        out, inner = self.weight_shape[0], prod(self.weight_shape[1:])
        repeats = self.groups * self.experts
        m = -(-self.macs * samples // (self.batch * self.parameters))
        if self.kind.startswith("conv_transpose"):
            taps = prod(self.kernel)
            return m, inner // taps, out // repeats * taps, repeats
        return m, inner, out // repeats, repeats


@dataclass(frozen=True)
class Network:
    """The layers of a model in execution order, how they feed each other, and what is left outside.

    Attributes:
        layers: One entry for each weight, in the order of first use.
        edges: (producer, consumer) pairs: the producer's output reaches the consumer through operations that are no
            layers, so over a residual path every earlier writer feeds every later reader. No pair of a layer with
            itself.
        siblings: Groups that runtimes want in one format: fused linears, convolutions whose outputs are added.
        batch: Samples in the example inputs.
        total_bytes: Bytes of everything the model saves; shared tensors once.
        outside_bytes: The part of them that belongs to no layer: norms, biases, what was skipped.
        dtype: Format of most of the layers' weights as they stand, ``fp32``, ``fp16``, ``bf16`` …
        skipped: Weights that are not planned, with the reason.
        fingerprint: sha256 over the names and shapes of the parameters.
        buffers: The activations that are stored between operators, and for how long.
        attention: Every run of attention: its products have no weights and are in no layer's ``macs``.

    Example:
        >>> from mpq.layers import Layer, Network
        >>> Network((Layer("fc", "linear", (4, 8), 32, 64, (2, 8), (2, 4), batch=2),), batch=2)
        Network(1 layer, 32 weights in fp32, 64 MACs for 2 samples)
    """

    layers: tuple[Layer, ...]
    edges: tuple[tuple[str, str], ...] = ()
    siblings: tuple[tuple[str, ...], ...] = ()
    batch: int = 1
    total_bytes: int = 0
    outside_bytes: int = 0
    dtype: str = "fp32"
    skipped: Mapping[str, str] = field(default_factory=dict, hash=False)
    fingerprint: str = ""
    buffers: tuple[Buffer, ...] = ()
    attention: tuple[Attention, ...] = ()

    def __post_init__(self) -> None:
        if len(self._by_name) < len(self.layers):
            names = [layer.name for layer in self.layers]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"layers must have different names, got {twice!r} twice")

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> Layer:
        if name in self._by_name:
            return self._by_name[name]
        if name in self.skipped:
            raise ValueError(f"layer {name!r} is not planned: {self.skipped[name]}")
        near = get_close_matches(str(name), self._by_name, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {_some(list(self._by_name))}"
        raise ValueError(f"the network has no layer {name!r}; {hint}")

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __repr__(self) -> str:
        weights = sum(layer.parameters for layer in self.layers)
        macs = sum(layer.macs for layer in self.layers)
        parts = [
            _count(len(self.layers), "layer"),
            f"{_short(weights)} weights in {self.dtype}",
            f"{_short(macs)} MACs for {_count(self.batch, 'sample')}",
        ]
        if self.siblings:
            parts.append(f"{_count(len(self.siblings), 'group')} of siblings")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped")
        return f"Network({', '.join(parts)})"

    def to_frame(self) -> "pd.DataFrame":
        """One row a layer, in order: every field of `Layer` but its name, which is the index."""
        import pandas as pd

        columns = {each.name: [getattr(layer, each.name) for layer in self.layers] for each in fields(Layer)}
        return pd.DataFrame(columns).set_index("name").rename_axis("layer")

    def plot(self, ax: Any = None, *, interactive: bool = False) -> Any:
        """Shares of weights and of work, layer by layer: matplotlib's Axes, or a plotly Figure; it is not shown yet.

        Raises:
            ImportError: without matplotlib or plotly: ``pip install 'mpq-search[explore]'``.
        """
        from mpq.network_picture import network_picture

        return network_picture(self).drawn(ax, interactive=interactive)

    def _repr_html_(self) -> str:
        from mpq.notebook_cards import network_card

        return network_card(self)

    def gemm(self, layer: Layer | str, batch: int | None = None) -> tuple[int, int, int, int]:
        """(M, K, N, repeats) of a layer for ``batch`` samples, those of the example inputs unless given.

        See `Layer.matmul`.
        """
        return (self[layer] if isinstance(layer, str) else layer).matmul(batch)

    def peak_elements(self) -> int:
        """The most numbers that activations take at the same time, for the example batch."""
        return peak_elements(self.buffers)

    def units(self, granularity: str = "layer") -> "Units":
        """Cut every layer into the units that take an option of their own.

        ``layer``: a layer is a unit. ``experts``: so is each matrix of a stack of experts, other layers are whole.
        ``rows:16``: blocks of 16 output rows, ``rows`` is ``rows:1``. ``groups:64``: blocks of 64 weights along a row.
        Rows are those of ``weight_shape``, columns its other axes flattened; the last block may be short.

        Raises:
            ValueError: If ``granularity`` is none of these.

        Example:
            >>> from mpq.layers import Layer, Network
            >>> network = Network((Layer("fc", "linear", (5, 8), 40, 40, (1, 8), (1, 5)),))
            >>> network.units("rows:4").labels.tolist()
            ['fc[0:4]', 'fc[4:5]']
            >>> network.units("groups:6")[7]
            Unit('fc[3,6:8]', 2 weights)
        """
        kind, size = block_size(granularity)
        if kind == "layer":
            return Units.cut(self.layers)
        if kind == "experts":
            return Units.cut(self.layers, rows=[layer.weight_shape[0] // layer.experts for layer in self.layers])
        if kind == "groups":
            return Units.cut(self.layers, rows=1, columns=size)
        return Units.cut(self.layers, rows=size)


@dataclass(frozen=True, repr=False)
class Unit:
    """The smallest thing that takes an option: a layer, a block of its rows, or a group along one of its rows."""

    layer: Layer
    rows: slice
    columns: slice
    parameters: int
    label: str

    def __repr__(self) -> str:
        return f"Unit({self.label!r}, {_count(self.parameters, 'weight')})"


@dataclass(frozen=True, eq=False, repr=False)
class Units(Sequence[Unit]):
    """A sequence of units kept as arrays, so that a million of them cost a few arrays and no objects.

    Attributes:
        layers: The layers that were cut.
        layer_index: Position in ``layers`` of each unit, (units,).
        row_start: First row of each unit, (units,).
        row_stop: One past its last row, (units,).
        column_start: First column, (units,).
        column_stop: One past its last column, (units,).
        grouped: Whether rows were cut into groups, which the labels show.

    Example:
        >>> from mpq.layers import Layer, Units
        >>> units = Units.cut((Layer("fc", "linear", (5, 8), 40, 40, (1, 8), (1, 5)),), rows=2)
        >>> len(units), units.parameters.tolist(), units[-1].rows
        (3, [16, 16, 8], slice(4, 5, None))
    """

    layers: tuple[Layer, ...]
    layer_index: Integers
    row_start: Integers
    row_stop: Integers
    column_start: Integers
    column_stop: Integers
    grouped: bool = False

    @classmethod
    def cut(cls, layers: Sequence[Layer], *, rows: Any = None, columns: int | None = None) -> "Units":
        """Cut each layer into blocks of ``rows`` (one number, or one a layer) × ``columns``; None: not along it."""
        blocks = [np.empty((5, 0), dtype=np.int64)]
        for position, layer in enumerate(layers):
            height, width = layer.weight_shape[0], prod(layer.weight_shape[1:])
            tall, wide = (rows[position] if isinstance(rows, list) else rows) or height, columns or width
            top = np.arange(0, height, tall, dtype=np.int64)[:, None]
            left = np.arange(0, width, wide, dtype=np.int64)[None, :]
            bottom, right = np.minimum(top + tall, height), np.minimum(left + wide, width)
            blocks.append(np.stack(np.broadcast_arrays(position, top, bottom, left, right)).reshape(5, -1))
        cells = np.concatenate(blocks, axis=1)
        return cls(tuple(layers), cells[0], cells[1], cells[2], cells[3], cells[4], columns is not None)

    @cached_property
    def parameters(self) -> Integers:
        """Weights in each unit, (units,)."""
        return (self.row_stop - self.row_start) * (self.column_stop - self.column_start)

    @cached_property
    def labels(self) -> NDArray[np.str_]:
        """One string a unit: ``fc`` for a whole layer, ``fc[0:16]`` for rows, ``fc[3,0:64]`` for a group; (units,)."""
        sizes = np.array([prod(layer.weight_shape) for layer in self.layers], dtype=np.int64)
        names = np.array([layer.name for layer in self.layers], dtype=object)
        whole = self.parameters == sizes[self.layer_index]
        labels = names[self.layer_index]
        bounds = (self.row_start, self.row_stop, self.column_start, self.column_stop)
        parts = [labels[~whole].tolist(), *(bound[~whole].tolist() for bound in bounds)]
        if self.grouped:
            labels[~whole] = [f"{n}[{top},{left}:{right}]" for n, top, _, left, right in zip(*parts, strict=True)]
        else:
            labels[~whole] = [f"{n}[{top}:{bottom}]" for n, top, bottom, _, _ in zip(*parts, strict=True)]
        return labels.astype(np.str_)

    def __len__(self) -> int:
        return len(self.layer_index)

    @overload
    def __getitem__(self, item: int) -> Unit: ...
    @overload
    def __getitem__(self, item: slice) -> "Units": ...
    def __getitem__(self, item: int | slice) -> "Unit | Units":
        if not isinstance(item, slice):
            if not -len(self) <= item < len(self):
                raise IndexError(f"unit must be below {len(self)}, got {item}")
            return next(iter(self[item : item + 1 or None]))
        rows, columns = (self.row_start[item], self.row_stop[item]), (self.column_start[item], self.column_stop[item])
        return Units(self.layers, self.layer_index[item], *rows, *columns, self.grouped)

    def __iter__(self) -> Iterator[Unit]:
        arrays = (self.layer_index, self.row_start, self.row_stop, self.column_start, self.column_stop, self.parameters)
        columns = (array.tolist() for array in (*arrays, self.labels))
        for layer, top, bottom, left, right, size, label in zip(*columns, strict=True):
            yield Unit(self.layers[layer], slice(top, bottom), slice(left, right), size, label)

    def __repr__(self) -> str:
        return f"Units({_count(len(self), 'unit')} of {_count(len(self.layers), 'layer')})"


def _count(number: int, noun: str) -> str:
    return f"{_short(number)} {noun}" + ("s" if number != 1 else "")


def _short(number: int) -> str:
    for suffix, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= max(size, 10**4):
            return f"{number / size:.3g} {suffix}"
    return str(number)


def _some(names: list[str], at_most: int = 8) -> str:
    return ", ".join(names[:at_most]) + (", …" if len(names) > at_most else "") if names else "none"
