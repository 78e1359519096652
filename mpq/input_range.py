"""`InputRange`: the static range of a layer's input, from calibration; without one every batch has its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpq.formats import NumberFormat
from mpq.granularity import CHANNEL, TENSOR
from mpq.layers import Layer


@dataclass(frozen=True)
class InputRange:
    """The range that the scale of a layer's input covers: one of the whole tensor, or one a channel.

    Args:
        fmt: the activation format it was calibrated for.
        low: lower ends: one, or one a channel of the input.
        high: upper ends, as many.
        method: how it was found: ``minmax``, ``mse``, ``percentile99.9``, ``running0.99``.

    Raises:
        ValueError: if the format has no static range, there are not as many lower as upper ends, or an end is not
            finite or below its lower end.

    Example:
        >>> from mpq.formats import parse
        >>> InputRange(parse("uint8@tensor"), (0.0,), (6.0,), "minmax").high
        (6.0,)
    """

    fmt: NumberFormat
    low: tuple[float, ...]
    high: tuple[float, ...]
    method: str

    def __post_init__(self) -> None:
        if not has_static_range(self.fmt):
            raise ValueError(f"format {self.fmt} has no static range: only scales a tensor or a channel can be fixed")
        if len(self.low) != len(self.high) or not self.low or (self.fmt.granularity == TENSOR and len(self.low) > 1):
            raise ValueError(
                f"the range of {self.fmt} must have one end below and one above for every scale, "
                f"got {len(self.low)} and {len(self.high)}"
            )
        for low, high in zip(self.low, self.high, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"a range of {self.fmt} must be finite and go upwards, got {low:g} to {high:g}")

    def check(self, layer: Layer, fmt: NumberFormat | None) -> None:
        """Check that the range is for a layer's input in a format.

        Raises:
            ValueError: if it is for another format or another number of channels.
        """
        if fmt != self.fmt:
            raise ValueError(
                f"the input range of {layer.name!r} was calibrated for {self.fmt}, the layer takes {fmt}: "
                "calibrate again with mpq.activation_ranges.calibrate_ranges"
            )
        channels = input_channels(layer)
        if self.fmt.granularity == CHANNEL and len(self.low) != channels:
            raise ValueError(
                f"the input range of {layer.name!r} must have {channels} channels, those of its input "
                f"{layer.input_shape}, got {len(self.low)}"
            )


def has_static_range(fmt: NumberFormat | None) -> bool:
    """Whether a layer input's scales can be fixed: those of a tensor or a channel can, a token's or a group's not.

    Tokens come and go, so theirs are always found as they come; formats without a range to choose have none to fix.

    Example:
        >>> from mpq.formats import parse
        >>> [has_static_range(parse(text)) for text in ("int8@tensor", "int8@channel", "int8@token", "mxfp4", "fp16")]
        [True, True, False, False, False]
    """
    return fmt is not None and "range" in fmt.takes and fmt.granularity in (TENSOR, CHANNEL)


def input_channels(layer: Layer) -> int:
    """Channels of a layer's input: its second axis for a convolution, else its last."""
    return layer.input_shape[1 if layer.kind.startswith("conv") else -1]
