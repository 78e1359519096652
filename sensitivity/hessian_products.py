"""Products of the mean loss's Hessian with vectors, layer by layer, over one first-order graph a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mpq.batches import Batch, batch_size, samples_in
from mpq.layers import Layer
from mpq.surgery import frozen_parameters, input_modules, layer_parameters
from mpq.tasks import Outputs, Task

from .gradient_pass import Labels, check_labels
from .measurement import Measurement
from .trace_estimators import random_signs

Of = Literal["weights", "inputs"]

# What an operation costs on a CPU core, roughly. Counted rather than timed, so that a seed fixes the answer.
SECONDS_PER_OPERATION = 1e-5
SECONDS_PER_ELEMENT = 1e-9
SECONDS_PER_FLOP = 3e-11

_ONCE = (
    "the model must be differentiable twice, without overwriting what its layers read: {}. Use ggn_trace "
    "(curvature='ggn'), which differentiates once"
)


@dataclass
class HessianProducts:
    """The diagonal blocks of a Hessian: of the weights of each layer, or of the inputs that its modules receive.

    The loss is the mean over all samples of each sample's loss, which is a mean over its positions. `labels` "data"
    takes the data's labels. "model" takes the divergence from full precision in their place, whose gradient at full
    precision is zero and whose Hessian is therefore the Gauss-Newton matrix, JᵀH_out J, exactly; nothing is drawn.
    "auto" is "data" where the data has labels.

    Half precision is computed in float32. Attention runs by plain matrix products: the fused kernels cannot be
    differentiated twice. Use it as a context; the model comes back as it was.

    Args:
        measurement: model, data and task.
        labels: see above.
        of: "weights", or "inputs": a block is then divided by its elements a sample, as only their mean is of use.
        layers: positions of the layers whose blocks are wanted.
    """

    measurement: Measurement
    labels: Labels
    of: Of
    layers: Sequence[int]
    _graph: tuple[int, Graph] | None = field(default=None, init=False)

    def __enter__(self) -> HessianProducts:
        check_labels(self.labels)
        model = self.measurement.model
        with ExitStack() as stack:
            stack.enter_context(in_single_precision(model))
            stack.enter_context(frozen_parameters(model))
            if self.of == "weights":
                stack.enter_context(_asking(self._parameters()))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.enable_grad())
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._graph = None
        self._open.close()

    @property
    def batches(self) -> range:
        """Indices of the batches."""
        return range(len(self.measurement.batches))

    def weight(self, index: int) -> float:
        """Share of the samples that are in a batch."""
        return batch_size(self.measurement.batches[index]) / samples_in(self.measurement.batches)

    def graph(self, index: int) -> Graph:
        """The first-order graph of a batch; the one that was asked for last is kept.

        Raises:
            ValueError: if the loss cannot be differentiated.
        """
        if self._graph is None or self._graph[0] != index:
            self._graph = None  # free the old one first
            self._graph = (index, self._build(index))
        return self._graph[1]

    def product(self, layer: int, vectors: Tensor) -> Tensor:
        """One layer's block of the whole data's Hessian times float64 vectors (size, k); weights only."""
        total = torch.zeros_like(vectors)
        for index in self.batches:
            graph = self.graph(index)
            total += self.weight(index) * graph.columns(layer, vectors)
        return total

    def size(self, layer: int) -> int:
        """Rows of a layer's block of weights."""
        return self.measurement.network.layers[layer].parameters

    def _parameters(self) -> list[nn.Parameter]:
        layers = self.measurement.network.layers
        return [layer_parameters(self.measurement.model, layers[position])[0] for position in self.layers]

    def _build(self, index: int) -> Graph:
        measurement = self.measurement
        batch = _in_single_precision(measurement.batches[index])
        with ExitStack() as stack:
            blocks: dict[int, list[Tensor]] = {}
            for place, parameter in zip(self.layers, self._parameters(), strict=True):
                blocks[place] = [parameter] if self.of == "weights" else stack.enter_context(self._inputs(place))
            outputs = measurement.task.run(measurement.model, batch)
            loss = mean_loss(measurement.task, outputs, self.labels)
        shares = dict.fromkeys(blocks, 1.0)
        if self.of == "inputs":
            elements = {place: sum(t.numel() for t in tensors) for place, tensors in blocks.items()}
            shares = {place: batch_size(batch) / max(count, 1) for place, count in elements.items()}
        return Graph(loss, blocks, shares, {place: measurement.network.layers[place] for place in blocks})

    @contextmanager
    def _inputs(self, position: int) -> Iterator[list[Tensor]]:
        """The list that a forward fills with a layer's inputs, each a tensor that nothing else reads."""
        seen: list[Tensor] = []

        def alias(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            name = None if args else "input" if "input" in kwargs else next(iter(kwargs))
            given = args[0] if name is None else kwargs[name]
            given = given.view_as(given) if given.requires_grad else given.detach().clone().requires_grad_()
            seen.append(given)
            return ((given, *args[1:]), kwargs) if name is None else (args, kwargs | {name: given})

        with ExitStack() as stack:
            for module in input_modules(self.measurement.model, self.measurement.network.layers[position]):
                stack.callback(module.register_forward_pre_hook(alias, with_kwargs=True).remove)
            yield seen


class Graph:
    """The gradient of one batch's mean loss, with the graph that made it."""

    def __init__(
        self, loss: Tensor, blocks: Mapping[int, list[Tensor]], shares: Mapping[int, float], layers: Mapping[int, Layer]
    ) -> None:
        self._layers, self._shares = layers, shares
        tensors = [(place, tensor) for place, block in blocks.items() for tensor in block]
        if not loss.requires_grad:
            raise ValueError("the model's outputs have no gradient: it runs under no_grad or detaches; use kl")
        found = _differentiated([loss], [tensor for _, tensor in tensors], None, create_graph=True)
        self._blocks: dict[int, list[tuple[Tensor, Tensor]]] = {place: [] for place in blocks}
        _check_twice_differentiable([gradient for gradient in found if gradient is not None])
        for (place, tensor), gradient in zip(tensors, found, strict=True):
            self._check_finite(place, gradient)
            if gradient is not None and gradient.requires_grad:  # else its derivative is zero
                self._blocks[place].append((tensor, gradient))

    def joint(self, generator: torch.Generator) -> dict[int, float]:
        """v_lᵀ (H v)_l of every layer l, with v drawn for all layers at once."""
        pairs = [(place, *pair) for place, block in self._blocks.items() for pair in block]
        vectors = [_signs_like(tensor, generator) for _, tensor, _ in pairs]
        values = dict.fromkeys(self._blocks, 0.0)
        if pairs:
            places, tensors, gradients = zip(*pairs, strict=True)
            for place, vector, product in zip(
                places, vectors, _differentiated(gradients, tensors, vectors), strict=True
            ):
                values[place] += self._value(place, vector, product)
        return values

    def block(self, layer: int, generator: torch.Generator) -> float:
        """v_lᵀ H_ll v_l of one layer, with v drawn for that layer alone."""
        block = self._blocks[layer]
        vectors = [_signs_like(tensor, generator) for tensor, _ in block]
        if not block:
            return 0.0
        tensors, gradients = zip(*block, strict=True)
        products = _differentiated(gradients, tensors, vectors)
        return sum(self._value(layer, *pair) for pair in zip(vectors, products, strict=True))

    def columns(self, layer: int, vectors: Tensor) -> Tensor:
        """H_ll times each column of float64 (size, k); weights only."""
        result = torch.zeros_like(vectors)
        for tensor, gradient in self._blocks[layer]:
            for column in range(vectors.shape[1]):
                vector = vectors[:, column].reshape(tensor.shape).to(tensor)
                (product,) = _differentiated([gradient], [tensor], [vector])
                self._check_finite(layer, product)
                if product is not None:
                    result[:, column] = product.reshape(-1).double().cpu()
        return result

    def _value(self, layer: int, vector: Tensor, product: Tensor | None) -> float:
        self._check_finite(layer, product)
        if product is None:
            return 0.0
        return self._shares[layer] * float((vector * product).sum(dtype=torch.float64))

    def _check_finite(self, layer: int, tensor: Tensor | None) -> None:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"the Hessian at layer {self._layers[layer].name!r} holds NaN or infinity: check the model's outputs "
                "on this data, and what it divides by or takes the root of"
            )


