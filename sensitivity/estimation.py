"""`estimate`: from a model and data to a labelled table of scores, by whichever method; several at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from mpq.batches import batches_of, samples_in
from mpq.cache import ADDRESS, Pieces, description, fingerprint_of, pieces_in
from mpq.layers import Network
from mpq.options import SearchSpace
from mpq.plugins import plugin_named
from mpq.quantizer import Quantizer, RoundToNearest
from mpq.ranks import Ranks
from mpq.suggestions import did_you_mean
from mpq.surgery import evaluating
from mpq.task_choice import choose_task
from mpq.tasks import LossFunction, Task

from . import METHODS, available
from .layer_runs import base_option
from .measurement import Estimator, Measurement, Scores, check_operators, check_ranks, check_weights
from .method_choice import MethodChoice, choose_method
from .one_pass import OnePassEstimator, run_together
from .single_layer import SingleLayer, measured_together

if TYPE_CHECKING:
    import pandas as pd

Together = Callable[[Sequence[Any], Measurement], Sequence[Scores]]


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

    Where `torch.distributed` is initialised (`torchrun` and `init_process_group`), its ranks share the work: rank r of
    W takes batches r, r + W, ... of the same data, (batch, layer) pairs for measured methods, layers for `obs` and for
    low-rank traces; pieces without data are made on every rank. Seeds go by batch, so every rank returns the table of a
    single process. All ranks must call it with the same whole model, data and settings; cache folders may be shared.

    Args:
        model: in full precision; comes back bit for bit.
        data: calibration data: a DataLoader, a list of batches, or one batch.
        network: of the model (`mpq.trace`).
        space: which options are scored; its operators of attention by methods that measure them alone.
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
        `attrs["method"]` says how it was made, `attrs["why"]` why "auto" took that method; `attrs["pairs"]` has the
        terms for pairs of layers, by their positions, where the method measures any (`interactions`).

    Raises:
        ValueError: if data, method, settings or options do not fit, or a weight is not finite or on the meta device.
    """
    batches = batches_of(data)
    check_weights(model, network)
    with evaluating(model):
        chosen_task = choose_task(model, batches[0], task)
        default = partial(choose_method, network, space, samples_in(batches), granularity)
        estimator = _estimator(method, settings, default)
        measurement = Measurement(
            model=model,
            batches=batches,
            network=network,
            options=space.all_options,
            candidates=space.candidates(network),
            granularity=granularity,
            task=chosen_task,
            quantizer=quantizer or RoundToNearest(),
            seed=seed,
            pieces=Pieces(),
            progress=progress and Ranks.current().rank == 0,
            ranks=Ranks.current(),
            operators=space.operators(network),
        )
        check_operators(measurement, estimator)
        scores = estimator(_with_pieces(measurement, cache, (estimator,)))
        frame = _frame(scores, estimator, measurement, _index(measurement))
    if method == "auto":
        frame.attrs["why"] = default().why
    return frame


def estimate_together(
    model: nn.Module,
    data: Any,
    network: Network,
    space: SearchSpace,
    methods: Sequence[str | Estimator],
    *,
    task: Task | LossFunction | str | None = None,
    seed: int = 0,
    granularity: str = "layer",
    quantizer: Quantizer | None = None,
    cache: Any = None,
    progress: bool = True,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, pd.DataFrame]:
    """`estimate` by several methods: those that need the same runs of the model share them, the others run in turn.

    Fisher, full Fisher, output Fisher, first order and channel salience see the same gradients: there is one backward
    for those with the data's labels and one for those with labels drawn from the model, and every weight is quantised
    once for all of them. KL, loss, output MSE and SQNR on the same base compare the same outputs. The scores are those
    of each method on its own.

    Args:
        model: this and all arguments that are not named otherwise: as in `estimate`.
        data: calibration data.
        network: of the model.
        space: which options are scored.
        methods: names of `mpq.sensitivity.available()`, "auto", or estimators.
        task: how a batch is run.
        seed: of everything random.
        granularity: of the units.
        quantizer: whose error is scored.
        cache: a folder for finished pieces.
        progress: show a bar on a terminal.
        settings: fields of the estimators that are given by name, by that name.

    Returns:
        A frame like `estimate`'s for every method, by its name; an estimator's name is its repr.

    Raises:
        ValueError: if no method or one method twice is asked for, settings are for none of them, or as `estimate` does.

    Example:
        >>> import torch
        >>> import mpq
        >>> from mpq.options import SearchSpace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()
        >>> data = torch.randn(8, 4), torch.randint(0, 3, (8,))
        >>> network, space = mpq.trace(model, data[0]), SearchSpace(["int4", "int8"])
        >>> frames = estimate_together(model, data, network, space, ["fisher", "output_fisher", "kl"])
        >>> list(frames), frames["fisher"].index[0]
        (['fisher', 'output_fisher', 'kl'], ('0', 'int4'))
    """
    batches = batches_of(data)
    check_weights(model, network)
    with evaluating(model):
        measurement = Measurement(
            model=model,
            batches=batches,
            network=network,
            options=space.all_options,
            candidates=space.candidates(network),
            granularity=granularity,
            task=choose_task(model, batches[0], task),
            quantizer=quantizer or RoundToNearest(),
            seed=seed,
            pieces=Pieces(),
            progress=progress and Ranks.current().rank == 0,
            ranks=Ranks.current(),
            operators=space.operators(network),
        )
        estimators = _named_estimators(methods, settings or {}, measurement, space)
        for each in estimators.values():
            check_operators(measurement, each)
        scores: dict[str, Scores] = {}
        for run, group in _groups(estimators):  # in the same order on every rank
            together = tuple(group.values())
            scores |= zip(group, run(together, _with_pieces(measurement, cache, together)), strict=True)
        index = _index(measurement)
        frames = {name: _frame(scores[name], each, measurement, index) for name, each in estimators.items()}
    if "auto" in frames:
        frames["auto"].attrs["why"] = choose_method(network, space, samples_in(batches), granularity).why
    return frames


