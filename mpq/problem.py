"""The allocation problem every method reduces to: one option a layer, a table of scores, tables of costs, budgets."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt

from mpq.allocation import Allocation, InfeasibleError, Proof, Status
from mpq.arrays import BoolArray, FloatArray, IntArray, read_only, whole_numbers
from mpq.sparse_peak import SparsePeak
from mpq.suggestions import did_you_mean

__all__ = ["Allocation", "AllocationProblem", "InfeasibleError", "Proof", "SparsePeak"]

Blocks = Mapping[tuple[int, int], FloatArray]

BUDGET_TOLERANCE = 1e-9  # relative; room for the rounding of sums, promised to every caller


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Choose one option a layer: the least objective under every budget.

    minimise  ‖objective[i, c_i]‖_norm + Σ pairs[i, j][c_i, c_j] + Σ format_costs[options in use]
    subject to  offsets[r] + Σ resources[r][i, c_i] + Σ transitions[r][i, j][c_i, c_j] ≤ budgets[r]  for every budget,
    offsets[r] + max over steps of peak_resources[r] ≤ peak_budgets[r],  c equal within every tie.

    Everything is checked here, once; solvers rely on it. Arrays are stored as read-only float64 copies.

    Args:
        objective: ``(layers, options)``, lower is better, may be negative; +inf forbids an option for a layer.
        objective_se: ``(layers, options)`` standard errors of the objective.
        norm: 1 for the sum, ``math.inf`` for the worst layer, p for (Σ xᵖ)^(1/p) of non-negative objectives.
        resources: ``(layers, options)`` each, finite wherever the option is allowed, may be negative.
        budgets: the most that a resource may add up to. Resources without a budget are reported only.
        peak_resources: dense ``(steps, layers, options)`` arrays or `SparsePeak`; kept as `SparsePeak`.
        peak_budgets: the most that any step of a peak resource may hold.
        ties: groups of layers that take the same option; groups that overlap are one.
        pairs: ``(options, options)`` terms of the objective for two layers. Need norm 1.
        transitions: the same for a resource: ``{resource: {(i, j): array}}``.
        max_formats: at most so many different options in use.
        format_costs: ``(options,)`` non-negative, added to the objective once for every option in use. Need norm 1.
        offsets: constants added to a resource (bytes that no option touches), peak or not.
        layers: labels of the layers, for messages and results.
        options: labels of the options.

    Raises:
        ValueError: for anything that breaks these rules, naming layer and option.
        InfeasibleError: for a layer, or a tie, without any allowed option.

    Example:
        Two layers in 4 or 8 bits: 8 bits for both would take 12 bytes, 9 are allowed.

        >>> problem = AllocationProblem(
        ...     objective=[[5.0, 1.0], [3.0, 0.5]], resources={"size": [[2.0, 4.0], [4.0, 8.0]]}, budgets={"size": 9.0},
        ...     layers=("stem", "head"), options=("int4", "int8"))
        >>> problem.evaluate([1, 0])
        (4.0, {'size': 8.0})
        >>> problem.violations([1, 1])
        {'size': 3.0}
    """

    objective: FloatArray
    _: KW_ONLY
    objective_se: FloatArray | None = None
    norm: float = 1
    resources: Mapping[str, FloatArray] = field(default_factory=dict)
    budgets: Mapping[str, float] = field(default_factory=dict)
    peak_resources: Mapping[str, SparsePeak | FloatArray] = field(default_factory=dict)
    peak_budgets: Mapping[str, float] = field(default_factory=dict)
    ties: Sequence[Sequence[int]] = ()
    pairs: Blocks = field(default_factory=dict)
    transitions: Mapping[str, Blocks] = field(default_factory=dict)
    max_formats: int | None = None
    format_costs: FloatArray | None = None
    offsets: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        objective = read_only(self.objective)
        if objective.ndim != 2 or not objective.size:
            raise ValueError(f"objective must have shape (layers, options), neither of them 0, got {objective.shape}")
        rows, columns = objective.shape
        self._set(
            objective=objective,
            layers=_labels("layers", self.layers, rows),
            options=_labels("options", self.options or [f"option {k}" for k in range(columns)], columns),
        )
        self._check_objective()
        self._set(
            resources={name: self._table(f"resources[{name!r}]", table) for name, table in self.resources.items()},
            peak_resources={name: self._peak(name, peak) for name, peak in self.peak_resources.items()},
            pairs={key: self._block("pairs", key, block) for key, block in self.pairs.items()},
        )
        both = self.resources.keys() & self.peak_resources.keys()
        if both:
            raise ValueError(f"a name must be a resource or a peak resource, not both: {sorted(both)}")
        for name, amounts, known in (
            ("budgets", self.budgets, self.resources),
            ("peak_budgets", self.peak_budgets, self.peak_resources),
            ("offsets", self.offsets, [*self.resources, *self.peak_resources]),
        ):
            self._set(**{name: _amounts(name, amounts, known)})
        self._check_transitions()
        self._check_ties()
        self._check_formats()

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_objective(self) -> None:
        self._forbid(np.isnan(self.objective) | (self.objective == -np.inf), "objective must be a number or +inf")
        for layer in np.flatnonzero(~self.allowed.any(1))[:1]:
            raise InfeasibleError(
                f"layer {self.label(layer)!r} has no allowed option: its objective is +inf throughout"
            )
        norm = self.norm
        if isinstance(norm, bool) or not isinstance(norm, int | float | np.number) or not norm >= 1:
            raise ValueError(f"norm must be 1, math.inf or a number between, got {norm!r}")
        if 1 < norm < math.inf:
            rule = f"objective must not be negative for norm={norm:g} (use norm=1 or math.inf)"
            self._forbid(self.allowed & (self.objective < 0), rule)
        if self.objective_se is not None:
            errors = self._table("objective_se", self.objective_se)
            self._forbid(self.allowed & (errors < 0), "objective_se must not be negative", errors)
            self._set(objective_se=errors)

    def _check_transitions(self) -> None:
        unknown = [name for name in self.transitions if name not in self.resources]
        if unknown:
            raise ValueError(
                f"transitions[{unknown[0]!r}] must name a resource{did_you_mean(unknown[0], self.resources)}"
            )
        self._set(
            transitions={
                name: {key: self._block(f"transitions[{name!r}]", key, block) for key, block in blocks.items()}
                for name, blocks in self.transitions.items()
            }
        )

    def _check_ties(self) -> None:
        ties = tuple(tuple(whole_numbers("ties", tie).tolist()) for tie in self.ties)
        self._set(ties=ties)
        for tie in ties:
            outside = [layer for layer in tie if not 0 <= layer < len(self.objective)]
            if outside:
                raise ValueError(
                    f"ties must hold layer indices 0..{len(self.objective) - 1}, got {outside[0]} in {tie}"
                )
        if not ties:
            return
        groups = self.groups
        common = np.ones((groups.max() + 1, len(self.options)), dtype=bool)
        np.logical_and.at(common, groups, self.allowed)
        for group in np.flatnonzero(~common.any(1))[:1]:
            names = [self.label(int(layer)) for layer in np.flatnonzero(groups == group)]
            raise InfeasibleError(f"tied layers {names} share no allowed option: widen their options or drop the tie")

    def _check_formats(self) -> None:
        limit = self.max_formats
        if limit is not None and (isinstance(limit, bool) or int(limit) != limit or limit < 1):
            raise ValueError(f"max_formats must be a whole number from 1, got {limit!r}")
        if self.format_costs is not None:
            costs = read_only(self.format_costs)
            if costs.shape != (len(self.options),) or not (np.isfinite(costs) & (costs >= 0)).all():
                raise ValueError(f"format_costs must be {len(self.options)} finite numbers from 0, got {costs}")
            self._set(format_costs=costs)
        if self.norm != 1 and (self.pairs or self.format_costs is not None):
            raise ValueError(f"pairs and format_costs are terms of a sum: norm must be 1, got {self.norm:g}")

    def _forbid(self, wrong: BoolArray, rule: str, table: FloatArray | None = None) -> None:
        for layer, option in np.argwhere(wrong)[:1]:
            value = (self.objective if table is None else table)[layer, option]
            where = f"layer {self.label(layer)!r}, option {self.options[option]!r}"
            raise ValueError(f"{rule}, got {value} for {where}")

    def _table(self, name: str, table: npt.ArrayLike) -> FloatArray:
        array = read_only(table)
        if array.shape != self.objective.shape:
            raise ValueError(f"{name} must have the objective's shape {self.objective.shape}, got {array.shape}")
        self._forbid(self.allowed & ~np.isfinite(array), f"{name} must be finite wherever the option is allowed", array)
        return array

    def _block(self, name: str, key: tuple[int, int], block: npt.ArrayLike) -> FloatArray:
        array, (rows, columns) = read_only(block), self.objective.shape
        if len(key) != 2 or key[0] == key[1] or not all(0 <= layer < rows for layer in key):
            raise ValueError(f"{name} must be keyed by two different layers of 0..{rows - 1}, got {key}")
        if array.shape != (columns, columns):
            raise ValueError(f"{name}[{key}] must have shape {(columns, columns)}, got {array.shape}")
        wrong = np.outer(self.allowed[key[0]], self.allowed[key[1]]) & ~np.isfinite(array)
        for first, second in np.argwhere(wrong)[:1]:
            labels = [(self.label(key[0]), self.options[first]), (self.label(key[1]), self.options[second])]
            raise ValueError(f"{name}[{key}] must be finite, got {array[first, second]} for {labels}")
        return array

    def _peak(self, name: str, peak: SparsePeak | FloatArray) -> SparsePeak:
        if not isinstance(peak, SparsePeak):
            dense = np.asarray(peak, dtype=np.float64)
            if dense.ndim != 3 or dense.shape[1:] != self.objective.shape:
                shape = f"(steps, {len(self.objective)}, {len(self.options)})"
                raise ValueError(
                    f"peak_resources[{name!r}] must have shape {shape} or be SparsePeak, got {dense.shape}"
                )
            peak = SparsePeak.from_dense(np.where(self.allowed, dense, 0))
        sizes = {"layer": (peak.layer, len(self.objective)), "option": (peak.option, len(self.options))}
        for axis, (index, size) in sizes.items():
            if index.size and index.max() >= size:
                raise ValueError(f"peak_resources[{name!r}].{axis} must be below {size}, got {index.max()}")
        return peak

    # -- what solvers and callers ask --------------------------------------------------------------------------------

    @cached_property
    def allowed(self) -> BoolArray:
        """``(layers, options)``: True where the objective is finite."""
        return self.objective < np.inf

    @cached_property
    def groups(self) -> IntArray:
        """``(layers,)``: number of the tie group of every layer, counted in the order of their first layers."""
        if not self.ties:
            return np.arange(len(self.objective))
        leader = list(range(len(self.objective)))
        for tie in self.ties:
            roots = [_root(leader, layer) for layer in tie]
            for root in roots:
                leader[root] = min(roots)
        for layer in {layer for tie in self.ties for layer in tie}:
            leader[layer] = _root(leader, layer)
        return np.unique(leader, return_inverse=True)[1].astype(np.int64)

    @property
    def features(self) -> frozenset[str]:
        """What this problem asks of a solver beyond a sum under one budget."""
        asked = {
            "several budgets": len(self.budgets) + len(self.peak_budgets) > 1,
            "peak budgets": bool(self.peak_budgets),
            "pairs": bool(self.pairs),
            "transitions": any(self.transitions.get(name) for name in self.budgets),
            "max_formats": self.max_formats is not None,
            "format_costs": self.format_costs is not None,
            "max norm": self.norm == math.inf,
            "p-norm": 1 < self.norm < math.inf,
        }
        return frozenset(name for name, is_asked in asked.items() if is_asked)

    def label(self, layer: int) -> str:
        """What a message calls a layer."""
        return self.layers[layer] if self.layers else f"layer {layer}"

    def peak(self, name: str) -> SparsePeak:
        """The entries of a peak resource."""
        return cast(SparsePeak, self.peak_resources[name])

    def evaluate(self, choices: npt.ArrayLike) -> tuple[float, dict[str, float]]:
        """Objective and usage of every resource, recomputed with ``math.fsum``; a forbidden option costs +inf.

        Raises:
            ValueError: for choices that are not one option index a layer.
        """
        chosen = self._chosen(choices)
        rows = np.arange(len(chosen))
        scores, usage = self.objective[rows, chosen], {}
        for name, table in self.resources.items():
            terms = (block[chosen[i], chosen[j]] for (i, j), block in self.transitions.get(name, {}).items())
            usage[name] = math.fsum([self.offsets.get(name, 0.0), *table[rows, chosen].tolist(), *terms])
        for name in self.peak_resources:
            usage[name] = math.fsum([self.offsets.get(name, 0.0), self.peak(name).largest(chosen)])
        if self.norm == math.inf:
            return float(scores.max()), usage
        if self.norm != 1:
            return _power_norm(scores, float(self.norm)), usage
        terms = (block[chosen[i], chosen[j]] for (i, j), block in self.pairs.items())
        fixed = () if self.format_costs is None else self.format_costs[np.unique(chosen)]
        return math.fsum([*scores.tolist(), *terms, *fixed]), usage

    def violations(self, choices: npt.ArrayLike) -> dict[str, float]:
        """``{budget: usage − budget}`` for every budget that is exceeded by more than 1e-9 of itself."""
        usage, budgets = self.evaluate(choices)[1], {**self.budgets, **self.peak_budgets}
        over = {name: usage[name] - budget for name, budget in budgets.items()}
        return {name: excess for name, excess in over.items() if excess > BUDGET_TOLERANCE * abs(budgets[name])}

    def is_feasible(self, choices: npt.ArrayLike) -> bool:
        """Whether choices keep every budget, tie, forbidden option and ``max_formats``."""
        chosen, groups = self._chosen(choices), self.groups
        tied = True
        if self.ties:
            first = np.unique(groups, return_index=True)[1]
            tied = bool((chosen == chosen[first][groups]).all())
        few = self.max_formats is None or len(np.unique(chosen)) <= self.max_formats
        allowed = bool(self.allowed[np.arange(len(chosen)), chosen].all())
        return tied and few and allowed and not self.violations(chosen)

    def allocation(self, choices: npt.ArrayLike, *, status: Status, bound: float | None = None) -> Allocation:
        """The answer that these choices are, with objective, usage and gap recomputed from them."""
        chosen = self._chosen(choices)
        objective, usage = self.evaluate(chosen)
        proof = Proof.of(objective, objective if status == "optimal" else bound, status)
        return Allocation(chosen, objective, usage, proof, self.layers, self.options)

    def _chosen(self, choices: npt.ArrayLike) -> IntArray:
        chosen = whole_numbers("choices", choices)
        if chosen.shape != (len(self.objective),) or chosen.min() < 0 or chosen.max() >= len(self.options):
            raise ValueError(
                f"choices must be {len(self.objective)} indices below {len(self.options)}, got {choices!r}"
            )
        return chosen

    def __repr__(self) -> str:
        budgets = ", ".join(f"{name} <= {limit:g}" for name, limit in {**self.budgets, **self.peak_budgets}.items())
        size = f"{len(self.objective)} layers, {len(self.options)} options"
        return f"AllocationProblem({size}, budgets: {budgets or 'none'})"


