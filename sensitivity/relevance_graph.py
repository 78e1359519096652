"""The autograd graph of one forward pass: which operations depend on the data, and which parameter is their weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

ELEMENTWISE = frozenset(
    {"Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Tanh", "Sigmoid", "Erf", "Exp", "Relu", "Softplus", "Hardtanh"}
)
STRUCTURE = frozenset(
    {
        *(
            "View",
            "UnsafeView",
            "ReshapeAlias",
            "Reshape",
            "Alias",
            "AsStrided",
            "Clone",
            "ToCopy",
            "Copy",
            "CopySlices",
        ),
        *("T", "Transpose", "Permute", "Movedim", "Expand", "Repeat", "Squeeze", "Unsqueeze", "Select", "Slice"),
        *(
            "Split",
            "SplitWithSizes",
            "Unbind",
            "Unfold",
            "UnsafeSplit",
            "Chunk",
            "Diagonal",
            "Flip",
            "Roll",
            "Contiguous",
        ),
    }
)
Role = Literal["data", "weight", "constant"]


class RelevanceGraph:
    """What lies between the data and the outputs.

    Data enters at leaf tensors and where an embedding looks something up. An operand is `data` if it depends on them,
    `weight` if it depends on parameters alone, else `constant`.

    Args:
        outputs: of a forward pass with gradients, every parameter asking for one.
        leaves: the tensors with which data enters.
    """

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor]) -> None:
        self.nodes = _inputs_first(outputs.grad_fn)
        self._leaves = {id(leaf) for leaf in leaves}
        self.consumers = Counter(source for node in self.nodes for source in operands(node) if source is not None)
        self._depends: set[Node] = set()
        for node in self.nodes:
            if self._is_entrance(node) or any(source in self._depends for source in operands(node)):
                self._depends.add(node)

    def data_nodes(self) -> Iterator[Node]:
        """Operations that depend on the data, inputs first; lookups are among them, leaves are not."""
        return (node for node in self.nodes if node in self._depends and operation(node) != "AccumulateGrad")

    def role(self, node: Node, position: int) -> Role:
        """What an operand of an operation is."""
        source = node.next_functions[position][0] if position < len(node.next_functions) else None
        if source is None:
            return "constant"
        return "data" if source in self._depends else "weight"

    def parameters_behind(self, node: Node | None) -> Iterator[Tensor]:
        """The parameters that an operand was made of."""
        found = [] if node is None else _inputs_first(node)
        return (leaf.variable for leaf in found if operation(leaf) == "AccumulateGrad")  # type: ignore[attr-defined]

    def parameter_value(self, node: Node, position: int, shape: tuple[int, ...]) -> Tensor | None:
        """The value of an operand that is a parameter, or cut and joined from some; None where it is computed.

        For what is linear in its parameters p the value is J p, and J comes from the graph: u → Jᵀ u is its backward.
        """
        source, output = node.next_functions[position]
        if source is not None and operation(source) == "AccumulateGrad":
            return source.variable.detach()  # type: ignore[attr-defined, no-any-return]
        behind = [] if source is None else _inputs_first(source)
        if not behind or not {operation(step) for step in behind} <= STRUCTURE | {"AccumulateGrad", "Cat"}:
            return None
        parameters = list(self.parameters_behind(source))
        with torch.enable_grad():
            u = parameters[0].new_zeros(shape, requires_grad=True)
            edge = GradientEdge(behind[-1], output)
            back = torch.autograd.grad(edge, parameters, u, create_graph=True)
            total = torch.stack([(part * p.detach()).sum() for part, p in zip(back, parameters, strict=True)]).sum()
            return torch.autograd.grad(total, u)[0]

    def behind_structure(self, node: Node | None) -> Node | None:
        """The operation that made a tensor's numbers: what views, casts and repetitions are of."""
        while node is not None and operation(node) in STRUCTURE:
            node = node.next_functions[0][0]
        return node

    def elementwise_sources(self, node: Node | None) -> tuple[frozenset[Node], bool]:
        """The data that an operand is an elementwise function of, and whether it is that data times a constant."""
        sources: set[Node] = set()
        linear, waiting = True, [node]
        while waiting:
            current = waiting.pop()
            if current is None or current not in self._depends:
                continue
            if operation(current) not in ELEMENTWISE:
                sources.add(current)
                continue
            kinds = [self.role(current, position) for position in range(len(current.next_functions))]
            linear &= operation(current) in ("Mul", "Neg") and kinds.count("data") == 1
            waiting.extend(operands(current))
        return frozenset(sources), linear

    def comes_first(self, node: Node, sums: Iterable[Node]) -> bool:
        """Whether no other of the given operations lies between an operation and the data."""
        before = {source for start in operands(node) if start is not None for source in _inputs_first(start)}
        return not before & set(sums)

    def _is_entrance(self, node: Node) -> bool:
        if operation(node) == "AccumulateGrad":
            return id(node.variable) in self._leaves  # type: ignore[attr-defined]
        return operation(node) == "Embedding"


def operation(node: Node) -> str:
    """The name of an operation without autograd's endings: "Addmm" for AddmmBackward0."""
    return node.name().removeprefix("torch::autograd::").partition("Backward")[0]


def operands(node: Node) -> list[Node | None]:
    """What an operation was given, None for what has no gradient."""
    return [source for source, _ in node.next_functions]


def _inputs_first(start: Node | None) -> list[Node]:
    """All operations behind one, each after its own operands."""
    order: list[Node] = []
    seen: set[Node] = set()
    waiting: list[tuple[Node | None, bool]] = [(start, False)]
    while waiting:
        node, finished = waiting.pop()
        if node is None or (not finished and node in seen):
            continue
        if finished:
            order.append(node)
            continue
        seen.add(node)
        waiting.append((node, True))
        waiting.extend((source, False) for source in operands(node))
    return order
