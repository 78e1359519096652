"""One forward and one backward to every layer's output: what each layer saw, handed over as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mpq.batches import Batch, batch_size
from mpq.layers import Layer
from mpq.surgery import frozen_parameters, layer_parameters, owners
from mpq.tasks import Outputs, Task
from mpq.weight_view import as_rows

from .batch_samples import single_samples
from .measurement import Measurement
from .weight_gradients import Apply, Call, weight_gradients

__all__ = ["Call", "Capture", "Labels", "as_called", "captures", "captures_together"]

Labels = Literal["auto", "data", "model"]
LOSS_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)  # tried in this order on float16 models


@dataclass(frozen=True)
class Capture:
    """What one layer saw in one batch.

    Attributes:
        position: of the layer in `measurement.network.layers`.
        layer: the layer.
        parameter: the layer's weight in the model.
        calls: of the layer's modules, those whose output the loss depends on; none where it depends on none.
        samples: in the batch.
        positions: T_j, (samples,): how many positions of each sample count; divide sums over positions by it once.
        whole_gradient: of the one sample there is, as the weight is stored, for a weight that a function uses.
    """

    position: int
    layer: Layer
    parameter: nn.Parameter
    calls: tuple[Call, ...]
    samples: int
    positions: Tensor
    whole_gradient: Tensor | None = None

    def sample_gradients(self, rows: slice | None = None) -> Tensor:
        """(samples, rows, in...): the weight's gradient of each sample's loss, summed over positions and calls.

        Rows are those of the (out, in...) view; all of them unless a slice of them is asked for. Float32 or float64.

        Cost: for a dense layer or a convolution as much as the layer's forward.
        """
        start, stop, _ = (rows or slice(None)).indices(self.layer.weight_shape[0])
        if self.whole_gradient is not None:
            return as_rows(self.whole_gradient, self.layer)[None, start:stop]
        total: Tensor | None = None
        for call in self.calls:
            part = weight_gradients(call, self.layer, self.samples, slice(start, stop))
            total = part if total is None else total.add_(part)
        if total is not None:
            return total
        dtype = torch.float64 if self.parameter.dtype == torch.float64 else torch.float32
        shape = (self.samples, stop - start, *self.layer.weight_shape[1:])
        return torch.zeros(shape, dtype=dtype, device=self.parameter.device)


Receive = Callable[[Capture], None]
ReceiveAll = Callable[[dict[Labels, Capture]], None]


def captures(
    measurement: Measurement, index: int, labels: Labels, receive: Receive, *, functional: bool = False
) -> None:
    """Run one batch forward and backward, and hand a `Capture` of every layer to `receive`.

    The loss is the sum over samples of losses **summed** over positions. `receive` is called without gradient tracking,
    once a layer, from the last layer to the first, when the gradients of all of its calls are there; what a layer saw
    is dropped after that. A batch in which a layer's samples cannot be told apart (its input has another first axis,
    such as the positions that all samples share, or the tokens that a router picked), or whose weights are used by
    functions, is run one sample at a time: `receive` is then called once a layer and sample, with `samples == 1`.

    Args:
        measurement: model, data and task; the model comes back as it was.
        index: of the batch; labels are drawn with `measurement.seed + index`.
        labels: "data", "model" (drawn from the model's own distribution, each position on its own) or "auto", the
            data's where it has labels.
        receive: takes each capture.
        functional: whether weights that are used by functions are welcome; their captures have no calls, only
            `sample_gradients`.

    Cost: one forward and one backward without weight gradients. Memory: every layer's input until its gradient has
    come; a copy of it where the model overwrites it.

    Example:
        An estimator collects the squared norm of every sample's gradient, layer by layer:

        >>> def __call__(self, measurement):
        ...     norms = {}
        ...     def receive(capture):
        ...         norms[capture.layer.name] = capture.sample_gradients().flatten(1).square().sum(1)
        ...     captures(measurement, 0, "model", receive)

    Raises:
        ValueError: if there are no such labels, the outputs have no gradient, a gradient is NaN or infinite, a layer's
            module returns no tensor, or a function uses a weight and that is not welcome.
    """
    captures_together(measurement, index, (labels,), lambda seen: receive(seen[labels]), functional=functional)


def captures_together(
    measurement: Measurement,
    index: int,
    labels: Sequence[Labels],
    receive: ReceiveAll,
    *,
    functional: bool = False,
) -> None:
    """`captures` for several kinds of labels: one forward, one backward a kind; `receive` gets {kind: capture}.

    Kinds that come to the same share one capture. Memory: output gradients of all kinds but one are kept until the
    last backward.
    """
    for kind in labels:
        check_labels(kind)
    unwatched = [layer.name for layer in measurement.network.layers if layer.module is None]
    if unwatched and not functional:
        raise ValueError(
            f"this method watches modules, the weight of {unwatched[0]!r} is used by a function: use kl or weight_error"
        )
    batch = measurement.batches[index]
    generator = torch.Generator().manual_seed(measurement.seed + index)
    run = partial(_Pass, measurement, tuple(dict.fromkeys(labels)), generator, receive)
    with _only_functional_weights_ask(measurement), torch.enable_grad():
        if (unwatched and batch_size(batch) > 1) or not run(batch).go():
            for sample in single_samples(batch):
                run(sample).go()


def check_labels(labels: str) -> None:
    """Check a setting.

    Raises:
        ValueError: if it is no kind of labels.
    """
    if labels not in get_args(Labels):
        raise ValueError(f"labels must be one of {', '.join(get_args(Labels))}, got {labels!r}")


@dataclass
class _Record:
    """One call on its way: its input, and the gradients that have come."""

    layer: Layer
    inputs: Tensor
    version: int
    apply: Apply
    module: nn.Module
    parameter: nn.Parameter
    outputs: torch.Size
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def call(self, kind: str) -> Call:
        return Call(self.inputs, self.gradients[kind], self.apply, self.module, self.parameter)


class _Pass:
    """One forward of one batch, and one backward a kind of labels."""

    def __init__(
        self,
        measurement: Measurement,
        labels: tuple[Labels, ...],
        generator: torch.Generator,
        receive: ReceiveAll,
        batch: Batch,
    ) -> None:
        self.measurement, self.labels, self.generator = measurement, labels, generator
        self.receive, self.batch, self.samples = receive, batch, batch_size(batch)
        self.layers = measurement.network.layers
        self.records: list[list[_Record]] = [[] for _ in self.layers]
        self.copied: set[str] = set()
        self.kind, self.scale, self.trial = "", 1.0, False

    def go(self) -> bool:
        """Run it; False, with nothing handed over, where samples cannot be told apart in some layer."""
        with ExitStack() as stack:
            self._watch_all(stack)
            while True:
                for records in self.records:
                    records.clear()
                outputs = self.measurement.task.run(self.measurement.model, self.batch)
                overwritten = {r.layer.name for r in self._all_records() if r.inputs._version != r.version}
                if overwritten <= self.copied:
                    break
                self.copied |= overwritten
        if self.samples > 1 and any(not self._samples_are_apart(record) for record in self._all_records()):
            return False
        self.positions = outputs.positions()
        if self.positions.numel() != self.samples:
            raise ValueError(
                f"the model's outputs must have the {self.samples} samples of the batch first, got "
                f"{tuple(outputs.values.shape)}"
            )
        self._backward(outputs)
        return True

    def _all_records(self) -> Iterator[_Record]:
        return (record for records in self.records for record in records)

    def _samples_are_apart(self, record: _Record) -> bool:
        shapes = (record.inputs.shape, record.outputs)
        return all(len(shape) > 0 and shape[0] > 0 and shape[0] % self.samples == 0 for shape in shapes)

    def _watch_all(self, stack: ExitStack) -> None:
        for position, layer in enumerate(self.layers):
            if layer.module is not None:
                for module, parameter in owners(self.measurement.model, layer):
                    hook = self._watch(position, parameter)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _watch(self, position: int, parameter: nn.Parameter) -> Any:
        layer, records = self.layers[position], self.records

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise ValueError(f"layer {layer.name!r} must return a tensor, got {type(output).__name__}: use kl")
            if not torch.is_grad_enabled():
                return output
            given, apply = as_called(module, args, kwargs)
            given = given.detach().clone() if layer.name in self.copied else given.detach()
            watched: Tensor = output if output.requires_grad else output.detach().requires_grad_().clone()
            arrived = partial(self._arrived, position, len(records[position]))
            watched.register_hook(arrived)  # type: ignore[no-untyped-call]
            records[position].append(_Record(layer, given, given._version, apply, module, parameter, output.shape))
            return watched

        return remember

    def _backward(self, outputs: Outputs) -> None:
        task = self.measurement.task
        given = _data_losses(task, outputs, self.labels)
        resolved = {label: _resolved(label, given is not None) for label in self.labels}
        kinds = tuple(dict.fromkeys(resolved.values()))
        self.names = {kind: [label for label in self.labels if resolved[label] == kind] for kind in kinds}
        with ExitStack() as stack:
            self.whole: dict[int, dict[str, Tensor]] = {}
            for position, layer in enumerate(self.layers):
                if layer.module is None:
                    parameter = layer_parameters(self.measurement.model, layer)[0]
                    hook = partial(self._whole_arrived, position)
                    handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            for kind in kinds:
                of_data = None if given is None or kind == "model" else given * self.positions
                loss = (task.sampled_losses(outputs, self.generator) if of_data is None else of_data).sum()
                if not loss.requires_grad:
                    raise ValueError("the model's outputs have no gradient: it runs under no_grad or detaches; use kl")
                self.kind, self.last = kind, kind == kinds[-1]
                self.scale = self._loss_scale(loss)
                self.waiting = [len(records) for records in self.records]
                torch.autograd.backward(loss * self.scale, retain_graph=not self.last)
        for position in range(len(self.layers)):
            if self.waiting[position] >= 0:
                self._hand_over(position)

    def _loss_scale(self, loss: Tensor) -> float:
        """The factor that keeps float16 gradients from underflowing: the largest at which none overflows."""
        if not any(parameter.dtype == torch.float16 for parameter in self.measurement.model.parameters()):
            return 1.0
        for scale in LOSS_SCALES[:-1]:
            self.trial, self.overflow = True, False
            torch.autograd.backward(loss * scale, retain_graph=True)
            self.trial = False
            if not self.overflow:
                return scale
        return LOSS_SCALES[-1]

    @torch.no_grad()
    def _arrived(self, position: int, number: int, gradient: Tensor) -> None:
        finite = all(bool(torch.isfinite(end)) for end in gradient.aminmax()) if gradient.numel() else True
        if self.trial:
            self.overflow |= not finite
            return
        self._check_finite(position, finite)
        self.records[position][number].gradients[self.kind] = _unscaled(gradient, self.scale)
        self.waiting[position] -= 1
        if self.last and self.waiting[position] == 0:
            self._hand_over(position)

    @torch.no_grad()
    def _whole_arrived(self, position: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        finite = bool(torch.isfinite(gradient).all())
        if self.trial:
            self.overflow |= not finite
            return
        self._check_finite(position, finite)
        self.whole.setdefault(position, {})[self.kind] = _unscaled(gradient, self.scale)

    def _check_finite(self, position: int, finite: bool) -> None:
        if finite:
            return
        for layer in self.layers:
            if not layer_parameters(self.measurement.model, layer)[0].isfinite().all():
                raise ValueError(f"the weight of {layer.name!r} must be finite, it holds NaN or infinity")
        raise ValueError(
            f"the gradient at layer {self.layers[position].name!r} must be finite, it holds NaN or infinity: check the "
            "model's outputs on this data, or run the model in float32"
        )

    @torch.no_grad()
    def _hand_over(self, position: int) -> None:
        records, self.records[position], self.waiting[position] = self.records[position], [], -1
        seen: dict[Labels, Capture] = {}
        for kind, names in self.names.items():
            capture = Capture(
                position=position,
                layer=self.layers[position],
                parameter=layer_parameters(self.measurement.model, self.layers[position])[0],
                calls=tuple(record.call(kind) for record in records if kind in record.gradients),
                samples=self.samples,
                positions=self.positions,
                whole_gradient=self.whole.get(position, {}).get(kind),
            )
            seen |= dict.fromkeys(names, capture)
        self.receive(seen)


def as_called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Apply]:
    """The input that a module was given, and its forward, without hooks, on another input in that place."""
    if args:
        rest = args[1:]
        return args[0], lambda given: module.forward(given, *rest, **kwargs)
    name = "input" if "input" in kwargs else next(iter(kwargs))
    others = {key: value for key, value in kwargs.items() if key != name}
    return kwargs[name], lambda given: module.forward(**{name: given}, **others)


def _resolved(labels: Labels, has_labels: bool) -> str:
    """Where the labels come from in the end."""
    if labels == "data" and not has_labels:
        raise ValueError("labels='data' needs data with labels and a task whose loss they give: use labels='model'")
    return "data" if has_labels and labels != "model" else "model"


def _data_losses(task: Task, outputs: Outputs, labels: tuple[Labels, ...]) -> Tensor | None:
    """(samples,): losses against the data's labels where they are asked for and the task measures a loss."""
    return None if task.measured_in != "loss" or set(labels) <= {"model"} else task.losses(outputs)


def _unscaled(gradient: Tensor, scale: float) -> Tensor:
    single = gradient if gradient.dtype == torch.float64 else gradient.float()
    return single if scale == 1 else single / scale


@contextmanager
def _only_functional_weights_ask(measurement: Measurement) -> Iterator[None]:
    """No parameter asks for a gradient but those that functions use; their own `grad` comes back."""
    functional = [layer for layer in measurement.network.layers if layer.module is None]
    parameters = [layer_parameters(measurement.model, layer)[0] for layer in functional]
    grads = [parameter.grad for parameter in parameters]
    with frozen_parameters(measurement.model):
        asked = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, grad, asks in zip(parameters, grads, asked, strict=True):
                parameter.grad = grad
                parameter.requires_grad_(asks)
