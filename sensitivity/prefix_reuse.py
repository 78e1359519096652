"""Runs of a model with one layer changed that do not run again what comes before that layer."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq.layers import Layer
from mpq.tasks import Outputs

from .module_calls import Forward, ModuleCall, ModuleCalls, copied, observe, parts_of, replaceable, replaced_forwards

Run = Callable[[], Outputs]

_FREED_BYTES = 31 * 2**20  # glibc follows blocks of up to 32 MiB
_ROUNDING = 1e-6  # relative; what two runs of the same model may differ by


class _DivergedError(Exception):
    """The model did not make the calls that it made before."""


class PrefixReuse:
    """What is known of a model's calls, from batch to batch.

    While a layer is changed, every module call that ended before the layer is first used gives what it gave before:
    its output is handed out from memory and its forward is left out, at whatever depth of nesting, as few and as large
    calls as there are. What follows runs as ever, so a deep chain costs about half of full runs.

    It works for any model because it is checked, not assumed. One run is watched operation by operation: a call that
    writes to a tensor from outside, or returns anything but tensors and plain values, is never left out; where an
    output is overwritten later, copies are handed out. A second run must give the same outputs and leave every module's
    attributes, and what they hold, as they were. Before modules of a class that is not torch's own are left out, a run
    that leaves them out with nothing changed must give the reference. Where a check fails, the model runs in full, with
    a warning. Globals of a program that its modules change are not watched.

    Args:
        model: whose runs are meant; weights and hooks may be changed for a while by the caller.
        layers: which may be changed.
        keep_bytes: of outputs kept for one batch, outer calls first; with 0 every run is a full one.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], keep_bytes: int) -> None:
        if keep_bytes < 0:
            raise ValueError(f"keep_bytes must be at least 0, got {keep_bytes}")
        self.model, self.layers, self.keep_bytes = model, layers, keep_bytes
        self.calls: ModuleCalls | None = None
        self.trusted: set[type] = set()
        self.verified: set[frozenset[int]] = set()
        self.is_off = keep_bytes == 0
        if not self.is_off and (module := next(filter(_is_out_of_reach, model.modules()), None)):
            self.turn_off(f"{type(module).__name__} has calls that Python does not see")
        if not self.is_off:
            _raise_trim_threshold()

    def turn_off(self, reason: str) -> None:
        """Run in full from now on."""
        self.is_off = True
        warnings.warn(f"the model is run as a whole for every choice: {reason}", RuntimeWarning, stacklevel=2)

    def recorded(self, run: Run) -> Recorded:
        """The model, as it now stands, on one batch: run, and outputs kept."""
        kept = None if self.is_off else self._kept(run)
        return Recorded(self, run, kept or _Kept(run(), {}))

    def _kept(self, run: Run) -> _Kept | None:
        for _ in range(2):
            try:
                watched = None
                if self.calls is None:
                    self.calls, watched = observe(self.model, self.layers, run)
                before = _attributes(self.model)
                kept = _keep_outputs(self.model, self.calls, self.keep_bytes, run)
            except _DivergedError:  # another path through the model on this batch
                self.calls = None
                self.verified.clear()
                continue
            except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
                run()  # what is wrong with the model itself comes up here
                self.turn_off(f"its calls cannot be followed ({error})")
                return None
            if watched is not None and not _agree(watched, kept.reference):
                self.turn_off("two runs on the same batch differ")
            elif changed := _changed(before, _attributes(self.model)):
                self.turn_off(f"its {type(changed).__name__} keeps something from run to run")
            return None if self.is_off else kept
        self.turn_off("it makes other calls every time")
        return None


@dataclass
class _Kept:
    """Outputs of one batch, whole and by call."""

    reference: Outputs
    outputs: dict[int, Any]


class Recorded:
    """One batch, with `reference`, the outputs of the model as it stood."""

    def __init__(self, reuse: PrefixReuse, run: Run, kept: _Kept) -> None:
        self._reuse, self._run, self._kept, self._calls = reuse, run, kept, reuse.calls
        self.reference = kept.reference

    def outputs(self, layer: Layer) -> Outputs:
        """Outputs of the model, in which this layer, or later ones too, have been changed by the caller."""
        steps = self._steps(layer)
        return self._run() if steps is None else self._replayed(steps) or self._run()

    def verify(self, layer: Layer) -> None:
        """To be called before the layer is changed: try whether what would be left out can be."""
        steps, calls = self._steps(layer), self._calls
        if steps is None or calls is None:
            return
        inner = [place for step in steps if step.kept for place in range(step.position, step.call.after)]
        doubtful = frozenset(place for place in inner if not self._is_trusted(calls.calls[place]))
        if not doubtful or doubtful in self._reuse.verified:
            return
        self._reuse.verified.add(doubtful)
        outputs = self._replayed(steps)
        if outputs is not None and not _agree(outputs, self.reference):
            self._reuse.turn_off(f"what comes before {layer.name!r} does more than its output tells")
        self._reuse.trusted |= {type(calls.calls[place].module) for place in doubtful if not calls.calls[place].opaque}

    def _is_trusted(self, call: ModuleCall) -> bool:
        known = type(call.module).__module__.startswith("torch.nn.") or type(call.module) in self._reuse.trusted
        return known and not call.opaque

    def _steps(self, layer: Layer) -> list[_Step] | None:
        if self._reuse.is_off or self._calls is None or layer.name not in self._calls.first_use:
            return None
        return _steps(self._calls, self._kept.outputs, self._calls.first_use[layer.name])

    def _replayed(self, steps: list[_Step]) -> Outputs | None:
        player = _Player(steps, self._kept.outputs)
        versions = player.versions()
        try:
            with replaced_forwards({step.call.module: player.played(step.call.module) for step in steps}):
                outputs = self._run()
            player.check_all_played()
        except Exception as error:  # a full run shows whether the model or the replay is wrong
            self._reuse.turn_off(f"what comes before a layer could not be left out ({type(error).__name__}: {error})")
            return None
        if versions != player.versions():
            self._reuse.turn_off("it writes to outputs of earlier calls, but not always")
            return None
        return outputs


