"""LRP: relevance of a layer times how much an option disturbs its output."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.batches import batch_size, samples_in
from mpq.formats import NumberFormat
from mpq.layers import Layer, block_size
from mpq.options import Option
from mpq.plan import weight_format
from mpq.progress import track
from mpq.surgery import layer_parameters, owners, quantise_activation, swapped_data
from mpq.weight_view import as_rows

from .batch_samples import single_samples
from .gradient_pass import as_called
from .measurement import Measurement, ScoreArray, Scores
from .quantised_weights import QuantisedWeights
from .relevance_pass import Bias, Propagation, Residual, Target, batch_relevance
from .relevance_rules import Rule
from .unit_sums import sum_over_row_blocks, sum_over_units
from .weight_gradients import Apply

Mode = Literal["error", "linear"]
BITS = {"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64}


@dataclass(frozen=True, kw_only=True)
class LRP:
    """Layer contribution by relevance, c, times the relative error of the layer's output (LRP-QViT).

        score(l, o) = c_l · E ||Y_o - Y||² / ||Y||²,  c_l = share of Σ |R| at the layer's input (`relevance`)

    Y_o is the output with the layer's weight, and its input where the option says so, quantised; the mean is over
    samples. A weight that a function uses has no output to watch: its error is ||Q(W) - W||² / ||W||², and its input is
    not quantised. Units of rows take the relevance and the error of their own outputs.

    The paper's abstract calls relevance an indicator of the layer's contribution; how it becomes a score is our
    decision, the product with the error included. `mode="linear"` is the linear form, maximise Σ c_l b_l, as we
    remember it: score = c_l · (bits of full precision - bits), for the weight and, where it is quantised, the input.
    Its best plan puts all layers but one at the ends of their options.

    When to use: to try the paper's idea. When not: as the first choice; relevance is conserved between layers in
    series, so it tells branches apart better than layers.

    Args:
        mode: "error" or "linear".
        rule, input_rule, bias, residual, target: as in `relevance`.
        keep_bytes: quantised weights up to this many bytes are kept between batches.

    Cost: relevance (a forward and a backward), and in mode "error" one more forward of every layer an option. Standard
    errors are over samples, by the delta method, with the correlation of relevance and error.

    Example:
        The branch that the output rests on scores higher at the same relative error:

        >>> import mpq, torch
        >>> class Branches(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = (torch.nn.Linear(2, 2, bias=False) for _ in "ab")
        ...     def forward(self, x):
        ...         return self.a(x) + self.b(x)
        >>> model, weight = Branches(), torch.tensor([[1.0, 0.4], [0.3, 1.0]])
        >>> model.a.weight.data, model.b.weight.data = 9 * weight, weight
        >>> data = [torch.rand(8, 2, generator=torch.Generator().manual_seed(0))]
        >>> space = mpq.SearchSpace(["int2", "fp32"], ties=None)
        >>> frame = mpq.sensitivity.estimate(model, data, mpq.trace(model, data[0]), space, LRP(), progress=False)
        >>> scores = frame["sensitivity"].unstack()
        >>> round(float(scores["int2"]["a"] / scores["int2"]["b"]), 3), float(scores["fp32"]["a"])
        (9.0, 0.0)
    """

    mode: Mode = "error"
    rule: Rule | str = "epsilon"
    input_rule: Rule | str | None = None
    bias: Bias = "absorb"
    residual: Residual = "split"
    target: Target = "auto"
    keep_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be 'error' or 'linear', got {self.mode!r}")
        self.propagation  # noqa: B018 - checks the settings

    @property
    def propagation(self) -> Propagation:
        """How relevance flows."""
        return Propagation(
            rule=self.rule, input_rule=self.input_rule, bias=self.bias, residual=self.residual, target=self.target
        )

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option; the measure is "score".

        Raises:
            ValueError: if units cut columns, rows are asked for of a weight that a function uses, or relevance cannot
                be found.
        """
        check_units(measurement)
        weights = QuantisedWeights(measurement, self.keep_bytes)
        total = np.zeros((len(MOMENTS), len(measurement.units), len(measurement.options)))
        batches = range(len(measurement.batches))

        def sums_of(index: int) -> NDArray[np.float64]:
            return measurement.pieces.get(f"batch {index}", partial(self._moments, measurement, weights, index))

        shown = track(batches, "relevance", shown=measurement.progress)
        for _, sums in zip(shown, measurement.ranks.shared(batches, sums_of), strict=True):
            total += sums
        mean, error = product_of_shares(total, samples_in(measurement.batches))
        absent = np.isnan(_where_candidate(measurement))
        mean[absent] = error[absent] = np.nan
        return Scores(mean, error, "score")

    def _moments(self, measurement: Measurement, weights: QuantisedWeights, index: int) -> NDArray[np.float64]:
        """(moments, units, options): sums over the batch's samples."""
        amounts = self._amounts(measurement, index)
        if self.mode == "linear":
            factors = _bits_saved(measurement)[None].expand(len(amounts), -1, -1)
        else:
            factors = _relative_errors(measurement, weights, index)
        return moments(amounts, factors).numpy()

    def _amounts(self, measurement: Measurement, index: int) -> Tensor:
        """(samples, units): Σ |R| of every unit."""
        batch = measurement.batches[index]
        found = batch_relevance(measurement.model, batch, measurement.network, measurement.task, self.propagation)
        if measurement.granularity == "layer":
            return found.inputs[:, 0].T
        for layer, part in zip(measurement.network.layers, found.outputs, strict=True):
            if part.shape[2] != layer.weight_shape[0]:
                raise ValueError(
                    f"lrp needs outputs that are the rows of the weight, those of {layer.name!r} are not: use "
                    "granularity='layer', or fisher or weight_error"
                )
        return torch.cat([sum_over_row_blocks(part[0], measurement.granularity) for part in found.outputs], 1)


def check_units(measurement: Measurement) -> None:
    """Check that every unit has a relevance of its own.

    Raises:
        ValueError: if units cut columns, or rows of a weight that a function uses.
    """
    kind, _ = block_size(measurement.granularity)
    if kind == "groups":
        raise ValueError(
            f"lrp knows the relevance of layers and of their output rows, got granularity {measurement.granularity!r}: "
            "use granularity='rows:1', or fisher or weight_error"
        )
    for layer in measurement.network.layers if kind == "rows" else ():
        if layer.module is None:
            raise ValueError(
                f"lrp watches modules, the rows of {layer.name!r} are used by a function: use granularity='layer', "
                "or fisher or weight_error"
            )


MOMENTS = ("a", "A", "aa", "AA", "aA", "e", "ee", "ae", "Ae")


def moments(amounts: Tensor, factors: Tensor) -> Tensor:
    """(9, units, options): sums over samples of a, A, a², A², aA, e, e², ae, Ae.

    Args:
        amounts: a, (samples, units); A is their sum over units.
        factors: e, (samples, units, options).
    """
    a, e = amounts.double()[..., None], factors.double()
    whole = a.sum(1, keepdim=True)
    products = (a, whole, a * a, whole * whole, a * whole, e, e * e, a * e, whole * e)
    return torch.stack([product.expand(e.shape).sum(0) for product in products])


def product_of_shares(sums: NDArray[np.float64], samples: int) -> tuple[ScoreArray, ScoreArray]:
    """Means ē ā / Ā and their standard errors from `moments`, by the delta method.

    The influence of a sample on ē ā / Ā is (ē a + ā e - (ē ā / Ā) A) / Ā less its mean.

    Raises:
        ValueError: if all amounts are zero.
    """
    a, whole, aa, ww, aw, e, ee, ae, we = sums / samples
    if not (whole > 0).all():
        raise ValueError("relevance is 0 in every layer: the outputs do not depend on the data, or are all 0")
    mean = e * a / whole
    weights = e / whole, -mean / whole, a / whole  # of a, A and e
    covariances = {
        (0, 0): aa - a * a, (1, 1): ww - whole**2, (2, 2): ee - e * e,
        (0, 1): aw - a * whole, (0, 2): ae - a * e, (1, 2): we - whole * e,
    }  # fmt: skip
    parts = [(1 + (i != j)) * weights[i] * weights[j] * value for (i, j), value in covariances.items()]
    variance = np.maximum(np.sum(parts, axis=0), 0) / max(samples - 1, 1)
    return mean, np.sqrt(variance)


def _where_candidate(measurement: Measurement) -> ScoreArray:
    """(units, options): 0, NaN where the option is no candidate."""
    rows = [
        [0.0 if measurement.is_candidate(layer, option) else np.nan for option in measurement.options]
        for layer in measurement.network.layers
    ]
    return np.array(rows)[measurement.units.layer_index]


def _bits_saved(measurement: Measurement) -> Tensor:
    """(units, options): bits below full precision, of a weight and of an input that is quantised."""
    full = BITS.get(measurement.network.dtype, 32)
    saved = [
        sum(full - fmt.bits for fmt in (option.weight, option.activation) if fmt is not None)
        for option in measurement.options
    ]
    return torch.tensor(saved, dtype=torch.float64).expand(len(measurement.units), -1)


def _relative_errors(measurement: Measurement, weights: QuantisedWeights, index: int) -> Tensor:
    """(samples, units, options): ||Y_o - Y||² / ||Y||²; 0 where the output is 0."""
    batch = measurement.batches[index]
    run = partial(_Errors, measurement, weights)
    try:
        return run(batch_size(batch)).of(batch)
    except _SamplesMixedError:
        return torch.cat([run(1).of(sample) for sample in single_samples(batch)])


class _SamplesMixedError(Exception):
    """A layer's output has another first axis than the samples."""


class _Errors:
    """One forward in which every layer's output is compared with what each option would make of it."""

    def __init__(self, measurement: Measurement, weights: QuantisedWeights, samples: int) -> None:
        self.measurement, self.weights, self.samples = measurement, weights, samples
        counts = np.bincount(measurement.units.layer_index, minlength=len(measurement.network.layers))
        self.first = np.concatenate([[0], np.cumsum(counts)])
        shape = (2, samples, len(measurement.units), len(measurement.options))
        self.squares = torch.zeros(shape, dtype=torch.float64)  # of the change and of the output

    @torch.no_grad()
    def of(self, batch: Any) -> Tensor:
        """Run the batch."""
        measurement = self.measurement
        with ExitStack() as stack:
            for position, layer in enumerate(measurement.network.layers):
                if layer.module is None:
                    self._weight_error(position, layer)
                    continue
                for module, parameter in owners(measurement.model, layer):
                    hook = self._comparing(position, parameter)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            measurement.task.run(measurement.model, batch)
        change, size = self.squares
        relative: Tensor = change / size.masked_fill(size == 0, 1)
        return relative

    def _comparing(self, position: int, parameter: nn.Parameter) -> Any:
        layer = self.measurement.network.layers[position]

        def compare(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            given, apply = as_called(module, args, kwargs)
            exact = output.double()
            for column, option in enumerate(self.measurement.options):
                if self.measurement.is_candidate(layer, option):
                    change = self._output(layer, option, parameter, given, apply).double() - exact
                    self._add(position, column, (change, exact), given if isinstance(module, nn.Embedding) else None)

        return compare

    def _output(self, layer: Layer, option: Option, parameter: nn.Parameter, given: Tensor, apply: Apply) -> Tensor:
        if option.activation is not None and given.is_floating_point():
            given = quantise_activation(given, option.activation, layer)
        with swapped_data([parameter], self.weights.get(layer, weight_format(option))):
            return apply(given)

    def _add(self, position: int, column: int, parts: tuple[Tensor, Tensor], looked_up: Tensor | None) -> None:
        layer = self.measurement.network.layers[position]
        for kind, values in enumerate(parts):
            sums = sum_over_row_blocks(self._per_row(layer, values, looked_up), self.measurement.granularity)
            self.squares[kind, :, self._units(position), column] += sums.cpu()

    def _per_row(self, layer: Layer, values: Tensor, looked_up: Tensor | None) -> Tensor:
        """(samples, rows): sums of squares over positions; those of a lookup belong to the entry that was looked up."""
        last = values.movedim(1, -1) if layer.kind.startswith("conv") and values.ndim > 2 else values
        if last.shape[0] % self.samples:
            raise _SamplesMixedError
        squares = last.square().reshape(self.samples, -1, last.shape[-1])
        if looked_up is None or self.measurement.granularity == "layer":
            return squares.sum(1)
        empty = squares.new_zeros(self.samples, layer.weight_shape[0])
        return empty.scatter_add_(1, looked_up.reshape(self.samples, -1), squares.sum(2))

    def _units(self, position: int) -> slice:
        return slice(self.first[position], self.first[position + 1])

    def _weight_error(self, position: int, layer: Layer) -> None:
        rows = as_rows(layer_parameters(self.measurement.model, layer)[0].detach(), layer)
        exact = rows.double().reshape(rows.shape[0], -1)
        for column, option in enumerate(self.measurement.options):
            if self.measurement.is_candidate(layer, option):
                quantised = self._quantised(layer, option).double().reshape(exact.shape)
                for kind, values in enumerate((quantised - exact, exact)):
                    total = sum_over_units(values.square(), self.measurement.granularity)
                    self.squares[kind, :, self._units(position), column] = total.cpu()

    def _quantised(self, layer: Layer, option: Option) -> Tensor:
        fmt: NumberFormat = weight_format(option)
        return as_rows(self.weights.get(layer, fmt), layer)
