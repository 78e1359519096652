"""Sensitivity: how much the loss grows when one layer takes one option. Torch is imported when a method is used."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .estimation import automatic, estimate
    from .kl import KL
    from .measurement import Estimator, Measurement, Scores
    from .output_fisher import OutputFisher
    from .weight_error import WeightError

__all__ = [
    "KL",
    "Estimator",
    "Measurement",
    "OutputFisher",
    "Scores",
    "WeightError",
    "automatic",
    "available",
    "estimate",
]

# Name of a method: the file it lives in and its class there.
METHODS = {
    "kl": ("kl", "KL"),
    "output_fisher": ("output_fisher", "OutputFisher"),
    "weight_error": ("weight_error", "WeightError"),
}

_HOME = {
    "KL": "kl",
    "Estimator": "measurement",
    "Measurement": "measurement",
    "OutputFisher": "output_fisher",
    "Scores": "measurement",
    "WeightError": "weight_error",
    "automatic": "estimation",
    "estimate": "estimation",
}


def available() -> list[str]:
    """Names of the methods, for `method=` and `sensitivity=`."""
    return list(METHODS)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(_import_module(f"mpq.sensitivity.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mpq.sensitivity' has no attribute {name!r}")
