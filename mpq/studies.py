"""Measured plans on an Optuna storage that many processes share: one packed plan a trial, none measured twice."""

from __future__ import annotations

import base64
import os
import socket
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import optuna

PLAN, FIGURES, PROBLEM = "plan", "figures", "problem"  # user attributes of trials, and of the study
UNCLAIMED_SECONDS = 60.0  # a trial that was taken up and not signed by anybody after that is lost
_ACTIVE: set[str] = set()  # workers of this process that are running


def pack(options: NDArray[np.int64]) -> str:
    """Options of groups (groups,) as text: base64 of a byte each, or of two where there are more than 256 options.

    Example:
        >>> pack(np.array([3, 0, 1]))
        '1AwAB'
        >>> unpack('1AwAB').tolist()
        [3, 0, 1]
    """
    width = 1 if int(options.max(initial=0)) < 256 else 2
    return f"{width}{base64.b64encode(options.astype(f'<u{width}').tobytes()).decode('ascii')}"


def unpack(text: str) -> NDArray[np.int64]:
    """Options of groups from their text."""
    return np.frombuffer(base64.b64decode(text[1:]), dtype=f"<u{text[0]}").astype(np.int64)


@dataclass(frozen=True)
class Measured:
    """One finished trial.

    Attributes:
        number: of the trial.
        plan: the packed plan.
        origin: where it came from: "seed", "random", "child" or the name of the sampler.
        values: what was minimised: the divergence, then the resources.
        figures: standard error and number of samples, as far as the evaluator says.
    """

    number: int
    plan: str
    origin: str
    values: tuple[float, ...]
    figures: tuple[float, ...]


@dataclass(frozen=True)
class Proposal:
    """A plan that this worker has taken up; nobody else measures it."""

    trial: optuna.Trial
    plan: str
    origin: str


