"""One operation of a forward as PyTorch dispatches it: its name, its operands, what it multiplies and writes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree

from mpq.parameters import Piece

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "linear", "matmul"}
COPIES = {"clone", "_to_copy", "_unsafe_view", "lift_fresh", "repeat"}
# Besides those that PyTorch tags as pointwise and all kinds of norm and dropout.
_IN_PLACE = {"_prelu_kernel", "hardswish"}


class Trail(NamedTuple):
    """What is known of a tensor."""

    sources: int
    root: int
    shape: tuple[int, ...]  # of the root
    direct: int = 0  # the uses whose outputs it is, or is the sum of, seen through batch norm
    copied: Piece | None = None  # the parameter it is a copy of
    value: int = 0  # what it shows in `mpq.buffers.Liveness`; 0 for constants
    distinct: int = 0  # elements before they were repeated


@dataclass(frozen=True)
class Call:
    """One operation as it was called."""

    func: Any
    args: tuple[Any, ...]
    operands: list[Tensor]
    written: list[Tensor]

    @cached_property
    def name(self) -> str:
        """Name of the operation, whether in place or not."""
        return str(getattr(self.func, "_opname", self.func)).removesuffix("_")

    @property
    def is_view(self) -> bool:
        """Whether the result shares memory with the first operand."""
        return bool(getattr(self.func, "is_view", False))

    @cached_property
    def works_in_place(self) -> bool:
        """Whether the result may overwrite an operand of its size: element by element, norms, dropout."""
        pointwise = torch.Tag.pointwise in getattr(self.func, "tags", ())
        return pointwise or self.name in _IN_PLACE or "norm" in self.name or "dropout" in self.name

    @property
    def same_shaped(self) -> bool:
        """Whether the first two arguments are tensors of one shape."""
        pair = self.args[:2]
        return len(pair) == 2 and all(isinstance(a, Tensor) for a in pair) and pair[0].shape == pair[1].shape

    @property
    def is_product(self) -> bool:
        """Whether two operands are multiplied as matrices."""
        return self.name in _PRODUCTS or "grouped_mm" in self.name

    @property
    def factors(self) -> list[Tensor]:
        """The operands that are multiplied with each other, none if the operation multiplies nothing."""
        if self.is_product:
            return [a for a in self.args if isinstance(a, Tensor)][self.name.startswith(("add", "badd")) :][:2]
        if self.name == "mul" and self.same_shaped:
            return self.operands[:2]
        return self.operands[:3] if "attention" in self.name or "flash_attn" in self.name else []


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested containers, in order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def has_format(tensor: Tensor) -> bool:
    """Whether numbers flow through a tensor; indices and masks carry no layer's output."""
    return tensor.is_floating_point() or tensor.is_complex()


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors an operation declares to write to."""
    if not isinstance(func, OpOverload) or not func._schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return tensors(found)
