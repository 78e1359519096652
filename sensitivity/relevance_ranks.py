"""Relevance of batches that are shared over ranks: each rank propagates its own, and every rank gets all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mpq.progress import track

from .measurement import Measurement
from .relevance_pass import BatchRelevance, Propagation, batch_relevance

Array = NDArray[np.float64]


def shared_relevance(measurement: Measurement, propagation: Propagation) -> list[BatchRelevance]:
    """`batch_relevance` of every batch, in order, on every rank. Operations without a rule stand in the first.

    Cost: batches / ranks passes, and one broadcast a batch.

    Raises:
        ValueError: as `batch_relevance`; another rank's error is raised on all of them.
    """
    ranks, network = measurement.ranks, measurement.network
    unruled = Counter[str]()

    def numbers_of(index: int) -> Array:
        batch = measurement.batches[index]
        found = batch_relevance(measurement.model, batch, network, measurement.task, propagation)
        unruled.update(found.unruled)
        return numbers(found)

    indices = range(len(measurement.batches))
    shown: Iterator[int] = iter(track(indices, "relevance", shown=measurement.progress))
    parts = [part_of(found) for _, found in zip(shown, ranks.shared(indices, numbers_of), strict=True)]

    def text_of(rank: int) -> Array:
        return np.frombuffer(json.dumps(unruled).encode(), np.uint8).astype(np.float64)

    for text in ranks.shared(range(ranks.world), text_of):
        parts[0].unruled.update(json.loads(text.astype(np.uint8).tobytes()))
    return parts


def numbers(part: BatchRelevance) -> Array:
    """(n,): how many channels each layer has, after how many layers there are, then every number, sample by sample."""
    samples = len(part.started)
    signed_and_not = [part.inputs.flatten(0, 1).T, *(channels.movedim(1, 0).flatten(1) for channels in part.outputs)]
    table = torch.cat([*signed_and_not, part.started[:, None], part.arrived[:, None]], 1).double().cpu()
    widths = [channels.shape[2] for channels in part.outputs]
    return np.concatenate([[len(widths), *widths], table.reshape(samples * table.shape[1]).numpy()])


def part_of(found: Array) -> BatchRelevance:
    """What `numbers` was made of, without the operations that have no rule."""
    layers = int(found[0])
    widths = found[1 : 1 + layers].astype(int).tolist()
    table = torch.tensor(found[1 + layers :]).reshape(-1, 2 * (layers + sum(widths) + 1))
    inputs, *outputs, ends = torch.split(table, [2 * layers, *(2 * width for width in widths), 2], 1)
    return BatchRelevance(
        inputs=inputs.T.reshape(layers, 2, -1),
        outputs=[part.reshape(len(part), 2, -1).movedim(1, 0) for part in outputs],
        started=ends[:, 0],
        arrived=ends[:, 1],
    )
