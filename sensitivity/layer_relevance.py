"""`relevance`: how much of a network's outputs passes through each layer, by layer-wise relevance propagation."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from mpq.batches import batches_of, model_inputs
from mpq.cache import Pieces
from mpq.layers import Network
from mpq.quantizer import RoundToNearest
from mpq.ranks import Ranks
from mpq.surgery import evaluating
from mpq.task_choice import choose_task
from mpq.tasks import LossFunction, Task
from mpq.tracing import trace

from .measurement import Measurement, check_ranks
from .relevance_pass import BatchRelevance, Bias, Propagation, Residual, Target
from .relevance_ranks import shared_relevance
from .relevance_rules import Rule

if TYPE_CHECKING:
    import pandas as pd

Per = Literal["layer", "channel"]


def relevance(
    model: nn.Module,
    data: Any,
    network: Network | None = None,
    *,
    rule: Rule | str = "epsilon",
    input_rule: Rule | str | None = None,
    bias: Bias = "absorb",
    residual: Residual = "split",
    target: Target = "auto",
    task: Task | LossFunction | str | None = None,
    per: Per = "layer",
    fold_norms: bool = True,
    progress: bool = False,
) -> pd.DataFrame:
    """Relevance at every layer's input and output: the share of the outputs that it accounts for.

    Relevance starts as the chosen output and is handed back, operation by operation, to what the operation was made
    from. At every layer it is summed over positions and channels, as it is and by magnitude.

        share(l) = Ā_l / Σ_k Ā_k,  Ā_l = mean over samples of Σ |R| at layer l

    Products with a weight (linear, convolution, experts) follow `rule`; the rest follows AttnLRP (Achtibat et al. 2024,
    read in the authors' code): half to each factor of a product of activations (query times key, attention times value,
    gate times up), all to the signal behind a sigmoid gate (Arras et al. 2017, from memory), softmax by its Taylor
    expansion, layer norm and RMS norm with their deviation as a constant, elementwise functions with f(0) = 0
    unchanged; a residual sum hands each branch its own part, a R / (a + b). Batch norm is folded into the sum before
    it. Anything else falls back to gradient times input and is counted in `attrs["unruled"]`.

    What is conserved: sums without bias under every rule but epsilon > 0 (which keeps a part), residual sums, products
    of activations, ReLU, pooling, norms without shift. A bias, a constant that is added (masks, position parameters)
    and a norm's shift keep their share; `bias="distribute"` hands that of a sum's own bias to its inputs. Softmax does
    not conserve. `attrs["conservation"]` is what arrived where the data enter, over what started.

    When to use: to see which layers an output rests on, or behind `LRP`. When not: as a measure of what an error in a
    layer costs: conservation makes layers in series alike.

    Args:
        model: comes back bit for bit.
        data: a DataLoader, a list of batches, or one batch.
        network: of the model; traced on the first batch by default.
        rule: "epsilon[:ε]", "z" (ε = 0), "z+", "gamma[:γ]", "alpha-beta[:α,β]", or a rule of `relevance_rules`.
        input_rule: for sums that see the data themselves, where these are numbers: "z-box[:low,high]".
        bias: "absorb" or "distribute", see above.
        residual: "split": each branch of a residual sum gets its own part; "rescaled": by the magnitude of what the
            branches get in all, which Chefer et al.'s code does and keeps large parts that cancel in check.
        target: "argmax" (the most likely class at every position), "label" (the data's), "output" (every output, by its
            own size, so that y² starts), "auto": argmax where outputs are logits, else output.
        task: how a batch is run; chosen from the data by default.
        per: "layer", or "channel": one row for each row of each weight, of the layer's outputs.
        fold_norms: whether batch norm is folded; else it is a step of its own whose shift keeps its share.
        progress: show a bar on a terminal.

    Returns:
        A frame by layer with the columns `input`, `input_se`, `output`, `output_se` (shares that add up to 1 over the
        layers, standard errors over samples) and `input_signed`, `output_signed` (means of Σ R, in units of the
        output). Per channel it is indexed by (layer, channel), has the output columns alone, and layers whose outputs
        are not the rows of one weight have one channel.

    Where `torch.distributed` is initialised, its ranks share the batches, and every rank returns the same frame: all of
    them must call it with the same whole model, data and settings.

    Cost: measured on a small transformer, in forward and backward passes: 3 with epsilon, 4 with z+, 6 with alpha-beta,
    8 with gamma. Weights that functions use make it run one sample at a time.

    Raises:
        ValueError: if rule, target or data do not fit, the outputs have no gradient, or relevance is not finite, naming
            the layer; or ranks differ.

    Example:
        Of y = 3 a + 1 b with a = b = 1, three quarters come by the first path:

        >>> import torch
        >>> class Paths(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = (torch.nn.Linear(1, 1, bias=False) for _ in "ab")
        ...     def forward(self, x):
        ...         return self.a(x) + self.b(x)
        >>> model = Paths()
        >>> _ = model.a.weight.data.fill_(3), model.b.weight.data.fill_(1)
        >>> relevance(model, torch.ones(2, 1), rule="z")["input"].to_dict()
        {'a': 0.75, 'b': 0.25}
    """
    propagation = Propagation(
        rule=rule, input_rule=input_rule, bias=bias, residual=residual, target=target, fold_norms=fold_norms
    )
    if per not in get_args(Per):
        raise ValueError(f"per must be 'layer' or 'channel', got {per!r}")
    batches = batches_of(data)
    with evaluating(model):
        network = network or trace(model, model_inputs(model, batches[0]))
        chosen = choose_task(model, batches[0], task)
        measurement = Measurement(
            model=model,
            batches=batches,
            network=network,
            options=(),
            candidates={},
            granularity="layer",
            task=chosen,
            quantizer=RoundToNearest(),
            seed=0,
            pieces=Pieces(),
            progress=progress and Ranks.current().rank == 0,
            ranks=Ranks.current(),
        )
        check_ranks(measurement, propagation, chosen, per)
        parts = shared_relevance(measurement, propagation)
    frame = _by_layer(parts, network) if per == "layer" else _by_channel(parts, network)
    started, arrived = (float(sum(part.sum() for part in ends)) for ends in _ends(parts))
    unruled = sum((part.unruled for part in parts), Counter[str]())
    frame.attrs |= {"rule": repr(propagation), "unruled": dict(unruled)}
    frame.attrs["conservation"] = arrived / started if started else float("nan")
    return frame


def shares(amounts: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, n) amounts: the mean of each over the sum of all means, and its standard error (delta method).

    Raises:
        ValueError: if all are zero.

    Example:
        >>> [part.tolist() for part in shares(torch.tensor([[1.0, 3.0], [1.0, 3.0]]).double())]
        [[0.25, 0.75], [0.0, 0.0]]
    """
    means = amounts.mean(0)
    total = means.sum()
    if not total > 0:
        raise ValueError("relevance is 0 in every layer: the outputs do not depend on the data, or are all 0")
    deviations = (amounts - amounts.sum(1, keepdim=True) * (means / total)) / total
    samples = len(amounts)
    spread = deviations.std(0) if samples > 1 else torch.zeros_like(means)
    return means / total, spread / samples**0.5


def _ends(parts: list[BatchRelevance]) -> tuple[list[Tensor], list[Tensor]]:
    return [part.started for part in parts], [part.arrived for part in parts]


def _by_layer(parts: list[BatchRelevance], network: Network) -> pd.DataFrame:
    import pandas as pd

    at_outputs = [torch.stack([channels.sum(2) for channels in part.outputs]) for part in parts]
    columns: dict[str, Any] = {}
    for name, found in (("input", [part.inputs for part in parts]), ("output", at_outputs)):
        values = torch.cat(found, 2)  # (layers, 2, samples)
        share, error = shares(values[:, 0].T)
        columns |= {name: share.numpy(), f"{name}_se": error.numpy(), f"{name}_signed": values[:, 1].mean(1).numpy()}
    order = ["input", "input_se", "output", "output_se", "input_signed", "output_signed"]
    index = pd.Index([layer.name for layer in network.layers], name="layer")
    return pd.DataFrame(columns, index=index)[order]


def _by_channel(parts: list[BatchRelevance], network: Network) -> pd.DataFrame:
    import pandas as pd

    values = torch.cat([torch.cat(part.outputs, 2) for part in parts], 1)  # (2, samples, channels)
    share, error = shares(values[0])
    widths = [channels.shape[2] for channels in parts[0].outputs]
    labels = [(layer.name, at) for layer, width in zip(network.layers, widths, strict=True) for at in range(width)]
    columns = {"output": share.numpy(), "output_se": error.numpy(), "output_signed": values[1].mean(0).numpy()}
    return pd.DataFrame(columns, index=pd.MultiIndex.from_tuples(labels, names=["layer", "channel"]))
