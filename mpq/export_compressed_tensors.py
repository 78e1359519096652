"""A plan as the `quantization_config` of compressed-tensors, which llm-compressor writes and vLLM reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mpq.exported_layers import (
    expert_modules,
    group_size,
    integer_refusal,
    is_unquantised,
    module_refusal,
    taken_layers,
)
from mpq.formats import CHANNEL, TENSOR, Integer, Minifloat, NumberFormat
from mpq.granularity import MINMAX
from mpq.layers import Layer, Network
from mpq.options import Option
from mpq.plan import Plan, weight_format
from mpq.routers import REASON as ROUTERS_KEEP

_BITS = (4, 8)
_HAS = (
    "compressed-tensors has, for vLLM, weights in int4, int8, uint4 and uint8 by channel or group, int8 and fp8_e4m3 "
    "with int8@token, int8@tensor, fp8_e4m3@token or fp8_e4m3@tensor inputs of the same kind"
)
EXPERTS_OF_A_BLOCK = re.compile(r"(.*\.)?experts\.(?=\d|gate|up|down)")
"""What the names of the experts of one block share."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def to_compressed_tensors(plan: Plan) -> dict[str, Any]:
    """The plan for `compressed_tensors.quantization.QuantizationConfig`, or llm-compressor's `QuantizationModifier`.

    One ``config_groups`` entry an option, whose targets are anchored regular expressions of module names; linear layers
    in a float format are listed under ``ignore``, since vLLM refuses a linear layer that is in neither. Each group says
    how it is packed, and where they differ the whole is ``mixed-precision``.

        QuantizationModifier(config_groups=c["config_groups"], ignore=c["ignore"])

    Scales are stored in the format of the model's weights: 16 bits, as plans count them, if those are fp16 or bf16.

    Its symmetric scale is the largest magnitude by (2^b − 1) / 2, the simulation's by 2^(b−1) − 1: codes differ, and
    only the size of the error agrees. For uint and fp8 the grids are the same; a bf16 model's codes are computed in
    bf16, which moves some.

    Checked with llm-compressor 0.14.0.1 and compressed-tensors 0.19.0 (`oneshot`, no calibration, random Llama of two
    layers): schemes on disk as planned, bytes within 0.2 %, error of the reloaded model's outputs within 5 % of the
    simulation's. The outputs themselves differ from the simulation's by 3 % of its error for uint and fp8 in fp32, by
    41 % in bf16, and by about all of it with int. Schemes and packed sizes with compressed-tensors 0.20.0 too. Static
    inputs (@tensor), experts and vLLM itself were not run.

    Experts are named one by one, as files have them: `mlp.experts.0.down_proj`, for Mixtral `experts.0.w2`. vLLM
    runs the experts of a block in one kernel, so all their parts need one option; `mpq.search(..., target=...)` ties
    them. Routers are ignored.

    Raises:
        ValueError: if a layer is split, no linear layer, has a format that vLLM does not load this way, or if layers
            that vLLM fuses (q, k and v; gate and up; the experts of a block) have different options.
    """
    groups: dict[str, dict[str, Any]] = {}
    ignored = []
    taken = taken_layers(plan, "compressed-tensors", refused_by_compressed_tensors)
    _check_fused(taken)
    _check_experts(taken)
    for layer, option in taken:
        experts = expert_modules(layer)
        if not is_unquantised(option):
            group = groups.setdefault(str(option), _group(option))
            group["targets"].append(f"re:^{experts or re.escape(layer.module or '')}$")
        elif experts is not None:
            ignored.append(f"re:^{experts}$")
        elif layer.kind == "linear" and layer.module is not None:
            ignored.append(layer.module)
        ignored += [alias.rpartition(".")[0] for alias in layer.aliases if layer.kind == "embedding"]
    skipped = plan.provenance.get("skipped", {})
    ignored += [name.removesuffix(".weight") for name, reason in skipped.items() if reason == ROUTERS_KEEP]
    packings = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else "mixed-precision",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": ignored,
    }


