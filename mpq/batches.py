"""Batches: what one may look like, how a model is called on it, and data checked before anything long starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

Batch = Any  # (inputs, targets), a mapping the model is called with, or inputs alone; samples come first


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model: a mapping is unpacked into keywords, a tuple or list into positions."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def split_batch(batch: Batch) -> tuple[Any, Tensor | None]:
    """Inputs and targets of a batch: `(inputs, targets)`, a mapping with or without `labels`, or inputs alone."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}, batch.get("labels")
    if isinstance(batch, tuple | list):
        if len(batch) == 2 and isinstance(batch[1], Tensor):
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        kinds = ", ".join(type(part).__name__ for part in batch)
        raise ValueError(
            f"a batch must be (inputs, targets), a mapping or a tensor, got {len(batch)} parts ({kinds}); "
            "several batches go in a list"
        )
    return batch, None


def model_inputs(model: nn.Module, batch: Batch) -> Any:
    """What the model is called with: the labels of a mapping are left out unless its forward cannot do without."""
    if isinstance(batch, Mapping) and takes_labels(model) == "needed":
        return batch
    return split_batch(batch)[0]


def takes_labels(model: nn.Module) -> Literal["no", "possible", "needed"]:
    """Whether the model's forward takes an argument `labels`, and whether it must be given."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except ValueError:  # traced by torch.jit: what it takes is not known
        return "no"
    if "labels" in parameters:
        return "needed" if parameters["labels"].default is inspect.Parameter.empty else "possible"
    keywords = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return "possible" if keywords else "no"


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)


def batch_size(batch: Batch) -> int:
    """Samples in a batch: the first axis of its first tensor."""
    first = next(tensors_of(batch), None)
    if first is None or first.ndim == 0:
        raise ValueError(f"a batch must hold tensors with the samples first, got {type(batch).__name__}")
    return first.shape[0]


def samples_in(batches: Sequence[Batch]) -> int:
    """Samples in all batches."""
    return sum(batch_size(batch) for batch in batches)


def batches_of(data: Any, *, role: str = "data") -> list[Batch]:
    """The data as a list of batches.

    Args:
        data: one batch (a tensor, a tuple `(inputs, targets)`, a mapping), or an iterable of batches.
        role: what the data is called in messages.

    Raises:
        ValueError: if there is none, a batch holds no samples, NaN or infinity, or a list of tensors that cannot be
            batches of one kind looks like `[inputs, targets]`.

    Example:
        >>> import torch
        >>> len(batches_of([torch.ones(2, 3), torch.ones(2, 3)])), len(batches_of((torch.ones(2, 3), torch.ones(2))))
        (2, 1)
    """
    one = isinstance(data, Tensor | Mapping | tuple)
    if not one and not isinstance(data, Iterable):
        raise ValueError(f"{role} must be a batch or an iterable of batches, got {type(data).__name__}")
    batches = [data] if one else list(data)
    if not batches:
        raise ValueError(f"{role} must hold at least one batch, got none")
    if len({(batch.dtype, batch.ndim) for batch in batches if isinstance(batch, Tensor)}) > 1:
        raise ValueError(
            f"{role} must be batches of one kind, got a list of tensors that differ in dtype or axes: "
            "if it is one batch, make it a tuple (inputs, targets)"
        )
    for position, batch in enumerate(batches):
        _check_batch(batch, f"batch {position} of {role}")
    return batches


def _check_batch(batch: Batch, where: str) -> None:
    if batch_size(batch) == 0:
        raise ValueError(f"{where} must hold samples, it is empty")
    for tensor in tensors_of(batch):
        if tensor.is_floating_point() and (wrong := int((tensor.isnan() | tensor.isposinf()).sum())):  # masks add -inf
            raise ValueError(f"{where} must be finite, {wrong} of {tensor.numel()} values are NaN or infinite")
