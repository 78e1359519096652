"""Which activations a run holds at the same time: lifetimes of the tensors that are stored between its operators."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True)
class Buffer:
    """Memory for one activation, alive during steps ``first`` to ``last``, both included.

    A step is one run of a layer's kernel, or of another operator that needs memory of its own: pooling, concatenation,
    softmax, a product of activations, interpolation. Operators that work in place take no step and no buffer:
    element-wise ones, activation functions, normalisations, biases and residual additions continue the buffer of an
    operand of their size that nobody reads afterwards; without such an operand they are a step too. Views, reshapes,
    permutations and repeats are the buffer they look at, whether PyTorch copies or not. Constants are no buffers.

    Attributes:
        owner: The layer whose input format the buffer takes: the first layer that reads it, else the first one that it
            reaches through operators other than products and softmax, else the layer that produced it (or fed its
            producer), else any layer downstream; "" in a network where none of these exists.
        elements: Numbers it holds, for the whole example batch; networks scale it by the batch they plan for.
        first: Step that writes it; 0 for an input of the network.
        last: Last step that reads it; for an output of the network the last step of all.
        producer: The layer that wrote it, else the one that fed the operator that did; "" for an input of the network.
        readers: The layers that read it, each once, in order; sums and other operators in place are no readers.
    """

    owner: str
    elements: int
    first: int
    last: int
    producer: str = ""
    readers: tuple[str, ...] = ()


def peak_elements(buffers: Iterable[Buffer]) -> int:
    """The most elements that are alive in one step, 0 without buffers. Linear in buffers and steps.

    Example:
        A residual block of two layers holds its input, and the input and output of the second layer:

        >>> from mpq.buffers import Buffer, peak_elements
        >>> peak_elements([Buffer("a", 16, 0, 1), Buffer("b", 16, 0, 1), Buffer("c", 16, 1, 1)])
        48
    """
    alive = list(buffers)
    changes = [0] * (max((buffer.last for buffer in alive), default=0) + 2)
    for buffer in alive:
        changes[buffer.first] += buffer.elements
        changes[buffer.last + 1] -= buffer.elements
    return max(accumulate(changes))


@dataclass(frozen=True, slots=True)
class Event:
    """One operator: the values it read and wrote.

    ``in_place``: it may continue the buffer of an operand. ``keeps_format``: what it reads may be stored in the format
    of what it writes.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    layer: str | None
    in_place: bool
    keeps_format: bool


@dataclass(slots=True)
class Slot:
    """A buffer in the making: its lifetime (an input is written at step -1), and the layers that may own it."""

    elements: int
    first: int
    last: int
    producer: str = ""
    readers: list[str] = field(default_factory=list)
    downstream: str = ""
    reached: str = ""

    @property
    def reader(self) -> str:
        """The first layer that reads it."""
        return self.readers[0] if self.readers else ""

    def named(self, names: Mapping[str, str]) -> Buffer:
        """The finished buffer, with layers by the names that the network calls them."""
        owner = self.reader or self.downstream or self.producer or self.reached
        owner, producer, *readers = (names.get(name, name) for name in (owner, self.producer, *self.readers))
        return Buffer(owner, self.elements, max(self.first, 0), self.last, producer, tuple(readers))


class Liveness:
    """Takes note of a run operator by operator, and says which buffers it needed.

    A value is what an operator wrote, known by a number; views of it are the same value. 0 is no activation.

    Example:
        >>> from mpq.buffers import Liveness
        >>> run = Liveness()
        >>> x = run.given(8)
        >>> (hidden,) = run.step((x,), (4,), layer="a")
        >>> hidden = run.in_place((hidden,), 4)
        >>> (y,) = run.step((hidden,), (2,), layer="b")
        >>> run.buffers(returned=(y,))[1]
        Buffer(owner='b', elements=4, first=0, last=1, producer='a', readers=('b',))
    """

    def __init__(self) -> None:
        self._elements = [0]
        self._inputs: list[int] = []
        self._events: list[Event] = []

    def given(self, elements: int) -> int:
        """An input of the network."""
        value = self._value(elements)
        self._inputs.append(value)
        return value

    def step(
        self, reads: Sequence[int], sizes: Sequence[int], *, layer: str | None = None, keeps_format: bool = True
    ) -> list[int]:
        """An operator with memory of its own; returns the values written, 0 for those of no elements.

        Only the first of them is sure to be stored; the others are if somebody reads them.
        """
        values = [self._value(size) for size in sizes]
        self._events.append(Event(tuple(reads), tuple(filter(None, values)), layer, False, keeps_format))
        return values

    def in_place(self, reads: Sequence[int], elements: int, into: int = 0) -> int:
        """An operator that may overwrite an operand, or does overwrite the value ``into``; returns the value."""
        value = into or self._value(elements)
        self._events.append(Event(tuple(reads), (value,), None, True, True))
        return value

    def buffers(self, returned: Iterable[int] = (), names: Mapping[str, str] | None = None) -> tuple[Buffer, ...]:
        """The buffers in the order they are written, inputs first; ``names`` translates the names of layers.

        Time is linear in what was noted.
        """
        end = len(self._events)
        last_read = {value: i for i, event in enumerate(self._events) for value in event.reads}
        last_read |= dict.fromkeys(filter(None, returned), end)
        slots = {value: Slot(self._elements[value], -1, 0) for value in self._inputs if value in last_read}
        found = list(slots.values())
        now = -1
        for i, event in enumerate(self._events):
            reads = [slots[value] for value in event.reads if value in slots]
            producer = event.layer or max(reads, key=lambda slot: slot.first, default=_NOTHING).producer
            target = self._overwritten(event, {v for v in event.reads if last_read[v] == i}, slots)
            if target is None:
                now += 1
                for value in event.writes[:1] + tuple(v for v in event.writes[1:] if v in last_read):
                    slots[value] = Slot(self._elements[value], now, now, producer)
                    found.append(slots[value])
            else:
                slots[event.writes[0]] = target
            for slot in reads:
                slot.last = max(slot.last, now)
                if event.layer and event.layer not in slot.readers:
                    slot.readers.append(event.layer)
        for value, read in last_read.items():
            if read == end and value in slots:
                slots[value].last = max(now, 0)
        self._look_downstream(slots)
        names = names or {}
        return tuple(slot.named(names) for slot in found)

    def _overwritten(self, event: Event, dying: set[int], slots: Mapping[int, Slot]) -> Slot | None:
        """The slot that an operator in place continues: of the operands that die, the one written last."""
        if not event.in_place:
            return None
        (value,) = event.writes
        if value in slots:
            return slots[value]
        size = self._elements[value]
        fitting = [slots[v] for v in event.reads if v in dying and v in slots and slots[v].elements == size]
        return max(fitting, key=lambda slot: slot.first, default=None)

    def _look_downstream(self, slots: Mapping[int, Slot]) -> None:
        for event in reversed(self._events):
            written = [slots[value] for value in event.writes if value in slots and event.layer is None]
            near = next((s.reader or s.downstream for s in written if s.reader or s.downstream), "")
            far = next((s.reader or s.reached for s in written if s.reader or s.reached), "")
            for slot in (slots[value] for value in event.reads if value in slots):
                slot.downstream = (near if event.keeps_format else "") or slot.downstream
                slot.reached = far or slot.reached

    def _value(self, elements: int) -> int:
        if not elements:
            return 0
        self._elements.append(elements)
        return len(self._elements) - 1


_NOTHING = Slot(0, 0, 0)
