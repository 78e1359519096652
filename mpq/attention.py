"""Attention: two products without weights and a softmax between them, in one kernel or spelled out."""

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple


@dataclass(frozen=True)
class Attention:
    """One run of attention, softmax(q·kᵀ)·v.

    Attributes:
        name: Path of the module that ran it, else its position among the runs; a module that runs twice appears twice.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values: fewer where groups of heads share them (grouped queries), counted before
            they are repeated. Repeats through an index (index_select) go unnoticed and count as heads of their own.
        query_positions: Positions that ask, a sample.
        key_positions: Positions that are looked at, a sample, as traced: those of a cache are among them.
        head_dim: Width of a query and of a key.
        value_dim: Width of a value.
        batch: Samples; where attention is cut into windows, samples times windows.
        qk_macs: Multiply-adds of q·kᵀ, all samples and heads; a causal mask saves none.
        pv_macs: Multiply-adds of the product with the values.
        query_layers: Layers whose outputs reach the queries without another layer between, in execution order.
        key_layers: The same for the keys; a fused projection is in all three.
        value_layers: The same for the values.
        is_replaceable: Whether the module `name` ran it through torch.nn.functional.scaled_dot_product_attention, so
            that its operands can be quantised; not where the model spells attention out.

    Example:
        >>> from mpq.attention import Attention
        >>> step = Attention("attn", 8, 2, 1, 1024, 64, 64, qk_macs=8 * 1024 * 64, pv_macs=8 * 1024 * 64)
        >>> step.cache_elements
        262144
    """

    name: str
    heads: int
    kv_heads: int
    query_positions: int
    key_positions: int
    head_dim: int
    value_dim: int
    batch: int = 1
    qk_macs: int = 0
    pv_macs: int = 0
    query_layers: tuple[str, ...] = ()
    key_layers: tuple[str, ...] = ()
    value_layers: tuple[str, ...] = ()
    is_replaceable: bool = False

    @property
    def cache_elements(self) -> int:
        """Numbers in the keys and values, all samples: what a cache of ``key_positions`` holds."""
        return self.batch * self.kv_heads * self.key_positions * (self.head_dim + self.value_dim)


class Operand(NamedTuple):
    """A factor: its number as a value of the run, the set of layer uses that reach it, its elements before repeats."""

    value: int
    sources: int
    distinct: int


class Product(NamedTuple):
    """A product of two activations: its factors, the width it sums over, and the elements it writes."""

    left: Operand
    right: Operand
    width: int
    elements: int


class Scores(NamedTuple):
    """What became of products of queries and keys: ``shape`` and ``axis`` are those of the softmax, once it ran."""

    products: tuple[Product, ...]
    shape: tuple[int, ...] = ()
    axis: int = 0


class AttentionFinder:
    """Recognises attention in a run that is told operator by operator.

    Args:
        batch: Samples in the example inputs, to tell them from heads where the two were flattened into one axis.

    Attributes:
        found: Every run of attention, without layers, and its three operands.
    """

    def __init__(self, batch: int = 1) -> None:
        self.found: list[tuple[Attention, tuple[Operand, Operand, Operand]]] = []
        self._batch = batch
        self._scores: dict[int, Scores] = {}

    def product(self, product: Product, written: int, name: str = "") -> None:
        """A product of two activations: queries with keys, or what the softmax wrote with values."""
        for weights, values in ((product.left, product.right), (product.right, product.left)):
            scores = self._scores.get(weights.value)
            if scores is not None and scores.shape:
                self._add(scores, values, product, name)
                return
        self._scores[written] = Scores((product,))

    def softmax(self, read: int, written: int, shape: tuple[int, ...], axis: int) -> None:
        """A softmax of ``shape`` over ``axis``."""
        scores = self._scores.get(read)
        if scores is not None and shape:
            self._scores[written] = scores._replace(shape=shape, axis=axis % len(shape))

    def pass_on(self, reads: tuple[int, ...], written: int) -> None:
        """Any other operator: scaled, masked or summed scores are scores, dropped out weights are weights."""
        met = [self._scores[value] for value in dict.fromkeys(reads) if value in self._scores]
        if met:
            products = tuple(dict.fromkeys(product for scores in met for product in scores.products))
            self._scores[written] = met[0]._replace(products=products)

    def kernel(
        self,
        operands: tuple[Operand, Operand, Operand],
        shapes: tuple[tuple[int, ...], ...],
        name: str = "",
        *,
        is_replaceable: bool = False,
    ) -> None:
        """Attention in one kernel: shapes of queries, keys and values are (batch, heads, positions, width)."""
        (*lead, positions, width), (*_, keys, _), (*_, value_width) = shapes
        batch, heads = self._split(lead)
        run = Attention(name or str(len(self.found)), heads, heads, positions, keys, width, value_width, batch)
        pairs = batch * heads * positions * keys
        run = replace(run, qk_macs=pairs * width, pv_macs=pairs * value_width)
        self._record(replace(run, is_replaceable=is_replaceable and bool(name)), operands)

    def _add(self, scores: Scores, values: Operand, product: Product, name: str) -> None:
        first, shape, axis = scores.products[0], scores.shape, scores.axis
        asking = axis - 1 if axis == len(shape) - 1 or len(shape) > 3 else axis + 1
        positions = shape[asking] if asking >= 0 else 1
        batch, heads = self._split([size for a, size in enumerate(shape) if a not in (asking, axis)])
        rows = batch * heads * positions
        run = Attention(
            name=name or str(len(self.found)),
            heads=heads,
            kv_heads=heads,
            query_positions=positions,
            key_positions=first.elements // rows,
            head_dim=first.width,
            value_dim=product.elements // rows,
            batch=batch,
            qk_macs=sum(each.elements * each.width for each in scores.products),
            pv_macs=product.elements * product.width,
        )
        self._record(run, (first.left, first.right, values))

    def _record(self, run: Attention, operands: tuple[Operand, Operand, Operand]) -> None:
        """Heads of the keys: as many as their elements before repeats make, at least one."""
        kept = operands[1].distinct // (run.batch * run.key_positions * run.head_dim)
        self.found.append((replace(run, kv_heads=min(max(kept, 1), run.heads)), operands))

    def _split(self, lead: list[int]) -> tuple[int, int]:
        """Samples and heads, of the axes before positions: one axis may hold both."""
        if len(lead) != 1:
            return (lead[0], prod(lead[1:])) if lead else (1, 1)
        samples = self._batch if lead[0] % self._batch == 0 else 1
        return samples, lead[0] // samples
