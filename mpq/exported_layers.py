"""What exporters share: the layers of a plan with the one option that each takes, none of which the target lacks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from mpq.attention_operators import is_float, is_operator
from mpq.formats import Float, Integer, UnsignedInteger
from mpq.granularity import MINMAX
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, weight_format

_EXPERT_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
}

Refusal = Callable[[Layer, Option], str | None]
"""Why a target cannot hold an option of a layer, None if it can."""


def taken_layers(plan: Plan, target: str, refused: Refusal) -> list[tuple[Layer, Option]]:
    """Every layer with its option.

    Args:
        plan: what is exported.
        target: what errors call the library.
        refused: why it cannot hold an option of a layer; None if it can.

    Raises:
        ValueError: if a layer is split, the target cannot hold its option, or attention is quantised.
    """
    taken = []
    for entry in without_operators(plan, target).entries:
        choice = _whole(entry)
        if choice is None:
            raise ValueError(f"{target} takes one format a layer, {entry.layer.name!r} is split: {entry.choice}")
        reason = refused(entry.layer, choice)
        if reason is not None:
            raise ValueError(f"{target} cannot hold {choice} ({entry.layer.name!r}): {reason}")
        taken.append((entry.layer, choice))
    return taken


def without_operators(plan: Plan, target: str) -> Plan:
    """The plan without operators of attention, none of which may be quantised.

    Raises:
        ValueError: if one is: no target takes formats of attention from a plan.
    """
    entries = plan.of_layers
    if len(entries) == len(plan.entries):
        return plan
    for entry in plan.entries:
        if is_operator(entry.layer) and (reason := operator_refusal(*entry.options)):
            raise ValueError(f"{target} cannot hold {entry.choice} ({entry.layer.name!r}): {reason}")
    return replace(plan, entries=entries)


def operator_refusal(option: Option) -> str | None:
    """Why no target holds an option of an operator of attention; None where it stays in floats."""
    if is_float(option):
        return None
    return (
        "mpq exports formats of weights and of layers' inputs, not of attention. Set the format of the cache where the "
        "model is run, and export plan.with_options({'*:*': '-/fp16'})"
    )


def _whole(entry: Entry) -> Option | None:
    """The option of a layer all of which takes the same; rows and experts are stored as those of a whole layer."""
    if isinstance(entry.choice, Option):
        return entry.choice
    groups = entry.choice.granularity.startswith("groups")
    return None if groups or len(entry.options) > 1 else entry.options[0]


def is_unquantised(option: Option) -> bool:
    """Whether an option leaves a layer in floating point, its input too.

    Example:
        >>> [is_unquantised(Option.parse(text)) for text in ("fp32", "bf16", "int8", "fp16/int8")]
        [True, True, False, False]
    """
    return isinstance(option.weight, Float) and option.activation is None


def group_size(option: Option) -> int:
    """Columns that share a scale of an integer weight: −1 for a scale a channel, 0 for one a tensor.

    Example:
        >>> [group_size(Option.parse(text)) for text in ("int4", "int4@group64", "int8@tensor")]
        [-1, 64, 0]
    """
    granularity = weight_format(option).granularity
    if granularity is None or granularity.kind == "tensor":
        return 0
    return granularity.size if granularity.kind == "group" else -1


def integer_refusal(layer: Layer, option: Option, bits: tuple[int, ...], what: str) -> str | None:
    """Why a weight is no integer of those bits with a range from smallest to largest; None if it is.

    Groups must divide the row: every library pads or refuses a short last group in a way of its own.
    """
    weight = weight_format(option)
    if not isinstance(weight, Integer | UnsignedInteger) or weight.bits not in bits:
        return what
    if weight.range != MINMAX:
        return f"it scales weights by their range, not @{weight.range}"
    size, columns = group_size(option), layer.parameters // layer.weight_shape[0]
    if size > 0 and columns % size:
        return f"groups must divide the row, {size} does not divide its {columns} inputs: take a scale a channel"
    return None


def module_refusal(layer: Layer, kinds: tuple[str, ...] = ("linear",)) -> str | None:
    """Why a library that swaps modules of some kinds leaves a layer out; None if it takes it."""
    if layer.module is None:
        return f"it quantises modules, the weight of {layer.name!r} is used by a function: pin it to fp32"
    if layer.kind not in kinds:
        return f"it quantises {' and '.join(kinds)} layers, {layer.name!r} is {_a(layer.kind)}: pin it to fp32"
    return None


def expert_modules(layer: Layer) -> str | None:
    r"""A regular expression of the modules that a stack of experts becomes where they are linears of their own.

    None for what is no stack, or one whose name tells no part. Files of Mixtral say w1, w2 and w3.

    Example:
        >>> stack = Layer("mlp.experts.down_proj", "experts", (64, 32), 2048, 0, (1,), (1,), experts=4)
        >>> expert_modules(stack)
        'mlp\\.experts\\.\\d+\\.(down_proj|w2)'
    """
    parent, _, leaf = layer.name.rpartition(".")
    if layer.kind != "experts" or leaf not in _EXPERT_PARTS:
        return None
    path = re.escape(parent).replace(r"\.mlp\.experts", r"\.(mlp|block_sparse_moe)\.experts")
    return rf"{path}\.\d+\.({'|'.join(_EXPERT_PARTS[leaf])})"


def module_names(layer: Layer) -> list[str]:
    """The modules that hold the layer's weight: its own and, of tied weights, the others."""
    return [name.rpartition(".")[0] for name in (layer.weight_name, *layer.aliases)]


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
