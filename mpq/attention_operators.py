"""Attention's operators as what is planned: q·kᵀ, p·v, the cache and the softmax's output, which have no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from mpq.attention import Attention
from mpq.formats import Float
from mpq.layers import Layer, Network

if TYPE_CHECKING:
    from mpq.options import Option

OPERATORS: Mapping[str, str] = {
    "scores": "q·kᵀ: queries and keys",
    "mixing": "p·v: probabilities and values",
    "cache": "keys and values as they are stored",
    "softmax": "probabilities, in another format than the values that p·v takes them with",
}


def is_operator(layer: Layer) -> bool:
    """Whether a planned thing is an operator of attention, without a weight, rather than a layer."""
    return layer.kind in OPERATORS


def module_of(operator: Layer) -> str:
    """The module that runs the attention an operator belongs to."""
    return operator.name.rpartition(":")[0]


def runs_of(operator: Layer, network: Network) -> list[int]:
    """Positions in `network.attention` of the runs that an operator belongs to: several where its module runs again."""
    module = module_of(operator)
    return [at for at, run in enumerate(network.attention) if run.is_replaceable and run.name == module]


def attention_operators(network: Network) -> tuple[Layer, ...]:
    """The operators of a network that can be planned, in execution order: four for each module that runs attention.

    They are `Layer`s of the kinds ``scores``, ``mixing``, ``cache`` and ``softmax``, named ``module:kind``, without
    weights: their ``weight_shape`` is (0,). Elements and multiply-adds are those of the example inputs, all runs of the
    module. Attention that a model spells out, or that no named module runs, has none: its operands cannot be quantised.

    Example:
        >>> from mpq.attention import Attention
        >>> run = Attention("attn", 4, 2, 10, 10, 16, 16, qk_macs=6400, pv_macs=6400, is_replaceable=True)
        >>> cache = attention_operators(Network((), attention=(run,)))[2]
        >>> cache.name, cache.input_shape, cache.input_elements
        ('attn:cache', (1, 2, 10, 32), 640)
    """
    runs: dict[str, list[Attention]] = {}
    for run in network.attention:
        if run.is_replaceable:
            runs.setdefault(run.name, []).append(run)
    return tuple(_operator(kind, several, network.batch) for several in runs.values() for kind in OPERATORS)


def is_operator_pattern(pattern: str) -> bool:
    """Whether a name or pattern means operators of attention: its part after the last colon fits one of them.

    Example:
        >>> [is_operator_pattern(text) for text in ("*:cache", "layers.0.attn:*", "*", "attn.cache")]
        [True, True, False, False]
    """
    kind = pattern.rpartition(":")[2]
    return kind != pattern and any(fnmatchcase(known, kind) for known in OPERATORS)


def is_named(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches a name: of an operator of attention where it names those, else of a layer.

    Example:
        >>> is_named("attn:cache", "*:cache"), is_named("attn:cache", "*"), is_named("attn", "*")
        (True, False, True)
    """
    return fnmatchcase(name, pattern) and is_operator_pattern(name) == is_operator_pattern(pattern)


def planned_operators(network: Network, patterns: Sequence[str]) -> tuple[Layer, ...]:
    """The operators that patterns of a search space name; patterns of layers name none.

    Raises:
        ValueError: if a pattern of operators matches none; it says which there are, or why there are none.
    """
    asked = [pattern for pattern in patterns if is_operator_pattern(pattern)]
    if not asked:
        return ()
    offered = attention_operators(network)
    for pattern in asked:
        if not any(_is_meant(operator, pattern) for operator in offered):
            raise ValueError(f"pattern {pattern!r} matches no operator of attention: {_there_are(network, offered)}")
    return tuple(each for each in offered if any(_is_meant(each, pattern) for pattern in asked))


def _is_meant(operator: Layer, pattern: str) -> bool:
    """Whether a pattern names an operator; the softmax, which has the values' format by itself, only in full."""
    kind = pattern.rpartition(":")[2]
    return fnmatchcase(operator.name, pattern) and (operator.kind != "softmax" or kind == "softmax")


def keeps(option: Option, dtype: str) -> bool:
    """Whether an operator's option changes nothing in a model of a dtype: its own format, or fp32.

    Example:
        >>> from mpq.options import Option
        >>> [keeps(Option.parse(text), "bf16") for text in ("-/bf16", "-/fp32", "-/fp16", "-/int8")]
        [True, True, False, False]
    """
    return option.activation is not None and option.activation.name in (dtype, "fp32")


def is_float(option: Option) -> bool:
    """Whether an option leaves an operator in a float of 16 bits or more, which every runtime does by itself.

    Example:
        >>> from mpq.options import Option
        >>> [is_float(Option.parse(text)) for text in ("-/fp16", "-/bf16", "-/fp8_e4m3", "-/int8")]
        [True, True, False, False]
    """
    return isinstance(option.activation, Float)


def _there_are(network: Network, offered: Sequence[Layer]) -> str:
    if offered:
        more = f" and {len(offered) - 3} more" if len(offered) > 3 else ""
        return f"there are {', '.join(operator.name for operator in offered[:3])}{more}"
    if network.attention:
        return (
            f"that of {network.attention[0].name!r} does not run through torch.nn.functional."
            "scaled_dot_product_attention in a module of its own, so that nothing can be quantised there; a "
            "transformers model does with attn_implementation='sdpa'"
        )
    return "the network has no attention"


def _operator(kind: str, runs: Sequence[Attention], batch: int) -> Layer:
    shapes = [_shapes(kind, run) for run in runs]
    macs = {"scores": sum(run.qk_macs for run in runs), "mixing": sum(run.pv_macs for run in runs)}
    return Layer(
        name=f"{runs[0].name}:{kind}",
        kind=kind,
        weight_shape=(0,),
        parameters=0,
        macs=macs.get(kind, 0),
        input_shape=shapes[0][0],
        output_shape=shapes[0][1],
        calls=len(runs),
        batch=batch,
        input_elements=sum(map(_operands, [kind] * len(runs), runs)),
        output_elements=sum(prod(written) for _, written in shapes),
    )


def _shapes(kind: str, run: Attention) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is read first and what is written, (batch, heads, positions, width)."""
    pairs = (run.batch, run.heads, run.query_positions, run.key_positions)
    if kind == "scores":
        return (run.batch, run.heads, run.query_positions, run.head_dim), pairs
    if kind == "mixing":
        return pairs, (run.batch, run.heads, run.query_positions, run.value_dim)
    if kind == "softmax":
        return pairs, pairs
    stored = (run.batch, run.kv_heads, run.key_positions, run.head_dim + run.value_dim)
    return stored, stored


def _operands(kind: str, run: Attention) -> int:
    """Elements of both inputs, keys and values before they are repeated."""
    if kind == "cache":
        return run.cache_elements
    if kind == "softmax":
        return prod(_shapes(kind, run)[0])
    width = run.head_dim if kind == "scores" else run.value_dim
    return prod(_shapes(kind, run)[0]) + run.batch * run.kv_heads * run.key_positions * width
