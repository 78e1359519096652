"""`MeasuredLoss`: what a plan was measured to lose, sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class MeasuredLoss:
    """What one plan was measured to lose.

    Attributes:
        divergence: mean over the samples, in nats where the task is a distribution.
        standard_error: of that mean over samples; 0 for one sample.
        per_sample: (samples,), in the evaluator's order of samples: two plans can be compared sample by sample.
        samples: how many, the first of the evaluator's order; batches, where those are what is independent.
    """

    divergence: float
    standard_error: float
    per_sample: NDArray[np.float64]
    samples: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> MeasuredLoss:
        """The measurement that these values a sample are."""
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(float(values.mean()), error, values, len(values))
