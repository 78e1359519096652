"""Expected increase of the loss from each layer's output error and the gradient there, in one pass for all layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.batches import batch_size, samples_in
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import weight_format
from mpq.progress import track
from mpq.surgery import frozen_parameters, owners, quantise_activation, swapped_data
from mpq.tasks import Outputs, Task

from .measurement import Measurement, Scores
from .quantised_weights import QuantisedWeights
from .unit_sums import sum_over_row_blocks

Labels = Literal["auto", "data", "model"]
Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class OutputFisher:
    """½ the mean over samples of Σ (dL/dY ⊙ (Y_option - Y))²: a second-order estimate in each layer's output.

        score(l, o) = 1/(2N) Σ_j 1/T_j Σ_i ( g_ji ΔY_ji )²

    g_j is the gradient of sample j's loss **summed** over its T_j positions, labels drawn independently for each
    position, so that E g gᵀ is the Gauss-Newton matrix of the outputs; ΔY the change of the layer's output when its
    weight, and its input where the option says so, are quantised. Only the diagonal of g gᵀ is used. Model Optimizer's
    gradient score is the same sum with the data's labels and without ½ (its source, `auto_quantize`).

    When to use: any model whose layers are modules; the cost does not grow with the number of layers times options.
    When not: below 3 bits, where a quadratic is a poor picture of the loss.

    Args:
        labels: where the gradient's labels come from: "data", "model" (drawn from the model's own distribution), or
            "auto", the data's where it has labels.
        keep_bytes: quantised weights up to this many bytes are kept between batches; the rest is quantised again.

    Cost: one forward and one backward to the layers' outputs, and one more forward of every layer an option. Standard
    errors are over samples. Memory: every layer's input until its gradient has come.
    """

    labels: Labels = "auto"
    keep_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels must be one of {', '.join(get_args(Labels))}, got {self.labels!r}")

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option.

        Raises:
            ValueError: if a layer has no module whose output could be watched, or units cut columns.
        """
        for layer in measurement.network.layers:
            if layer.module is None:
                raise ValueError(
                    f"output_fisher watches modules, the weight of {layer.name!r} is used by a function: "
                    "use kl or weight_error"
                )
        weights = QuantisedWeights(measurement, self.keep_bytes)
        total = np.zeros((2, len(measurement.units), len(measurement.options)))
        with frozen_parameters(measurement.model):
            for index in track(range(len(measurement.batches)), "output Fisher", shown=measurement.progress):
                piece = partial(_moments, _Pass(self.labels, measurement, weights, index))
                total += measurement.pieces.get(f"batch {index}", piece)
        return _scores(total, measurement)


