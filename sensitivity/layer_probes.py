"""Hutchinson's estimate for every layer at once: one probe for all layers or one a layer, whichever is cheaper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mpq.progress import track

from .hessian_products import HessianProducts, counted_seconds
from .trace_estimators import FEWEST_PROBES, StoppingRule, seed_of, standard_error_of_mean, xtrace

Kind = Literal["joint", "block"]
Array = NDArray[np.float64]
KINDS: tuple[Kind, Kind] = ("joint", "block")
UNREACHED = 10**6  # more probes than anyone takes
PILOT = 8  # block probes by which they are compared with joint ones
MOST_NUMBERS = 2**25  # float64 that the vectors of XTrace may fill


@dataclass(frozen=True)
class LayerTrace:
    """Trace of one layer's block, its standard error over probes (data fixed), probes used, and how it was found."""

    trace: float
    standard_error: float
    probes: int
    method: str


def probed_traces(
    products: HessianProducts, rule: StoppingRule, method: Literal["auto", "joint", "block"]
) -> dict[int, LayerTrace]:
    """Traces of the layers' diagonal blocks from random signs.

        block   v on layer l:     v_lᵀ H_ll v_l,  mean Tr(H_ll),  variance 2 (||H_ll||² - Σ_i H_ii²)
        joint   v on all layers:  v_lᵀ (H v)_l,   mean Tr(H_ll),  variance that + Σ_{m≠l} ||H_lm||²

    A joint probe serves all layers for one product and is noisier, by the cross blocks, up to hundreds of times; a
    sweep of block probes takes a product a layer over one shared first-order graph. "auto" starts with joint probes.
    Where they do not suffice it tries block probes on the layers that need most, if these could be cheaper at all, and
    splits the layers where the total is least: after n probes of standard error s a target τ takes n (s/τ)² probes.
    A layer that needs many block probes is given to XTrace first, for a third of their number: enough where the block's
    eigenvalues decay, as they mostly do, and else a third in vain. Costs are counted from operations, not timed: the
    same seed gives the same answer.

    Every probe draws new signs for every batch, so that batches average the noise as well.

    Returns:
        A `LayerTrace` for each of `products.layers`.
    """
    sampler = _Sampler(products, rule)
    layers = list(products.layers)
    if method == "block":
        blocks: dict[int, Kind] = dict.fromkeys(layers, "block")
        sampler.finish(blocks)
        return sampler.traces(blocks)
    sampler.draw(joint=min(FEWEST_PROBES, rule.probes), block={})
    kinds: dict[int, Kind] = dict.fromkeys(layers, "joint")
    if method == "auto":
        kinds.update(dict.fromkeys(_chosen_blocks(sampler), "block"))
    low_rank = _by_xtrace(sampler, [layer for layer, kind in kinds.items() if kind == "block"])
    kinds = {layer: kind for layer, kind in kinds.items() if layer not in low_rank}
    sampler.finish(kinds)
    return sampler.traces(kinds) | low_rank


