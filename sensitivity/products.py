"""Products of per-sample gradients with the changes that options make, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

from mpq.formats import NumberFormat
from mpq.layers import block_size
from mpq.options import Option
from mpq.plan import weight_format
from mpq.surgery import quantise_activation, swapped_data
from mpq.weight_view import as_rows, from_rows

from .gradient_pass import Call, Capture
from .measurement import Measurement
from .quantised_weights import QuantisedWeights
from .unit_sums import in_groups, spread_over_groups
from .weight_gradients import by_sample, is_dense, row_blocks_are_cheap

BLOCK = 2**22  # values of a temporary: rows are taken as many at a time as that allows

Product = Literal["signed", "absolute", "squared", "output", "input_signed", "input_squared", "input_absolute"]
"""What can be asked for, for sample j and option o. G_j is the weight's gradient, ΔW = Q(W) - W, in each cell c:

    signed          Σ_{i in c} G_ji ΔW_i
    absolute        Σ_{i in c} |G_ji ΔW_i|
    squared         Σ_{i in c} (G_ji ΔW_i)²

For a row r with output y_r, output gradient g, at every position t of the sample:

    output          Σ_t (g_tr Δy_tr)²       Δy by the quantised weight on the quantised input
    input_signed    Σ_t g_tr Δy_tr          Δy by the quantised input alone
    input_squared   Σ_t (g_tr Δy_tr)²       likewise
    input_absolute  Σ_t,i |(Wᵀg)_ti Δx_ti|  the layer's whole input x; what leaves the layer another way does not count

What the quantised input does cannot be told by groups of columns, `input_absolute` not by rows: cells then take shares
in proportion to their Σ W², which is exact where the errors of the inputs are independent and of one size (own choice).
"""

WEIGHT: tuple[Product, ...] = ("signed", "absolute", "squared")
INPUT: tuple[Product, ...] = ("input_signed", "input_squared")


def products_of(
    requests: Sequence[tuple[Capture, frozenset[Product]]], measurement: Measurement, weights: QuantisedWeights
) -> list[dict[Product, Tensor]]:
    """For each capture of one layer the products asked for, (samples, cells, options) each, zero for no candidate.

    Cells are the layer's rows; for a granularity of groups the groups of every row. Products of the input are left out
    where no option quantises it. Every weight is quantised once.
    """
    changes = _Changes(requests[0][0], measurement, weights)
    together: dict[int, tuple[Capture, frozenset[Product]]] = {}
    for capture, needs in requests:
        together[id(capture)] = capture, needs | together.get(id(capture), (capture, frozenset()))[1]
    found = {key: _Products(capture, needs, changes).all() for key, (capture, needs) in together.items()}
    return [found[id(capture)] for capture, _ in requests]


class _Changes:
    """What the options of one layer make of its weight."""

    def __init__(self, capture: Capture, measurement: Measurement, weights: QuantisedWeights) -> None:
        self.layer, self.parameter, self.weights = capture.layer, capture.parameter, weights
        self.options = measurement.options
        self.columns = [
            column for column, option in enumerate(self.options) if measurement.is_candidate(self.layer, option)
        ]
        self.formats = list(dict.fromkeys(weight_format(self.options[column]) for column in self.columns))
        of_inputs = [self.options[c] for c in self.columns if self.options[c].activation is not None]
        if self.layer.module is None and of_inputs:
            raise ValueError(
                f"option {of_inputs[0]} quantises the input of {self.layer.name!r}, whose weight a function uses, "
                "not a module: give it options without activation format"
            )
        kind, size = block_size(measurement.granularity)
        self.group = size if kind == "groups" else 0

    @cached_property
    def quantised(self) -> list[Tensor]:
        """The weight in every format, (out, in...) each."""
        return [self.weights.rows(self.layer, fmt) for fmt in self.formats]

    @cached_property
    def exact(self) -> Tensor:
        """The weight, (out, columns)."""
        return as_rows(self.parameter.detach(), self.layer).reshape(self.layer.weight_shape[0], -1)

    def block(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """(formats, rows, columns): ΔW."""
        exact = self.exact[rows].to(dtype)
        parts = [part[rows].reshape(exact.shape) for part in self.quantised]
        return torch.stack([part.to(dtype) for part in parts]).sub_(exact)

    def format_of(self, column: int) -> int:
        """Which format an option's weight has."""
        return self.formats.index(weight_format(self.options[column]))


