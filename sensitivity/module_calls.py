"""The calls of a model's modules in one run, in order, and which of them could be answered from memory."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpq.batches import tensors_of
from mpq.layers import Layer
from mpq.surgery import layer_parameters, owners

Forward = Callable[..., Any]

_PLAIN = (bool, int, float, complex, str, bytes, slice, range, enum.Enum, torch.dtype, torch.device, torch.layout)
_ABSENT = object()


@dataclass(eq=False)
class ModuleCall:
    """One call of a module's forward. Times count the tensor operations and calls of the run.

    Attributes:
        module: what was called.
        start, end: times of the first and last thing it did.
        outer: the call that it was made in.
        opaque: an argument is neither tensor nor plain value: a cache, say, that the call might fill.
        after: position in the run of the first call that is not within this one.
        size: bytes of the output.
        overwritten: the output is written to later; whoever hands it out again hands out a copy.
        aliased: two tensors of the output, or one of them and an argument, share their memory.
        repeatable: the call changes no tensor from outside, and its output can be handed out a second time.
    """

    module: nn.Module
    start: int
    outer: ModuleCall | None
    opaque: bool
    end: float = math.inf
    after: int = 0
    size: int = 0
    overwritten: bool = False
    aliased: bool = False
    repeatable: bool = True

    @property
    def outer_end(self) -> float:
        """End of the call around it."""
        return math.inf if self.outer is None else self.outer.end

    @property
    def depth(self) -> int:
        """How many calls it is nested in."""
        return 0 if self.outer is None else self.outer.depth + 1


@dataclass(frozen=True)
class ModuleCalls:
    """All calls of a run in the order of their start, and the time at which each layer first matters."""

    calls: tuple[ModuleCall, ...]
    first_use: Mapping[str, int]

    def worth_keeping(self, keep_bytes: int) -> set[int]:
        """Positions of calls whose outputs are to be kept: outer calls first, while there is room.

        An output is of use only where a layer starts after the call and within the call around it: for later layers
        the outer call stands for both.
        """
        starts = sorted(self.first_use.values())
        kept: set[int] = set()
        for position in sorted(range(len(self.calls)), key=lambda position: self.calls[position].depth):
            call = self.calls[position]
            useful = any(call.end < start < call.outer_end for start in starts)
            if useful and call.repeatable and call.size <= keep_bytes:
                keep_bytes -= call.size
                kept.add(position)
        return kept


def observe(model: nn.Module, layers: Sequence[Layer], run: Callable[[], Any]) -> tuple[ModuleCalls, Any]:
    """Run a model once and note every call of a module; also returns what the run returned."""
    recorder = _Recorder(model, layers)
    forwards = {module: recorder.watched(module, module.forward) for module in replaceable(model)}
    with replaced_forwards(forwards), recorder:
        result = run()
    return ModuleCalls(tuple(recorder.calls), recorder.first_use), result


def replaceable(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward is Python."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules with another forward for a while; hooks run as ever."""
    originals = {module: module.__dict__.get("forward", _ABSENT) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, original in originals.items():
            if original is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every tensor operation: which weights it reads, what it makes and what it writes to."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[ModuleCall] = []
        self.first_use: dict[str, int] = {}
        self._clock = 0
        self._open: list[ModuleCall] = []
        self._born: dict[int, int] = {}  # storages made in this run, and when
        self._outputs: dict[int, list[ModuleCall]] = {}  # calls that returned a storage
        self._weights: dict[int, list[str]] = {}
        self._owners: dict[nn.Module, list[str]] = {}
        for layer in layers:
            for parameter in layer_parameters(model, layer):
                self._weights.setdefault(_storage(parameter), []).append(layer.name)
            for module, _ in owners(model, layer):
                self._owners.setdefault(module, []).append(layer.name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it touched."""
        self._clock += 1
        kwargs = kwargs or {}
        read = {_storage(tensor) for tensor in tensors_of((args, kwargs))}
        for storage in read & self._weights.keys():
            self._first_use(self._weights[storage])
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for storage in _written(func, args, kwargs):
                self._note_write(storage)
        for storage in {_storage(tensor) for tensor in tensors_of([result])} - read:
            self._born[storage] = self._clock  # perhaps where another one was before
            self._outputs.pop(storage, None)
        return result

    def watched(self, module: nn.Module, forward: Forward) -> Forward:
        """A module's forward that notes its calls."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._clock += 1
            outer = self._open[-1] if self._open else None
            call = ModuleCall(module, self._clock, outer, opaque=not _is_settled((args, *kwargs.values())))
            self._first_use(self._owners.get(module, ()))
            self.calls.append(call)
            self._open.append(call)
            output = forward(*args, **kwargs)
            self._open.pop()
            self._close(call, output)
            return output

        return noted

    def _first_use(self, names: Iterable[str]) -> None:
        for name in names:
            self.first_use.setdefault(name, self._clock)

    def _note_write(self, storage: int) -> None:
        for call in self._open:
            if self._born.get(storage, -1) < call.start:
                call.repeatable = False
        for call in self._outputs.get(storage, ()):
            call.overwritten = True
            call.repeatable &= not call.aliased  # a copy would no longer change with the other name of that memory

    def _close(self, call: ModuleCall, output: Any) -> None:
        self._clock += 1
        call.end, call.after = self._clock, len(self.calls)
        parts = list(parts_of(output))
        tensors = {id(part): part for part in parts if isinstance(part, Tensor)}.values()
        storages = {_storage(tensor) for tensor in tensors}
        call.repeatable &= all(isinstance(part, Tensor) or _is_plain(part) for part in parts)
        call.size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        call.aliased = len(storages) < len(tensors) or any(self._born.get(key, -1) < call.start for key in storages)
        for storage in storages:
            self._outputs.setdefault(storage, []).append(call)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[int]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (_storage(tensor) for tensor in tensors_of([value]))


def parts_of(value: Any) -> Iterator[Any]:
    """What a nest of mappings, tuples, lists and dataclasses is made of."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from parts_of(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from parts_of(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from parts_of(getattr(value, field.name))
    else:
        yield value


def _is_plain(part: Any) -> bool:
    return part is None or isinstance(part, _PLAIN)


def _is_settled(value: Any) -> bool:
    """Whether a call that is given this can leave nothing in it but through a tensor operation."""
    if isinstance(value, tuple):
        return all(map(_is_settled, value))
    return isinstance(value, Tensor) or _is_plain(value)


def copied(value: Any, clone: bool, done: dict[int, Tensor] | None = None) -> Any:
    """The same nest in containers of its own; its tensors are copies too where `clone` says so."""
    done = {} if done is None else done
    if isinstance(value, Tensor):
        if clone and id(value) not in done:
            done[id(value)] = value.clone()
        return done.get(id(value), value)
    if isinstance(value, Mapping):
        mapping: Any = copy.copy(value)
        for key, part in value.items():
            mapping[key] = copied(part, clone, done)
        return mapping
    if isinstance(value, tuple | list):
        parts = [copied(part, clone, done) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(record, field.name, copied(getattr(value, field.name), clone, done))
        return record
    return value
