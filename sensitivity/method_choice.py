"""Which method "auto" means for a model and an amount of data, and why."""

from __future__ import annotations

from dataclasses import dataclass

from mpq.layers import Network
from mpq.options import SearchSpace

from .fisher import Fisher
from .kl import KL
from .measurement import Estimator
from .weight_error import WeightError

MEASURED_MACS = 1e13  # what `automatic` lets a measurement cost: 3 to 10 CPU minutes, at 6e10 to 1.7e10 a second


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
        'measuring all 2 choices takes 2.4e+03 multiply-adds; up to 1e+13 it is done'
    """
    candidates = space.candidates(network)
    if space.operators(network):
        return MethodChoice(KL(), "operators of attention have no weights: nothing but measuring scores them")
    if granularity != "layer":
        if any(layer.kind == "embedding" and len(candidates[layer.name]) > 1 for layer in network.layers):
            return MethodChoice(WeightError(), "rows of an embedding that no sample meets have no gradient; pin it")
        return MethodChoice(Fisher(), f"units of {granularity} are too many to be measured one by one")
    runs = sum(len(options) for options in candidates.values())
    macs = sum(layer.macs for layer in network.layers) / network.batch * samples * runs
    takes = f"measuring all {runs} choices takes {macs:.2g} multiply-adds"
    if macs <= MEASURED_MACS:
        return MethodChoice(KL(), f"{takes}; up to {MEASURED_MACS:.0e} it is done")
    return MethodChoice(Fisher(), f"{takes}; beyond {MEASURED_MACS:.0e} it is estimated from gradients")


def automatic(network: Network, space: SearchSpace, samples: int, granularity: str = "layer") -> Estimator:
    """The method that "auto" means for a model and an amount of data.

    `kl` where running every choice costs at most `MEASURED_MACS` multiply-adds, full runs counted (the prefix that is
    reused takes off about half); else, and for rows and groups, `fisher` with labels drawn from the model. Counted, not
    timed, so that the same input gives the same plan.

    Rows or groups of an embedding are the exception: those of tokens that no sample meets have no gradient, nor much of
    one in a head that is tied to it, and `fisher` gives them the fewest bits: SmolLM2's plan for groups of 64 at 4 bits
    diverged by 21.7 nats. So it is `weight_error` there, unless the embedding is pinned to one option, which is better.

    Why, measured on held-out data (tables in sensitivity/README.md): the plans of `kl` never lost to uniform precision,
    and on MiniLM at 6 bits it alone of the four tried won, where errors add up through the residual stream and no
    diagonal sees it. `fisher` came next in one pass: its plans equal those of `kl` on EfficientNet-Lite0 and on
    ResNet-8 at 6 bits, and diverge 14 % more on ResNet-8 at 3 bits and, within noise, 7 % more on MiniLM at 4.
    `output_fisher` is up to three times cheaper, and its plan on EfficientNet-Lite0 diverged 44 % more at 4 bits; it
    has no groups. The measured increase of the `loss` drowns in noise at high precision, and `weight_error` knows
    nothing of the loss.

    Operators of attention (`SearchSpace.operators`) are always measured, whatever it takes.

    Example:
        >>> import torch
        >>> from mpq import trace
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval(), torch.randn(1, 4)
        >>> automatic(trace(model, x), SearchSpace(["int4"]), samples=8, granularity="groups:2").labels
        'model'
    """
    return choose_method(network, space, samples, granularity).estimator