@dataclass
class _Products:
    """The products of one capture."""

    capture: Capture
    needs: frozenset[Product]
    changes: _Changes

    def all(self) -> dict[Product, Tensor]:
        """(samples, cells, options) of each."""
        layer = self.capture.layer
        self.dtype = torch.float64 if self.changes.parameter.dtype == torch.float64 else torch.float32
        self.rows = layer.weight_shape[0]
        self.width = prod(layer.weight_shape[1:])
        per_row = -(-self.width // self.changes.group) if self.changes.group else 1
        if not self._input_options():
            self.needs = self.needs - {"input_absolute", *INPUT}
        self.found: dict[Product, Tensor] = {}
        for need in self.needs:
            cells = self.rows * per_row if need in WEIGHT else self.rows
            count = len(self.changes.formats) if need in WEIGHT else len(self.changes.options)
            shape = (self.capture.samples, cells, count)
            self.found[need] = torch.zeros(shape, dtype=self.dtype, device=self.changes.parameter.device)
        self._by_blocks()
        self._other_outputs()
        if "input_absolute" in self.needs:
            self._input_absolute()
        return {need: self._by_option(need) for need in self.needs}

    def _input_options(self) -> dict[Option, int]:
        """Column of each option that quantises the layer's input."""
        options = self.changes.options
        return {options[c]: c for c in self.changes.columns if options[c].activation is not None}

    def _by_blocks(self) -> None:
        capture, samples = self.capture, self.capture.samples
        weight_needs = [need for need in WEIGHT if need in self.needs]
        dense = [_DenseCall(call, self) for call in capture.calls if is_dense(call.module, call.parameter)]
        dense = dense if self.needs & {"output", *INPUT} else []
        if not weight_needs and not dense:
            return
        tokens = max((call.tokens for call in dense), default=0)
        widest = samples * max(self.width, tokens * len(self.changes.formats), 1)
        cheap = capture.calls and all(row_blocks_are_cheap(call) for call in capture.calls)
        for rows in _blocks(self.rows, max(1, BLOCK // widest) if cheap or not weight_needs else self.rows):
            change = self.changes.block(rows, self.dtype)
            for call in dense:
                call.add(rows, change)
            if weight_needs:
                gradient = capture.sample_gradients(rows).to(self.dtype)
                self._multiply(rows, gradient.reshape(samples, -1, self.width), change)

    def _multiply(self, rows: slice, gradient: Tensor, change: Tensor) -> None:
        """One product of (cells, samples, n) and (cells, n, formats) each; both factors are used up."""
        if self.capture.whole_gradient is not None:
            gradient = gradient.clone()
        left, right = in_groups(gradient, self.changes.group), in_groups(change, self.changes.group)
        per_row = left.shape[1] // (rows.stop - rows.start)
        cells = slice(rows.start * per_row, rows.stop * per_row)

        def multiplied() -> Tensor:
            return torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).transpose(0, 1)

        if "signed" in self.needs:
            self.found["signed"][:, cells] = multiplied()
        if "absolute" in self.needs:
            left.abs_(), right.abs_()
            self.found["absolute"][:, cells] = multiplied()
        if "squared" in self.needs:
            left.square_(), right.square_()
            self.found["squared"][:, cells] = multiplied()

    def _other_outputs(self) -> None:
        """Changes of outputs by calling the module with other weights and inputs, where it is not dense."""
        if not self.needs & {"output", *INPUT}:
            return
        for call in self.capture.calls:
            if is_dense(call.module, call.parameter):
                continue
            exact = call.apply(call.inputs).to(self.dtype)
            for column in self.changes.columns:
                option = self.changes.options[column]
                given = self.quantised_input(call, option.activation)
                if "output" in self.needs:
                    weight = from_rows(self.changes.quantised[self.changes.format_of(column)], self.capture.layer)
                    with swapped_data([call.parameter], weight.contiguous()):
                        change = call.apply(given).to(self.dtype).sub_(exact)
                    self._add_output(call, column, change, ("output",))
                if given is not call.inputs and self.needs & {*INPUT}:
                    self._add_output(call, column, call.apply(given).to(self.dtype).sub_(exact), INPUT)

    def _add_output(self, call: Call, column: int, change: Tensor, products: tuple[Product, ...]) -> None:
        weighted = change.mul_(call.gradient)
        for product in products:
            if product in self.needs:
                part = weighted if product == "input_signed" else weighted.square()
                self.found[product][..., column] += self._per_row(call, part)

    def _per_row(self, call: Call, values: Tensor) -> Tensor:
        """(samples, rows): sums over positions. An embedding's row is the entry that was looked up."""
        samples, layer = self.capture.samples, self.capture.layer
        if isinstance(call.module, torch.nn.Embedding):
            ids = call.inputs.reshape(samples, -1)
            per_row = values.new_zeros(samples, self.rows)
            return per_row.scatter_add_(1, ids, values.reshape(samples, ids.shape[1], -1).sum(2))
        last = values.movedim(1, -1) if layer.kind.startswith("conv") and values.ndim > 2 else values
        if last.shape[-1] != self.rows:
            raise ValueError(
                f"the output of {layer.name!r} must have a channel for each of the {self.rows} rows of its weight, "
                f"got {tuple(values.shape)}: use fisher or kl"
            )
        return by_sample(last, samples).sum(1)

    def _input_absolute(self) -> None:
        weight = self.changes.exact.to(self.dtype).square().sum(1)
        share = weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / len(weight))
        for call in self.capture.calls:
            slope = None
            for option, column in self._input_options().items():
                given = self.quantised_input(call, option.activation)
                if given is not call.inputs:
                    slope = _input_gradient(call) if slope is None else slope
                    change = (given.to(self.dtype) - call.inputs.to(self.dtype)).mul_(slope).abs_()
                    per_sample = change.reshape(self.capture.samples, -1).sum(1)
                    self.found["input_absolute"][..., column] += per_sample[:, None] * share

    def quantised_input(self, call: Call, fmt: NumberFormat | None) -> Tensor:
        """The call's input in a format, itself where there is none or the input is no number."""
        if fmt is None or not call.inputs.is_floating_point():
            return call.inputs
        return quantise_activation(call.inputs, fmt, self.capture.layer)

    def _by_option(self, need: Product) -> Tensor:
        found, changes = self.found[need], self.changes
        if need not in WEIGHT:
            weighted = changes.group and need != "output"
            return spread_over_groups(found, changes.exact, changes.group) if weighted else found
        if changes.columns == list(range(len(changes.options))) == [changes.format_of(c) for c in changes.columns]:
            return found
        result = found.new_zeros(*found.shape[:2], len(changes.options))
        for column in changes.columns:
            result[..., column] = found[..., changes.format_of(column)]
        return result


class _DenseCall:
    """One call of a dense layer: changes of its output for all formats in one product."""

    def __init__(self, call: Call, products: _Products) -> None:
        self.products, self.changes = products, products.changes
        self.dtype, samples = products.dtype, products.capture.samples
        self.inputs = by_sample(call.inputs, samples).to(self.dtype)
        self.gradient = by_sample(call.gradient, samples)
        self.tokens = self.inputs.shape[1]
        self.by_activation: dict[NumberFormat | None, list[int]] = {}
        for column in self.changes.columns:
            self.by_activation.setdefault(self.changes.options[column].activation, []).append(column)
        self.quantised = {
            fmt: by_sample(products.quantised_input(call, fmt), samples).to(self.dtype)
            for fmt in self.by_activation
            if fmt is not None
        }

    def add(self, rows: slice, change: Tensor) -> None:
        """Add a block of rows; `change` is ΔW, (formats, rows, columns)."""
        found, exact = self.products.found, self.changes.exact[rows].to(self.dtype)
        gradient = self.gradient[..., rows]
        for activation, columns in self.by_activation.items():
            given = self.quantised.get(activation, self.inputs) if activation is not None else self.inputs
            by_input = None if activation is None else (given - self.inputs) @ exact.T
            if by_input is not None and "input_signed" in found:
                found["input_signed"][:, rows, columns] += (by_input * gradient).sum(1)[..., None]
            if by_input is not None and "input_squared" in found:
                found["input_squared"][:, rows, columns] += (by_input * gradient).square_().sum(1)[..., None]
            if "output" in found:
                formats = [self.changes.format_of(column) for column in columns]
                wanted = change if formats == list(range(len(change))) else change[formats]
                outputs = given @ wanted.reshape(-1, wanted.shape[-1]).T
                outputs = outputs.reshape(*given.shape[:2], len(columns), -1)
                if by_input is not None:
                    outputs += by_input[:, :, None]
                squares = outputs.mul_(gradient[:, :, None]).square_().sum(1)
                found["output"][:, rows, columns] += squares.transpose(1, 2)


def _blocks(count: int, at_a_time: int) -> Iterator[slice]:
    return (slice(start, min(start + at_a_time, count)) for start in range(0, count, at_a_time))


def _input_gradient(call: Call) -> Tensor:
    """The loss's gradient with respect to the input of this call, through this layer only."""
    if is_dense(call.module, call.parameter):
        weight = call.parameter.detach().to(call.gradient.dtype)
        return call.gradient @ (weight if isinstance(call.module, torch.nn.Linear) else weight.T)
    with torch.enable_grad():
        given = call.inputs.detach().requires_grad_()
        output = call.apply(given)
        return torch.autograd.grad(output, given, call.gradient.to(output.dtype))[0].to(call.gradient.dtype)
