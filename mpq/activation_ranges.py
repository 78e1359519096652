"""Static ranges of layer inputs, calibrated on data: min-max, percentile, least squared error, running min-max."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpq.batches import Batch, batches_of, call, model_inputs
from mpq.fake_quantize import SHRINK_FACTORS, Limits
from mpq.formats import MSE, TENSOR, MinMax, NumberFormat, Percentile, Range, UnsignedInteger
from mpq.granularity import MINMAX, parse_suffix
from mpq.grids import on_grid
from mpq.input_range import InputRange, has_static_range, input_channels
from mpq.layers import Layer
from mpq.plan import Entry, Plan
from mpq.rounding import divide
from mpq.surgery import check_model, evaluating, input_modules
from mpq.tasks import cloned


@dataclass(frozen=True)
class Running:
    """A moving average of each batch's min-max range, weight `momentum` on what was there.

        low ← m · low + (1 − m) · low of the batch,    high likewise;    the first batch as it is

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1, with momentum close to 1 over thousands of steps.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum:g}")

    def __str__(self) -> str:
        return f"running{self.momentum:g}"


Method = Range | Running


def calibrate_ranges(model: nn.Module, data: Any, plan: Plan, method: Method | str = "minmax") -> Plan:
    """The plan with static ranges for its quantised layer inputs, as `mpq.quantized` then uses them.

    What each layer reads is seen in the full-precision model, all calls and samples together. A format that names its
    own range (``int8@mse``) keeps to that; ``method`` is for the others. Inputs with a scale a token or a group, and
    formats without a range to choose (mxfp4, fp16), stay dynamic, as do lookups in embeddings.

        minmax         least and largest value of all data
        percentile99   of magnitudes, with a zero point of values: interpolated between order statistics, exact
        mse            min-max times the factor, of `mpq.fake_quantize.SHRINK_FACTORS`, with the least squared error
        running0.9     moving average of each batch's min-max (`Running`): the order of the batches matters

    Args:
        model: in full precision, the one the plan is for; comes back bit for bit.
        data: batches, as for `mpq.search`.
        plan: whose inputs are calibrated; ranges it has are found anew.
        method: one of these, as text or as an object.

    Cost: one pass over the data, a second one for percentile (keeps the values beyond the percentile) and mse (rounds
    every input 40 times).

    Raises:
        ValueError: if the method is unknown, plan and model do not fit, a layer's input is not finite, or no data
            reaches it.

    Example:
        >>> import mpq
        >>> model, x = nn.Sequential(nn.Linear(2, 3)), torch.tensor([[0.0, 6.0], [-1.0, 2.0]])
        >>> plan = Plan((Entry(mpq.trace(model, x).layers[0], mpq.options.Option("int8", "uint8")),), "")
        >>> found = calibrate_ranges(model, x, plan).entries[0].input_range
        >>> found.low, found.high
        ((-1.0,), (6.0,))
    """
    default = method_of(method)
    check_model(model, plan)
    batches = batches_of(data)
    observers = {e.layer.name: _observer(e, default) for e in plan.of_layers if _is_observed(model, e)}
    layers = [entry.layer for entry in plan.entries if entry.layer.name in observers]
    with evaluating(model), torch.no_grad():
        _observe(model, batches, layers, lambda layer, x: observers[layer.name].first(x), list(observers.values()))
        again = [layer for layer in layers if observers[layer.name].second is not None]
        if again:
            _observe(model, batches, again, lambda layer, x: observers[layer.name].look_again(x), [])
    entries = tuple(
        replace(e, input_range=observers[e.layer.name].range() if e.layer.name in observers else None)
        for e in plan.entries
    )
    if not observers:
        return plan
    return replace(plan, entries=entries, measured={}, provenance={**plan.provenance, "ranges": str(default)})


def method_of(method: Method | str) -> Method:
    """A method from its text.

    Raises:
        ValueError: if it is unknown.

    Example:
        >>> str(method_of("running0.99")), method_of("percentile99.9")
        ('running0.99', Percentile(p=99.9))
    """
    if not isinstance(method, str):
        return method
    if method.startswith("running"):
        try:
            return Running(float(method.removeprefix("running"))) if method != "running" else Running()
        except ValueError as error:
            raise ValueError(f"method must be running<momentum>, such as running0.9, got {method!r}") from error
    found = parse_suffix(method)
    if not isinstance(found, MinMax | MSE | Percentile):
        raise ValueError(f"method must be minmax, mse, percentile<p> or running<momentum>, got {method!r}")
    return found


