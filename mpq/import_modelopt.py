"""Read the `quant_cfg` list of NVIDIA's Model Optimizer: quantiser names and settings, of which the later wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mpq.import_autoround import stored_format
from mpq.imported_names import modules_of
from mpq.layers import Layer
from mpq.options import Option
from mpq.suggestions import did_you_mean

_DEFAULT = {"num_bits": 8}  # of a quantiser that is on and has no settings
_BLOCK_FLOATS: dict[Any, str] = {
    ((2, 1), 32, (8, 0)): "mxfp4",
    ((4, 3), 32, (8, 0)): "mxfp8_e4m3",
    ((5, 2), 32, (8, 0)): "mxfp8_e5m2",
    ((3, 2), 32, (8, 0)): "mxfp6_e3m2",
    ((2, 3), 32, (8, 0)): "mxfp6_e2m3",
    ((2, 1), 16, (4, 3)): "nvfp4",
}
_FLOATS: dict[Any, str] = {(4, 3): "fp8_e4m3", (5, 2): "fp8_e5m2"}
_FIELDS = {"quantizer_name", "cfg", "enable"}


def from_modelopt(data: Any, layers: Sequence[Layer]) -> dict[str, Option]:
    """{layer: option} of a configuration of `mtq.quantize`, or its ``quant_cfg`` list.

    Every entry sets the quantisers its pattern matches; ``enable`` false switches them off. Layers whose weight is not
    quantised stay as they are stored, and so do quantisers no entry names.

    Raises:
        ValueError: if it is no list (in old releases it was a dict), an entry has another form or names no layer's
            quantiser, or a setting has no counterpart here.
    """
    entries = data["quant_cfg"] if isinstance(data, Mapping) and "quant_cfg" in data else data
    if not isinstance(entries, list | tuple):
        raise ValueError(f"modelopt: quant_cfg must be a list of entries, got {type(entries).__name__}")
    modules = modules_of(layers)
    settings: dict[str, dict[str, Any] | None] = {}
    names = [f"{module}.{role}_quantizer" for module in modules for role in ("weight", "input")]
    for entry in entries:
        _apply(dict(entry), names, settings)
    found = {}
    for module, layer in modules.items():
        weight, inputs = (settings.get(f"{module}.{role}_quantizer") for role in ("weight", "input"))
        stored = stored_format(layer)
        activation = None if inputs is None else _format(inputs, f"{module}.input_quantizer", "input")
        chosen = Option(
            stored if weight is None else _format(weight, f"{module}.weight_quantizer", "weight"), activation
        )
        if layer.name not in found or weight is not None:
            found[layer.name] = chosen
    return found


def _apply(entry: dict[str, Any], names: list[str], settings: dict[str, dict[str, Any] | None]) -> None:
    if other := set(entry) - _FIELDS:
        raise ValueError(f"modelopt: an entry must have {', '.join(sorted(_FIELDS))}, got {sorted(other)[0]!r} as well")
    pattern = str(entry.get("quantizer_name", ""))
    matched = [name for name in names if fnmatchcase(name, pattern)]
    ours = pattern.endswith(("weight_quantizer", "input_quantizer"))
    if not matched and ours and "*" not in pattern:
        raise ValueError(f"modelopt: {pattern!r} is no layer's quantiser{did_you_mean(pattern, names)}")
    for name in matched:
        if not entry.get("enable", True):
            settings[name] = None
        elif entry.get("cfg") is not None:
            settings[name] = entry["cfg"]
        else:
            settings[name] = settings.get(name) or dict(_DEFAULT)


def _format(cfg: Any, name: str, role: str) -> str:
    if not isinstance(cfg, Mapping):
        raise ValueError(f"modelopt: {name!r} has several quantisers in a row, which has no counterpart here")
    bits = cfg.get("num_bits", 8)
    blocks = {str(key): value for key, value in (cfg.get("block_sizes") or {}).items()}
    width = blocks.get("-1")
    if isinstance(bits, list | tuple):
        kind = tuple(bits)
        scale = tuple(blocks.get("scale_bits") or ())
        if block := _BLOCK_FLOATS.get((kind, width, scale)):
            return block
        fmt = _FLOATS.get(kind)
    else:
        fmt = f"int{bits}"
    if fmt is None or cfg.get("unsigned") or blocks.get("scale_bits"):
        raise ValueError(f"modelopt: the settings of {name!r} have no counterpart here: {dict(cfg)}")
    return f"{fmt}@{_granularity(cfg, blocks, name, role)}"


def _granularity(cfg: Mapping[str, Any], blocks: Mapping[str, Any], name: str, role: str) -> str:
    if blocks and blocks.get("-1") is None and role == "input":
        return "token"
    if blocks:
        return f"group{int(blocks['-1'])}"
    axis = cfg.get("axis")
    if axis is None:
        return "tensor"
    if axis in (0, (0,), [0]) and role == "weight":
        return "channel"
    raise ValueError(f"modelopt: axis {axis!r} of {name!r} has no counterpart here: 0 is a scale a channel")