class _Pass:
    """One batch: a forward that remembers every layer's input, a backward that turns gradients into scores."""

    def __init__(self, labels: Labels, measurement: Measurement, weights: QuantisedWeights, index: int) -> None:
        self.labels, self.measurement, self.weights, self.index = labels, measurement, weights, index
        self.batch = measurement.batches[index]
        self.samples = batch_size(self.batch)
        self.first_unit = np.concatenate([[0], np.cumsum(np.bincount(measurement.units.layer_index))])
        self.changed_in_place: set[str] = set()

    def run(self) -> Tensor:
        """(samples, units, options) scores. Layers whose input the model overwrites later get a copy of it."""
        while True:
            known = set(self.changed_in_place)
            scores = self._run_once(copied=known)
            if self.changed_in_place == known:
                return scores

    def _run_once(self, copied: set[str]) -> Tensor:
        measurement = self.measurement
        self.scores = torch.zeros(self.samples, len(measurement.units), len(measurement.options), dtype=torch.float64)
        with ExitStack() as stack, torch.enable_grad():
            for position, layer in enumerate(measurement.network.layers):
                for module, parameter in owners(measurement.model, layer):
                    hook = self._watch(position, parameter, copied)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            outputs = measurement.task.run(measurement.model, self.batch)
            self.positions = outputs.positions().cpu().double()
            generator = torch.Generator().manual_seed(measurement.seed + self.index)
            loss = _summed_losses(measurement.task, outputs, self.labels, generator).sum()
            if not loss.requires_grad:
                raise ValueError("the model's outputs have no gradient: it runs under no_grad or detaches; use kl")
            torch.autograd.backward(loss)
        return self.scores / (2 * self.positions[:, None, None])

    def _watch(self, position: int, parameter: nn.Parameter, copied: set[str]) -> Any:
        layer = self.measurement.network.layers[position]

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given, apply = _as_called(module, args, kwargs)
            given = given.detach().clone() if layer.name in copied else given.detach()
            version = given._version
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()

            def score(gradient: Tensor) -> None:
                if given._version != version:
                    self.changed_in_place.add(layer.name)
                else:
                    self._score(position, apply, parameter, given, gradient)

            output.register_hook(score)  # type: ignore[no-untyped-call]
            return output

        return remember

    @torch.no_grad()
    def _score(self, position: int, apply: Apply, parameter: nn.Parameter, given: Tensor, gradient: Tensor) -> None:
        measurement = self.measurement
        layer = measurement.network.layers[position]
        exact = apply(given)
        units = slice(self.first_unit[position], self.first_unit[position + 1])
        for column, option in enumerate(measurement.options):
            if measurement.is_candidate(layer, option):
                change = self._output(apply, parameter, given, layer, option) - exact
                per_row = _per_sample_rows((gradient.float() * change.float()).square(), layer, self.samples)
                self.scores[:, units, column] += sum_over_row_blocks(per_row, measurement.granularity).cpu()

    def _output(self, apply: Apply, parameter: nn.Parameter, given: Tensor, layer: Layer, option: Option) -> Tensor:
        if option.activation is not None and given.is_floating_point():
            given = quantise_activation(given, option.activation, layer)
        with swapped_data([parameter], self.weights.get(layer, weight_format(option))):
            return apply(given)


def _as_called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Apply]:
    """The input that a module was given, and its forward, without hooks, on another input in that place."""
    if args:
        rest = args[1:]
        return args[0], lambda given: module.forward(given, *rest, **kwargs)
    name = "input" if "input" in kwargs else next(iter(kwargs))
    others = {key: value for key, value in kwargs.items() if key != name}
    return kwargs[name], lambda given: module.forward(**{name: given}, **others)


def _summed_losses(task: Task, outputs: Outputs, labels: Labels, generator: torch.Generator) -> Tensor:
    """(samples,): losses summed over positions, with the labels that were asked for."""
    losses = None if labels == "model" or task.measured_in != "loss" else task.losses(outputs)
    if losses is not None:
        return losses * outputs.positions()
    if labels == "data":
        raise ValueError("labels='data' needs data with labels and a task whose loss they give: use labels='model'")
    return task.sampled_losses(outputs, generator)


def _per_sample_rows(squares: Tensor, layer: Layer, samples: int) -> Tensor:
    """(samples, rows): sums over positions. Tokens that were flattened into the first axis go back to their sample."""
    last = squares.movedim(1, -1) if layer.kind.startswith("conv") and squares.ndim > 2 else squares
    rows = last.shape[-1]
    if last.numel() % (samples * rows) or last.shape[0] % samples:
        return (last.reshape(-1, rows).double().sum(0) / samples).expand(samples, rows)
    return last.reshape(samples, -1, rows).double().sum(1)


def _moments(batch: _Pass) -> NDArray[np.float64]:
    """(2, units, options): sums of the samples' scores and of their squares."""
    scores = batch.run()
    return torch.stack([scores.sum(0), scores.square().sum(0)]).numpy()


def _scores(total: NDArray[np.float64], measurement: Measurement) -> Scores:
    samples = samples_in(measurement.batches)
    mean = total[0] / samples
    variance = np.maximum(total[1] / samples - mean**2, 0) * samples / max(samples - 1, 1)
    missing = [
        [not measurement.is_candidate(layer, option) for option in measurement.options]
        for layer in measurement.network.layers
    ]
    absent = np.array(missing)[measurement.units.layer_index]
    mean[absent] = np.nan
    return Scores(mean, np.sqrt(variance / samples) + 0 * mean, measurement.task.measured_in)
