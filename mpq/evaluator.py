"""`Evaluator`: a plan in, its measured divergence out; every measurement is made once, within a budget, and kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from mpq.batches import batch_size, batches_of
from mpq.cache import description, fingerprint_of, pieces_in
from mpq.drops import Metric, drop_name, drop_of
from mpq.frontier import Frontier
from mpq.kept_outputs import KeptOutputs
from mpq.kept_weights import KeptWeights
from mpq.measured_loss import MeasuredLoss
from mpq.plan import Plan
from mpq.plan_keys import choices_of_key, key_of
from mpq.plan_slopes import plan_slopes
from mpq.planning import choices_of
from mpq.progress import meter
from mpq.quantizer import Quantizer, RoundToNearest
from mpq.shuffled_pieces import shuffled_pieces
from mpq.slope_steps import Slopes
from mpq.stored_values import StoredValues
from mpq.surgery import evaluating, quantized
from mpq.table_entries import entries_of
from mpq.table_problem import totals
from mpq.task_choice import choose_task
from mpq.tasks import CustomLoss, LossFunction, Outputs, Task

if TYPE_CHECKING:
    from mpq.tables import CostTable

Independent = Literal["samples", "batches"]

KEPT_BYTES = 2**31  # of reference outputs, and as many of quantised weights
SLOPES_COST = 3  # measurements: a backward takes two forwards' time
_ROUNDING = 1e-9  # of an evaluation


class Exhausted(RuntimeError):
    """The evaluator's budget does not allow another measurement; those made so far are in `measured`."""


