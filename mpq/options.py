"""What a layer may become: `Option` is a pair of number formats, `SearchSpace` says which layers may take which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from mpq.attention_operators import is_named, is_operator_pattern, planned_operators
from mpq.formats import NumberFormat, parse
from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    from mpq.layers import Layer, Network

_WEIGHT_ACTIVATION = re.compile(r"w(\d+)(?:a(\d+))?", re.IGNORECASE)
_FLOAT_OF_BITS = {"16": "fp16", "32": "fp32"}


@dataclass(frozen=True)
class Option:
    """A format for a layer's weight and one for its input.

    `activation=None` leaves the input in the model's own format (weight-only quantisation); `weight=None` is for
    operators without weights. Formats may be given as text. A format without granularity is bound by its role:
    weights have a scale a channel, activations one a tensor. Both in one text are for `Option.parse`.

    Raises:
        ValueError: if a format is unknown, there is none, or a text names both of them.

    Example:
        >>> Option("int4", "int8")
        Option('int4/int8')
        >>> Option("int4") == Option("int4@channel") == Option.parse("w4")
        True
        >>> Option.parse("w4a8").activation
        int8@tensor
    """

    weight: NumberFormat | None
    activation: NumberFormat | None = None

    def __init__(self, weight: NumberFormat | str | None, activation: NumberFormat | str | None = None) -> None:
        if weight is None and activation is None:
            raise ValueError("an option needs a weight format or an activation format, got neither")
        object.__setattr__(self, "weight", _bound(weight, "weight"))
        object.__setattr__(self, "activation", _bound(activation, "activation"))

    @classmethod
    def parse(cls, text: str | Option) -> Option:
        """Read `"int4"`, `"int4/int8"`, `"-/int8"` (no weight) or `"w4a8"` (integers; a16 and a32 are floats).

        Raises:
            ValueError: if a format is unknown or there are more than two.
        """
        if isinstance(text, Option):
            return text
        if short := _WEIGHT_ACTIVATION.fullmatch(text.strip()):
            weight, activation = short.groups()
            return cls(_integer_or_float(weight), None if activation is None else _integer_or_float(activation))
        weight_text, *rest = (part.strip() for part in text.split("/"))
        if len(rest) > 1:
            raise ValueError(f"option must be WEIGHT or WEIGHT/ACTIVATION, got {text!r}")
        return cls(None if weight_text == "-" else weight_text, rest[0] if rest else None)

    @property
    def label(self) -> str:
        """The shortest text that parses back to this option; the label of its column in tables and plans."""
        weight = "-" if self.weight is None else _unbound(self.weight, "weight")
        return weight if self.activation is None else f"{weight}/{_unbound(self.activation, 'activation')}"

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"Option({self.label!r})"


def _bound(fmt: NumberFormat | str | None, role: Literal["weight", "activation"]) -> NumberFormat | None:
    if fmt is None:
        return None
    if isinstance(fmt, str) and ("/" in fmt or _WEIGHT_ACTIVATION.fullmatch(fmt.strip())):
        pair = Option.parse(fmt)
        formats = [repr(None if one is None else str(one)) for one in (pair.weight, pair.activation)]
        told = ", ".join(formats[: 1 if pair.activation is None else 2])
        raise ValueError(
            f"the {role} format of an option must be one format, got {fmt!r}: write Option.parse({fmt!r}), "
            f"or Option({told})"
        )
    return (parse(fmt) if isinstance(fmt, str) else fmt).bind(role)


def _unbound(fmt: NumberFormat, role: Literal["weight", "activation"]) -> str:
    text = str(fmt)
    plain = text.replace({"weight": "@channel", "activation": "@tensor"}[role], "", 1)
    return plain if parse(plain).bind(role) == fmt else text


def _integer_or_float(bits: str) -> str:
    return _FLOAT_OF_BITS.get(bits, f"int{bits}")


Candidates = Iterable[Option | str]


@dataclass(frozen=True)
class SearchSpace:
    """The options every layer may take, the layers whose option is given, and the layers that go together.

    Args:
        options: the candidates of every layer, or a mapping from name patterns (`*`, `?`, `[...]` as in a shell) to
            candidates; a later pattern overrides an earlier one. A pattern that ends in ``:scores``, ``:mixing``,
            ``:cache`` or ``:*`` names operators of attention (`mpq.attention_operators`), and so does ``:softmax``,
            which ``:*`` leaves alone; they are planned only where one does. They take options without weight, such as
            ``-/int8``, and ``-/fp16`` to stay in floats. Other patterns name layers.
        pins: a mapping from name patterns to the one option those layers take.
        ties: `"auto"` takes the groups the trace found (projections that runtimes fuse, convolutions whose outputs are
            added), `None` ties nothing, a list of name patterns ties all layers that match the same pattern.
            ``*:cache`` gives every cache one format, as most runtimes do.

    Example:
        >>> space = SearchSpace(["int4", "int8"], pins={"fc": "int8"})
        >>> space.all_options
        (Option('int4'), Option('int8'))
        >>> SearchSpace({"*": ["int4", "int8"], "*:cache": ["-/int4@token", "-/int8@token", "-/fp16"]}).all_options[2:]
        (Option('-/int4@token'), Option('-/int8@token'), Option('-/fp16'))
    """

    options: Mapping[str, tuple[Option, ...]]
    pins: Mapping[str, Option] = field(default_factory=dict)
    ties: Literal["auto"] | tuple[str, ...] | None = "auto"

    def __init__(
        self,
        options: Candidates | Mapping[str, Candidates],
        pins: Mapping[str, Option | str] | None = None,
        ties: Literal["auto"] | Iterable[str] | None = "auto",
    ) -> None:
        if isinstance(options, str):
            raise ValueError(f"options must be a list of options, got the text {options!r}: write [{options!r}]")
        if isinstance(ties, str) and ties != "auto":
            raise ValueError(f"ties must be 'auto', None or a list of name patterns, got {ties!r}")
        by_pattern = options if isinstance(options, Mapping) else {"*": options}
        parsed = {pattern: _parsed(pattern, candidates) for pattern, candidates in by_pattern.items()}
        if not parsed:
            raise ValueError("options must name at least one option, got none")
        object.__setattr__(self, "options", MappingProxyType(parsed))
        object.__setattr__(self, "pins", MappingProxyType({k: Option.parse(v) for k, v in (pins or {}).items()}))
        object.__setattr__(self, "ties", ties if ties is None or ties == "auto" else tuple(ties))

    @cached_property
    def all_options(self) -> tuple[Option, ...]:
        """Every option that is named, in the order of first mention, pins last: the columns of a table."""
        named = [option for candidates in self.options.values() for option in candidates]
        return tuple(dict.fromkeys([*named, *self.pins.values()]))

    def operators(self, network: Network) -> tuple[Layer, ...]:
        """The operators of attention that a pattern of the options or pins names; they are planned after the layers.

        Raises:
            ValueError: if such a pattern matches none.
        """
        return planned_operators(network, (*self.options, *self.pins))

    def candidates(self, network: Network) -> dict[str, tuple[Option, ...]]:
        """The options of every layer of the network, then of every operator that is planned, pins applied.

        Raises:
            ValueError: if a pattern matches nothing, a layer is left without candidates or has one without weight, an
                operator one with a weight, or tied layers have no option in common.
        """
        layers = [layer.name for layer in network.layers]
        operators = [operator.name for operator in self.operators(network)]
        names = [*layers, *operators]
        result: dict[str, tuple[Option, ...]] = {}
        for pattern, options in self.options.items():
            result |= dict.fromkeys(matching(pattern, names, "options"), options)
        for pattern, option in self.pins.items():
            result |= dict.fromkeys(matching(pattern, names, "pins"), (option,))
        if missing := [name for name in names if name not in result]:
            raise ValueError(
                f"options must cover every layer, none given for {missing[0]!r}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + ": add a pattern '*', or pin it to a float format such as 'fp32'"
            )
        for name in names:
            _check_weights(name, result[name], is_operator=is_operator_pattern(name))
        for group in self.tied_layers(network):
            own = {id(result[name]): result[name] for name in group}  # layers share tuples; hashing options is slow
            if len(own) > 1 and not set.intersection(*map(set, own.values())):
                raise ValueError(
                    f"tied layers must share an option, {', '.join(group)} share none: "
                    "pin them alike, widen their options, or pass ties=None"
                )
        return {name: result[name] for name in names}

    def tied_layers(self, network: Network) -> tuple[tuple[str, ...], ...]:
        """Groups of layer names that take the same option; groups that overlap are merged."""
        if self.ties is None:
            return ()
        if self.ties == "auto":
            return network.siblings
        names = [layer.name for layer in (*network.layers, *self.operators(network))]
        return merged([matching(pattern, names, "ties") for pattern in self.ties], names)


def matching(pattern: str, names: list[str], role: str) -> list[str]:
    """The names that a shell pattern matches: of operators of attention where it names those, else of layers.

    Raises:
        ValueError: if there are none; it names the closest names.
    """
    found = [name for name in names if is_named(name, pattern)]
    if not found:
        what = "planned operator of attention" if is_operator_pattern(pattern) else "layer"
        raise ValueError(f"{role}: pattern {pattern!r} matches no {what}{did_you_mean(pattern, names)}")
    return found


def _check_weights(name: str, options: Iterable[Option], *, is_operator: bool) -> None:
    for option in options:
        if is_operator and option.weight is not None:
            raise ValueError(f"option {option} of {name!r} has a weight format, attention has no weights: write -/int8")
        if not is_operator and option.weight is None:
            raise ValueError(f"option {option} of layer {name!r} has no weight format, and the layer has weights")


def _parsed(pattern: str, candidates: Candidates) -> tuple[Option, ...]:
    if isinstance(candidates, str):
        raise ValueError(f"options of {pattern!r} must be a list, got the text {candidates!r}: write [{candidates!r}]")
    parsed = tuple(dict.fromkeys(Option.parse(candidate) for candidate in candidates))
    if not parsed:
        raise ValueError(f"options of {pattern!r} must name at least one option, got none")
    return parsed


def merged(groups: list[list[str]], names: list[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of names, those that overlap as one, in the order of all names; groups of one are left out."""
    found: list[set[str]] = []
    for group in map(set, groups):
        overlapping = [other for other in found if other & group]
        found = [other for other in found if not other & group] + [group.union(*overlapping)]
    return tuple(tuple(name for name in names if name in group) for group in found if len(group) > 1)