class CountedCost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up roughly how many CPU seconds the operations of a block take, the same in every run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and add its cost."""
        out = func(*args, **(kwargs or {}))
        self.seconds += SECONDS_PER_OPERATION
        if isinstance(out, Tensor):
            self.seconds += SECONDS_PER_ELEMENT * out.numel()
        if func.overloadpacket in flop_registry:
            self.seconds += SECONDS_PER_FLOP * flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def counted_seconds(work: Callable[[], object]) -> float:
    """Roughly the CPU seconds of some work, from counts of its operations."""
    cost = CountedCost()
    with cost:
        work()
    return cost.seconds


def mean_loss(task: Task, outputs: Outputs, labels: Labels) -> Tensor:
    """Mean over samples of the loss against the data's labels, or of the divergence from these very outputs.

    Raises:
        ValueError: if labels are asked for that the data does not have.
    """
    losses = None if labels == "model" else task.losses(outputs)
    if losses is not None:
        return losses.mean()
    if labels == "data":
        raise ValueError("labels='data' needs data with labels and a task whose loss they give: use labels='model'")
    reference = Outputs(outputs.values.detach(), outputs.mask, outputs.labels)
    return task.divergence(reference, outputs).mean()


@contextmanager
def in_single_precision(model: nn.Module) -> Iterator[None]:
    """A model whose half-precision parameters and buffers are float32 for a while; the originals come back."""
    parameters = {p: (p.data, p.grad) for p in model.parameters() if _is_half(p)}
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and _is_half(buffer)
    ]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.data = parameter.data.float()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.float()
        yield
    finally:
        for parameter, (data, gradient) in parameters.items():
            parameter.grad = None
            parameter.data = data
            parameter.grad = gradient
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _in_single_precision(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch.float() if _is_half(batch) else batch
    if isinstance(batch, Mapping):
        return {name: _in_single_precision(part) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_in_single_precision(part) for part in batch)
    return batch


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in {torch.float16, torch.bfloat16}


@contextmanager
def _asking(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that ask for a gradient for a while, inside `frozen_parameters`."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _differentiated(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor] | None, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    if not inputs:
        return ()
    try:
        return torch.autograd.grad(
            outputs, inputs, vectors, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        raise ValueError(_ONCE.format(str(error).rstrip("."))) from error


def _check_twice_differentiable(gradients: Sequence[Tensor]) -> None:
    """Functions that are marked as differentiable once end the graph in an error that is never reached: zeros."""
    seen: set[Any] = set()
    waiting = [gradient.grad_fn for gradient in gradients]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            raise ValueError(_ONCE.format("a function in it is marked once_differentiable"))
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]


def _signs_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return random_signs(tuple(tensor.shape), generator, torch.float32).to(tensor)
