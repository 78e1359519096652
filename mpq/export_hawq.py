"""A plan as HAWQ's `bit_config`: {module: bits}."""

from __future__ import annotations

from collections.abc import Mapping

from mpq.exported_layers import integer_refusal, is_unquantised, taken_layers
from mpq.formats import CHANNEL, Integer
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Plan, weight_format
from mpq.suggestions import did_you_mean

_BITS = tuple(range(2, 9))
_HAS = "HAWQ has weights in int2 to int8 with a scale a channel, and inputs in int of any width with a scale a tensor"


def to_hawq(plan: Plan, *, names: Mapping[str, str] | None = None) -> dict[str, int]:
    """The plan as an entry of HAWQ's `bit_config_dict`, weights' bits by module.

    Bits of layer inputs have keys of their own in HAWQ (``quant_act``); they are not in a plan's modules, and stay what
    HAWQ's network has them at. HAWQ's kernels take 4 and 8 bits.

    Args:
        plan: what is exported.
        names: HAWQ's name of a layer, where it differs: ``{"layer1.0.conv1": "stage1.unit1.quant_convbn1"}``.

    Raises:
        ValueError: if a layer is split, not quantised or in a format that HAWQ lacks, or `names` has another layer.
    """
    taken = taken_layers(plan, "HAWQ", refused_by_hawq)
    known = [layer.name for layer, _ in taken]
    for name in names or {}:
        if name not in known:
            raise ValueError(f"names has {name!r}, the plan has no such layer{did_you_mean(name, known)}")
    return {(names or {}).get(layer.name, layer.name): weight_format(option).bits for layer, option in taken}


def refused_by_hawq(layer: Layer, option: Option) -> str | None:
    """Why HAWQ cannot hold an option of a layer; None if it can."""
    weight, activation = weight_format(option), option.activation
    if is_unquantised(option) or not isinstance(weight, Integer) or weight.granularity != CHANNEL:
        return _HAS
    if activation is not None and (not isinstance(activation, Integer) or str(activation.granularity) != "tensor"):
        return _HAS
    return integer_refusal(layer, option, _BITS, _HAS)
