"""Prices of a cost worth trying: the slopes at which plans change."""

import numpy as np

from mpq.arrays import FloatArray

from .forest import Forest

GROUPS = 4096  # looked at for slopes


def prices(forest: Forest, count: int) -> FloatArray:
    """About so many prices of the first cost, ascending, from one that buys nothing to one that buys everything.

    Between are quantiles of value given up per cost saved, from option to option of a group; they are few where the
    plans do not change and many where they do. Couplings have such slopes as well.
    """
    step = -(-forest.own.shape[1] // GROUPS)
    own = np.where(forest.core.allowed[::step], forest.own[:2, ::step], np.nan)
    given = own[0, :, None, :] - own[0, :, :, None]
    saved = own[1, :, :, None] - own[1, :, None, :]
    parts = [(given, saved)]
    for nodes in forest.trees:
        for node in nodes:
            for _, table in node.branches:
                flat = table[:2].reshape(2, -1)
                parts.append((flat[0][:, None] - flat[0], flat[1] - flat[1][:, None]))
    slopes = [up[(up > 0) & (down > 0)] / down[(up > 0) & (down > 0)] for up, down in parts]
    slope = np.sort(np.concatenate([part[np.isfinite(part) & (part > 0)] for part in slopes]))
    if not len(slope):
        return np.zeros(1)
    picked = slope[np.linspace(0, len(slope) - 1, count).astype(np.int64)]
    return np.unique(np.concatenate([[0.0, 1e-5 * slope[0]], picked, [1e5 * slope[-1]]]))
