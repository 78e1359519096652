"""`estimate`: from a model and data to a labelled table of scores, by whichever method."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from mpq.batches import batches_of, samples_in
from mpq.cache import ADDRESS, description, fingerprint_of, pieces_in
from mpq.layers import Network, block_size
from mpq.options import SearchSpace
from mpq.quantizer import Quantizer, RoundToNearest
from mpq.suggestions import did_you_mean
from mpq.surgery import evaluating
from mpq.task_choice import choose_task
from mpq.tasks import LossFunction, Task

from . import METHODS
from .kl import KL
from .measurement import Estimator, Measurement
from .output_fisher import OutputFisher
from .weight_error import WeightError

if TYPE_CHECKING:
    import pandas as pd

MEASURED_MACS = 2e12  # what `automatic` lets a measurement cost; about a minute on two CPU cores


def estimate(  # noqa: PLR0917 - the order is public
    model: nn.Module,
    data: Any,
    network: Network,
    space: SearchSpace,
    method: str | Estimator = "auto",
    task: Task | LossFunction | str | None = None,
    seed: int = 0,
    *,
    granularity: str = "layer",
    quantizer: Quantizer | None = None,
    cache: Any = None,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Score every option of every layer: the expected increase of the loss when only that layer takes it.

    Args:
        model: in full precision; comes back bit for bit.
        data: calibration data: a DataLoader, a list of batches, or one batch.
        network: of the model (`mpq.trace`).
        space: which options are scored.
        method: a name of `mpq.sensitivity.available()`, "auto" (`automatic`), or an estimator.
        task: how a batch is run and what the loss is; chosen from the data by default (`mpq.tasks.choose_task`).
        seed: of everything random.
        granularity: units that take an option: "layer", "rows:16", "groups:64".
        quantizer: whose error is scored; rounds to nearest by default. It should be the one that is deployed.
        cache: a folder for finished pieces: an interrupted measurement goes on there.
        progress: show a bar on a terminal.
        **settings: fields of the estimator, where it is given by name.

    Returns:
        A frame indexed by (unit label, option label) with the columns `sensitivity` and `sensitivity_se` (standard
        error over samples); NaN where the option is no candidate. `attrs["measure"]` is "loss" or "score",
        `attrs["method"]` says how it was made.

    Raises:
        ValueError: if data, method, settings or options do not fit.
    """
    import pandas as pd

    batches = batches_of(data)
    with evaluating(model):
        chosen_task = choose_task(model, batches[0], task)
        estimator = _estimator(method, settings, lambda: automatic(network, space, samples_in(batches), granularity))
        quantizer = quantizer or RoundToNearest()
        options = space.all_options
        candidates = space.candidates(network)
        settings_used = (estimator, chosen_task, seed, granularity, quantizer, network.layers, options, candidates)
        measurement = Measurement(
            model=model,
            batches=batches,
            network=network,
            options=options,
            candidates=candidates,
            granularity=granularity,
            task=chosen_task,
            quantizer=quantizer,
            seed=seed,
            pieces=pieces_in(cache, _fingerprint(model, batches, settings_used) if cache is not None else ""),
            progress=progress,
        )
        scores = estimator(measurement)
    index = pd.MultiIndex.from_product([measurement.units.labels, map(str, options)], names=["layer", "option"])
    columns = {"sensitivity": scores.mean.ravel(), "sensitivity_se": scores.standard_error.ravel()}
    frame = pd.DataFrame(columns, index=index)
    made = {"method": repr(estimator), "task": repr(chosen_task)}
    frame.attrs |= {"measure": scores.measure, **{name: ADDRESS.sub("", text) for name, text in made.items()}}
    return frame


def automatic(network: Network, space: SearchSpace, samples: int, granularity: str = "layer") -> Estimator:
    """The method that "auto" means for a model and an amount of data.

    Measured divergence where running every choice costs at most `MEASURED_MACS` multiply-adds, or where a layer's
    output cannot be watched; else output Fisher. Where units are too fine for either, the weight error. Counted, not
    timed, so that the same input gives the same plan.
    """
    runs = sum(len(options) for options in space.candidates(network).values())
    macs = sum(layer.macs for layer in network.layers) / network.batch * samples * runs
    unwatched = any(layer.module is None for layer in network.layers)
    if granularity != "layer" and (unwatched or block_size(granularity)[0] == "groups"):
        return WeightError()
    return KL() if granularity == "layer" and (unwatched or macs <= MEASURED_MACS) else OutputFisher()


def _estimator(method: str | Estimator, settings: dict[str, Any], default: Callable[[], Estimator]) -> Estimator:
    if not isinstance(method, str):
        if settings:
            raise ValueError(f"settings {sorted(settings)} must be fields of the estimator that was given")
        return method
    if method == "auto":
        return default()
    if method not in METHODS:
        raise ValueError(f"sensitivity method {method!r} is not known{did_you_mean(method, [*METHODS, 'auto'])}")
    module, name = METHODS[method]
    try:
        estimator: Estimator = getattr(import_module(f"mpq.sensitivity.{module}"), name)(**settings)
    except TypeError as error:
        raise ValueError(f"settings of {method} must be its fields: {error}") from error
    return estimator


def _fingerprint(model: nn.Module, batches: list[Any], settings: tuple[Any, ...]) -> str:
    return fingerprint_of([], *(description(part) for part in (model, batches, *settings)))