@dataclass(eq=False)
class SharedStudy:
    """An Optuna study whose trials are plans.

    A trial holds its plan as one text, so that a storage gets five records a trial, however many layers there are. A
    plan that another worker finished or holds is not taken up again. Trials of workers that died are queued again: at
    once where the worker ran on this host, after ``stale`` seconds where it ran elsewhere.

    Args:
        study: of as many directions as there are objectives, all minimised.
        stale: seconds after which a trial on another host counts as lost.
    """

    study: optuna.Study
    stale: float = 3600.0
    worker: str = field(default_factory=lambda: f"{socket.gethostname()}|{os.getpid()}|{uuid.uuid4().hex}")

    # -- what is known -----------------------------------------------------------------------------------------------

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All of them, read once; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> list[Measured]:
        """Plans that were measured, in the order of their trials; those with values that are no numbers left out."""
        from optuna.trial import TrialState

        return [
            Measured(trial.number, *_plan_of(trial)[:2], tuple(trial.values), tuple(trial.user_attrs.get(FIGURES, ())))
            for trial in self.trials()
            if trial.state == TrialState.COMPLETE
        ]

    def known(self) -> set[str]:
        """Plans that were measured or are being measured."""
        from optuna.trial import TrialState

        lost = (TrialState.FAIL, TrialState.WAITING)
        return {_plan_of(trial)[0] for trial in self.trials() if trial.state not in lost and PLAN in trial.user_attrs}

    def counted(self) -> int:
        """Plans measured or being measured."""
        return len(self.known())

    # -- proposing ---------------------------------------------------------------------------------------------------

    def enqueue(self, plans: Sequence[str], origin: str) -> None:
        """Plans to measure before any other; those known or queued already are left out."""
        there = self.known() | {_plan_of(trial)[0] for trial in self._waiting()}
        for plan in dict.fromkeys(plans):
            if plan not in there:
                self.study.enqueue_trial({}, user_attrs={PLAN: [plan, origin, ""]})

    def _waiting(self) -> list[optuna.trial.FrozenTrial]:
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def queued(self) -> bool:
        """Whether plans wait to be measured."""
        return bool(self._waiting())

    def take(self) -> Proposal | None:
        """A queued plan that is not known, taken up; None where there is none."""
        from optuna.trial import TrialState

        while self.queued():
            known, trial = self.known(), self.study.ask()
            if PLAN not in trial.user_attrs:  # another worker was faster, and this trial is a new one
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            plan, origin, _ = trial.user_attrs[PLAN]
            if plan in known:
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr(PLAN, [plan, origin, self.worker])
            return Proposal(trial, plan, origin)
        return None

    def sign(self, trial: optuna.Trial, plan: str, origin: str) -> Proposal:
        """A trial of this worker becomes a plan."""
        trial.set_user_attr(PLAN, [plan, origin, self.worker])
        return Proposal(trial, plan, origin)

    def is_held_twice(self, proposal: Proposal) -> bool:
        """Whether another worker has the same plan: each signs before it looks, so one of the two sees it, or both."""
        from optuna.trial import TrialState

        lost = (TrialState.FAIL, TrialState.WAITING)
        held = [trial for trial in self.trials() if trial.state not in lost and PLAN in trial.user_attrs]
        return [_plan_of(trial)[0] for trial in held].count(proposal.plan) > 1

    # -- results -----------------------------------------------------------------------------------------------------

    def tell(self, proposal: Proposal, values: Sequence[float], figures: Sequence[float]) -> None:
        """What a plan was measured at; NaN and infinity are kept apart from the results, and not measured again."""
        from optuna.trial import TrialState, create_trial

        try:
            proposal.trial.set_user_attr(FIGURES, list(figures))
            if np.isfinite(values).all():
                self.study.tell(proposal.trial, list(values))
            else:
                self.study.tell(proposal.trial, state=TrialState.PRUNED)
        except (RuntimeError, ValueError):  # it took so long that another worker wrote it off: the result still counts
            if proposal.plan not in self.known():
                attributes = {PLAN: [proposal.plan, proposal.origin, self.worker], FIGURES: list(figures)}
                self.study.add_trial(create_trial(values=list(values), user_attrs=attributes))

    def give_back(self, proposal: Proposal) -> None:
        """The plan was not measured after all: it waits for the next worker."""
        from optuna.trial import TrialState

        self.study.tell(proposal.trial, state=TrialState.FAIL)
        self.enqueue([proposal.plan], proposal.origin)

    def reclaim(self) -> int:
        """Queue the plans of dead workers again; how many there were."""
        from optuna.trial import TrialState

        found = 0
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if PLAN not in trial.user_attrs or not self._is_lost(trial):
                continue
            try:
                self.study.tell(trial.number, state=TrialState.FAIL)
            except (RuntimeError, ValueError):  # another worker was faster
                continue
            self.enqueue([_plan_of(trial)[0]], _plan_of(trial)[1])
            found += 1
        return found

    def _is_lost(self, trial: optuna.trial.FrozenTrial) -> bool:
        worker = _plan_of(trial)[2]
        age = (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
        if not worker:
            return age > min(self.stale, UNCLAIMED_SECONDS)
        host, process, _ = worker.split("|")
        if host != socket.gethostname() or os.name != "posix":
            return age > self.stale
        if int(process) == os.getpid():
            return worker not in _ACTIVE and worker != self.worker
        return not _is_alive(int(process))

    @contextmanager
    def working(self) -> Iterator[None]:
        """While this lasts, the trials of this worker are not lost."""
        _ACTIVE.add(self.worker)
        try:
            yield
        finally:
            _ACTIVE.discard(self.worker)


def _plan_of(trial: optuna.trial.FrozenTrial) -> tuple[str, str, str]:
    """Packed plan, origin and worker of a trial."""
    plan, origin, worker = trial.user_attrs[PLAN]
    return plan, origin, worker


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def open_study(storage: Any, name: str, objectives: int, problem: str, sampler: Any) -> optuna.Study:
    """A study of that name, made if there is none.

    Args:
        storage: None for memory, a URL (``sqlite:///study.db``) for a database, any other text or path for a journal
            file, or an Optuna storage.
        name: of the study.
        objectives: how many values are minimised.
        problem: a fingerprint; a study of another one is refused.
        sampler: of Optuna.

    Raises:
        ValueError: if the study is one of another problem.
    """
    import optuna

    study = optuna.create_study(
        storage=_storage(storage),
        study_name=name,
        directions=["minimize"] * objectives,
        sampler=sampler,
        load_if_exists=True,
    )
    if len(study.directions) != objectives or study.user_attrs.get(PROBLEM, problem) != problem:
        raise ValueError(
            f"study {name!r} holds plans of another table, model, task, quantiser or data, or other resources or pins: "
            "give study= another name"
        )
    if PROBLEM not in study.user_attrs:
        study.set_user_attr(PROBLEM, problem)
    return study


def _storage(storage: Any) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if isinstance(storage, str | Path) and "://" not in str(storage):
        folder = Path(storage).resolve().parent
        if not folder.is_dir():
            raise ValueError(f"storage={str(storage)!r} cannot be written: the folder {str(folder)!r} does not exist")
        try:
            return JournalStorage(JournalFileBackend(str(storage)))
        except (ValueError, KeyError, TypeError) as error:  # what its lines of JSON are not
            raise ValueError(f"storage={str(storage)!r} is a file, but no journal of studies: name another") from error
    return storage


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its notes on every trial, and without the warning that NSGA-III may change."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ImportError("evolving over measured plans needs Optuna: pip install 'mpq-search[evolve]'") from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
