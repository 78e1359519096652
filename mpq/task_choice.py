"""Which task data and outputs suggest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpq.batches import Batch, call, split_batch, takes_labels
from mpq.tasks import CustomLoss, Distribution, Features, LossFunction, Task, cloned, output_fields, output_tensor

TASKS: Mapping[str, Task] = {
    "classification": Distribution(),
    "causal-lm": Distribution(causal=True),
    "features": Features(),
}


def choose_task(model: nn.Module, batch: Batch, task: Task | LossFunction | str | None = None) -> Task:
    """The task that was given, or the one the data and the outputs suggest.

    `(inputs, integer targets)` and mappings whose output has logits are distributions; float targets, hidden states,
    unit-norm rows, single numbers and unlabelled maps (four axes or more) are features. A causal language model shifts
    its labels.

    Args:
        model: run once on a copy of the batch where the data alone does not decide.
        batch: one batch of the data.
        task: a `Task`, a function `(model, batch) -> loss`, or "classification", "causal-lm" or "features".

    Raises:
        ValueError: if the name is unknown.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, a Task or a function, got {task!r}")
        return TASKS[task]
    if task is not None:
        return task if isinstance(task, Task) else CustomLoss(task)
    inputs, targets = split_batch(batch)
    with torch.no_grad():
        with_labels = isinstance(batch, Mapping) and takes_labels(model) != "no"
        output = call(model, cloned(batch if with_labels else inputs))
    fields = output_fields(output)
    if "loss" in fields and "logits" not in fields:
        return CustomLoss(_own_loss)
    if targets is None:
        looks_like_logits = "logits" in fields or not _looks_like_features(output)
    else:
        looks_like_logits = not targets.is_floating_point()
    return Distribution(causal=_is_causal(model)) if looks_like_logits else Features()


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch)["loss"]  # type: ignore[no-any-return]


def _is_causal(model: nn.Module) -> bool:
    name = type(model).__name__
    if "For" in name:  # a checkpoint's config may still name the model it was taken from
        return "CausalLM" in name
    names = getattr(getattr(model, "config", None), "architectures", None) or ()
    return any("CausalLM" in other or "LMHead" in other for other in (name, *names))


def _looks_like_features(output: Any) -> bool:
    if "last_hidden_state" in output_fields(output):
        return True
    values = output_tensor(output, ())
    norms = values.flatten(0, -2).float().norm(dim=-1)
    unit_norm = bool(((norms - 1).abs() < 1e-3).all())
    return values.shape[-1] == 1 or unit_norm or values.ndim > 3
