"""Relevance of every layer on one batch: a forward as it is, then a backward in which rules replace gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq.batches import Batch, batch_size
from mpq.layers import Network
from mpq.surgery import layer_parameters
from mpq.tasks import IGNORED, Distribution, Outputs, Task

from .batch_samples import single_samples
from .relevance_graph import RelevanceGraph, operands, operation
from .relevance_residual import SeenSums, rescaled_residual
from .relevance_rules import Rule, ZBox, at_least_float, parse_rule
from .relevance_steps import Gradients, has_rule, step_rule
from .relevance_sums import FACTORS, GraphSum, data_factors, weighted_sum, with_norm

Target = Literal["auto", "argmax", "label", "output"]
Bias = Literal["absorb", "distribute"]
Residual = Literal["split", "rescaled"]


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """How relevance starts and flows; rules may be given as text.

    Args:
        rule: of every weighted sum.
        input_rule: of those that no other sum comes before, where the data are numbers and no tokens.
        bias: "absorb": a bias keeps its share; "distribute": the inputs of the sum get it in proportion.
        residual: "split": each branch its own part; "rescaled": see `rescaled_residual`.
        target: whose relevance it is; see `relevance`.
        fold_norms: batch norm is made part of the sum before it.

    Raises:
        ValueError: if one does not fit.
    """

    rule: Rule | str = "epsilon"
    input_rule: Rule | str | None = None
    bias: Bias = "absorb"
    residual: Residual = "split"
    target: Target = "auto"
    fold_norms: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("bias", Bias), ("residual", Residual), ("target", Target)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        self.rules  # noqa: B018 - checks them

    @property
    def rules(self) -> tuple[Rule, Rule | None]:
        """The rule and the input rule."""
        return parse_rule(self.rule), None if self.input_rule is None else parse_rule(self.input_rule)


@dataclass
class BatchRelevance:
    """What one batch gave, every number a sample.

    Attributes:
        inputs: (layers, 2, samples): Σ |R| and Σ R at the layers' inputs.
        outputs: a layer (2, samples, channels): Σ over positions of |R| and R of each output channel; one channel in
            all where the layer's outputs are not its weight's rows in order.
        started: (samples,): relevance of the outputs.
        arrived: (samples,): what came to where the data enter.
        unruled: operations that fell back to gradient times input, and how often.
    """

    inputs: Tensor
    outputs: list[Tensor]
    started: Tensor
    arrived: Tensor
    unruled: Counter[str] = field(default_factory=Counter)

    def joined(self, other: BatchRelevance) -> BatchRelevance:
        """Both, one's samples after the other's."""
        outputs = [torch.cat(pair, 1) for pair in zip(self.outputs, other.outputs, strict=True)]
        ends = ((self.started, other.started), (self.arrived, other.arrived))
        started, arrived = (torch.cat(pair) for pair in ends)
        unruled = self.unruled | other.unruled
        return BatchRelevance(torch.cat([self.inputs, other.inputs], 2), outputs, started, arrived, unruled)


def _only(parameters: Iterator[Tensor]) -> Tensor:
    found = list(parameters)
    if len(found) != 1:
        raise ValueError(f"relevance needs embeddings that are one parameter, one is computed from {len(found)}")
    return found[0]


class _SamplesMixedError(Exception):
    """An operation's first axis does not hold the samples of the batch."""