def _by_xtrace(sampler: _Sampler, layers: list[int]) -> dict[int, LayerTrace]:
    """XTrace's estimates of the blocks that meet the rule with a third of the products that block probes need."""
    products, rule = sampler.products, sampler.rule
    allowed = {layer: min(sampler.need("block", layer) // 3, rule.probes) for layer in layers}
    tried = [
        layer
        for layer, most in allowed.items()
        if not rule.takes_all
        and most >= FEWEST_PROBES
        and products.of == "weights"
        and 3 * most / 2 * products.size(layer) <= MOST_NUMBERS
    ]

    def estimate(layer: int) -> Array:
        generator = torch.Generator().manual_seed(seed_of(products.measurement.seed, layer))
        limited = replace(rule, probes=allowed[layer])
        found = xtrace(partial(products.product, layer), products.size(layer), limited, generator)
        return np.array([found.trace, found.standard_error, found.products])

    def piece(layer: int) -> Array:
        return products.measurement.pieces.get(f"xtrace of {layer} by {allowed[layer]}", partial(estimate, layer))

    found = {}
    for layer, estimated in zip(tried, products.measurement.ranks.shared(tried, piece), strict=True):
        trace, error, count = estimated.tolist()
        if rule.met(trace, error):
            found[layer] = LayerTrace(trace, error, int(count), "xtrace")
    return found


def _chosen_blocks(sampler: _Sampler) -> list[int]:
    """The layers for block probes, judged anew at every look: a noisy trace can make joint probes seem enough."""
    while True:
        chosen = _better_by_block(sampler)
        joint = max((sampler.following("joint", layer) for layer in sampler.layers), default=0)
        missing = joint - sampler.count("joint", sampler.layers[0]) if sampler.layers else 0
        if chosen or missing <= 0:
            return chosen
        sampler.draw(missing, {})


def _better_by_block(sampler: _Sampler) -> list[int]:
    """The layers that block probes serve at less cost: those that need most joint probes, down to the best cut."""
    if not sampler.layers:
        return []
    done = sampler.count("joint", sampler.layers[0])
    needs = {layer: sampler.need("joint", layer) for layer in sampler.layers}
    hungry = sorted((layer for layer in sampler.layers if needs[layer] > done), key=lambda layer: -needs[layer])
    if not hungry:
        return []
    price, prices = sampler.prices(hungry)
    tried = hungry[: _best_cut(price, needs, {layer: FEWEST_PROBES * prices[layer] for layer in hungry}, done)]
    if not tried:
        return []
    fresh = [layer for layer in tried if not sampler.count("block", layer)]
    if fresh:
        sampler.draw(0, dict.fromkeys(fresh, min(PILOT, sampler.rule.probes)))
    needs |= {layer: sampler.need("joint", layer) for layer in tried}
    costs = {layer: max(FEWEST_PROBES, sampler.need("block", layer)) * prices[layer] for layer in tried}
    tried.sort(key=lambda layer: -needs[layer])
    return tried[: _best_cut(price, needs, costs, done)]


def _best_cut(price: float, needs: Mapping[int, int], costs: Mapping[int, float], done: int) -> int:
    """How many of the layers in `costs`, those that need most joint probes, to serve by block probes at least cost."""
    ordered = sorted(needs, key=lambda layer: -needs[layer])
    best, least, spent = 0, price * max(needs[ordered[0]] - done, 0), 0.0
    for cut, layer in enumerate(ordered, 1):
        if layer not in costs:
            break
        spent += costs[layer]
        rest = max(needs[ordered[cut]] if cut < len(ordered) else done, done)
        total = spent + price * (rest - done)
        if total < least:
            best, least = cut, total
    return best


@dataclass
class _Sampler:
    """Values of probes of either kind, drawn round by round; a round of a batch is a piece that is kept."""

    products: HessianProducts
    rule: StoppingRule
    rounds: int = 0
    values: dict[tuple[Kind, int], Array] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return list(self.products.layers)

    def count(self, kind: Kind, layer: int) -> int:
        return len(self.values.get((kind, layer), ()))

    def estimate(self, kind: Kind, layer: int) -> tuple[float, float]:
        values = self.values[kind, layer]
        return float(values.mean()), standard_error_of_mean(values)

    def need(self, kind: Kind, layer: int) -> int:
        """Probes of a kind that a layer needs in all, as far as one can see, be it more than the rule allows.

        Where the rule asks for all probes, the target is what all of them are expected to reach as joint ones.
        """
        error, count = self.estimate(kind, layer)[1], self.count(kind, layer)
        known = [self.estimate(other, layer) for other in KINDS if self.count(other, layer)]
        target = self.rule.target(min(known, key=lambda estimate: estimate[1])[0])
        if self.rule.takes_all and self.count("joint", layer):
            target = self.estimate("joint", layer)[1] * math.sqrt(self.count("joint", layer) / self.rule.probes)
        if error <= target:
            return count
        return UNREACHED if target == 0 else min(UNREACHED, math.ceil(count * (error / target) ** 2))

    def prices(self, layers: list[int]) -> tuple[float, dict[int, float]]:
        """Counted CPU seconds of a joint probe, and of a block probe of some layers; the first batch stands for all."""
        pieces, name = self.products.measurement.pieces, f"{self.products.of} prices {layers}"
        (counted,) = self.products.measurement.ranks.shared(
            [layers], lambda of: pieces.get(name, partial(self._counted, of))
        )
        return float(counted[0]), dict(zip(layers, counted[1:].tolist(), strict=True))

    def _counted(self, layers: list[int]) -> Array:
        graph, generator = self.products.graph(0), torch.Generator().manual_seed(0)
        joint = counted_seconds(lambda: graph.joint(generator))
        return np.array([joint, *(counted_seconds(partial(graph.block, layer, generator)) for layer in layers)])

    def finish(self, kinds: Mapping[int, Kind]) -> None:
        """Draw until every layer meets the rule or has had all its probes."""
        while True:
            wanted = {layer: self.following(kind, layer) - self.count(kind, layer) for layer, kind in kinds.items()}
            joint = max((wanted[layer] for layer, kind in kinds.items() if kind == "joint"), default=0)
            block = {layer: wanted[layer] for layer, kind in kinds.items() if kind == "block" and wanted[layer] > 0}
            if not joint and not block:
                return
            self.draw(joint, block)

    def following(self, kind: Kind, layer: int) -> int:
        """How many probes a layer should have at the next look."""
        count, most = self.count(kind, layer), self.rule.probes
        if count < min(FEWEST_PROBES, most):
            return min(FEWEST_PROBES, most)
        if count >= most or self.rule.met(*self.estimate(kind, layer)):
            return count
        if self.rule.takes_all:
            return most
        expected = math.ceil(1.1 * self.need(kind, layer))
        return min(most, max(math.ceil(1.2 * count), min(expected, 2 * count)))

    def draw(self, joint: int, block: Mapping[int, int]) -> None:
        """One round: so many joint probes and so many block probes of each layer, summed over batches."""
        self.rounds += 1
        most = max([joint, *block.values()], default=0)
        total = np.zeros((2, len(self.layers), most))
        shown = self.products.measurement.progress
        asked = f"{self.products.of} round {self.rounds} joint {joint} block {sorted(block.items())}"

        def values_of(index: int) -> Array:
            make = partial(self._draw, index, joint, block, most)
            return self.products.measurement.pieces.get(f"{asked} batch {index}", make)

        batches = track(self.products.batches, f"curvature, round {self.rounds}", shown=shown)
        values = self.products.measurement.ranks.shared(self.products.batches, values_of)
        for index, of_batch in zip(batches, values, strict=True):
            total += self.products.weight(index) * of_batch
        for row, layer in enumerate(self.layers):
            self._add("joint", layer, total[0, row, :joint])
            self._add("block", layer, total[1, row, : block.get(layer, 0)])

    def _draw(self, index: int, joint: int, block: Mapping[int, int], most: int) -> Array:
        """(joint or block, layers, probes): values on one batch."""
        of_inputs = self.products.of == "inputs"
        generator = torch.Generator().manual_seed(
            seed_of(self.products.measurement.seed, of_inputs, self.rounds, index)
        )
        graph, values = self.products.graph(index), np.zeros((2, len(self.layers), most))
        for probe in range(joint):
            found = graph.joint(generator)
            values[0, :, probe] = [found[layer] for layer in self.layers]
        for row, layer in enumerate(self.layers):
            values[1, row, : block.get(layer, 0)] = [graph.block(layer, generator) for _ in range(block.get(layer, 0))]
        return values

    def _add(self, kind: Kind, layer: int, values: Array) -> None:
        if len(values):
            self.values[kind, layer] = np.append(self.values.get((kind, layer), np.empty(0)), values)

    def traces(self, kinds: Mapping[int, Kind]) -> dict[int, LayerTrace]:
        return {
            layer: LayerTrace(*self.estimate(kind, layer), self.count(kind, layer), kind)
            for layer, kind in kinds.items()
        }