def refused_by_compressed_tensors(layer: Layer, option: Option) -> str | None:
    """Why compressed-tensors, as vLLM loads it, cannot hold an option of a layer; None if it can."""
    if is_unquantised(option):
        return None
    if expert_modules(layer) is None and (reason := module_refusal(layer)):
        return reason
    weight, activation = weight_format(option), option.activation
    if activation is not None:
        kinds = (activation.granularity is not None and activation.granularity.kind) in ("token", "tensor")
        if not kinds or activation.name != weight.name or activation.range != MINMAX or weight.bits != 8:
            return _HAS
    if isinstance(weight, Minifloat):
        held = weight.name == "fp8_e4m3" and weight.granularity in (TENSOR, CHANNEL) and weight.range == MINMAX
        return None if held and activation is not None else _HAS
    if weight.granularity == TENSOR or (activation is not None and group_size(option) > 0):
        return _HAS
    return integer_refusal(layer, option, _BITS, _HAS)


def _group(option: Option) -> dict[str, Any]:
    weight = weight_format(option)
    activation = None if option.activation is None else _activation(option.activation)
    if isinstance(weight, Minifloat):
        packing = "float-quantized"
    else:
        packing = "pack-quantized" if activation is None else "int-quantized"
    return {"targets": [], "weights": _weight(option), "input_activations": activation, "format": packing}


def _weight(option: Option) -> dict[str, Any]:
    weight, size = weight_format(option), group_size(option)
    strategy = {-1: "channel", 0: "tensor"}.get(size, "group")
    fields = {
        "num_bits": weight.bits,
        "type": "float" if isinstance(weight, Minifloat) else "int",
        "symmetric": isinstance(weight, Integer | Minifloat),
        "strategy": strategy,
        "dynamic": False,
    }
    return fields | ({"group_size": size} if strategy == "group" else {})


def _activation(fmt: NumberFormat) -> dict[str, Any]:
    strategy = fmt.granularity.kind if fmt.granularity is not None else "tensor"
    kind = "float" if isinstance(fmt, Minifloat) else "int"
    fields = {"num_bits": fmt.bits, "type": kind, "symmetric": True, "strategy": strategy}
    return fields | {"dynamic": strategy == "token"}


def _check_fused(taken: Iterable[tuple[Layer, Option]]) -> None:
    """Parts that vLLM fuses must have one format."""
    options = {layer.name: option for layer, option in taken}
    for name, option in options.items():
        parent, dot, leaf = name.rpartition(".")
        for parts in _FUSED:
            for part in parts if leaf in parts else ():
                other = f"{parent}{dot}{part}"
                if options.get(other, option) != option:
                    raise ValueError(
                        f"compressed-tensors cannot hold {option} ({name!r}) beside {options[other]} ({other!r}): "
                        'vLLM fuses the two, they need one option; search with ties="auto"'
                    )


def _check_experts(taken: Iterable[tuple[Layer, Option]]) -> None:
    """All experts of a block, which run in one kernel, must have one format."""
    found: dict[str, tuple[str, Option]] = {}
    for layer, option in taken:
        if block := EXPERTS_OF_A_BLOCK.match(layer.name):
            name, other = found.setdefault(block[0], (layer.name, option))
            if other != option:
                raise ValueError(
                    f"compressed-tensors cannot hold {option} ({layer.name!r}) beside {other} ({name!r}): vLLM runs "
                    "experts of a block in one kernel, which takes one option: search with target='compressed-tensors'"
                )


def fused_by_compressed_tensors(network: Network) -> list[tuple[str, ...]]:
    """Groups of layers that vLLM wants in one format, beyond those of the trace: the experts of each block."""
    groups: dict[str, list[str]] = {}
    for layer in network.layers:
        if block := EXPERTS_OF_A_BLOCK.match(layer.name):
            groups.setdefault(block[0], []).append(layer.name)
    return [tuple(group) for group in groups.values() if len(group) > 1]
