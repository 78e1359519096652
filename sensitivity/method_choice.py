"""Which method "auto" means for a model and an amount of data, and why."""

from __future__ import annotations

from dataclasses import dataclass

from mpq.layers import Network
from mpq.options import SearchSpace

from .fisher import Fisher
from .kl import KL
from .measurement import Estimator

MEASURED_MACS = 3e13  # what `automatic` lets a measurement cost: some minutes on two CPU cores, for 5e10 a second


@dataclass(frozen=True)
class MethodChoice:
    """A method and, in words, why it is the one."""

    estimator: Estimator
    why: str


def choose_method(network: Network, space: SearchSpace, samples: int, granularity: str = "layer") -> MethodChoice:
    """What `automatic` says, with the reason.

    Example:
        >>> import torch
        >>> from mpq import trace
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval(), torch.randn(1, 4)
        >>> choice = choose_method(trace(model, x), SearchSpace(["int4", "int8"]), samples=100)
        >>> choice.estimator
        KL(base='full')
        >>> choice.why
        'measuring all 2 choices takes 2.4e+03 multiply-adds; up to 3e+13 it is done'
    """
    if granularity != "layer":
        return MethodChoice(Fisher(), f"units of {granularity} are too many to be measured one by one")
    runs = sum(len(options) for options in space.candidates(network).values())
    macs = sum(layer.macs for layer in network.layers) / network.batch * samples * runs
    takes = f"measuring all {runs} choices takes {macs:.2g} multiply-adds"
    if macs <= MEASURED_MACS:
        return MethodChoice(KL(), f"{takes}; up to {MEASURED_MACS:.0e} it is done")
    return MethodChoice(Fisher(), f"{takes}; beyond {MEASURED_MACS:.0e} it is estimated from gradients")


def automatic(network: Network, space: SearchSpace, samples: int, granularity: str = "layer") -> Estimator:
    """The method that "auto" means for a model and an amount of data."""
    return choose_method(network, space, samples, granularity).estimator
