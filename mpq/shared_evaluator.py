"""`SharedEvaluator`: the measurements of one search, done by as many processes as there are machines for."""

from __future__ import annotations

import hashlib
import math
import random
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.evaluator import Evaluator
from mpq.measured_loss import MeasuredLoss
from mpq.plan_keys import key_of
from mpq.studies import Measured, Proposal, SharedStudy, open_study, quiet

if TYPE_CHECKING:
    from torch import nn

    from mpq.plan import Plan
    from mpq.tables import CostTable

POLL_SECONDS = 0.05  # between looks at the storage while another worker measures what is needed


class SharedEvaluator(Evaluator):
    """An evaluator whose measurements are shared with workers that run the same search on one Optuna storage.

    All workers do the same search: the same model, data, table, settings and seed. What is measured next then is the
    same for all, and it follows from what was measured before: each takes a plan of the next few that nobody has taken,
    measures it, and reads the others' from the storage. The search ends as it would have with one worker, sooner. A
    worker that comes late, or again, reads what is there and joins. One that dies loses what it was measuring at that
    moment, which another does (`mpq.studies`).

    A trial of the study is a plan on some pieces of the data: its name is a hash of the plan and the pieces, its
    figures are the values a sample.

    Args:
        model: as for `Evaluator`, and so is all that is not named here.
        data: as for `Evaluator`.
        table: as for `Evaluator`.
        storage: None for memory; a path of a journal file; a URL such as ``sqlite:///study.db``; an Optuna storage.
        study: its name there; other budgets may share it, another model, data, quantiser or seed may not.
        stale: seconds after which a measurement that a worker on another host began counts as lost.

    Raises:
        ValueError: as `Evaluator`, or if the study holds measurements of something else.
        ImportError: without Optuna: ``pip install 'mpq-search[evolve]'``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        table: CostTable,
        *,
        storage: Any,
        study: str = "refine",
        stale: float = 3600.0,
        **settings: Any,
    ) -> None:
        super().__init__(model, data, table, **settings)
        with quiet():
            from optuna.samplers import RandomSampler

            opened = open_study(storage, study, 1, self.fingerprint, RandomSampler(seed=0))
        self.study = SharedStudy(opened, stale)
        self._read: set[int] = set()
        self._found: dict[tuple[str, int], tuple[int, NDArray[np.float64]]] = {}

    def measure(self, choices: ArrayLike | Plan, samples: int | None = None) -> MeasuredLoss:
        """As `Evaluator.measure`, by whoever is first."""
        codes = self._codes(choices)
        self.prepare([codes], samples)
        return super().measure(codes, samples)

    def prepare(self, plans: Iterable[ArrayLike], samples: int | None = None) -> None:
        """Measure these plans together with the other workers, as far as the budget goes."""
        stop = self._piece_end(samples)
        asked = self._affordable([self._codes(plan) for plan in plans], stop)
        with quiet(), self.study.working():
            while asked:
                self._take_over()
                asked = [codes for codes in asked if self._pieces_known(codes) < stop]
                if not asked or self._time_is_over():
                    return
                if not self._one_measured(asked, stop) and not self.study.reclaim():
                    time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))

    # -- sharing -----------------------------------------------------------------------------------------------------

    def _affordable(self, plans: list[NDArray[np.int64]], stop: int) -> list[NDArray[np.int64]]:
        """The first plans that the evaluations left are enough for, none of them twice."""
        chosen: dict[bytes, NDArray[np.int64]] = {}
        left = math.inf if self.evaluations is None else self.evaluations - self.spent
        for codes in plans:
            key = key_of(codes)
            before = self.measured[key].samples if key in self.measured else 0
            left -= 0.0 if key in chosen else max(0, int(self._edges[stop]) - before) / self.samples
            if left < -1e-9:
                break
            chosen[key] = codes
        return list(chosen.values())

    def _one_measured(self, plans: list[NDArray[np.int64]], stop: int) -> bool:
        """Measure one of the plans that no worker holds; whether there was one and nobody else took it."""
        held = self.study.known()
        free = [codes for codes in plans if self._name(codes, stop) not in held]
        if not free:
            return False
        codes = random.choice(free)
        name, first = self._name(codes, stop), self._pieces_known(codes)
        proposal = self.study.sign(self.study.study.ask(), name, "refine")
        if self.study.is_held_twice(proposal):
            self._give_up(proposal)
            return False
        try:
            values = self._grown(codes, self._known(key_of(codes)), stop)
        except BaseException:
            self.study.give_back(proposal)
            raise
        found = values[self._edges[first] : self._edges[stop]]
        loss = float(found.mean())
        self.study.tell(proposal, [loss if np.isfinite(loss) else sys.float_info.max], found.tolist())
        return True

    def _give_up(self, proposal: Proposal) -> None:
        from optuna.trial import TrialState

        self.study.study.tell(proposal.trial, state=TrialState.FAIL)

    def _take_over(self) -> None:
        """Read what others have finished since."""
        for found in self.study.finished():
            if found.number not in self._read:
                self._read.add(found.number)
                plan, first, stop = _named(found)
                self._found.setdefault((plan, first), (stop, np.array(found.figures)))

    def _pieces_known(self, codes: NDArray[np.int64]) -> int:
        """How many pieces a plan is known on, after what the storage has was put behind what is known here."""
        key, name = key_of(codes), _digest(codes)
        values = self._known(key)
        first = int(np.searchsorted(self._edges, len(values)))
        while (name, first) in self._found:
            first, more = self._found[name, first]
            values = np.concatenate([values, more])
        self._values[key] = values
        return first

    def _name(self, codes: NDArray[np.int64], stop: int) -> str:
        return f"{_digest(codes)} {self._pieces_known(codes)} {stop}"


def _digest(codes: NDArray[np.int64]) -> str:
    return hashlib.sha256(key_of(codes)).hexdigest()[:32]


def _named(found: Measured) -> tuple[str, int, int]:
    """Hash of the plan, first piece and the one behind the last."""
    plan, first, stop = found.plan.split()
    return plan, int(first), int(stop)
