"""A plan as AutoRound's `layer_config`, by module name."""

from __future__ import annotations

from typing import Any

from mpq.exported_layers import group_size, integer_refusal, is_unquantised, module_refusal, taken_layers
from mpq.formats import MX, NVFP4, Integer
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Plan, weight_format

_BITS = (2, 3, 4, 8)
_HAS = (
    "AutoRound has weights in int or uint of 2, 3, 4 and 8 bits, mxfp4, mxfp8_e4m3 and nvfp4, alone or with int8@token "
    "inputs beside int weights"
)
_FLOATS = {"mxfp4": ("mx_fp", 4, 32), "mxfp8_e4m3": ("mx_fp", 8, 32), "nvfp4": ("nv_fp", 4, 16)}
_DYNAMIC_INT8 = {
    "act_bits": 8, "act_data_type": "int", "act_sym": True, "act_dynamic": True, "act_group_size": -1,
}  # fmt: skip


def to_autoround(plan: Plan) -> dict[str, Any]:
    """The plan for `AutoRound(model, tokenizer, layer_config=…)`, a dict a module.

    Symmetric integers are ``sym=True``, those with a zero point ``sym=False``; a scale a channel is ``group_size=-1``.
    Layers in a float format are there with 16 bits, since AutoRound gives its default scheme to every linear layer that
    `layer_config` does not name.

    Its packed file keeps a zero point of b bits a group for symmetric integers too, which the plan does not count.

    AutoRound's symmetric grid is not the simulation's: its scale is the value of largest magnitude by 2^(b−1), sign
    included. Its rounding is then trained, so the simulation is an upper estimate of its error. Checked with 0.16.1.

    Raises:
        ValueError: if a layer is split, no linear layer, or has a format that AutoRound lacks.
    """
    return {layer.module or "": _scheme(option) for layer, option in _taken(plan)}


def _taken(plan: Plan) -> list[tuple[Layer, Option]]:
    """Layers with an entry: embeddings in full precision need none."""
    taken = taken_layers(plan, "AutoRound", refused_by_autoround)
    return [(layer, option) for layer, option in taken if layer.kind == "linear" and layer.module is not None]


def refused_by_autoround(layer: Layer, option: Option) -> str | None:
    """Why AutoRound cannot hold an option of a layer; None if it can."""
    if is_unquantised(option):
        return None
    if reason := module_refusal(layer):
        return reason
    weight, activation = weight_format(option), str(option.activation or "")
    if isinstance(weight, MX | NVFP4):
        return None if weight.name in _FLOATS and not activation else _HAS
    if activation not in ("", "int8@token") or (activation and not isinstance(weight, Integer)):
        return _HAS
    return integer_refusal(layer, option, _BITS, _HAS)


def _scheme(option: Option) -> dict[str, Any]:
    if is_unquantised(option):
        return {"bits": 16, "act_bits": 16, "data_type": "float"}
    weight = weight_format(option)
    if weight.name in _FLOATS:
        kind, bits, size = _FLOATS[weight.name]
        return {"bits": bits, "group_size": size, "sym": True, "data_type": kind, "act_bits": 16}
    activation = _DYNAMIC_INT8 if option.activation is not None else {"act_bits": 16}
    symmetric = isinstance(weight, Integer)
    fields = {"bits": weight.bits, "group_size": group_size(option), "sym": symmetric, "data_type": "int"}
    return {**fields, **activation}
