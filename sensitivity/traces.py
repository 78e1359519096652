"""`layer_traces`: the trace of every layer's diagonal block of the loss's Hessian, or of its Gauss-Newton part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpq.batches import batches_of
from mpq.cache import description, fingerprint_of, pieces_in
from mpq.layers import Network
from mpq.progress import track
from mpq.quantizer import RoundToNearest
from mpq.ranks import Ranks
from mpq.surgery import evaluating
from mpq.task_choice import choose_task
from mpq.tasks import LossFunction, Task

from .gauss_newton import gauss_newton_draws
from .gradient_pass import Labels
from .hessian_products import HessianProducts
from .layer_probes import LayerTrace, probed_traces
from .measurement import Measurement, check_ranks, check_weights
from .trace_estimators import StoppingRule, hutch_plus_plus, seed_of, xtrace

if TYPE_CHECKING:
    import pandas as pd

Algorithm = Literal["auto", "joint", "block", "hutch++", "xtrace"]
Curvature = Literal["hessian", "ggn"]
Array = NDArray[np.float64]
COLUMNS = ("trace", "standard_error", "probes", "method")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How traces of the Hessian's diagonal blocks are estimated; see `layer_traces`.

    Raises:
        ValueError: if the algorithm is unknown.
    """

    rule: StoppingRule
    algorithm: Algorithm = "auto"
    labels: Labels = "auto"

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(f"algorithm must be one of {', '.join(get_args(Algorithm))}, got {self.algorithm!r}")

    def weight_traces(self, measurement: Measurement) -> dict[int, LayerTrace]:
        """The trace of each layer, by its position."""
        layers = range(len(measurement.network.layers))
        with HessianProducts(measurement, self.labels, "weights", layers) as products:
            if self.algorithm in {"auto", "joint", "block"}:
                return probed_traces(products, self.rule, self.algorithm)
            shown = track(layers, self.algorithm, shown=measurement.progress)
            found = measurement.ranks.shared(layers, partial(self._low_rank, products))
            return {
                layer: LayerTrace(float(trace), float(error), int(count), self.algorithm)
                for layer, (trace, error, count) in zip(shown, found, strict=True)
            }

    def input_traces(self, measurement: Measurement, layers: Sequence[int]) -> dict[int, LayerTrace]:
        """The mean of the diagonal of the block of each layer's inputs: trace over elements, a mean over samples."""
        if not layers:
            return {}
        method = self.algorithm if self.algorithm in {"joint", "block"} else "auto"
        with HessianProducts(measurement, self.labels, "inputs", layers) as products:
            return probed_traces(products, self.rule, method)

    def _low_rank(self, products: HessianProducts, layer: int) -> Array:
        """(3,): trace, standard error and products of one layer."""
        measurement = products.measurement
        name = measurement.network.layers[layer].name
        estimate = {"hutch++": hutch_plus_plus, "xtrace": xtrace}[self.algorithm]

        def make() -> Array:
            generator = torch.Generator().manual_seed(seed_of(measurement.seed, layer))
            found = estimate(partial(products.product, layer), products.size(layer), self.rule, generator)
            return np.array([found.trace, found.standard_error, found.products])

        return measurement.pieces.get(f"{self.algorithm} {name}", make)


