"""Any sampler of Optuna over packed plans: a study in memory, with a parameter a gene, that follows the shared one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.studies import Measured

if TYPE_CHECKING:
    import optuna


@dataclass(eq=False)
class SamplerMirror:
    """The study with every gene as a parameter of its own, in memory: the shared storage stays packed.

    What was measured is shown to the sampler as it was after repair.
    """

    sampler: Any
    counts: NDArray[np.int64]
    objectives: int

    @cached_property
    def study(self) -> optuna.Study:
        """In memory."""
        import optuna

        self._seen: set[int] = set()
        return optuna.create_study(directions=["minimize"] * self.objectives, sampler=self.sampler)

    @cached_property
    def genes(self) -> dict[str, Any]:
        """Distribution of every gene that has a choice, by its position."""
        from optuna.distributions import IntDistribution

        return {str(g): IntDistribution(0, int(count) - 1) for g, count in enumerate(self.counts) if count > 1}

    def follow(self, found: Sequence[Measured], genes: NDArray[np.int16]) -> None:
        """Show the sampler what it has not seen."""
        from optuna.trial import create_trial

        study = self.study
        for one, values in zip(found, genes, strict=True):
            if one.number not in self._seen:
                self._seen.add(one.number)
                params = {name: int(values[int(name)]) for name in self.genes}
                study.add_trial(create_trial(params=params, distributions=self.genes, values=list(one.values)))

    def proposal(self) -> NDArray[np.int16]:
        """Genes that the sampler would try, (groups,)."""
        from optuna.trial import TrialState

        trial = self.study.ask(self.genes)
        self.study.tell(trial, state=TrialState.FAIL)
        found = np.zeros(len(self.counts), dtype=np.int16)
        for name, value in trial.params.items():
            found[int(name)] = value
        return found
