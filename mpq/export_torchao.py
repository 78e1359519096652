"""A plan as torchao's `FqnToConfig`, in the JSON form that `torchao.core.config.config_from_dict` reads."""

from __future__ import annotations

from typing import Any

from mpq.exported_layers import without_operators
from mpq.formats import CHANNEL, Float, Integer, Minifloat, NumberFormat
from mpq.granularity import MINMAX
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, weight_format

_SUPPORTED = (
    "torchao takes int2 to int8 weights with a scale a channel or a group, alone or with uint8@token inputs, "
    "int8/int8@token, fp8_e4m3 or fp8_e5m2 weights with a scale a channel, and unquantised layers"
)
_MAX_INT_BITS = 8
_FLOAT8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_PACKING = {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"}


def to_torchao(plan: Plan) -> dict[str, Any]:
    """The plan for torchao's `quantize_`, by module name.

    Integers become `IntxWeightOnlyConfig` (the largest magnitude of a group falls on the outermost code of its sign, so
    nothing is clipped), with uint8@token inputs `Int8DynamicActivationIntxWeightConfig`; int8/int8@token becomes
    `Int8DynamicActivationInt8WeightConfig`, floats of 8 bits `Float8WeightOnlyConfig`. Layers in fp32, fp16 and bf16
    are left out: torchao leaves them alone.

    Torchao's grid is not the simulation's: it divides the largest magnitude by 2^(b-1) where that is negative and by
    2^(b-1) - 1 where it is positive, the simulation always by the latter. Its error is the same or smaller.

    Apply it with

        quantize_(model, config_from_dict(mpq.export(plan, "torchao")), filter_fn=None)

    and look at the types afterwards: torchao skips what it cannot pack. Checked with torchao 0.18.

    Torchao gives each position of a convolution's kernel scales of its own, not one a channel, and fails on
    convolutions of one input channel, along one or three axes, and with floats: only those of 1 x 1 are taken.

    Raises:
        ValueError: if a layer is split, its weight is not a module's, or torchao has no config for its option.
    """
    configs = {}
    for entry in without_operators(plan, "torchao").entries:
        config = _config(entry)
        if config is not None:
            for name in (entry.layer.weight_name, *entry.layer.aliases):
                configs[name.rpartition(".")[0]] = config
    return _tagged("FqnToConfig", 1, fqn_to_config=configs)


def refused_by_torchao(layer: Layer, option: Option) -> str | None:
    """Why torchao cannot hold an option of a layer; None if it can."""
    try:
        _config(Entry(layer, option))
    except ValueError as error:
        return str(error)
    return None


def _config(entry: Entry) -> dict[str, Any] | None:
    layer, option = entry.layer, entry.choice
    if not isinstance(option, Option):
        raise ValueError(f"torchao takes one format a layer, {layer.name!r} is split: {option}")
    weight = weight_format(option)
    if isinstance(weight, Float) and option.activation is None:
        return None
    if layer.kind.startswith("conv_transpose") or layer.groups > 1:
        raise ValueError(
            f"torchao cannot run {layer.name!r}, a {layer.kind} in {layer.groups} groups, from quantised weights: "
            "pin it to fp32"
        )
    if layer.module is None:
        raise ValueError(
            f"torchao quantises modules, the weight of {layer.name!r} is used by a function: pin it to fp32"
        )
    if layer.kind.startswith("conv") and not _holds_convolution(layer, weight):
        raise ValueError(
            f"torchao scales every position of a kernel by itself, so that it cannot hold {option} ({layer.name!r}, a "
            f"{layer.kind}): of convolutions it holds those of 1 x 1 over several channels in int2 to int8 @channel; "
            "pin it to fp32"
        )
    return _for_option(layer, option, weight)


def _holds_convolution(layer: Layer, weight: NumberFormat) -> bool:
    """Whether a scale of every channel is what torchao gives a convolution; one input channel makes it fail."""
    _, channels, *kernel = layer.weight_shape
    per_channel = isinstance(weight, Integer) and weight.granularity == CHANNEL
    return kernel == [1, 1] and channels > 1 and per_channel


def _for_option(layer: Layer, option: Option, weight: NumberFormat) -> dict[str, Any]:
    if weight.range != MINMAX:
        raise ValueError(f"torchao scales weights by their largest magnitude, it cannot hold {option} ({layer.name!r})")
    activation = None if option.activation is None else str(option.activation)
    if activation is not None and layer.kind != "linear":
        raise ValueError(
            f"torchao quantises the inputs of linear layers, {layer.name!r} is a {layer.kind}: drop its input format"
        )
    if str(option) == "int8/int8@token":
        return _tagged("Int8DynamicActivationInt8WeightConfig", 2)
    if isinstance(weight, Integer) and weight.bits <= _MAX_INT_BITS and activation in (None, "uint8@token"):
        fields = _integer_weight(layer, weight)
        if activation is None:
            return _tagged("IntxWeightOnlyConfig", 2, **fields, intx_packing_format=_PACKING)
        weights = {f"weight_{key.removeprefix('weight_')}": value for key, value in fields.items()}
        return _tagged("Int8DynamicActivationIntxWeightConfig", 2, **weights, intx_packing_format=_PACKING)
    if (
        isinstance(weight, Minifloat)
        and weight.name in _FLOAT8
        and weight.granularity == CHANNEL
        and activation is None
    ):
        dtype = _enum("torch.dtype", _FLOAT8[weight.name])
        return _tagged("Float8WeightOnlyConfig", 2, weight_dtype=dtype, granularity=_tagged("PerRow", 1, dim=-1))
    raise ValueError(f"torchao cannot hold {option} ({layer.name!r}): {_SUPPORTED}")


def _integer_weight(layer: Layer, weight: NumberFormat) -> dict[str, Any]:
    granularity, columns = weight.granularity, layer.parameters // layer.weight_shape[0]
    if granularity is None or granularity.kind not in ("channel", "group"):
        raise ValueError(f"torchao cannot hold {weight} ({layer.name!r}): {_SUPPORTED}")
    if granularity.kind == "group" and columns % granularity.size:
        raise ValueError(
            f"torchao needs groups that divide the row, {weight} does not divide {columns} inputs of {layer.name!r}: "
            "pin that layer to a scale a channel"
        )
    by_group = _tagged("PerGroup", 1, group_size=granularity.size)
    return {
        "weight_dtype": _enum("torch.dtype", f"int{weight.bits}"),
        "granularity": _tagged("PerAxis", 1, axis=0) if granularity.kind == "channel" else by_group,
        "mapping_type": _enum("MappingType", "SYMMETRIC_NO_CLIPPING_ERR"),
        "scale_dtype": None,
    }


def _tagged(kind: str, version: int, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _enum(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}