def _power_norm(scores: FloatArray, power: float) -> float:
    largest = float(scores.max())
    if largest in (0.0, math.inf):
        return largest
    powers = (scores / largest) ** power
    return largest * float(math.fsum(powers.tolist()) ** (1 / power))


def _root(leader: list[int], layer: int) -> int:
    while leader[layer] != layer:
        layer = leader[layer]
    return layer


def _labels(name: str, labels: Sequence[str], count: int) -> tuple[str, ...]:
    words = tuple(str(label) for label in labels)
    if words and len(words) != count:
        raise ValueError(f"{name} must have {count} labels, got {len(words)}")
    if len(set(words)) < len(words):
        twice = next(word for word, times in Counter(words).items() if times > 1)
        raise ValueError(f"{name} must have different labels, got {twice!r} more than once")
    return words


def _amounts(name: str, amounts: Mapping[str, float], known: Iterable[str]) -> dict[str, float]:
    names = list(known)
    for key, amount in amounts.items():
        if key not in names:
            raise ValueError(
                f"{name}[{key!r}] must name a {'peak ' * ('peak' in name)}resource{did_you_mean(key, names)}"
            )
        if not math.isfinite(amount):
            raise ValueError(f"{name}[{key!r}] must be finite, got {amount}; leave it out to set no limit")
    return {key: float(amount) for key, amount in amounts.items()}
