"""Random inputs of the kind that a model was given, for measurements without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpq.batches import Batch
from mpq.layers import Network


def random_batch(batch: Batch, network: Network, generator: torch.Generator) -> Batch:
    """A batch of the same form with random content.

    Floats become normal with the mean and standard deviation of the tensor. Integers of more than two values become
    uniform below the number of rows of the network's first embedding, or, where it has none, up to the largest value
    seen. What tells about other inputs stays: booleans, integers of one or two values (masks, token types), mapping
    keys with "mask", "position" or "labels" in them, and the targets of an (inputs, targets) pair, which give shapes.

    Example:
        >>> ids = {"input_ids": torch.arange(6).reshape(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
        >>> drawn = random_batch(ids, Network(()), torch.Generator().manual_seed(0))
        >>> drawn["input_ids"].shape, bool((drawn["input_ids"] < 6).all()), drawn["attention_mask"].sum().item()
        (torch.Size([1, 6]), True, 6)
    """
    rows = next((layer.weight_shape[0] for layer in network.layers if layer.kind == "embedding"), None)
    if isinstance(batch, Mapping):
        return {name: value if _is_kept(name) else _random(value, rows, generator) for name, value in batch.items()}
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return _random(batch[0], rows, generator), batch[1]
    return _random(batch, rows, generator)


def _is_kept(name: str) -> bool:
    return any(word in name for word in ("mask", "position", "labels"))


def _random(value: Any, rows: int | None, generator: torch.Generator) -> Any:
    if isinstance(value, Mapping):
        return {name: part if _is_kept(name) else _random(part, rows, generator) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_random(part, rows, generator) for part in value)
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return value
    if value.is_floating_point():
        spread, middle = (float(value.double().std(correction=0)), float(value.double().mean()))
        return (torch.randn(value.shape, generator=generator) * spread + middle).to(value)
    if bool(((value == value.min()) | (value == value.max())).all()):
        return value
    below = int(value.max()) + 1 if rows is None else rows
    return torch.randint(0, below, value.shape, generator=generator).to(value)
