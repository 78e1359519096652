"""`KeptOutputs`: full precision's outputs, kept as far as there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpq.tasks import Outputs


class KeptOutputs:
    """Outputs by piece of data; those of the first pieces are run once.

    Args:
        run: full precision on a piece.
        room: bytes that may be kept.
    """

    def __init__(self, run: Callable[[int], Outputs], room: int) -> None:
        self._run, self._room = run, room
        self._kept: dict[int, Outputs] = {}

    def spans(self, pieces: range) -> Iterable[tuple[range, list[Outputs]]]:
        """Runs of pieces with their outputs: as long as these are kept, else one piece."""
        start = pieces.start
        while start < pieces.stop:
            stop = start
            while stop < pieces.stop and self._keeps(stop):
                stop += 1
            if stop > start:
                yield range(start, stop), [self._kept[piece] for piece in range(start, stop)]
            else:
                stop = start + 1
                yield range(start, stop), [self._run(start)]
            start = stop

    def _keeps(self, piece: int) -> bool:
        """Whether the outputs on a piece are kept; they are from now on, if there is room."""
        if piece not in self._kept and self._room > 0:
            outputs = self._run(piece)
            size = outputs.values.numel() * outputs.values.element_size()
            if size <= self._room:
                self._kept[piece] = outputs
                self._room -= size
            else:
                self._room = 0  # pieces are alike: the next would not fit either
        return piece in self._kept
