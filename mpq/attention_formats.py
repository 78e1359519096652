"""Attention with quantised operands: q·kᵀ, p·v and the cache of keys and values, simulated in its kernel's place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.activations import name_running_modules
from mpq.attention_operators import module_of
from mpq.formats import NumberFormat, parse
from mpq.layers import Layer
from mpq.options import Option
from mpq.surgery import quantise_activation


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """Options of one run of attention, an operator without weights each: ``-/int8``, both inputs in one format.

    Args:
        scores: of q·kᵀ: queries and keys.
        mixing: of p·v: probabilities and values.
        cache: of keys and values as they are stored; before the other two.
        probabilities: another format for the softmax's output alone, such as ``ulog4``; `mixing`'s by default.

    Scales are those of tensors (batch, heads, positions, width): one, one a token (the last axis), one a channel of
    the width, or one a group along it. Ranges are dynamic.

    Raises:
        ValueError: if an option has a weight format.

    Example:
        >>> AttentionChoice(scores="-/int8", probabilities="ulog4").probabilities
        ulog4@tensor
    """

    scores: Option | str | None = None
    mixing: Option | str | None = None
    cache: Option | str | None = None
    probabilities: NumberFormat | str | None = None

    def __post_init__(self) -> None:
        for name in ("scores", "mixing", "cache"):
            given = getattr(self, name)
            option = None if given is None else Option.parse(given)
            if option is not None and option.weight is not None:
                raise ValueError(f"{name} must be an option without weight, such as -/int8, got {option}")
            object.__setattr__(self, name, option)
        fmt = parse(self.probabilities) if isinstance(self.probabilities, str) else self.probabilities
        object.__setattr__(self, "probabilities", None if fmt is None else fmt.bind("activation"))

    def format_of(self, operator: str) -> NumberFormat | None:
        """The format of an operator's inputs, None where they stay."""
        option = getattr(self, operator)
        return option.activation if isinstance(option, Option) else None


@contextmanager
def quantised_attention(model: nn.Module, choices: Mapping[str, AttentionChoice]) -> Iterator[nn.Module]:
    """The model with attention simulated in number formats, inside or beside `mpq.quantized`.

        scores = Q(q) Q(k)ᵀ · scale + mask,    p = softmax(scores),    output = Q(p) Q(v),    k and v out of the cache

    What runs through `torch.nn.functional.scaled_dot_product_attention`, looked up when it is called, is seen;
    attention that a model spells out is not. Dropout is left out.

    Args:
        model: any; not changed.
        choices: name patterns of the modules that run attention, as `network.attention` names them ("" and "*" match
            attention outside every module), and what it takes; the first pattern that matches counts.

    Raises:
        ValueError: on the way out, if a pattern matched no attention that ran.

    Example:
        >>> x = torch.randn(1, 2, 4, 8)
        >>> with quantised_attention(nn.Module(), {"*": AttentionChoice(scores="-/fp32")}):
        ...     found = functional.scaled_dot_product_attention(x, x, x)
        >>> torch.allclose(found, functional.scaled_dot_product_attention(x, x, x), atol=1e-6)
        True
    """
    with _simulated(model, choices) as met:
        yield model
    if unmet := [pattern for pattern in choices if pattern not in met]:
        raise ValueError(
            f"pattern {unmet[0]!r} matched no attention that ran: it must name a module that calls "
            "torch.nn.functional.scaled_dot_product_attention"
        )


@contextmanager
def quantised_operators(model: nn.Module, formats: Mapping[Layer, NumberFormat | None]) -> Iterator[nn.Module]:
    """The model with planned operators of attention in formats, as `quantised_attention` simulates them.

    Args:
        model: any; not changed.
        formats: of the inputs of operators (`mpq.attention_operators.attention_operators`); fp32 leaves one as it is.

    Raises:
        ValueError: if the model lacks a module, or, on the way out, if one ran without attention that can be quantised.
    """
    choices = _choices(formats)
    ran: dict[str, None] = {}
    with ExitStack() as stack:
        for name in choices:
            module = _module(model, name)
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: ran.setdefault(name)).remove)
        met = stack.enter_context(_simulated(model, choices))
        yield model
    if unmet := [name for name in ran if name not in met]:
        raise ValueError(
            f"the attention of {unmet[0]!r} was to be quantised and did not run through torch.nn.functional."
            "scaled_dot_product_attention: load a transformers model with attn_implementation='sdpa', or leave its "
            "operators out of the plan"
        )


def _choices(formats: Mapping[Layer, NumberFormat | None]) -> dict[str, AttentionChoice]:
    """What the attention of every module takes in which an operator does not stay as it is."""
    own: dict[str, dict[str, NumberFormat]] = {}
    for operator, fmt in formats.items():
        if fmt is not None:
            own.setdefault(module_of(operator), {})[operator.kind] = fmt
    changed = {name: kinds for name, kinds in own.items() if any(fmt.name != "fp32" for fmt in kinds.values())}
    return {
        name: AttentionChoice(
            **{kind: Option(None, fmt) for kind, fmt in kinds.items() if kind != "softmax"},
            probabilities=kinds.get("softmax"),
        )
        for name, kinds in changed.items()
    }


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module {name!r}: the plan is for another model") from error


@contextmanager
def _simulated(model: nn.Module, choices: Mapping[str, AttentionChoice]) -> Iterator[set[str]]:
    """Attention in the formats of the patterns; yields the set of those that some attention has met so far."""
    given, running = functional.scaled_dot_product_attention, list[str]()
    fused = torch.backends.mha.get_fastpath_enabled()
    met: set[str] = set()

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = running[-1] if running else ""
        pattern = next((pattern for pattern in choices if fnmatchcase(name, pattern)), None)
        if pattern is None:
            return given(query, key, value, *args, **kwargs)
        met.add(pattern)
        operands = _operands((query, key, value), choices[pattern], name)
        named = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        if choices[pattern].mixing is None and choices[pattern].probabilities is None:
            return given(*operands, **named | {"dropout_p": 0.0})
        return _attention(operands, choices[pattern], name, **named)

    functional.scaled_dot_product_attention = attention
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention calls the function only on its slow path
    try:
        with name_running_modules(model, running):
            yield met
    finally:
        functional.scaled_dot_product_attention = given
        torch.backends.mha.set_fastpath_enabled(fused)


def _operands(
    operands: tuple[Tensor, Tensor, Tensor], choice: AttentionChoice, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they enter the two products."""
    query, key, value = operands
    key, value = (_quantised(part, choice.format_of("cache"), f"{name} (cache)") for part in (key, value))
    query, key = (_quantised(part, choice.format_of("scores"), f"{name} (q·k)") for part in (query, key))
    return query, key, _quantised(value, choice.format_of("mixing"), f"{name} (values)")


def _attention(
    operands: tuple[Tensor, Tensor, Tensor],
    choice: AttentionChoice,
    name: str,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention spelled out, with probabilities in the format of the choice."""
    query, key, value = operands
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    weights = scores.softmax(-1)
    fmt = choice.probabilities if isinstance(choice.probabilities, NumberFormat) else choice.format_of("mixing")
    return _quantised(weights, fmt, f"{name} (probabilities)") @ value


def _quantised(operand: Tensor, fmt: NumberFormat | None, name: str) -> Tensor:
    """An operand (batch, heads, positions, width) in a format; channels and groups are along the last axis."""
    if fmt is None:
        return operand
    shape = tuple(operand.shape)
    return quantise_activation(operand, fmt, Layer(name, "linear", (1, shape[-1]), shape[-1], 0, shape, shape))
