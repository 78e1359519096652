"""Plan a checkpoint from its files: shapes and costs from the meta device, scores from weights read in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.options import SearchSpace
from mpq.pricing import Priced, price_network
from mpq.tables import CostTable

if TYPE_CHECKING:
    from mpq.checkpoints import Checkpoint

METHODS = {
    "auto": "squared weight error over the mean squared weight",
    "weight_error": "squared weight error",
    "relative_weight_error": "relative squared weight error",
}
"""Scores that need no data, and what the plan calls them."""

WHY = "without data there is only the error of the weights, which knows nothing of the loss"


NANOSECONDS = 15
"""Of one core a weight and option: measured for int4@group64 in bf16; formats that search their scales take more."""


def measure_checkpoint(
    checkpoint: str | Path | Checkpoint,
    data: None,
    space: SearchSpace,
    *,
    sensitivity: Any = "auto",
    budgets: Mapping[str, float | str] | None = None,
    solver: Any = "auto",
    granularity: str = "layer",
    progress: bool = True,
    **run: Any,
) -> CostTable:
    """The cost table of a checkpoint, its weights read a few rows at a time and never all in memory.

        auto                     n_l ||Q_o(W_l) - W_l||² / ||W_l||²        n_l weights in layer l
        weight_error                 ||Q_o(W_l) - W_l||²
        relative_weight_error        ||Q_o(W_l) - W_l||² / ||W_l||²

    By the linearity theorem of HIGGS (methods 2.8; Malinovskii et al. 2024, arXiv:2411.17525) the loss grows with the
    sum over layers of the relative error times a factor α_l, which to second order is ½ n_l avgTr(H_l) mean(W_l²).
    Without data the last two are not known: "auto" takes their product to be the same everywhere, "weight_error" the
    mean trace, "relative_weight_error" all of α_l. No paper proposes the first; on SmolLM2-135M, int3, int4 and int8 in
    groups of 64, it had the least loss of the three at 3.6, 4 and 5.5 bits and was level with the second at 4.5, and
    the third was far behind from 4.5 bits on, where it gave the embedding the fewest bits (8 windows of 256 tokens:
    4.91, 4.35, 3.85, 3.64 against 6.46, 5.95, 3.84, 3.74 and 6.18, 5.84, 5.53, 5.32; float32 3.37). One model is no
    proof.

    Args:
        checkpoint: a path, or what `mpq.checkpoints.read_checkpoint` found there.
        data: None.
        space: options of weights.
        sensitivity: one of the scores above.
        budgets: refused at once if they cannot be kept, before a weight is read.
        solver: the one that will be used.
        granularity: what takes an option: "layer", "experts", "rows:16", "groups:64".
        progress: show a bar on a terminal.
        **run: `hardware`, `batch`, `phase`, `context`, `bops`, `target` as for `mpq.measure`.

    Raises:
        InfeasibleError: if `budgets` cannot be kept.
        ValueError: if there is data, a method needs it, files are missing or broken, or a name or pattern is wrong.

    Cost: about 15 ns a weight and format on one core of 2020s' servers. Memory: some hundred MB.

    Example:
        >>> import tempfile, torch
        >>> from mpq.pipeline import search
        >>> from safetensors.torch import save_file
        >>> generator = torch.Generator().manual_seed(0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tensors = {f"{n}.weight": torch.randn(8, 16, generator=generator) for n in ("up", "down")}
        ...     save_file(tensors, f"{folder}/model.safetensors")
        ...     search(folder, None, ["int4", "int8"], {"size": "8 bits"})
        Plan(2 layers: 1 int4, 1 int8; 7.000 bits a weight)
    """
    _check_method(data, sensitivity)
    found = _found(checkpoint)
    priced = price_checkpoint(found, space, granularity=granularity, **run)
    if budgets is not None:
        priced.check_reachable(budgets, solver)
    weights = [found.weights[layer.name] for layer in priced.network.layers]
    score = import_module("mpq.sensitivity.checkpoint").score_stored
    frame = score(weights, space, granularity=granularity, progress=progress)
    if sensitivity == "weight_error":
        frame["sensitivity"] = frame["weight_error"]
    elif sensitivity == "auto":
        units = priced.network.units(granularity)
        sizes = np.array([layer.parameters for layer in units.layers], float)[units.layer_index]
        frame["sensitivity"] *= sizes.repeat(len(space.all_options))
    provenance = {"samples": 0, "sensitivity": METHODS[sensitivity], "quantizer": "RoundToNearest()"}
    provenance |= {"why": WHY, "notes": list(found.notes)}
    return priced.table({"sensitivity": frame, "sensitivity_se": frame}, frame.attrs["measure"], provenance)


def price_checkpoint(checkpoint: str | Path | Checkpoint, space: SearchSpace, **run: Any) -> Priced:
    """Price every option of a checkpoint; no weight is read. Arguments as for `measure_checkpoint`.

    Raises:
        ValueError: if a device is given for a checkpoint whose graph is not known, or a pattern matches nothing.
    """
    found = _found(checkpoint)
    if not found.graph and run.get("hardware") is not None:
        raise ValueError(
            f"hardware needs the multiply-adds of every layer, and {'; '.join(found.notes)}: give a folder with a "
            "config.json that transformers knows, or budgets of size alone"
        )
    priced = price_network(found.network, space, **run)
    if found.graph:
        return priced
    return replace(priced, costs=priced.costs.drop(columns="bops"))


def _found(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    from mpq.checkpoints import read_checkpoint

    return read_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint


def _check_method(data: Any, sensitivity: Any) -> None:
    if data is not None:
        raise ValueError(
            "a path is planned without data (data=None): load the model to use data, "
            "transformers.AutoModelForCausalLM.from_pretrained(path)"
        )
    if sensitivity not in METHODS:
        raise ValueError(
            f"sensitivity of a path must be one of {', '.join(METHODS)}, which need no data, got {sensitivity!r}: "
            "load the model and give data to use others"
        )
