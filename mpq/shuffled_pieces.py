"""Data in shuffled pieces, so that some of it is a fair part of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.batches import Batch, batch_size, samples_in

PIECES = 16  # data is measured piece by piece: at least so many, where batches can be cut


def shuffled_pieces(batches: list[Batch], cut: bool, rng: np.random.Generator) -> list[Batch]:
    """The data in shuffled pieces of at most a sixteenth of it, or a batch, whichever is less; uncut: whole batches."""
    if not cut:
        return [batches[position] for position in rng.permutation(len(batches))]
    most = max(1, -(-samples_in(batches) // PIECES))
    pieces: list[Batch] = []
    for batch in batches:
        samples = batch_size(batch)
        parts = np.array_split(rng.permutation(samples), -(-samples // most))
        pieces += [_taken(batch, torch.from_numpy(np.sort(part)), samples) for part in parts]
    return [pieces[position] for position in rng.permutation(len(pieces))]


def _taken(value: Any, index: Tensor, samples: int) -> Any:
    """Some samples of a batch; tensors without the samples' axis go with all of them."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.ndim and value.shape[0] == samples else value
    if isinstance(value, Mapping):
        return {name: _taken(part, index, samples) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_taken(part, index, samples) for part in value)
    return value
