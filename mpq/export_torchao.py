"""A plan as torchao's `FqnToConfig`, in the JSON form that `torchao.core.config.config_from_dict` reads."""

from __future__ import annotations

from typing import Any

from mpq.formats import Float, Integer, Minifloat, NumberFormat
from mpq.options import Option
from mpq.plan import Entry, Plan, weight_format

_SUPPORTED = (
    "torchao takes int2 to int8 weights with a scale a channel or a group, alone or with int8@token inputs, "
    "fp8_e4m3 or fp8_e5m2 weights with a scale a channel, and unquantised layers"
)
_MAX_INT_BITS = 8


def to_torchao(plan: Plan) -> dict[str, Any]:
    """The plan for torchao's `quantize_`, by module name.

    Integers become `IntxWeightOnlyConfig` (the largest magnitude of a group falls on the outermost code of its sign, so
    nothing is clipped), with int8@token inputs `Int8DynamicActivationIntxWeightConfig`; floats of 8 bits
    `Float8WeightOnlyConfig`; fp32, fp16 and bf16 layers are left out, as torchao leaves them alone.

    Apply it with

        quantize_(model, config_from_dict(mpq.export(plan, "torchao")), filter_fn=None)

    and look at the types afterwards: torchao skips what it cannot pack. Checked with torchao 0.18.

    Raises:
        ValueError: if a layer is split, its weight is not a module's, or torchao has no config for its option.
    """
    configs = {}
    for entry in plan.entries:
        config = _config(entry)
        if config is not None:
            for name in (entry.layer.weight_name, *entry.layer.aliases):
                configs[name.rpartition(".")[0]] = config
    return _tagged("FqnToConfig", 1, fqn_to_config=configs)


def _config(entry: Entry) -> dict[str, Any] | None:
    layer, option = entry.layer, entry.choice
    if not isinstance(option, Option):
        raise ValueError(f"torchao takes one format a layer, {layer.name!r} is split: {option}")
    weight = weight_format(option)
    if isinstance(weight, Float) and option.activation is None:
        return None
    if layer.module is None:
        raise ValueError(
            f"torchao quantises modules, the weight of {layer.name!r} is used by a function: pin it to fp32"
        )
    return _for_option(layer.name, option, weight, layer.parameters // layer.weight_shape[0])


def _for_option(name: str, option: Option, weight: NumberFormat, columns: int) -> dict[str, Any]:
    activation = None if option.activation is None else str(option.activation)
    if isinstance(weight, Integer) and weight.bits <= _MAX_INT_BITS and activation in (None, "int8@token"):
        fields = _integer_weight(name, weight, columns)
        if activation is None:
            return _tagged("IntxWeightOnlyConfig", 2, **fields)
        return _tagged(
            "Int8DynamicActivationIntxWeightConfig",
            2,
            **{
                key if key.startswith("intx") else f"weight_{key.removeprefix('weight_')}": v
                for key, v in fields.items()
            },
            act_mapping_type=_enum("MappingType", "SYMMETRIC"),
        )
    if isinstance(weight, Minifloat) and str(weight) in ("fp8_e4m3@channel", "fp8_e5m2@channel") and activation is None:
        dtype = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[weight.name]
        row = _tagged("PerRow", 1, dim=-1)
        return _tagged("Float8WeightOnlyConfig", 2, weight_dtype=_enum("torch.dtype", dtype), granularity=row)
    raise ValueError(f"torchao cannot hold {option} ({name!r}): {_SUPPORTED}")


def _integer_weight(name: str, weight: NumberFormat, columns: int) -> dict[str, Any]:
    granularity = weight.granularity
    if granularity is not None and granularity.kind == "group":
        if columns % granularity.size:
            raise ValueError(
                f"torchao needs groups that divide the row, {weight} does not divide {columns} inputs of {name!r}: "
                "pin that layer to a scale a channel"
            )
        along = _tagged("PerGroup", 1, group_size=granularity.size)
    elif granularity is not None and granularity.kind == "channel":
        along = _tagged("PerAxis", 1, axis=0)
    else:
        raise ValueError(f"torchao cannot hold {weight} ({name!r}): {_SUPPORTED}")
    return {
        "weight_dtype": _enum("torch.dtype", f"int{weight.bits}"),
        "granularity": along,
        "mapping_type": _enum("MappingType", "SYMMETRIC_NO_CLIPPING_ERR"),
        "scale_dtype": None,
        "intx_packing_format": _enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
    }


def _tagged(kind: str, version: int, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _enum(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}