def _groups(estimators: Mapping[str, Estimator]) -> list[tuple[Together, dict[str, Estimator]]]:
    """What runs together, and by what: methods that share gradients, measured ones of the same base, others alone."""
    groups: dict[tuple[Together, Any], dict[str, Estimator]] = {}
    for name, each in estimators.items():
        key: tuple[Together, Any] = (_alone, name)
        if isinstance(each, OnePassEstimator) and each.shares_pass:
            key = run_together, "gradients"
        elif isinstance(each, SingleLayer):
            key = measured_together, base_option(each.base)
        groups.setdefault(key, {})[name] = each
    return [(run, group) for (run, _), group in groups.items()]


def _alone(estimators: Sequence[Any], measurement: Measurement) -> Sequence[Scores]:
    return [estimator(measurement) for estimator in estimators]


def _named_estimators(
    methods: Sequence[str | Estimator],
    settings: Mapping[str, Mapping[str, Any]],
    measurement: Measurement,
    space: SearchSpace,
) -> dict[str, Estimator]:
    names = [method if isinstance(method, str) else repr(method) for method in methods]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods must be at least one and each another, got {', '.join(names) or 'none'}")
    if unused := set(settings) - {method for method in methods if isinstance(method, str)}:
        raise ValueError(f"settings must be for methods given by name, got some for {sorted(unused)}")
    samples = samples_in(measurement.batches)
    default = partial(choose_method, measurement.network, space, samples, measurement.granularity)
    given = [dict(settings.get(method, {})) if isinstance(method, str) else {} for method in methods]
    made = [_estimator(method, fields, default) for method, fields in zip(methods, given, strict=True)]
    return dict(zip(names, made, strict=True))


def _with_pieces(measurement: Measurement, cache: Any, estimators: tuple[Estimator, ...]) -> Measurement:
    """The measurement with the finished pieces of these estimators, from a cache folder if there is one."""
    layers, options = measurement.network.layers, measurement.options
    check_ranks(measurement, *estimators)
    if cache is None:
        return measurement
    made_of = (measurement.task, measurement.seed, measurement.granularity, measurement.quantizer)
    made = estimators[0] if len(estimators) == 1 else estimators
    used = (made, *made_of, layers, options, measurement.candidates)
    fingerprint = fingerprint_of([], *(description(part) for part in (measurement.model, measurement.batches, *used)))
    return replace(measurement, pieces=pieces_in(cache, fingerprint))


def _index(measurement: Measurement) -> pd.MultiIndex:
    import pandas as pd

    labels = [*measurement.units.labels, *(operator.name for operator in measurement.operators)]
    return pd.MultiIndex.from_product([labels, map(str, measurement.options)], names=["layer", "option"])


def _frame(scores: Scores, estimator: Estimator, measurement: Measurement, index: pd.MultiIndex) -> pd.DataFrame:
    import pandas as pd

    columns = {"sensitivity": scores.mean.ravel(), "sensitivity_se": scores.standard_error.ravel()}
    frame = pd.DataFrame(columns, index=index)
    made = {"method": repr(estimator), "task": repr(measurement.task)}
    frame.attrs |= {"measure": scores.measure, **{name: ADDRESS.sub("", text) for name, text in made.items()}}
    if scores.pairs:
        frame.attrs["pairs"] = dict(scores.pairs)
    return frame


def _estimator(method: str | Estimator, settings: dict[str, Any], default: Callable[[], MethodChoice]) -> Estimator:
    if not isinstance(method, str):
        if settings:
            raise ValueError(f"settings {sorted(settings)} must be fields of the estimator that was given")
        return method
    if method == "auto":
        return default().estimator
    plugin = plugin_named("mpq.estimators", method, METHODS)
    if plugin is None and method not in METHODS:
        raise ValueError(f"sensitivity method {method!r} is not known{did_you_mean(method, [*available(), 'auto'])}")
    try:
        if plugin is not None:
            made: Estimator = plugin.make(settings)
            return made
        module, name = METHODS[method]
        estimator: Estimator = getattr(import_module(f"mpq.sensitivity.{module}"), name)(**settings)
    except TypeError as error:
        raise ValueError(f"settings of {method} must be its fields: {error}") from error
    return estimator
