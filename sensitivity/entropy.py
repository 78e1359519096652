"""Entropy: how many bits of information quantisation takes from a weight or a feature map; QuantMCU's score."""

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
from mpq.expert_units import granularity_in
from mpq.formats import Float, NumberFormat
from mpq.layers import Layer, block_size
from mpq.options import Option
from mpq.plan import weight_format
from mpq.progress import track
from mpq.quantizer import quantised_rows
from mpq.surgery import input_modules, layer_parameters, quantise_activation
from mpq.weight_view import as_rows

from .measurement import Measurement, ScoreArray, Scores
from .quantised_levels import codes_of_activation, codes_of_weight, entropy_of_levels

Kind = Literal["value-driven", "activation", "weight"]
REFERENCE_BITS = 8
_FULL_BITS = {"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64}


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """QuantMCU's value-driven score, and the entropies it is made of.

        value-driven:  score(l, o) = λ Ω - (1 - λ) Φ
        Ω = (H(l, 8) - H(l, o)) / H(l, 8)      Φ = (B(l, 8) - B(l, o)) / max_k B(k, 8)
        H = -Σ_k p_k log2 p_k over the levels that the layer's input takes      B = MACs · input bits · weight bits
        activation, weight:  score(l, o) = max(0, H(l, 8) - H(l, o)) of the layer's input, of its weight

    QuantMCU (arXiv:2401.13714) maximises -λ Ω + (1 - λ) Φ with Ω from entropy and Φ from bit operations; their exact
    form, the denominator of Φ and λ = 0.6 are our reading, not established. H(l, 8) is that of `int8`, B(l, 8) has 8
    bits of both. Levels are those of the quantiser that is deployed: of inputs, rounding with each batch's range.
    Entropy is taken a sample and averaged. An input that stays in full precision loses no entropy (Ω = 0); its bit
    operations count, so that value-driven is 0 at 8 bits and above 0 beyond. Embeddings look up: there is no input.

    When to use: value-driven for feature maps on a microcontroller, where the trade of bits against computation is
    part of the score: λ = 0 takes the fewest bits, λ = 1 eight. When not: under a budget, which trades by itself; and
    entropy says nothing about the loss.

    Args:
        kind: "value-driven", "activation" or "weight".
        trade_off: λ, from 0 (computation alone) to 1 (entropy alone).

    Cost: inputs: one forward, and quantises every input once a format. Weights: quantises every weight once a format,
    no data. Standard errors are over samples, 0 for weights. Units: layers for inputs, any for weights.

    Example:
        Values in four equal parts on the levels of two bits hold two bits; at eight they hold no more, so nothing is
        lost:

        >>> import mpq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 1, bias=False))
        >>> model[0].weight.data = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0]])
        >>> space, data = mpq.SearchSpace(["uint2", "int2"]), [torch.rand(4, 8)]
        >>> network = mpq.trace(model, data[0])
        >>> frame = mpq.sensitivity.estimate(model, data, network, space, Entropy(kind="weight"), progress=False)
        >>> frame["sensitivity"].round(3).tolist()
        [0.0, 1.0]
    """

    kind: Kind = "value-driven"
    trade_off: float = 0.6

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not 0 <= self.trade_off <= 1:
            raise ValueError(f"trade_off must lie in [0, 1], got {self.trade_off:g}")

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option; the measure is "score".

        Raises:
            ValueError: if inputs are asked for of a weight that a function uses, of units finer than layers, or of a
                format whose levels cannot be told.
        """
        if self.kind == "weight":
            mean = _of_weights(measurement)
            return Scores(mean, 0 * mean, "score")
        _check_inputs(measurement, self.kind)
        total = np.zeros((2, len(measurement.units), len(measurement.options)))
        batches = range(len(measurement.batches))

        def sums_of(index: int) -> NDArray[np.float64]:
            return measurement.pieces.get(f"batch {index}", partial(self._of_batch, measurement, index))

        shown = track(batches, "entropy", shown=measurement.progress)
        for _, sums in zip(shown, measurement.ranks.shared(batches, sums_of), strict=True):
            total += sums
        samples = samples_in(measurement.batches)
        mean = total[0] / samples
        variance = np.maximum(total[1] / samples - mean**2, 0) / max(samples - 1, 1)
        absent = [[not measurement.is_candidate(x, o) for o in measurement.options] for x in measurement.network.layers]
        mean[np.array(absent)] = np.nan
        return Scores(mean, np.sqrt(variance) + 0 * mean, "score")

    def _of_batch(self, measurement: Measurement, index: int) -> NDArray[np.float64]:
        """(2, layers, options): sums over samples of scores and their squares."""
        entropies = _input_entropies(measurement, index)
        reference, found = entropies[..., :1], entropies[..., 1:]
        lost = torch.where(found.isnan(), 0, reference - found)
        if self.kind == "activation":
            scores = lost.clamp_min(0)
        else:
            relative = lost / reference.masked_fill(reference == 0, 1)
            scores = self.trade_off * relative - (1 - self.trade_off) * _computation_saved(measurement)
        return torch.stack([scores.sum(0), scores.square().sum(0)]).numpy()


def _check_inputs(measurement: Measurement, kind: str) -> None:
    if measurement.granularity != "layer":
        raise ValueError(
            f"entropy of kind {kind!r} knows whole inputs, which all units of a layer share, got granularity "
            f"{measurement.granularity!r}: use granularity='layer' or kind='weight'"
        )
    for layer in measurement.network.layers:
        if layer.module is None:
            raise ValueError(
                f"entropy of kind {kind!r} watches modules, the weight of {layer.name!r} is used by a function: "
                "use kind='weight'"
            )


def _computation_saved(measurement: Measurement) -> Tensor:
    """(layers, options): Φ."""
    layers, full = measurement.network.layers, _FULL_BITS.get(measurement.network.dtype, 32)
    macs = torch.tensor([layer.macs for layer in layers], dtype=torch.float64)
    bits = [_bits(option.activation, full) * _bits(option.weight, full) for option in measurement.options]
    saved = 1 - torch.tensor(bits, dtype=torch.float64) / REFERENCE_BITS**2
    return macs[:, None] / macs.max().clamp_min(1) * saved


def _bits(fmt: NumberFormat | None, full: int) -> int:
    return full if fmt is None else fmt.bits


def _input_entropies(measurement: Measurement, index: int) -> Tensor:
    """(samples, layers, 1 + options): H of the reference and of every option, NaN where there is nothing to lose."""
    batch = measurement.batches[index]
    formats = [Option("int8", "int8").activation, *(option.activation for option in measurement.options)]
    samples = batch_size(batch)
    total = torch.zeros(samples, len(measurement.network.layers), len(formats), dtype=torch.float64)
    calls = torch.zeros(len(measurement.network.layers), dtype=torch.float64)

    @torch.no_grad()
    def watch(position: int, layer: Layer, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs["input" if "input" in kwargs else next(iter(kwargs))]
        if given.is_floating_point():
            found = [_entropies(given, fmt, layer, samples) for fmt in formats]
            total[:, position] += torch.stack(found, 1)
            calls[position] += 1

    with ExitStack() as stack, torch.no_grad():
        for position, layer in enumerate(measurement.network.layers):
            for module in input_modules(measurement.model, layer):
                hook = partial(watch, position, layer)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        measurement.task.run(measurement.model, batch)
    return total / calls.clamp_min(1)[:, None]


def _entropies(given: Tensor, fmt: NumberFormat | None, layer: Layer, samples: int) -> Tensor:
    """(samples,) H in bits; of all samples together where they cannot be told apart."""
    if fmt is None or isinstance(fmt, Float):
        return torch.full((samples,), torch.nan, dtype=torch.float64)
    exact = given if given.dtype == torch.float64 else given.float()
    codes = codes_of_activation(quantise_activation(exact, fmt, layer), fmt, layer).cpu()
    if codes.shape[0] % samples:
        return entropy_of_levels(codes.flatten()).expand(samples)
    owner = torch.arange(samples)[:, None].expand(-1, codes.numel() // samples)
    return entropy_of_levels(codes.reshape(-1), owner.reshape(-1))


def _of_weights(measurement: Measurement) -> ScoreArray:
    """(units, options): bits of entropy a value that a weight loses against 8 bits."""
    layers = measurement.network.layers
    rows = track(range(len(layers)), "weight entropy", shown=measurement.progress)
    return np.concatenate([_weight_scores(measurement, layers[index]) for index in rows])


@torch.no_grad()
def _weight_scores(measurement: Measurement, layer: Layer) -> ScoreArray:
    rows = as_rows(layer_parameters(measurement.model, layer)[0].detach(), layer)
    exact = rows if rows.dtype == torch.float64 else rows.float()
    cut = granularity_in(layer, measurement.granularity)
    owner = _unit_of_each_weight(layer, cut)

    def entropy(fmt: NumberFormat) -> NDArray[np.float64]:
        quantised = quantised_rows(exact, fmt, layer, cut, measurement.quantizer)
        codes = codes_of_weight(quantised.reshape(rows.shape[0], -1), fmt, cut)
        return entropy_of_levels(codes.reshape(-1).cpu(), owner).numpy()

    reference = entropy(weight_format(Option("int8")))
    columns = []
    for option in measurement.options:
        fmt = weight_format(option)
        if not measurement.is_candidate(layer, option):
            columns.append(np.full(len(reference), np.nan))
        elif isinstance(fmt, Float):
            columns.append(np.zeros(len(reference)))
        else:
            columns.append(np.maximum(reference - entropy(fmt), 0))
    return np.stack(columns, 1)


def _unit_of_each_weight(layer: Layer, granularity: str) -> Tensor:
    """(weights,): the unit of every weight, in the order of the layer's units."""
    rows, columns = layer.weight_shape[0], layer.parameters // layer.weight_shape[0]
    kind, size = block_size(granularity)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    if kind == "layer":
        return torch.zeros(rows * columns, dtype=torch.long)
    if kind == "rows":
        return (row // size).expand(rows, columns).reshape(-1)
    return (row * -(-columns // size) + column // size).reshape(-1)
