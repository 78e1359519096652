"""Follow tensors through one forward: which weight is applied to what, and which layers feed, meet or join each other.

A dispatch mode sees every operation after PyTorch has broken it into its basic ones: inside nn.MultiheadAttention,
einsum and scripted modules too, on the meta device as well, and whatever the Python above looks like.
"""

from collections.abc import Hashable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from mpq.activations import Activations
from mpq.calls import COPIES, Call, Trail, has_format, tensors, written
from mpq.parameters import Layout, Piece, Weights, convolution_layout, identity, product_layout, storage

_GATHERS = {"index", "index_select"}


@dataclass(frozen=True)
class Use:
    """One application of a weight. Sets of uses are integers: bit i stands for the i-th use."""

    weight: str
    module: str | None
    layout: Layout
    macs: int
    part: Hashable
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    sources: int = 0  # the uses whose outputs reach the input through operations that are no layers
    ancestors: int = 0  # those, theirs, and so on
    root: int = 0  # the tensor that was read, whatever its shape
    value: int = 0  # what it wrote, in `mpq.buffers.Liveness`


class Ties:
    """Groups that grow by joining two members (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def group(self, name: str) -> str:
        """The name that stands for the group of ``name``."""
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, left: str, right: str) -> None:
        """Make one group of two."""
        self._parent[self.group(left)] = self.group(right)


class Dataflow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Watches one forward.

    Tensors are known by identity for as long as the model keeps them: nothing is kept alive. A tensor made by an
    operation carries the layers whose outputs reach it (``sources``), and an identity (``root``) that views, reshapes,
    permutations and casts keep and everything else renews.

    Args:
        weights: The parameters to recognise.
        watched: Tensors that must keep their values; what the forward writes to them is kept in ``overwritten``.

    Attributes:
        uses: Applications of weights, in order.
        ties: Groups of parameters: linears whose outputs meet in a product, convolutions whose outputs are added.
        inside: Parameters whose module is running and will report itself.
        touched: Parameters that were the operand of any operation.
        overwritten: (tensor, value before) of watched tensors, to be put back in reverse order.
        activations: The tensors that are stored on the way, and the runs of attention.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Weights, watched: Iterable[Tensor] = (), *, activations: Activations) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.activations = activations
        self.weights = weights
        self.uses: list[Use] = []
        self.ties = Ties()
        self.inside: list[str] = []
        self.touched: set[str] = set()
        self.overwritten: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._watched = {storage(tensor) for tensor in watched}
        self._names = {id(parameter): name for name, parameter in weights.parameters.items()}
        self._trails: MutableMapping[Tensor, Trail] = WeakTensorKeyDictionary()
        self._roots = count()
        self._views: dict[Hashable, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note what it did."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and isinstance(func, OpOverload):
            with self:  # in inference mode composite operations arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        call = Call(func, args, tensors((args, kwargs)), written(func, args, kwargs))
        self._keep(call)
        trails = [self.trail(operand) for operand in call.operands]
        result = _run(call, kwargs)
        self._follow(call, trails, tensors(result))
        return result

    def trail(self, tensor: Tensor) -> Trail:
        """What is known of a tensor; one never seen before starts a trail of its own."""
        trail = self._trails.get(tensor)
        if trail is None:
            trail = self._trails[tensor] = self._fresh(tensor)
        return trail

    def record(self, use: Use, inputs: Iterable[Tensor]) -> int:
        """Add one application of a weight that read ``inputs`` (the first is the data); returns it as a set of one."""
        trails = [self.trail(tensor) for tensor in inputs]
        sources = _union(trail.sources for trail in trails)
        ancestors = sources | _union(self.uses[i].ancestors for i in members(sources))
        value = self.activations.layer(trails, prod(use.output_shape), use.weight)
        self.uses.append(replace(use, sources=sources, ancestors=ancestors, root=trails[0].root, value=value))
        return 1 << len(self.uses) - 1

    def mark(self, output: Tensor, use: int) -> None:
        """Declare ``output`` the output of a use."""
        self._trails[output] = self._fresh(output, use, use, self.uses[use.bit_length() - 1].value)

    def give(self, tensor: Tensor) -> None:
        """Declare ``tensor`` an input of the network."""
        trail = self.trail(tensor)
        if not trail.value:
            self._trails[tensor] = trail._replace(value=self.activations.liveness.given(tensor.numel()))

    def attend(self, operands: list[Tensor], output: Tensor) -> None:
        """Declare ``output`` the result of attention over queries, keys, values and perhaps a mask."""
        if not self.inside:
            value = self.activations.attend(operands, [self.trail(operand) for operand in operands], output)
            self._trails[output] = self.trail(output)._replace(value=value)

    def _fresh(self, tensor: Tensor, sources: int = 0, direct: int = 0, value: int = 0) -> Trail:
        if not has_format(tensor):
            sources = direct = 0
        return Trail(sources, next(self._roots), tuple(tensor.shape), direct, None, value, tensor.numel())

    def _keep(self, call: "Call") -> None:
        self.touched.update(self._names[id(operand)] for operand in call.operands if id(operand) in self._names)
        # batch norm may write its running statistics without declaring it
        written = call.operands[1:] if "batch_norm" in call.name else call.written
        for tensor in written:
            if storage(tensor) in self._watched and not tensor.is_meta:
                key = identity(tensor)
                if key not in self.overwritten:
                    self.overwritten[key] = (tensor, tensor.clone())

    def _follow(self, call: "Call", trails: list[Trail], outputs: list[Tensor]) -> None:
        if not outputs:
            return
        applied = self._applied(call, outputs[0])
        if applied is not None:
            direct, data = applied
            others = (t for operand, t in zip(call.operands, trails, strict=True) if operand is not data)
            sources = direct | _union(trail.sources for trail in others)
        else:
            sources = _union(trail.sources for trail in trails)
            self._meet(call)
            direct = self._direct(call, trails)
        known = [None if applied else self._same(call, trails, output) for output in outputs]
        values = self._values(call, trails, outputs, known, layer=applied is not None)
        for position, (output, trail, value) in enumerate(zip(outputs, known, values, strict=True)):
            fresh = trail or self._fresh(output, sources, 0 if position else direct, value)
            self._trails[output] = _repeated(call, trails, fresh) if value and not applied else fresh
        for tensor in call.written:
            if not any(tensor is output for output in outputs):
                self._trails[tensor] = self._fresh(tensor, sources)
            if tensor._base is not None:
                whole, value = self.trail(tensor._base), self.trail(tensor).value
                self._trails[tensor._base] = self._fresh(tensor._base, whole.sources | sources, 0, value)

    def _values(
        self, call: Call, trails: list[Trail], outputs: list[Tensor], known: list[Trail | None], layer: bool
    ) -> list[int]:
        """What the outputs show: values that are stored, new ones or those of the operands."""
        if all(known) and not layer:
            if call.name in ("clone", "_to_copy", "repeat"):
                self.activations.copied.add(trails[0].value)
            return [0] * len(outputs)
        if self.inside and not layer:
            return [0] * len(outputs)
        if layer:
            return [self.activations.add_to(self.uses[-1].value, trails), *[0] * (len(outputs) - 1)]
        return self.activations.follow(call, trails, outputs, self.trail)

    def _same(self, call: "Call", trails: list[Trail], output: Tensor) -> Trail | None:
        """The trail of a view or a plain copy of the first operand; None for anything else."""
        if not trails or not has_format(output):
            return None
        if not (call.is_view or call.name in COPIES or call.name in _GATHERS):
            return None
        source, first = call.operands[0], trails[0]
        copied = first.copied if call.is_view or call.name == "_unsafe_view" else self._copy(call, source, output)
        if call.name in _GATHERS:
            return copied and self._fresh(output, first.sources)._replace(copied=copied)
        if output.numel() == source.numel():
            return first._replace(copied=copied)
        where = (first.root, storage(source), output.storage_offset(), tuple(output.shape), output.stride())
        root = self._views.setdefault(where, next(self._roots))
        distinct = min(first.distinct, output.numel())
        return Trail(first.sources, root, tuple(output.shape), 0, copied, first.value, distinct)

    def _copy(self, call: "Call", source: Tensor, output: Tensor) -> Piece | None:
        """The parameter that ``output`` is a copy of: cast, made contiguous, or gathered by an index of experts."""
        piece = self._piece(source)
        if piece is None or call.name == "repeat":
            return None
        axes = range(-source.ndim, 0)
        if call.name in _GATHERS:
            index = call.args[1]
            along_first = len(index) == 1 if call.name == "index" else index == 0
            if source.ndim != 3 or not along_first:
                return None
            axes = range(-source.ndim + 1, 0)
        kept = [a for a in axes if output.shape[a] > 1 and source.stride(a) in piece.strides]
        return piece._replace(strides={output.stride(a): piece.strides[source.stride(a)] for a in kept})

    def _piece(self, tensor: Tensor) -> Piece | None:
        return self.weights.find(tensor, self.trail(tensor).copied)

    def _applied(self, call: "Call", output: Tensor) -> tuple[int, Tensor] | None:
        """Record the operation if it applies a parameter; returns the use and the data it read."""
        if call.name == "convolution" and len(call.args) == 9:
            data, weight, transposed, groups = call.args[0], call.args[1], call.args[6], call.args[8]
            layout = convolution_layout(weight.shape, groups, transposed=transposed)
            positions = data.shape[0] * prod((data if transposed else output).shape[2:])
            return self._functional(weight, data, output, layout, positions * weight.numel())
        if "embedding" in call.name and len(call.operands) > 1:
            weight, data = call.operands[:2]
            return self._functional(weight, data, output, Layout("embedding", tuple(weight.shape)), 0)
        if not call.is_product or len(call.factors) < 2:
            return None
        left, right = call.factors
        inner = -1 if call.name == "linear" else -2
        return self._product(right, inner, left, output) or self._product(left, -1, right, output)

    def _functional(
        self, weight: Tensor, data: Tensor, output: Tensor, layout: Layout, macs: int
    ) -> tuple[int, Tensor] | None:
        piece = self._piece(weight)
        if piece is None or piece.name in self.inside or self.weights.parameters[piece.name].shape != weight.shape:
            return None
        use = Use(piece.name, None, layout, macs, piece.part, tuple(data.shape), tuple(output.shape))
        return self.record(use, [data]), data

    def _product(self, weight: Tensor, inner: int, data: Tensor, output: Tensor) -> tuple[int, Tensor] | None:
        """Record a matrix product with a parameter, summed over axis ``inner`` of the parameter's operand."""
        piece = self._piece(weight) if weight.ndim >= 2 else None
        if piece is None or piece.name in self.inside:
            return None
        width, shape = weight.shape[inner], tuple(self.weights.parameters[piece.name].shape)
        axis = shape.index(1) if width == 1 and 1 in shape else piece.strides.get(weight.stride(inner))
        layout = product_layout(shape, axis, width)
        if layout is None:
            return None
        whole = self.trail(data).shape  # before linear() flattened it
        flattened = data.ndim == output.ndim == 2 and whole[-1:] == (width,) and len(data) == len(output)
        input_shape = whole if flattened and prod(whole) == data.numel() else tuple(data.shape)
        output_shape = (*input_shape[:-1], output.shape[1]) if flattened else tuple(output.shape)
        use = Use(piece.name, None, layout, output.numel() * width, piece.part, input_shape, output_shape)
        return self.record(use, [data]), data

    def _meet(self, call: "Call") -> None:
        """Tie linears that read the same tensor and whose outputs are multiplied with each other.

        Where an operand holds several such linears, they must be tied already, as queries and keys are when they meet
        the values: a mixture of experts multiplied with its router's probabilities is no such case. Gates that are
        broadcast (routers, squeeze and excite) do not count.
        """
        reached = 0
        for factor in call.factors:
            sources = self.trail(factor).sources
            if reached and sources and reached != sources:
                left, right = self._readers(reached), self._readers(sources)
                for key in left.keys() & right.keys():
                    if len(left[key]) == len(right[key]) == 1:
                        self.ties.join(left[key].pop(), right[key].pop())
            reached |= sources

    def _readers(self, uses: int) -> dict[Hashable, set[str]]:
        """The groups of linears among some uses, by what they read."""
        groups: dict[Hashable, set[str]] = {}
        for use in (self.uses[i] for i in members(uses)):
            if use.layout.kind in ("linear", "experts"):
                key = (use.root, use.layout.kind, use.layout.weight_shape[1:], use.layout.experts)
                groups.setdefault(key, set()).add(self.ties.group(use.weight))
        return groups

    def _direct(self, call: "Call", trails: list[Trail]) -> int:
        """The uses whose output the result is: through batch norm, and through a sum, which ties convolutions."""
        if "batch_norm" in call.name or "dropout" in call.name:
            return trails[0].direct if trails else 0
        if call.name != "add" or not call.same_shaped:
            return 0
        left, right = ([self.uses[i] for i in members(trail.direct)] for trail in trails[:2])
        above = _union(use.ancestors for use in left + right)
        independent = not above & (trails[0].direct | trails[1].direct)
        if not (left and right and independent and all("conv" in use.layout.kind for use in left + right)):
            return 0
        for use in left[1:] + right:
            self.ties.join(left[0].weight, use.weight)
        return trails[0].direct | trails[1].direct


def _run(call: Call, kwargs: dict[str, Any]) -> Any:
    if call.name == "_grouped_mm" and (data := call.operands[0]).is_meta and call.operands[1].ndim > data.ndim:
        return data.new_empty(len(data), call.operands[1].shape[-1])  # the meta kernel takes nothing but bf16
    return call.func(*call.args, **kwargs)


def _repeated(call: Call, trails: list[Trail], trail: Trail) -> Trail:
    """The trail of an output that repeats elements because all operands of its size do, element by element."""
    size = trail.distinct
    if not any(t.distinct < operand.numel() == size for operand, t in zip(call.operands, trails, strict=True)):
        return trail
    if not call.works_in_place:
        return trail
    whole = [t.distinct for operand, t in zip(call.operands, trails, strict=True) if operand.numel() == size]
    return trail._replace(distinct=max(whole))


def members(uses: int) -> Iterator[int]:
    """The members of a set of uses, ascending."""
    while uses:
        lowest = uses & -uses
        yield lowest.bit_length() - 1
        uses ^= lowest


def _union(sets: Iterable[int]) -> int:
    union = 0
    for each in sets:
        union |= each
    return union
