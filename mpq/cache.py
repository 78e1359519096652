"""Finished pieces of a long measurement on disk, under a fingerprint of all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.atomic import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Arrays by name in a folder of their own, written whole; without a folder nothing is kept.

    A measurement that was killed finds its finished pieces again. The folder's name is the fingerprint of the weights,
    data, options, method and settings, so a change of any of them starts anew.
    """

    folder: Path | None = None

    def get(self, name: str, make: Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
        """The piece of that name, made and kept if it is not there yet."""
        if self.folder is None:
            return make()
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"
        if path.exists():
            return np.asarray(np.load(path, allow_pickle=False))
        piece = make()
        write_atomically(path, lambda partial: np.save(partial, piece, allow_pickle=False))
        return piece


def pieces_in(cache: str | Path | None, fingerprint: str) -> Pieces:
    """The pieces of one measurement below a cache folder, which is made if need be.

    Raises:
        ValueError: if the folder cannot be made.
    """
    if cache is None:
        return Pieces()
    folder = Path(cache) / fingerprint[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache must be a folder that can be written, got {str(cache)!r}: {error.strerror}") from error
    return Pieces(folder)


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]], *texts: str) -> str:
    """SHA-256 over named tensors (shape, dtype and bytes) and texts."""
    import torch

    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text};".encode())
    for name, tensor in tensors:
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