def input_rows(activation: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
    """A layer's input as (scales, values): a row a channel, or all in one row; float32 or float64."""
    if fmt.granularity == TENSOR:
        rows = activation.reshape(1, -1)
    else:
        rows = activation.movedim(1 if layer.kind.startswith("conv") else -1, 0)
        rows = rows.reshape(rows.shape[0], -1)
    return rows if rows.dtype == torch.float64 else rows.float()


@contextmanager
def watched_inputs(model: nn.Module, layer: Layer, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """A layer whose inputs are shown, one call after the other."""

    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive((args[0] if args else kwargs.get("input", next(iter(kwargs.values())))).detach())

    with ExitStack() as stack:
        for module in input_modules(model, layer):
            stack.callback(module.register_forward_pre_hook(show, with_kwargs=True).remove)
        yield


def _is_observed(model: nn.Module, entry: Entry) -> bool:
    is_lookup = entry.layer.kind == "embedding" and not entry.layer.aliases
    return has_static_range(entry.activation) and not is_lookup and bool(input_modules(model, entry.layer))


def _observe(
    model: nn.Module,
    batches: list[Batch],
    layers: list[Layer],
    receive: Callable[[Layer, Tensor], None],
    observers: list[_Observer],
) -> None:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(watched_inputs(model, layer, lambda x, layer=layer: receive(layer, x)))  # type: ignore[misc]
        for batch in batches:
            call(model, cloned(model_inputs(model, batch)))
            for observer in observers:
                observer.end_of_batch()


class _Observer:
    """What one layer's input was: the extremes, and where the method asks for it more in a second pass."""

    def __init__(self, layer: Layer, fmt: NumberFormat, method: Method) -> None:
        self.layer, self.fmt, self.method = layer, fmt, method
        self.limits: Limits | None = None  # of all batches
        self.second: _Errors | _Tails | None = None
        self._batch: Limits | None = None
        self._values = 0  # of a scale
        self._tails = isinstance(method, Percentile)
        self._errors = isinstance(method, MSE)

    def first(self, activation: Tensor) -> None:
        rows = input_rows(activation, self.fmt, self.layer)
        if not rows.numel():
            return
        low, high = rows.amin(1), rows.amax(1)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ValueError(f"the input of {self.layer.name!r} must be finite to be calibrated, it is not")
        self._batch = (low, high) if self._batch is None else _wider(self._batch, (low, high))
        self._values += rows.shape[1]
        if self._tails or self._errors:
            self.second = _Tails(self) if self._tails else _Errors(self)

    def end_of_batch(self) -> None:
        if self._batch is not None:
            old, new = self.limits, self._batch
            if old is None:
                self.limits = new
            elif isinstance(self.method, Running):
                momentum = self.method.momentum
                self.limits = new[0].lerp(old[0], momentum), new[1].lerp(old[1], momentum)
            else:
                self.limits = _wider(old, new)
        self._batch = None

    def look_again(self, activation: Tensor) -> None:
        if activation.numel() and self.second is not None:
            self.second.look(input_rows(activation, self.fmt, self.layer))

    @property
    def values(self) -> int:
        return self._values

    def range(self) -> InputRange:
        if self.limits is None:
            raise ValueError(
                f"no data reaches {self.layer.name!r}: calibrate on data that does, or leave its input alone"
            )
        low, high = self.limits if self.second is None else self.second.limits()
        return InputRange(self.fmt, tuple(low.tolist()), tuple(high.tolist()), str(self.method))


def _observer(entry: Entry, default: Method) -> _Observer:
    fmt = entry.activation
    if fmt is None or not input_channels(entry.layer):
        raise ValueError(f"layer {entry.layer.name!r} has no input to calibrate")
    return _Observer(entry.layer, fmt, default if fmt.range == MINMAX else fmt.range)


def _wider(one: Limits, other: Limits) -> Limits:
    return torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])


class _Errors:
    """Squared errors of every shrink factor, relative to the extremes, which all data have given."""

    def __init__(self, observer: _Observer) -> None:
        self._observer = observer
        self._sums: Tensor | None = None  # (factors, scales)

    def look(self, rows: Tensor) -> None:
        low, high = self._ends(rows)
        amax = torch.maximum(-low, high)
        sums = [
            divide(on_grid(self._observer.fmt, rows, low * f, high * f) - rows, amax).double().square().sum(1)
            for f in SHRINK_FACTORS
        ]
        self._sums = torch.stack(sums) + (0 if self._sums is None else self._sums)

    def limits(self) -> Limits:
        if self._sums is None:
            raise ValueError("the data must be the same in both passes: give a list of batches")
        low, high = self._ends(torch.empty(0))
        factors = torch.tensor(SHRINK_FACTORS, dtype=torch.float64, device=self._sums.device)[self._sums.argmin(0)]
        return low[:, 0] * factors.to(low), high[:, 0] * factors.to(high)

    def _ends(self, rows: Tensor) -> Limits:
        low, high = self._observer.limits or (rows, rows)
        return low[:, None], high[:, None]


class _Tails:
    """The values beyond a percentile, of which there are few: enough to read the percentile itself exactly."""

    def __init__(self, observer: _Observer) -> None:
        self._observer = observer
        self._upper: Tensor | None = None  # (scales, kept), descending
        self._lower: Tensor | None = None

    def look(self, rows: Tensor) -> None:
        if isinstance(self._observer.fmt, UnsignedInteger):
            self._lower = self._kept(self._lower, -rows)
            self._upper = self._kept(self._upper, rows)
        else:
            self._upper = self._kept(self._upper, rows.abs())

    def limits(self) -> Limits:
        high = self._read(self._upper)
        return (-high if self._lower is None else -self._read(self._lower)), high

    @property
    def _position(self) -> float:
        method = self._observer.method
        return (method.p if isinstance(method, Percentile) else 100.0) / 100 * (self._observer.values - 1)

    def _kept(self, old: Tensor | None, new: Tensor) -> Tensor:
        both = new if old is None else torch.cat([old, new], 1)
        return both.topk(min(self._observer.values - int(self._position), both.shape[1]), dim=1).values

    def _read(self, tail: Tensor | None) -> Tensor:
        """Interpolated between the last kept value and the one above it."""
        if tail is None:
            raise ValueError("the data must be the same in both passes: give a list of batches")
        below, above = tail[:, -1], tail[:, max(tail.shape[1] - 2, 0)]
        return below.lerp(above, self._position - int(self._position))
