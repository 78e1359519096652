"""Recognise a model's parameters where operations use them, and read a stored weight as (out, in…)."""

from collections.abc import Hashable, Iterable
from math import prod
from typing import NamedTuple

from torch import Tensor, nn


class Piece(NamedTuple):
    """A parameter, or a part or copy of one, as the operand of an operation."""

    name: str
    strides: dict[int, int]  # stride in the storage at hand -> axis of the parameter
    part: Hashable  # which part of the parameter; equal for equal parts


class Layout(NamedTuple):
    """How a stored weight is read as a layer's weight; the fields are those of `mpq.layers.Layer`."""

    kind: str
    weight_shape: tuple[int, ...]
    channel_axis: int = 0
    groups: int = 1
    kernel: tuple[int, ...] = ()
    experts: int = 1


class Weights:
    """Recognises parameters by their storage, so that views of them are recognised too, on the meta device as well.

    Args:
        model: The model.
        excluded: Names of parameters that are not to be recognised.
    """

    def __init__(self, model: nn.Module, excluded: Iterable[str] = ()) -> None:
        self.parameters: dict[str, nn.Parameter] = {}  # each once, under its first name
        self.aliases: dict[str, list[str]] = {}
        self.canonical: dict[str, str] = {}
        self._ranges: dict[int, list[tuple[int, int, str]]] = {}
        seen: dict[Hashable, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first = self.canonical[name] = seen.setdefault(identity(parameter), name)
            self.aliases.setdefault(first, []).append(name)
            if first == name:
                self.parameters[name] = parameter
        skip = set(excluded)
        for name, parameter in self.parameters.items():
            if parameter.ndim >= 2 and parameter.is_floating_point() and name not in skip:
                start = parameter.storage_offset()
                span = (int(start), int(start + parameter.numel()), name)
                self._ranges.setdefault(storage(parameter), []).append(span)

    def find(self, tensor: Tensor, copied: Piece | None = None) -> Piece | None:
        """The parameter of which ``tensor`` is a view, or a view of the copy ``copied``."""
        offset = tensor.storage_offset()
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        part = (offset, prod(size for size, stride in sizes if stride))
        if copied is not None:
            return copied._replace(part=(copied.part, part))
        for start, stop, name in self._ranges.get(storage(tensor), ()):
            if start <= offset < stop:
                parameter = self.parameters[name]
                strides = {parameter.stride(a): a for a in range(parameter.ndim) if parameter.shape[a] > 1}
                return Piece(name, strides, part)
        return None


def convolution_layout(shape: Iterable[int], groups: int, *, transposed: bool) -> Layout:
    """The layout of a convolution's stored weight: (out, in/groups, kernel…), transposed (in, out/groups, kernel…)."""
    first, second, *kernel = shape
    kind = f"conv{'_transpose' if transposed else ''}{len(kernel)}d"
    if transposed:
        return Layout(kind, (second * groups, first // groups, *kernel), 1, groups, tuple(kernel))
    return Layout(kind, (first, second, *kernel), 0, groups, tuple(kernel))


def product_layout(shape: tuple[int, ...], axis: int | None, width: int) -> Layout | None:
    """The layout of a parameter that was summed over its ``axis`` in a matrix product; None where it has none.

    Example:
        >>> from mpq.parameters import product_layout
        >>> product_layout((8, 32, 16), 1, 32).weight_shape   # 8 experts stored as (in, out)
        (128, 32)
    """
    if axis is None:
        return None
    if axis == len(shape) - 1 and width == prod(shape[1:]) != shape[-1]:
        return Layout("linear", shape)  # the weight of a convolution, flattened
    if len(shape) == 2:
        return Layout("linear", (shape[1 - axis], shape[axis]), 1 - axis)
    if len(shape) == 3 and axis > 0:
        return Layout("experts", (shape[0] * shape[3 - axis], shape[axis]), 3 - axis, experts=shape[0])
    return None


def storage(tensor: Tensor) -> int:
    """Identity of the memory of a tensor, also where there is none (meta device)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # tensor subclasses without storage
        return id(tensor)


def identity(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same numbers in the same place."""
    try:
        return storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    except (NotImplementedError, RuntimeError):
        return id(tensor)
