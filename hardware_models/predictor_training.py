"""Training of a predictor of latencies on measured kernels, and its error on shapes that it has not seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpq.rank_correlation import kendall

from .forest import grow
from .lookup_table import LookupTable
from .predictor import Codes, Features, Floats, HeldOut, Predictor, work_of_kernels

_UNKNOWN = HeldOut(0, 0, float("nan"), float("nan"), float("nan"))


def train_predictor(table: LookupTable, *, folds: int = 5, trees: int = 200, seed: int = 0) -> Predictor:
    """Train on a table of measured kernels; its error is measured on held-out shapes.

    Args:
        table: measured kernels, as `measured.measure_kernels` or `lookup_table.read_lookup_table` gives them.
        folds: parts of the shapes, each predicted by a forest trained on the others.
        trees: trees of a forest.
        seed: of the folds and the forests.

    Raises:
        ValueError: if there are fewer shapes than folds, or scikit-learn is not installed.
    """
    shapes = _shape_codes(table)
    count = int(shapes.max(initial=-1)) + 1
    if folds < 2 or count < folds:
        raise ValueError(f"folds must be at least 2 and at most the number of shapes, got {folds} for {count} shapes")
    latency = table.quantities["latency"]
    part = np.random.default_rng(seed).permutation(count)[shapes] % folds
    predicted = np.empty(len(table))
    for fold in range(folds):
        fitted = _fitted(table, part != fold, trees, seed)
        predicted[part == fold] = fitted.latency(
            *_coded(fitted.features.kinds, fitted.features.pairs, table, part == fold)
        )
    within = [kendall(predicted[own], latency[own]) for own in (shapes == code for code in range(count))]
    taus = [tau for tau in within if np.isfinite(tau)]
    held_out = HeldOut(
        samples=len(table),
        shapes=count,
        mape=float(np.mean(np.abs(predicted / latency - 1))),
        kendall_tau=kendall(predicted, latency),
        tau_within=float(np.mean(taus)) if taus else float("nan"),
    )
    return _fitted(table, np.ones(len(table), dtype=bool), trees, seed, held_out)


def _fitted(
    table: LookupTable, rows: NDArray[np.bool_], trees: int, seed: int, held_out: HeldOut = _UNKNOWN
) -> Predictor:
    """A predictor of some rows of a table; kinds and pairs are those of the whole."""
    kinds, pairs = tuple(dict.fromkeys(table.kinds)), tuple(dict.fromkeys(_pairs(table)))
    kind, sizes, pair = _coded(kinds, pairs, table, rows)
    latency = table.quantities["latency"][rows]
    macs, traffic, _ = work_of_kernels(sizes, pairs, pair)
    rate = 2 * macs / latency
    peaks = np.array([rate[pair == code].max(initial=0.0) or rate.max() for code in range(len(pairs))])
    features = Features(kinds, pairs, peaks, float((traffic / latency).max()))
    trained = np.zeros((len(kinds), len(pairs)), dtype=bool)
    trained[kind, pair] = True
    owns = [sizes[kind == code] if (kind == code).any() else sizes for code in range(len(kinds))]
    roofline, inputs = features.of(kind, sizes, pair)
    return Predictor(
        forest=grow(inputs, np.log(latency / roofline), trees=trees, seed=seed),
        features=features,
        trained=trained,
        low=np.array([own.min(axis=0) for own in owns]),
        high=np.array([own.max(axis=0) for own in owns]),
        held_out=held_out,
    )


def _coded(
    kinds: tuple[str, ...], pairs: tuple[tuple[str, str], ...], table: LookupTable, rows: NDArray[np.bool_]
) -> tuple[Codes, Floats, Codes]:
    """What `Predictor.latency` takes, of some rows."""
    kind_of = {key: code for code, key in enumerate(kinds)}
    pair_of = {key: code for code, key in enumerate(pairs)}
    kind = np.array([kind_of[key] for key in table.kinds], dtype=np.intp)
    pair = np.array([pair_of[key] for key in _pairs(table)], dtype=np.intp)
    return kind[rows], table.sizes[rows].astype(np.float64), pair[rows]


def _pairs(table: LookupTable) -> list[tuple[str, str]]:
    return list(zip(table.weights, table.activations, strict=True))


def _shape_codes(table: LookupTable) -> NDArray[np.intp]:
    """One number for every distinct kind and sizes, (entries,)."""
    kinds = {kind: code for code, kind in enumerate(dict.fromkeys(table.kinds))}
    rows = np.column_stack([[kinds[kind] for kind in table.kinds], table.sizes])
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
