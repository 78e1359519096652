"""A plan as calls of Quanto's `quantize`: one weight type and the modules that take it, one after the other."""

from __future__ import annotations

from typing import Any

from mpq.exported_layers import is_unquantised, module_refusal, taken_layers
from mpq.formats import CHANNEL, Integer, Minifloat, UnsignedInteger
from mpq.granularity import MINMAX, Granularity
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Plan, weight_format

_HAS = (
    "Quanto has weights in int8, fp8_e4m3 and fp8_e5m2 with a scale a channel, uint2 and uint4 with the groups it "
    "chooses itself, and leaves inputs alone"
)
_FLOATS = {"fp8_e4m3": "qfloat8_e4m3fn", "fp8_e5m2": "qfloat8_e5m2"}
_PACKED_BITS = (2, 4)
_GROUP, _STEP = 128, 32


def to_quanto(plan: Plan) -> dict[str, Any]:
    """The plan for `optimum.quanto.quantize`, one call an entry of ``calls``.

    Apply it with

        for call in exported["calls"]:
            quantize(model, **call)
        freeze(model)

    Quanto's qint4 and qint2 have a zero point, so they are this package's uint4 and uint2, in groups of 128 columns of
    the row, or where that does not divide it of 96, 64 or 32; below that a scale a channel. It
    stores scales and zero points in the format of the model's weights, so uint4@group128 takes 4.25 bits in fp16 where
    the plan counts 4.16. Checked with optimum-quanto 0.2.7.

    Raises:
        ValueError: if a layer is split, no linear layer or 2-D convolution, or has a format that Quanto lacks.
    """
    calls: dict[str, list[str]] = {}
    for layer, option in taken_layers(plan, "Quanto", refused_by_quanto):
        if not is_unquantised(option):
            calls.setdefault(_qtype(option), []).append(layer.module or "")
    return {"calls": [{"weights": qtype, "include": names} for qtype, names in calls.items()]}


def refused_by_quanto(layer: Layer, option: Option) -> str | None:
    """Why Quanto cannot hold an option of a layer; None if it can."""
    if is_unquantised(option):
        return None
    if reason := module_refusal(layer, ("linear", "conv2d")):
        return reason
    weight = weight_format(option)
    if option.activation is not None or weight.range != MINMAX:
        return _HAS
    if isinstance(weight, UnsignedInteger) and weight.bits in _PACKED_BITS:
        own = groups_of(layer)
        return (
            None if weight.granularity == own else f"its groups in {layer.name!r} are @{own}: write {weight.name}@{own}"
        )
    eight = (isinstance(weight, Integer) and weight.bits == 8) or weight.name in _FLOATS
    return None if eight and weight.granularity == CHANNEL else _HAS


def groups_of(layer: Layer) -> Granularity:
    """What shares a scale in Quanto's packed types: at most 128 columns that divide the row.

    Example:
        >>> [groups_of(Layer("fc", "linear", (4, n), 4 * n, 0, (1, n), (1, 4))) for n in (64, 576, 1024)]
        [channel, group96, group128]
    """
    columns = layer.parameters // layer.weight_shape[0]
    size = _GROUP
    while columns % size and size > _STEP:
        size -= _STEP
    return Granularity("group", size) if columns > _GROUP and columns % size == 0 else CHANNEL


def _qtype(option: Option) -> str:
    weight = weight_format(option)
    return _FLOATS[weight.name] if isinstance(weight, Minifloat) else f"qint{weight.bits}"
