"""Ranks: the processes of torch.distributed that share the items of a long piece of work, or this process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")
Array = NDArray[np.float64]

_AXES = 8  # an array may have so many
_FAILURES: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that work together.

    Args:
        rank: of this process.
        world: how many there are; 1: no one to talk to.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of `torch.distributed`, where it is initialised; else this process alone.

        Environment variables alone, as `torchrun` sets them, change nothing: call `init_process_group` first.
        """
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def shared(self, items: Sequence[Item], make: Callable[[Item], Array]) -> Iterator[Array]:
        """What `make` gives for each item, in order, on every rank; rank r makes that of items r, r + world, ...

        Every rank gets the same bits, in the order in which one process would make them, so that sums over items and
        decisions on them are the same everywhere. All ranks must ask for the same items. An error in one of them is
        raised on every rank.

        Cost: items / world calls of `make`, and one broadcast an item. Memory: one result a rank.

        Raises:
            Exception: what `make` raises; for another rank's a ValueError, TypeError or RuntimeError that names it.

        Example:
            >>> [float(squared) for squared in Ranks().shared([1, 2, 3], lambda item: np.array(item**2.0))]
            [1.0, 4.0, 9.0]
        """
        if self.world == 1:
            yield from map(make, items)
            return
        for start in range(0, len(items), self.world):
            made: Array | Exception | None = None
            if start + self.rank < len(items):
                try:
                    made = np.asarray(make(items[start + self.rank]), dtype=np.float64)
                except Exception as error:  # the others wait for an answer
                    made = error
            for owner in range(min(self.world, len(items) - start)):
                yield self._heard(owner, made)

    def agree(self, what: str, digest: str) -> None:
        """Check that every rank has the same of something, by its digest.

        Raises:
            ValueError: on every rank, if one has another.
        """
        own = np.frombuffer(digest.encode(), np.uint8).astype(np.float64)
        texts = list(self.shared(range(self.world), lambda rank: own))
        if other := [rank for rank, text in enumerate(texts) if not np.array_equal(text, texts[0])]:
            raise ValueError(f"every rank must have the same {what}, rank {other[0]} has another than rank 0")

    def _heard(self, owner: int, made: Array | Exception | None) -> Array:
        """What the owner made, told to all."""
        import torch
        from torch import distributed

        device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
        if owner == self.rank:
            content = _told(made) if isinstance(made, Exception) else torch.from_numpy(np.ascontiguousarray(made))
            failed = isinstance(made, Exception)
            shape = [int(failed), content.ndim, *content.shape]
            header = torch.tensor(shape + [0] * (_AXES + 2 - len(shape)), device=device)
            distributed.broadcast(header, src=owner)
            distributed.broadcast(content.to(device), src=owner)
            if isinstance(made, Exception):
                raise made
            return np.asarray(made)
        header = torch.zeros(_AXES + 2, dtype=torch.int64, device=device)
        distributed.broadcast(header, src=owner)
        failed, axes, *sizes = header.tolist()
        dtype = torch.uint8 if failed else torch.float64
        content = torch.empty(sizes[:axes], dtype=dtype, device=device)
        distributed.broadcast(content, src=owner)
        if failed:
            kind, _, text = bytes(content.tolist()).decode().partition(":")
            raise _FAILURES.get(kind, RuntimeError)(f"rank {owner}: {text}")
        heard: Array = content.cpu().numpy()
        return heard


def _told(error: Exception) -> Any:
    import torch

    kind = next((name for name, kind in _FAILURES.items() if isinstance(error, kind)), "RuntimeError")
    text = str(error) if kind in _FAILURES else f"{type(error).__name__}: {error}"
    return torch.frombuffer(bytearray(f"{kind}:{text}".encode()), dtype=torch.uint8)
