"""A plan as GPTQModel's `QuantizeConfig`: the most frequent option, and `dynamic` for the layers that differ."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from mpq.exported_layers import group_size, integer_refusal, is_unquantised, module_refusal, taken_layers
from mpq.formats import Integer
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Plan, weight_format

_BITS = (2, 3, 4, 8)
_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
_HAS = (
    "GPTQModel has weights in int or uint of 2, 3, 4 and 8 bits with a scale a channel or a group of "
    f"{', '.join(map(str, _GROUPS[1:]))}, and leaves inputs alone"
)


def to_gptqmodel(plan: Plan) -> dict[str, Any]:
    """The plan for `gptqmodel.QuantizeConfig(**plan)`.

    ``bits``, ``group_size`` and ``sym`` are those most weights take. ``dynamic`` has ``+:^module$`` for the others and
    ``-:^module$``, which GPTQModel leaves as they are, for layers in a float format. ``act_group_aware``, its order of
    columns, is on by default there and refuses a scale a channel, so it is said for each: on for groups alone.

    Its files have, beside what a plan counts, 4 bytes an input of each layer and, for int, a zero point as wide as a
    value beside each scale: 0.8 % more in int4@group128, 2.8 % in int4@group32. GPTQ chooses codes by calibration data,
    so its weights are not those simulated.

    Checked with GPTQModel 7.7.0 on CPU, a random Llama of two layers in int2, int3, int4, uint4 and uint8: bits, groups
    and bytes of every packed layer, layers left in fp32, and the reloaded model, whose outputs on fresh data are those
    of the unpacked weights to 1 % and closer to the exact model's than the simulation's.

    Raises:
        ValueError: if a layer is split, no linear layer, has a format that GPTQModel lacks, or no layer is quantised.
    """
    taken = taken_layers(plan, "GPTQModel", refused_by_gptqmodel)
    weights: Counter[Option] = Counter()
    for layer, option in taken:
        if not is_unquantised(option):
            weights[option] += layer.parameters
    if not weights:
        raise ValueError("GPTQModel needs a layer to quantise, the plan leaves every one in a float format")
    usual = weights.most_common(1)[0][0]
    dynamic: dict[str, Any] = {}
    for layer, option in taken:
        if is_unquantised(option) and layer.kind == "linear":
            dynamic[f"-:^{re.escape(layer.module or '')}$"] = {}
        elif not is_unquantised(option) and option != usual:
            dynamic[f"+:^{re.escape(layer.module or '')}$"] = _fields(option)
    return {**_fields(usual), "desc_act": False, "dynamic": dynamic}


def refused_by_gptqmodel(layer: Layer, option: Option) -> str | None:
    """Why GPTQModel cannot hold an option of a layer; None if it can."""
    if is_unquantised(option):
        return None
    if reason := module_refusal(layer):
        return reason
    if option.activation is not None or (reason := integer_refusal(layer, option, _BITS, _HAS)):
        return reason or _HAS
    return None if group_size(option) in _GROUPS else _HAS


def _fields(option: Option) -> dict[str, Any]:
    weight, size = weight_format(option), group_size(option)
    symmetric = isinstance(weight, Integer)
    return {"bits": weight.bits, "group_size": size, "sym": symmetric, "act_group_aware": size > 0}
