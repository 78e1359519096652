"""Sensitivity: how much the loss grows when one layer takes one option. Torch is imported when a method is used."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from mpq.plugins import all_names as _all_names

if _TYPE_CHECKING:
    from .additivity import Agreement, agreement
    from .channel_salience import ChannelSalience
    from .checkpoint import score_checkpoint
    from .entropy import Entropy
    from .estimation import estimate, estimate_together
    from .first_order import FirstOrder
    from .fisher import Fisher
    from .fisher_full import FisherFull
    from .ggn_trace import GGNTrace
    from .hessian_trace import HessianTrace
    from .interactions import Interactions
    from .kl import KL
    from .layer_relevance import relevance
    from .linearity import Linearity
    from .loss import Loss
    from .lrp import LRP
    from .measurement import Estimator, Measurement, Scores
    from .method_choice import automatic
    from .obs import OBS
    from .output_fisher import OutputFisher
    from .output_mse import OutputMSE
    from .sqnr import SQNR
    from .traces import layer_traces
    from .weight_error import WeightError

__all__ = [
    "KL",
    "LRP",
    "OBS",
    "SQNR",
    "Agreement",
    "ChannelSalience",
    "Entropy",
    "Estimator",
    "FirstOrder",
    "Fisher",
    "FisherFull",
    "GGNTrace",
    "HessianTrace",
    "Interactions",
    "Linearity",
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
    "layer_traces",
    "relevance",
    "score_checkpoint",
]

# Name of a method: the file it lives in and its class there.
METHODS = {
    "channel_salience": ("channel_salience", "ChannelSalience"),
    "entropy": ("entropy", "Entropy"),
    "first_order": ("first_order", "FirstOrder"),
    "fisher": ("fisher", "Fisher"),
    "fisher_full": ("fisher_full", "FisherFull"),
    "ggn_trace": ("ggn_trace", "GGNTrace"),
    "hessian_trace": ("hessian_trace", "HessianTrace"),
    "interactions": ("interactions", "Interactions"),
    "kl": ("kl", "KL"),
    "linearity": ("linearity", "Linearity"),
    "loss": ("loss", "Loss"),
    "lrp": ("lrp", "LRP"),
    "obs": ("obs", "OBS"),
    "output_fisher": ("output_fisher", "OutputFisher"),
    "output_mse": ("output_mse", "OutputMSE"),
    "sqnr": ("sqnr", "SQNR"),
    "weight_error": ("weight_error", "WeightError"),
}

_HOME = {
    "Agreement": "additivity",
    "ChannelSalience": "channel_salience",
    "Entropy": "entropy",
    "Estimator": "measurement",
    "FirstOrder": "first_order",
    "Fisher": "fisher",
    "FisherFull": "fisher_full",
    "GGNTrace": "ggn_trace",
    "HessianTrace": "hessian_trace",
    "Interactions": "interactions",
    "KL": "kl",
    "LRP": "lrp",
    "Linearity": "linearity",
    "Loss": "loss",
    "Measurement": "measurement",
    "OBS": "obs",
    "OutputFisher": "output_fisher",
    "OutputMSE": "output_mse",
    "SQNR": "sqnr",
    "Scores": "measurement",
    "WeightError": "weight_error",
    "agreement": "additivity",
    "automatic": "method_choice",
    "estimate": "estimation",
    "estimate_together": "estimation",
    "layer_traces": "traces",
    "relevance": "layer_relevance",
    "score_checkpoint": "checkpoint",
}


def available() -> list[str]:
    """Names of the methods, for `method=` and `sensitivity=`; ours first, then those of other packages."""
    return _all_names("mpq.estimators", METHODS)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(_import_module(f"mpq.sensitivity.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mpq.sensitivity' has no attribute {name!r}")
