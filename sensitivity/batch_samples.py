"""A batch taken apart into its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mpq.batches import Batch, batch_size


def single_samples(batch: Batch) -> Iterator[Batch]:
    """Batches of one sample each; tensors without the samples' axis go with every one of them.

    Example:
        >>> import torch
        >>> [inputs.tolist() for inputs, targets in single_samples((torch.tensor([[1], [2]]), torch.tensor([0, 1])))]
        [[[1]], [[2]]]
    """
    samples = batch_size(batch)
    return (_sample(batch, number, samples) for number in range(samples))


def _sample(value: Any, number: int, samples: int) -> Any:
    if isinstance(value, Tensor):
        return value[number : number + 1] if value.ndim and value.shape[0] == samples else value
    if isinstance(value, Mapping):
        return {key: _sample(part, number, samples) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_sample(part, number, samples) for part in value)
    return value
