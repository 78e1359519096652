"""Arrays kept in a folder, so that finished work outlives the process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpq.atomic import write_atomically


@dataclass(frozen=True)
class StoredValues:
    """Arrays by key, a file each, written whole; without a folder nothing is kept.

    Args:
        folder: where the files are; None keeps nothing.
    """

    folder: Path | None

    def read(self, key: bytes) -> NDArray[np.float64]:
        """What was written under a key, empty if nothing was."""
        path = self._path(key)
        if path is None or not path.exists():
            return np.empty(0)
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)

    def write(self, key: bytes, values: NDArray[np.float64]) -> None:
        """Keep an array under a key."""
        if (path := self._path(key)) is not None:
            write_atomically(path, lambda partial: np.save(partial, values, allow_pickle=False))

    def _path(self, key: bytes) -> Path | None:
        return None if self.folder is None else self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.npy"