def batch_relevance(
    model: nn.Module, batch: Batch, network: Network, task: Task, propagation: Propagation
) -> BatchRelevance:
    """Relevance of every layer for every sample of a batch.

    A batch in which some layer's samples cannot be told apart, or whose weights are used by functions, which may put
    the samples anywhere, is run one sample at a time.

    Raises:
        ValueError: if the outputs have no gradient, no data with gradients enters, relevance is not finite, or the
            target does not fit.
    """
    run = partial(_run, model, network, task, propagation)
    with _asking_for_gradients(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            if batch_size(batch) > 1 and any(layer.module is None for layer in network.layers):
                raise _SamplesMixedError
            return _overwriting_allowed(run, batch)
        except _SamplesMixedError:
            parts = [_overwriting_allowed(run, sample) for sample in single_samples(batch)]
    total = parts[0]
    for part in parts[1:]:
        total = total.joined(part)
    return total


def _overwriting_allowed(run: Callable[[Batch], BatchRelevance], batch: Batch) -> BatchRelevance:
    """Run once; again with copies of what autograd keeps where the model overwrites some of it."""
    try:
        return run(batch)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        return run(batch)


def _run(model: nn.Module, network: Network, task: Task, propagation: Propagation, batch: Batch) -> BatchRelevance:
    leaves: list[Tensor] = []
    seen = SeenSums()
    with seen if propagation.residual == "rescaled" else nullcontext():
        outputs = task.run(model, _with_leaves(batch, leaves))
    if not outputs.values.requires_grad:
        raise ValueError("the model's outputs have no gradient: it runs under no_grad or detaches; use kl")
    graph = RelevanceGraph(outputs.values, leaves)
    walk = _Walk(model, network, propagation, graph, batch_size(batch))
    start = starting_coefficient(task, outputs, propagation.target)
    walk.residuals = seen.terms
    walk.propagate(outputs.values, start, leaves)
    walk.check_finite()
    started = at_least_float(outputs.values.detach() * start).reshape(walk.samples, -1).double().sum(1)
    return BatchRelevance(walk.inputs, walk.finished_outputs(), started.cpu(), walk.arrived, walk.unruled)


def starting_coefficient(task: Task, outputs: Outputs, target: Target) -> Tensor:
    """The coefficient at the outputs: a sample's relevance is the mean over positions of what the target says."""
    values = outputs.values.detach()
    positions = outputs.positions().to(values.device).reshape(-1, *[1] * (values.ndim - 1))
    if target == "auto":
        target = "argmax" if isinstance(task, Distribution) else "output"
    if target == "output":
        chosen = values.clone()
    else:
        classes = values.argmax(-1) if target == "argmax" else _labels(outputs, values)
        chosen = torch.zeros_like(values).scatter_(-1, classes.clamp_min(0).unsqueeze(-1), 1)
    if outputs.mask is not None and values.ndim > outputs.mask.ndim:
        chosen = chosen * outputs.mask.unsqueeze(-1)
    return (chosen / positions).to(values.dtype)


def _labels(outputs: Outputs, values: Tensor) -> Tensor:
    labels = outputs.labels
    if labels is None or labels.is_floating_point() or labels.shape != values.shape[:-1]:
        raise ValueError("target='label' needs data with one class label a position: use target='argmax'")
    if bool((labels == IGNORED).any()) and outputs.mask is None:
        raise ValueError(f"target='label' needs a label for every sample, some are {IGNORED}: use target='argmax'")
    return labels


class _Walk:
    """One backward with a hook at every operation that has a rule."""

    def __init__(
        self, model: nn.Module, network: Network, propagation: Propagation, graph: RelevanceGraph, samples: int
    ) -> None:
        self.network, self.propagation, self.graph, self.samples = network, propagation, graph, samples
        layers = enumerate(network.layers)
        self.layer_of = {id(weight): place for place, layer in layers for weight in layer_parameters(model, layer)}
        self.inputs = torch.zeros(len(network.layers), 2, samples, dtype=torch.float64)
        self.outputs: list[list[Tensor]] = [[] for _ in network.layers]
        self.arrived = torch.zeros(samples, dtype=torch.float64)
        self.unruled: Counter[str] = Counter()
        self.residuals: Mapping[Node, tuple[Tensor, Tensor]] = {}
        self.rule, self.input_rule = propagation.rules

    def propagate(self, values: Tensor, start: Tensor, leaves: list[Tensor]) -> None:
        if any(operation(node) == "EmbeddingBag" for node in self.graph.nodes):
            raise ValueError("relevance cannot be followed through an embedding bag: use nn.Embedding and a mean")
        lookups = [node for node in self.graph.data_nodes() if operation(node) == "Embedding"]
        edges: list[Any] = [*leaves, *(GradientEdge(node, 0) for node in lookups)]
        if not edges:
            raise ValueError(
                "relevance needs data that are numbers, or tokens that an embedding looks up, found neither"
            )
        with ExitStack() as stack:
            for node, hook in self._hooks():
                stack.callback(node.register_hook(hook).remove)
            found = torch.autograd.grad(values, edges, start, allow_unused=True)
        with torch.no_grad():
            for leaf, coefficient in zip(leaves, found, strict=False):
                if coefficient is not None and not self._input_rule_sees_data():
                    self.arrived += _total(self._a_sample(leaf.detach() * coefficient))
            for node, coefficient in zip(lookups, found[len(leaves) :], strict=True):
                if coefficient is not None:
                    self._lookup(node, coefficient)

    def _hooks(self) -> Iterator[tuple[Node, Any]]:
        nodes = list(self.graph.data_nodes())
        followers = {source: node for node in nodes for source in operands(node) if source is not None}
        sums = [node for node in nodes if operation(node) in FACTORS and len(data_factors(self.graph, node)) == 1]
        self.first = {node for node in sums if self._takes_input_rule(node, sums)}
        for node in nodes:
            found = weighted_sum(self.graph, node, self.propagation.bias == "absorb") if node in sums else None
            if found is not None:
                yield node, self._sum_hook(node, self._folded(found, node, followers.get(node)))
            elif node in sums:
                continue
            elif node in self.residuals and [self.graph.role(node, at) for at in (0, 1)] == ["data", "data"]:
                self._a_sample(self.residuals[node][0])
                yield node, rescaled_residual(self.residuals[node], self.samples)
            elif (hook := step_rule(self.graph, node)) is not None:
                yield node, hook
            elif not has_rule(node):
                yield node, partial(self._count_unruled, operation(node))

    def _count_unruled(self, name: str, given: Gradients, coming: Gradients) -> None:
        if any(part is not None and bool(part.any()) for part in coming):
            self.unruled[name] += 1

    def _takes_input_rule(self, node: Node, sums: Sequence[Node]) -> bool:
        if self.input_rule is None or not self.graph.comes_first(node, sums):
            return False
        return not any(operation(other) == "Embedding" for other in self.graph.data_nodes())

    def _input_rule_sees_data(self) -> bool:
        return bool(self.first)

    def _folded(self, found: GraphSum, node: Node, follower: Node | None) -> GraphSum:
        norm = follower is not None and operation(follower) == "NativeBatchNorm"
        if not (norm and self.propagation.fold_norms and self.graph.consumers[node] == 1):
            return found
        if follower is None or follower._saved_training:  # type: ignore[attr-defined]
            return found
        return with_norm(self.graph, found, follower) or found

    def _sum_hook(self, node: Node, found: GraphSum) -> Any:
        layer = self._layer_behind(found.weight)
        rule = self.input_rule if node in self.first else None

        @torch.no_grad()
        def hook(given: Gradients, coming: Gradients) -> tuple[Tensor | None, ...] | None:
            before, after = given[found.position], coming[0]
            if before is None or after is None:
                return None
            step = found.step.in_float()
            coefficient = after.to(step.inputs.dtype)
            if found.norm_scale is not None:
                scale = found.norm_scale.to(coefficient.dtype)
                coefficient = torch.where(scale == 0, 0, coefficient / scale)
            passed = (rule or self.rule)(step, coefficient)
            arrived = rule.relevance(step, coefficient) if isinstance(rule, ZBox) else step.inputs * passed
            if node in self.first:
                self.arrived += _total(self._a_sample(arrived))
            if layer is not None:
                self._observe(layer, found, arrived, step.output * coefficient)
            return tuple(passed.to(before.dtype) if at == found.position else part for at, part in enumerate(given))

        return hook

    def _layer_behind(self, weight: Node | None) -> int | None:
        found = {self.layer_of.get(id(parameter)) for parameter in self.graph.parameters_behind(weight)} - {None}
        return min(place for place in found if place is not None) if len(found) == 1 else None

    def _observe(self, layer: int, found: GraphSum, arriving: Tensor, leaving: Tensor) -> None:
        given = self._a_sample(arriving.movedim(found.channel_axis, -1))
        self.inputs[layer] += torch.stack([_total(given.abs()), _total(given)])
        made = self._a_sample(leaving.movedim(found.channel_axis, -1))
        self.outputs[layer].append(
            torch.stack([made.abs().sum(1, dtype=torch.float64), made.sum(1, dtype=torch.float64)]).cpu()
        )

    def _lookup(self, node: Any, coefficient: Tensor) -> None:
        weight = _only(self.graph.parameters_behind(operands(node)[0]))
        looked_up: Tensor = node._saved_indices
        relevance = at_least_float(weight.detach()[looked_up]) * at_least_float(coefficient)
        a_sample = self._a_sample(relevance).double().cpu()  # (samples, tokens, width)
        self.arrived += _total(a_sample)
        layer = self.layer_of.get(id(weight))
        if layer is None:
            return
        tokens = a_sample.sum(2)  # a lookup is a sum over one-hot inputs
        self.inputs[layer] += torch.stack([tokens.abs().sum(1), tokens.sum(1)])
        entries = looked_up.reshape(self.samples, -1).cpu()
        empty = torch.zeros(2, self.samples, weight.shape[0], dtype=torch.float64)
        parts = torch.stack([a_sample.abs().sum(2), tokens])
        self.outputs[layer].append(empty.scatter_add_(2, entries.expand(2, -1, -1), parts))

    def _a_sample(self, relevance: Tensor) -> Tensor:
        """(samples, positions, channels)."""
        if relevance.shape[0] % self.samples:
            raise _SamplesMixedError
        channels = relevance.shape[-1] if relevance.ndim > 1 else 1
        return relevance.reshape(self.samples, -1, channels)

    def finished_outputs(self) -> list[Tensor]:
        """A layer (2, samples, channels), calls added up."""
        finished = []
        for layer, parts in zip(self.network.layers, self.outputs, strict=True):
            rows = layer.weight_shape[0]
            whole = all(part.shape[2] == rows for part in parts) and layer.kind != "experts"
            kept = parts if whole else [part.sum(2, keepdim=True) for part in parts]
            width = rows if whole else 1
            finished.append(sum(kept, torch.zeros(2, self.samples, width, dtype=torch.float64)))
        return finished

    def check_finite(self) -> None:
        """Raise for the layer nearest to the outputs whose relevance is NaN or infinite."""
        for place in reversed(range(len(self.network.layers))):
            parts = (self.inputs[place], *self.outputs[place])
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                raise ValueError(
                    f"the relevance at layer {self.network.layers[place].name!r} holds NaN or infinity: check the "
                    "model's outputs on this data, run it in float32, or take a rule such as 'z+'"
                )


def _total(relevance: Tensor) -> Tensor:
    """(samples,): sums in float64."""
    return relevance.sum((1, 2), dtype=torch.float64).cpu()


def _with_leaves(value: Any, leaves: list[Tensor], name: str = "") -> Any:
    """The batch with every floating-point input, labels and masks apart, a leaf that asks for a gradient."""
    if isinstance(value, Mapping):
        return {key: _with_leaves(part, leaves, str(key)) for key, part in value.items()}
    if isinstance(value, tuple | list):
        pair = len(value) == 2 and isinstance(value, tuple | list) and not name
        parts = [_with_leaves(part, leaves, "labels" if pair and at else "input") for at, part in enumerate(value)]
        return type(value)(parts)
    if not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in name or name == "labels":
        return value
    leaves.append(value.detach().clone().requires_grad_())
    return leaves[-1].clone()  # which the model may overwrite


@contextmanager
def _asking_for_gradients(model: nn.Module) -> Iterator[None]:
    """A model all of whose parameters ask for a gradient for a while, so that autograd keeps what they multiply."""
    silent = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in silent:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in silent:
            parameter.requires_grad_(False)
