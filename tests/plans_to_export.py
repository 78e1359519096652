"""Plans that the tests of exporters and importers share."""

from __future__ import annotations

from fnmatch import fnmatchcase

from mpq.layers import Layer, Network
from mpq.options import Option
from mpq.plan import Entry, Plan

ROLES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (256, 64),
    "mlp.up_proj": (256, 64),
    "mlp.down_proj": (64, 256),
}


def layer(name: str, shape: tuple[int, ...], kind: str = "linear", **fields) -> Layer:
    size = 1
    for axis in shape:
        size *= axis
    given = {"weight_name": f"{name}.weight", "module": name, "weight_bytes": 4 * size, **fields}
    return Layer(name, kind, shape, size, size, (1, shape[-1]), (1, shape[0]), **given)


def decoder_layers(blocks: int = 2, tied: bool = False) -> tuple[Layer, ...]:
    """The matrices of a Llama in miniature, by transformers' names."""
    aliases = ("lm_head.weight",) if tied else ()
    layers = [layer("model.embed_tokens", (128, 64), "embedding", aliases=aliases)]
    layers += [layer(f"model.layers.{n}.{role}", shape) for n in range(blocks) for role, shape in ROLES.items()]
    return (*layers, *(() if tied else (layer("lm_head", (128, 64)),)))


def planned(layers: tuple[Layer, ...], options: dict[str, str], default: str = "fp32") -> Plan:
    """A plan whose layers take the last option whose pattern matches them."""
    entries = []
    for each in layers:
        chosen = [option for pattern, option in options.items() if fnmatchcase(each.name, pattern)]
        entries.append(Entry(each, Option.parse(chosen[-1] if chosen else default)))
    return Plan(tuple(entries), "fingerprint", outside={"size": 100.0})


def network(layers: tuple[Layer, ...]) -> Network:
    return Network(layers, outside_bytes=100, fingerprint="fingerprint")
