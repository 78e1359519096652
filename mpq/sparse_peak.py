"""Resources summed at every step of a run, of which the largest counts: memory alive, load of a pipeline stage."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpq.arrays import FloatArray, IntArray, read_only, whole_numbers


@dataclass(frozen=True, eq=False)
class SparsePeak:
    """A peak resource by its entries: at step ``step[e]``, ``layer[e]`` in option ``option[e]`` holds ``value[e]``.

    Entries at one place add up; places without an entry are 0. A step is a moment of the run (its sum is what is alive
    then) or a stage of a pipeline.

    Args:
        step: ``(entries,)`` integers from 0.
        layer: ``(entries,)`` layer indices.
        option: ``(entries,)`` option indices.
        value: ``(entries,)``, finite.
        steps: number of steps; by default the last one mentioned plus one.

    Example:
        Two layers of two options; the first is alive at both steps.

        >>> peak = SparsePeak(step=[0, 0, 1, 1], layer=[0, 0, 0, 1], option=[0, 1, 1, 0], value=[4, 8, 8, 3])
        >>> peak.usage([1, 0])
        array([ 8., 11.])
    """

    step: IntArray
    layer: IntArray
    option: IntArray
    value: FloatArray
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("step", "layer", "option"):
            object.__setattr__(self, name, whole_numbers(f"SparsePeak.{name}", getattr(self, name)))
        object.__setattr__(self, "value", read_only(self.value))
        shapes = {name: np.shape(getattr(self, name)) for name in ("step", "layer", "option", "value")}
        if len(set(shapes.values())) != 1 or self.step.ndim != 1:
            raise ValueError(f"SparsePeak arrays must be one-dimensional and of one length, got shapes {shapes}")
        if any((getattr(self, name) < 0).any() for name in ("step", "layer", "option")):
            raise ValueError("SparsePeak.step, layer and option must not be negative")
        if not np.isfinite(self.value).all():
            raise ValueError("SparsePeak.value must be finite; leave entries of forbidden options out")
        least = int(self.step.max(initial=0)) + 1
        if self.steps and self.steps < least:
            raise ValueError(f"SparsePeak.steps must be at least {least}, got {self.steps}")
        object.__setattr__(self, "steps", max(self.steps, least))

    @classmethod
    def from_dense(cls, dense: npt.ArrayLike) -> "SparsePeak":
        """The entries of a ``(steps, layers, options)`` array that are not 0."""
        array = np.asarray(dense, dtype=np.float64)
        step, layer, option = np.nonzero(array)
        return cls(step, layer, option, array[step, layer, option], steps=array.shape[0])

    def usage(self, choices: npt.ArrayLike) -> FloatArray:
        """What is alive at every step, ``(steps,)``."""
        taken = np.asarray(choices)[self.layer] == self.option
        return np.bincount(self.step[taken], weights=self.value[taken], minlength=self.steps).astype(np.float64)

    def largest(self, choices: npt.ArrayLike) -> float:
        """The most that any step holds; the steps that might be the one are summed by ``math.fsum``."""
        taken = np.asarray(choices)[self.layer] == self.option
        order = np.argsort(self.step[taken], kind="stable")
        step, value = self.step[taken][order], self.value[taken][order]
        sums = np.bincount(step, weights=value, minlength=self.steps)
        sizes = np.bincount(step, weights=np.abs(value), minlength=self.steps)
        near = np.flatnonzero(sums >= sums.max() - 1e-12 * sizes.max())
        starts, stops = np.searchsorted(step, near), np.searchsorted(step, near, side="right")
        return max(math.fsum(value[start:stop].tolist()) for start, stop in zip(starts, stops, strict=True))
