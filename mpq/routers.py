"""`without_routers`: the small linears that send tokens to experts keep their format, as they do in every runtime."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from mpq.buffers import Buffer
from mpq.layers import Network

REASON = "a router of experts keeps its format, as it does in runtimes; an option or pin of its own plans it"

_NAMES = ("gate", "router", "gate.weight", "router.weight", "router.gate", "gate.wg", "shared_expert_gate")
_EXPERTS = re.compile(r"(?:^|(?<=\.))experts\b")


def routers(network: Network) -> tuple[str, ...]:
    """Names of the layers that choose experts: linears called gate or router beside experts.

    Example:
        >>> from mpq.layers import Layer
        >>> up = Layer("mlp.experts.up_proj", "experts", (4 * 8, 6), 192, 0, (1,), (1,), experts=4, channel_axis=1)
        >>> gate = Layer("mlp.gate", "linear", (4, 6), 24, 0, (1,), (1,))
        >>> routers(Network((gate, up)))
        ('mlp.gate',)
    """
    parents = {layer.name[: at.start()] for layer in network.layers if (at := _EXPERTS.search(layer.name))}
    names = {f"{parent}{name}" for parent in parents for name in _NAMES}
    return tuple(layer.name for layer in network.layers if layer.kind == "linear" and layer.name in names)


def without_routers(network: Network, patterns: Iterable[str] = ()) -> Network:
    """The network with its routers among what is skipped; their bytes count as outside.

    Args:
        network: any network; one without experts comes back as it is.
        patterns: name patterns of a search space. A router stays where one matches it and no other kind of layer.
    """
    found = set(routers(network))
    others = [layer.name for layer in network.layers if layer.name not in found]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in others):
            found = {name for name in found if not fnmatchcase(name, pattern)}
    if not found:
        return network
    left = [layer for layer in network.layers if layer.name in found]
    return replace(
        network,
        layers=tuple(layer for layer in network.layers if layer.name not in found),
        edges=tuple(edge for edge in network.edges if not found & set(edge)),
        siblings=tuple(group for group in network.siblings if not found & set(group)),
        outside_bytes=network.outside_bytes + sum(layer.weight_bytes for layer in left),
        skipped={**network.skipped, **dict.fromkeys((layer.name for layer in left), REASON)},
        buffers=tuple(_without(buffer, found) for buffer in network.buffers),
    )


def _without(buffer: Buffer, left: set[str]) -> Buffer:
    """The buffer with its next reader as the owner where the owner is left out."""
    readers = tuple(name for name in buffer.readers if name not in left)
    owner = next(iter(readers), "") if buffer.owner in left else buffer.owner
    return replace(buffer, owner=owner, readers=readers)