@dataclass(frozen=True)
class _Step:
    """A call before the layer that is changed: answered from memory (`kept`), or run."""

    position: int
    call: ModuleCall
    kept: bool


def _steps(calls: ModuleCalls, outputs: Iterable[int], first_use: int) -> list[_Step]:
    available = set(outputs)
    steps = []
    position = 0
    while position < len(calls.calls) and (call := calls.calls[position]).start < first_use:
        kept = call.end < first_use and position in available
        steps.append(_Step(position, call, kept))
        position = call.after if kept else position + 1
    return steps


class _Player:
    """Follows a run call by call until its steps are used up."""

    def __init__(self, steps: Sequence[_Step], outputs: dict[int, Any]) -> None:
        self._steps, self._outputs, self._next = steps, outputs, 0

    def played(self, module: nn.Module) -> Forward:
        """A forward that hands out the kept output where there is one."""
        forward = module.forward

        def play(*args: Any, **kwargs: Any) -> Any:
            if self._next == len(self._steps):
                return forward(*args, **kwargs)
            step = self._steps[self._next]
            _check_same(step.call.module, module)
            self._next += 1
            if not step.kept:
                return forward(*args, **kwargs)
            return copied(self._outputs[step.position], clone=step.call.overwritten)

        return play

    def check_all_played(self) -> None:
        """Every step must have come."""
        if self._next < len(self._steps):
            raise _DivergedError(f"no call of {type(self._steps[self._next].call.module).__name__}")

    def versions(self) -> list[int]:
        """How often each tensor that is handed out itself, not as a copy, was written to."""
        own = [self._outputs[step.position] for step in self._steps if step.kept and not step.call.overwritten]
        return [part._version for part in parts_of(own) if isinstance(part, Tensor) and not part.is_inference()]


def _keep_outputs(model: nn.Module, known: ModuleCalls, keep_bytes: int, run: Run) -> _Kept:
    """Run the model and keep the outputs that are worth it."""
    wanted = known.worth_keeping(keep_bytes)
    outputs: dict[int, Any] = {}
    position = 0

    def keeping(module: nn.Module, forward: Forward) -> Forward:
        def keep(*args: Any, **kwargs: Any) -> Any:
            nonlocal position
            own, position = position, position + 1
            if own >= len(known.calls):
                raise _DivergedError(f"one more call of {type(module).__name__}")
            _check_same(known.calls[own].module, module)
            output = forward(*args, **kwargs)
            if position != known.calls[own].after:
                raise _DivergedError(f"other calls within {type(module).__name__}")
            if own in wanted:
                outputs[own] = copied(output, clone=known.calls[own].overwritten)
            return output

        return keep

    with replaced_forwards({module: keeping(module, module.forward) for module in replaceable(model)}):
        reference = run()
    if position < len(known.calls):
        raise _DivergedError("fewer calls")
    return _Kept(reference, outputs)


def _check_same(expected: nn.Module, module: nn.Module) -> None:
    if expected is not module:
        raise _DivergedError(f"{type(module).__name__} instead of {type(expected).__name__}")


def _raise_trim_threshold() -> None:
    """Have the C library hold on to freed memory: its threshold for giving it back follows the largest block freed.

    Kept outputs fill the holes that a run's own tensors would use; at the end of the heap each of them would be given
    back and paged in anew, which on a network of small convolutions took a third of the time.
    """
    torch.empty(_FREED_BYTES, dtype=torch.uint8)


def _is_out_of_reach(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
    return compiled or isinstance(module, torch.jit.ScriptModule | nn.DataParallel)


def _agree(first: Outputs, second: Outputs) -> bool:
    if torch.equal(first.values, second.values):
        return True
    a, b = first.values.detach().double(), second.values.detach().double()
    if a.shape != b.shape:
        return False
    largest = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(())
    return torch.allclose(a, b, rtol=0, atol=_ROUNDING * float(largest), equal_nan=True)


def _attributes(model: nn.Module) -> list[tuple[nn.Module, list[Any]]]:
    """What every module's attributes hold, and the containers and objects among them."""
    seen: set[int] = set()
    return [
        (module, [part for name, value in module.__dict__.items() if name != "forward" for part in _held(value, seen)])
        for module in model.modules()
    ]


def _held(value: Any, seen: set[int], depth: int = 4) -> Iterator[Any]:
    yield value
    if depth == 0 or id(value) in seen or isinstance(value, nn.Module | Tensor | type):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _held(part, seen, depth - 1)


def _changed(before: list[tuple[nn.Module, list[Any]]], after: list[tuple[nn.Module, list[Any]]]) -> nn.Module | None:
    """The first module that holds something else than before."""
    for (module, old), (other, new) in zip(before, after, strict=True):
        if module is not other or len(old) != len(new) or any(map(_differ, old, new)):
            return module
    return None


def _differ(old: Any, new: Any) -> bool:
    return old is not new and not (isinstance(old, bool | int | float | str) and old == new)
