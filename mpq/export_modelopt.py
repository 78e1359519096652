"""A plan as the `quant_cfg` of NVIDIA's Model Optimizer: a list of quantiser names, of which the later wins."""

from __future__ import annotations

from typing import Any

from mpq.exported_layers import group_size, integer_refusal, is_unquantised, module_refusal, taken_layers
from mpq.formats import CHANNEL, TENSOR, Integer, NumberFormat
from mpq.granularity import MINMAX
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Plan, weight_format

_KINDS = ("linear", "conv1d", "conv2d", "conv3d")
_BITS = tuple(range(2, 9))
_HAS = (
    "Model Optimizer has weights in int2 to int8, fp8_e4m3@tensor and fp8_e4m3@channel, and inputs in int8@tensor and "
    "fp8_e4m3@tensor"
)
_INPUTS: dict[str, Any] = {"int8@tensor": 8, "fp8_e4m3@tensor": [4, 3]}
_OFF = {"quantizer_name": "*", "enable": False}


def to_modelopt(plan: Plan) -> dict[str, Any]:
    """The plan for `modelopt.torch.quantization.quantize(model, config, forward_loop)`.

    The list starts with every quantiser off, so layers in a float format stay as they are. ``num_bits`` is an integer,
    or exponent and mantissa bits of a float; ``axis`` 0 is a scale a channel, ``block_sizes`` groups along the row.

    Integer weights are rounded as in the simulation but for scales, which stay in fp32, and for the most negative
    code, which is not used. The algorithm is ``max``: no search for scales, as in the plan. Ranges of inputs are
    those of the forward loop. Checked with nvidia-modelopt 0.47.

    In a JSON file the key −1 of ``block_sizes`` becomes a text; `int` it when you read one.

    Raises:
        ValueError: if a layer is split, no linear layer or convolution, or has a format that Model Optimizer lacks.
    """
    entries: list[dict[str, Any]] = [dict(_OFF)]
    for layer, option in taken_layers(plan, "Model Optimizer", refused_by_modelopt):
        if is_unquantised(option):
            continue
        entries.append({"quantizer_name": f"{layer.module}.weight_quantizer", "cfg": _weight(option), "enable": True})
        if option.activation is not None:
            cfg = {"num_bits": _INPUTS[_input_name(option.activation)], "axis": None}
            entries.append({"quantizer_name": f"{layer.module}.input_quantizer", "cfg": cfg, "enable": True})
    return {"quant_cfg": entries, "algorithm": "max"}


def refused_by_modelopt(layer: Layer, option: Option) -> str | None:
    """Why Model Optimizer cannot hold an option of a layer; None if it can."""
    if is_unquantised(option):
        return None
    if reason := module_refusal(layer, _KINDS):
        return reason
    weight, activation = weight_format(option), option.activation
    if activation is not None and (_input_name(activation) not in _INPUTS or activation.range != MINMAX):
        return _HAS
    if not isinstance(weight, Integer):
        held = weight.name == "fp8_e4m3" and weight.granularity in (TENSOR, CHANNEL) and weight.range == MINMAX
        return None if held else _HAS
    if group_size(option) > 0 and layer.kind != "linear":
        return f"its groups run along the last axis, a row of {layer.name!r} has more: take a scale a channel"
    return integer_refusal(layer, option, _BITS, _HAS)


def _weight(option: Option) -> dict[str, Any]:
    weight = weight_format(option)
    bits: Any = weight.bits if isinstance(weight, Integer) else [4, 3]
    size = group_size(option)
    if size > 0:
        return {"num_bits": bits, "block_sizes": {-1: size}}
    return {"num_bits": bits, "axis": 0 if size < 0 else None}


def _input_name(fmt: NumberFormat) -> str:
    """Name and granularity, without the format of the scale: Model Optimizer's are fp32."""
    return f"{fmt.name}@{fmt.granularity}"
