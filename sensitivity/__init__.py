"""Sensitivity: how much the loss grows when one layer takes one option. Torch is imported when a method is used."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .additivity import Agreement, agreement
    from .channel_salience import ChannelSalience
    from .estimation import automatic, estimate, estimate_together
    from .first_order import FirstOrder
    from .fisher import Fisher
    from .fisher_full import FisherFull
    from .kl import KL
    from .loss import Loss
    from .measurement import Estimator, Measurement, Scores
    from .output_fisher import OutputFisher
    from .output_mse import OutputMSE
    from .sqnr import SQNR
    from .weight_error import WeightError

__all__ = [
    "KL",
    "SQNR",
    "Agreement",
    "ChannelSalience",
    "Estimator",
    "FirstOrder",
    "Fisher",
    "FisherFull",
    "Loss",
    "Measurement",
    "OutputFisher",
    "OutputMSE",
    "Scores",
    "WeightError",
    "agreement",
    "automatic",
    "available",
    "estimate",
    "estimate_together",
]

# Name of a method: the file it lives in and its class there.
METHODS = {
    "channel_salience": ("channel_salience", "ChannelSalience"),
    "first_order": ("first_order", "FirstOrder"),
    "fisher": ("fisher", "Fisher"),
    "fisher_full": ("fisher_full", "FisherFull"),
    "kl": ("kl", "KL"),
    "loss": ("loss", "Loss"),
    "output_fisher": ("output_fisher", "OutputFisher"),
    "output_mse": ("output_mse", "OutputMSE"),
    "sqnr": ("sqnr", "SQNR"),
    "weight_error": ("weight_error", "WeightError"),
}

_HOME = {
    "Agreement": "additivity",
    "agreement": "additivity",
    "KL": "kl",
    "Loss": "loss",
    "ChannelSalience": "channel_salience",
    "Estimator": "measurement",
    "FirstOrder": "first_order",
    "Fisher": "fisher",
    "FisherFull": "fisher_full",
    "Measurement": "measurement",
    "OutputFisher": "output_fisher",
    "OutputMSE": "output_mse",
    "SQNR": "sqnr",
    "Scores": "measurement",
    "WeightError": "weight_error",
    "automatic": "estimation",
    "estimate": "estimation",
    "estimate_together": "estimation",
}


def available() -> list[str]:
    """Names of the methods, for `method=` and `sensitivity=`."""
    return list(METHODS)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(_import_module(f"mpq.sensitivity.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mpq.sensitivity' has no attribute {name!r}")
