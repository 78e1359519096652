"""Hand a plan to the library that applies it: one function a target, none of which needs the target installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpq.export_torchao import to_torchao
from mpq.plan import Plan
from mpq.suggestions import did_you_mean

_TARGETS: dict[str, Callable[[Plan], dict[str, Any]]] = {"torchao": to_torchao}


def targets() -> list[str]:
    """Names of the libraries a plan can be exported to."""
    return list(_TARGETS)


def export(plan: Plan, target: str) -> dict[str, Any]:
    """The plan in the form a library reads, as plain data that `json.dump` takes.

    Args:
        plan: what is exported.
        target: a name of `targets()`; the function behind it says how the result is applied.

    Raises:
        ValueError: if the target is unknown, or cannot hold a format of the plan; nothing is mapped silently.
    """
    if target not in _TARGETS:
        raise ValueError(f"export target {target!r} is not known{did_you_mean(target, _TARGETS)}")
    return _TARGETS[target](plan)