class Evaluator:
    """Measures plans of a table on the real model: memoised, budgeted, on growing amounts of data, on disk if asked.

    The data is shuffled once (samples within a batch where its tensors have the samples first, then the pieces it is
    cut into) and always taken in that order, so that `samples=64` is part of `samples=128` and growing an amount only
    runs what is new. Quantised weights are kept by layer and format: a plan that differs in two layers quantises two.

    Args:
        model: in full precision; comes back bit for bit after every measurement.
        data: what plans are measured on.
        table: whose units and options plans are made of; it needs layers.
        task: as for `search`.
        quantizer: as for `search`.
        metric: what is measured a sample: "divergence" from full precision, or a drop: of "accuracy", "agreement",
            "loss" (`mpq.drops`), or of a function of `Outputs` that is (samples,), higher is better.
        cache: a folder where finished measurements stay, under a fingerprint of all they depend on; a search that was
            killed finds them there.
        evaluations: how many measurements on the whole data may be made; one on half of it counts half. What is found
            in the cache counts as well, so that a search that goes on ends where it would have ended.
        seconds: no measurement is begun so long after the first was asked for.
        seed: of the order of samples.
        independent: what says something of its own. "samples", or "batches" where those of a batch belong together,
            such as crops of one photo: batches then stay whole and count as one sample each, its losses' mean (by
            size), so that no photo is on both sides of a test, and a hundred crops are not a hundred witnesses.
        kept_bytes: of reference outputs that are kept, and of quantised weights.

    Raises:
        ValueError: if the table has no layers, the data is wrong, or a limit is not positive.

    Example:
        >>> import torch, mpq
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = (torch.randn(32, 4), torch.randint(0, 3, (32,)))
        >>> table = mpq.measure(model, data, ["int2", "int4", "int8"], sensitivity="weight_error", progress=False)
        >>> evaluator = Evaluator(model, data, table, evaluations=2)
        >>> coarse, fine = evaluator.measure([0, 0]), evaluator.measure([2, 2], samples=16)
        >>> coarse.divergence > fine.divergence, evaluator.spent, evaluator.left
        (True, 1.5, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        table: CostTable,
        *,
        task: Task | LossFunction | str | None = None,
        quantizer: Quantizer | None = None,
        metric: Metric = "divergence",
        cache: str | Path | None = None,
        evaluations: float | None = None,
        seconds: float | None = None,
        seed: int = 0,
        independent: Independent = "samples",
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        if not table.layers:
            raise ValueError("the table must have layers to measure plans on a model, this one was written by hand")
        for name, limit in (("evaluations", evaluations), ("seconds", seconds)):
            if limit is not None and not (isinstance(limit, Real) and limit > 0):
                raise ValueError(f"{name} must be a positive number, got {limit!r}; leave it out for no limit")
        if independent not in get_args(Independent):
            raise ValueError(f"independent must be samples or batches, got {independent!r}")
        batches = batches_of(data)
        with evaluating(model):
            self.task = choose_task(model, batches[0], task)
        self.model, self.table, self.metric, self.seed = model, table, metric, seed
        self.quantizer, self._batches = quantizer, batches
        self.evaluations, self.seconds = evaluations, seconds
        self._drop = drop_of(metric, self.task)
        self.independent = independent  # what a function makes of a batch may need all of it, too
        cut = independent == "samples" and not isinstance(self.task, CustomLoss)
        self._pieces = shuffled_pieces(batches, cut, np.random.default_rng(seed))
        sizes = np.array([batch_size(piece) for piece in self._pieces])
        self._counts = sizes if independent == "samples" else np.ones_like(sizes)
        self._shares = sizes / sizes.mean()
        self._edges = np.cumsum([0, *self._counts])
        self.samples = int(self._edges[-1])
        self.weights = KeptWeights(quantizer or RoundToNearest(), kept_bytes)
        self._references = KeptOutputs(self._in_full_precision, kept_bytes)
        self._store = StoredValues(None if cache is None else pieces_in(cache, self.fingerprint).folder)
        self._values: dict[bytes, NDArray[np.float64]] = {}
        self.measured: dict[bytes, MeasuredLoss] = {}
        self.spent = 0.0
        self.runs = 0
        self._tell: Callable[[float, str], None] | None = None
        self._under_way = 0.0  # of a measurement
        self._started: float | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of all that a measurement depends on."""
        table, how = self.table, (self.task, self.metric, self.quantizer)
        parts = (self.model, self._batches, *how, table.layers, table.options, self.seed)
        more = (table.granularity, np.asarray(table.layer_index), self.independent)
        return fingerprint_of([], "evaluator", *map(description, (*parts, *more)))

    @property
    def left(self) -> float:
        """Evaluations of the whole data that may still be made, at the pace so far if time is limited."""
        left = math.inf if self.evaluations is None else max(0.0, self.evaluations - self.spent)
        if self.seconds is None or self._started is None:
            return left
        if self._time_is_over():
            return 0.0
        taken = time.monotonic() - self._started
        return min(left, (self.seconds - taken) * self.spent / taken) if self.spent else left

    def measure(self, choices: ArrayLike | Plan, samples: int | None = None) -> MeasuredLoss:
        """What a plan loses on the first samples.

        Args:
            choices: (units,) option indices of the table, or a plan.
            samples: at least so many, rounded up to whole pieces of the data; all by default.

        Raises:
            Exhausted: if the budget is spent and the plan has not been measured on so much data yet.
            ValueError: if the choices are no plan of the table.
        """
        codes = self._codes(choices)
        key = key_of(codes)
        wanted = self._piece_end(samples)
        stop = int(self._edges[wanted])
        before = self.measured[key].samples if key in self.measured else 0
        if stop > before:
            self._afford(stop - before)
            values = self._known(key)
            if len(values) < stop:
                values = self._grown(codes, values, wanted)
            self.spent += (stop - before) / self.samples
            self.measured[key] = MeasuredLoss.of(values[:stop])
            self._told(-self._under_way)
        return self.measured[key] if stop >= before else MeasuredLoss.of(self._values[key][:stop])

    def measure_all(self, plans: Sequence[ArrayLike], samples: int | None = None) -> list[MeasuredLoss]:
        """Several plans, one after the other; workers on one storage share them (`mpq.shared_evaluator`)."""
        self.prepare(plans, samples)
        return [self.measure(plan, samples) for plan in plans]

    def slopes(self, choices: ArrayLike, samples: int | None = None) -> Slopes | None:
        """How a plan's divergence changes when one unit takes another option.

        Counts as three measurements on so much data, and is kept as they are; `mpq.plan_slopes` has the formula. It is
        the task's divergence that has slopes, whatever the metric. Workers on one storage take the gradient each for
        itself, so it is rounded to three digits: they take the same steps if theirs agree so far.

        Args:
            choices: the plan.
            samples: as for `measure`.

        Returns:
            None if the outputs have no gradient.

        Raises:
            Exhausted: if the budget does not allow it.
        """
        codes, wanted = self._codes(choices), self._piece_end(samples)
        stop = int(self._edges[wanted])
        self._afford(SLOPES_COST * stop)
        key = b"slopes on %d of " % stop + np.packbits(self.table.allowed).tobytes() + key_of(codes)
        kept = self._store.read(key)
        if not len(kept):
            found = plan_slopes(self, codes, range(wanted))
            if found is None:
                return None
            kept = np.concatenate([_three_digits(found[0]).ravel(), [found[1]]])
            self._store.write(key, kept)
        self.spent += SLOPES_COST * stop / self.samples
        self._told(-self._under_way)
        first = kept[:-1].reshape(len(codes), -1)
        return Slopes.around(codes, first, self.table.quantity("sensitivity"), float(kept[-1]))

    @contextmanager
    def watched(self, description: str, *, shown: bool = True) -> Iterator[None]:
        """Show a bar on a terminal meanwhile: how many evaluations of those allowed are done."""
        with meter(description, self.evaluations, "evaluations", digits=1, shown=shown) as tell:
            self._tell = tell
            try:
                yield
            finally:
                self._tell = None

    def prepare(self, plans: Iterable[ArrayLike], samples: int | None = None) -> None:
        """These plans will be measured next, whatever comes out."""

    def elsewhere(self, data: Any, plan: ArrayLike | None = None) -> Evaluator:
        """An evaluator of the same plans by the same rules on held-out data, without limits.

        With a plan some of it is measured: data that does not do is a ValueError now and not after a search.
        """
        same: dict[str, Any] = {"task": self.task, "quantizer": self.quantizer, "metric": self.metric}
        same["independent"] = self.independent
        try:
            other = Evaluator(self.model, data, self.table, **same)
            other.weights = self.weights  # some quantisers take long
            if plan is not None:
                other.measure(np.asarray(plan).astype(np.int64), samples=1)
        except ValueError as error:
            raise ValueError(f"held-out data: {error}") from error
        return other

    def plan(self, choices: ArrayLike) -> Plan:
        """The plan that choices are, with what the table predicts for it."""
        codes, table = self._codes(choices), self.table
        return Plan(
            entries=entries_of(table, codes),
            fingerprint=table.fingerprint,
            predicted=totals(table, codes),
            measures=dict(table.measures),
            outside=dict(table.offsets),
            provenance=dict(table.provenance),
            table=table,
        )

    def frontier(self, resource: str, samples: int | None = None) -> Frontier:
        """The measured plans that no other beats in both the resource and what was measured.

        Args:
            resource: a quantity of the table.
            samples: plans measured on at least so many samples are compared, on the first so many: searches measure
                most plans on a part of the data. All the data by default.

        Raises:
            ValueError: if the table has no such quantity, or no plan was measured on so many samples.
        """
        self.table.quantity(resource)
        count = self.samples if samples is None else samples
        known = {key: found for key, found in self.measured.items() if math.isfinite(found.divergence)}
        whole = [(key, found) for key, found in known.items() if found.samples >= count > 0]
        if not whole:
            most = max((found.samples for found in known.values()), default=0)
            asked = "all the data" if samples is None else f"{samples} samples"
            raise ValueError(f"no plan was measured on {asked}: measure some so, or ask for samples={most} at most")
        whole = [(key, MeasuredLoss.of(found.per_sample[:count])) for key, found in whole]
        plans = np.array([choices_of_key(key) for key, _ in whole])
        cost = np.array([totals(self.table, plan)[resource] for plan in plans])
        loss, error = np.array([(found.divergence, found.standard_error) for _, found in whole]).T
        order = np.lexsort((loss, cost))
        least = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
        front = order[loss[order] < least]
        return Frontier(
            problem=self.table.problem({}),
            names=(resource,),
            resource=cost[front],
            objective=loss[front],
            choices=plans[front],
            standard_error=error[front],
            is_heuristic=True,
            provenance=self.provenance | {"plans": len(whole), "samples": count},
            table=self.table,
            minimised="sensitivity",
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """How plans were measured."""
        found = {"measured": drop_name(self.metric), "samples": self.samples, "seed": self.seed}
        found |= {"task": repr(self.task), "quantizer": repr(self.weights.quantizer)}
        return found if self.independent == "samples" else found | {"independent": "batches"}

    # -- what is measured --------------------------------------------------------------------------------------------

    def _codes(self, choices: ArrayLike | Plan) -> NDArray[np.int64]:
        table = self.table
        codes = choices_of(table, choices) if isinstance(choices, Plan) else np.asarray(choices)
        rows = np.arange(len(table.units))
        is_index = codes.dtype.kind in "iu" and codes.shape == rows.shape
        if not is_index or codes.min() < 0 or codes.max() >= len(table.options):
            raise ValueError(f"choices must be {len(rows)} indices below {len(table.options)}, got {choices!r}")
        for unit in np.flatnonzero(~table.allowed[rows, codes])[:1]:
            raise ValueError(f"the table does not allow {table.options[codes[unit]]!r} for {str(table.units[unit])!r}")
        return codes.astype(np.int64)

    def _piece_end(self, samples: int | None) -> int:
        """Pieces that so many samples take."""
        if samples is None:
            return len(self._pieces)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        return int(np.searchsorted(self._edges, min(samples, self.samples)))

    def _afford(self, samples: int) -> None:
        if self._started is None:
            self._started = time.monotonic()
        if self._time_is_over():
            raise Exhausted(f"the {self.seconds:g} seconds for measurements are over")
        if self.evaluations is not None and self.spent + samples / self.samples > self.evaluations + _ROUNDING:
            raise Exhausted(f"the {self.evaluations:g} evaluations are spent")

    def _time_is_over(self) -> bool:
        if self.seconds is None or self._started is None:
            return False
        return time.monotonic() - self._started > self.seconds

    def _known(self, key: bytes) -> NDArray[np.float64]:
        if key not in self._values:
            values = self._store.read(key)
            ends = self._edges[self._edges <= len(values)]
            self._values[key] = values[: int(ends[-1])]
        return self._values[key]

    def _grown(self, codes: NDArray[np.int64], values: NDArray[np.float64], stop: int) -> NDArray[np.float64]:
        """The values of more pieces behind those known; what was finished is kept, whatever happens."""
        first = int(np.searchsorted(self._edges, len(values)))
        key, parts = key_of(codes), [values]
        try:
            with closing(self._measured_pieces(codes, range(first, stop))) as measured:
                for part in measured:
                    parts.append(part)
        finally:
            self._values[key] = np.concatenate(parts)
            if len(parts) > 1:
                self._store.write(key, self._values[key])
        return self._values[key]

    def _measured_pieces(self, codes: NDArray[np.int64], pieces: range) -> Generator[NDArray[np.float64]]:
        with torch.no_grad(), closing(self.outputs(codes, pieces)) as pairs:
            for piece, (reference, outputs) in zip(pieces, pairs, strict=True):
                found = self._drop(reference, outputs).detach().cpu().double().numpy()
                self.runs += len(found)
                yield found if self.independent == "samples" else found.mean(keepdims=True) * self._shares[piece]

    def outputs(self, codes: NDArray[np.int64], pieces: range) -> Generator[tuple[Outputs, Outputs]]:
        """Full precision's outputs and those of a plan, piece by piece; the plan's with gradients where asked for."""
        plan = Plan(entries=entries_of(self.table, codes), fingerprint=self.table.fingerprint)
        with evaluating(self.model):
            for span, references in self._references.spans(pieces):
                with quantized(self.model, plan, quantizer=self.weights):
                    for piece, reference in zip(span, references, strict=True):
                        yield reference, self.task.run(self.model, self._pieces[piece])
                        self._told(self._counts[piece] / self.samples)

    @torch.no_grad()
    def _in_full_precision(self, piece: int) -> Outputs:
        return self.task.run(self.model, self._pieces[piece])

    def _told(self, more: float) -> None:
        self._under_way += more
        if self._tell is not None:
            self._tell(self.spent + self._under_way, f", {len(self.measured)} plans")


def _three_digits(values: NDArray[np.float64]) -> NDArray[np.float64]:
    fraction, power = np.frexp(values)
    return np.asarray(np.ldexp(np.round(fraction * 2**10) / 2**10, power), dtype=np.float64)