def layer_traces(
    model: nn.Module,
    data: Any,
    network: Network,
    task: Task | LossFunction | str | None = None,
    *,
    probes: int = 256,
    tolerance: float = 0.05,
    absolute_tolerance: float = 0.0,
    algorithm: Algorithm = "auto",
    curvature: Curvature = "hessian",
    labels: Labels = "auto",
    seed: int = 0,
    cache: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Trace of every layer's diagonal block of the Hessian of the mean loss.

        Tr(H_l) = Σ_i d²L/dw_i²,    L = mean over samples of the task's loss, itself a mean over positions

    Args:
        model: in full precision; run in evaluation mode, so that batch norm is frozen; comes back bit for bit.
        data: a DataLoader, a list of batches, or one batch. Batches weigh by their samples.
        network: of the model (`mpq.trace`).
        task: how a batch is run and what the loss is; chosen from the data by default.
        probes: products with the Hessian a layer at most (draws, for "ggn").
        tolerance: relative standard error at which a layer is done; 0 takes all probes. Never the change of the running
            mean, which fires by chance.
        absolute_tolerance: added to it, in units of the trace.
        algorithm: for the Hessian: "joint" and "block" are Hutchinson's with one probe for all layers or one a layer,
            "auto" the cheaper for each layer (`mpq.sensitivity.layer_probes`); "hutch++" and "xtrace" take a layer's
            block and pay where its eigenvalues decay (`mpq.sensitivity.trace_estimators`), for memory of three vectors
            of the layer's size a product.
        curvature: "hessian", or "ggn": the Gauss-Newton matrix, of one forward and one backward a draw. It is the
            Hessian of the divergence from full precision, positive semi-definite, needs no labels.
        labels: of the Hessian's loss: "data"; "model": the divergence from full precision in place of the loss, whose
            Hessian is the Gauss-Newton matrix exactly; "auto": the data's where it has labels.
        seed: of the probes.
        cache: a folder for finished pieces: an interrupted run goes on there.
        progress: show a bar on a terminal.

    Returns:
        A frame indexed by layer with the columns `trace`, `standard_error` (over probes, the data fixed), `probes` and
        `algorithm`. Traces are as they are, be they negative (see `mpq.sensitivity.HessianTrace`).

    Raises:
        ValueError: if settings, data or labels do not fit, or the model cannot be differentiated twice.

    Cost: a product is about four to eight forwards. HAWQ-V2 (from memory) takes 50 probes of 512 samples.

    Example:
        >>> import torch
        >>> from mpq import trace
        >>> from mpq.sensitivity import layer_traces
        >>> model = torch.nn.Linear(3, 2, bias=False).eval()
        >>> data = (torch.eye(3), torch.zeros(3, dtype=torch.long))
        >>> frame = layer_traces(model, data, trace(model, data[0]), probes=1000, tolerance=0)
        >>> p = model(data[0]).softmax(1)
        >>> exact = float((p * (1 - p)).sum(1).mean())  # Tr(H) = mean of Tr(diag(p) - p pᵀ) ||x||²
        >>> abs(frame["trace"].item() - exact) < 3 * frame["standard_error"].item() + 1e-6
        True
    """
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature must be one of {', '.join(get_args(Curvature))}, got {curvature!r}")
    rule = StoppingRule(probes=probes, tolerance=tolerance, absolute_tolerance=absolute_tolerance)
    blocks = Blocks(rule=rule, algorithm=algorithm, labels=labels)
    batches = batches_of(data)
    check_weights(model, network)
    with evaluating(model):
        chosen = choose_task(model, batches[0], task)
        settings = (blocks, curvature, chosen, seed, network.layers)
        key = fingerprint_of([], *map(description, (model, batches, *settings))) if cache is not None else ""
        measurement = Measurement(
            model=model,
            batches=batches,
            network=network,
            options=(),
            candidates={},
            granularity="layer",
            task=chosen,
            quantizer=RoundToNearest(),
            seed=seed,
            pieces=pieces_in(cache, key),
            progress=progress and Ranks.current().rank == 0,
            ranks=Ranks.current(),
        )
        check_ranks(measurement, blocks, curvature)
        if curvature == "ggn":
            found = dict(enumerate(gauss_newton_draws(measurement, rule).traces()))
        else:
            found = blocks.weight_traces(measurement)
    return _frame(network, found)


def _frame(network: Network, traces: dict[int, LayerTrace]) -> pd.DataFrame:
    import pandas as pd

    rows = [[getattr(traces[position], column) for column in COLUMNS] for position in range(len(network.layers))]
    names = pd.Index([layer.name for layer in network.layers], name="layer")
    return pd.DataFrame(rows, index=names, columns=list(COLUMNS))
