"""A forest of regression trees as plain arrays: predicted by numpy, saved without pickle.

    prediction(x) = mean over trees of value[leaf that x falls into];  at a node: left if x[feature] <= threshold

as Breiman (2001), "Random forests". scikit-learn grows the trees; nothing but numpy is needed to use them. Inputs are
rounded to float32 before they are compared, as scikit-learn does, so that both fall into the same leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int32]

_LEAF = -1
_CHUNK = 4096  # samples at once
ARRAYS = {
    "feature": np.int32,
    "threshold": np.float64,
    "left": np.int32,
    "right": np.int32,
    "value": np.float64,
    "roots": np.int32,
}


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees one after the other in shared arrays; children stand behind their parents.

    Attributes:
        feature: what a node compares, -1 for a leaf, (nodes,).
        threshold: with what, (nodes,).
        left, right: nodes that follow, (nodes,).
        value: what a leaf predicts, (nodes,).
        roots: the first node of every tree, (trees,).

    Raises:
        ValueError: if the arrays make no forest.

    Example:
        >>> array = np.array
        >>> stump = Forest(array([0, -1, -1]), array([0.5, 0, 0]), array([1, 0, 0]), array([2, 0, 0]),
        ...                array([0.0, 10, 20]), array([0]))
        >>> stump.predict(array([[0.5], [0.6]]))
        array([10., 20.])
    """

    feature: Integers
    threshold: Floats
    left: Integers
    right: Integers
    value: Floats
    roots: Integers

    def __post_init__(self) -> None:
        nodes = len(self.feature)
        columns = (self.feature, self.threshold, self.left, self.right, self.value)
        if any(column.shape != (nodes,) for column in columns) or self.roots.ndim != 1 or not len(self.roots):
            raise ValueError("a forest needs five arrays of one length and at least one root")
        inner = np.flatnonzero(self.feature != _LEAF)
        children = np.stack([self.left[inner], self.right[inner]])
        if (children <= inner).any() or (children >= nodes).any() or (self.roots < 0).any() or nodes <= max(self.roots):
            raise ValueError("a forest's children must stand behind their parents, and all nodes within its arrays")
        if (self.feature < _LEAF).any() or not np.isfinite(self.value).all():
            raise ValueError("a forest's features must be -1 or more, its values finite")

    def predict(self, inputs: Floats) -> Floats:
        """Predictions for (samples, features), (samples,); a step a level, whatever the samples and trees."""
        rounded = np.asarray(inputs, dtype=np.float32)
        if rounded.ndim != 2 or rounded.shape[1] <= self.feature.max(initial=_LEAF):
            raise ValueError(f"the forest reads {self.feature.max() + 1} features, got an array of {rounded.shape}")
        parts = [self._leaves(rounded[start : start + _CHUNK]) for start in range(0, len(rounded), _CHUNK)]
        return np.concatenate([np.empty(0), *(self.value[leaves].mean(axis=1) for leaves in parts)])

    def _leaves(self, inputs: NDArray[np.float32]) -> Integers:
        nodes = np.tile(self.roots, (len(inputs), 1))
        while (inner := self.feature[nodes] != _LEAF).any():
            samples = np.nonzero(inner)[0]
            at = nodes[inner]
            goes_left = inputs[samples, self.feature[at]] <= self.threshold[at]
            nodes[inner] = np.where(goes_left, self.left[at], self.right[at])
        return nodes

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is saved, by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Forest:
        """A forest of saved arrays.

        Raises:
            ValueError: if one is missing or of another type.
        """
        for name, dtype in ARRAYS.items():
            if name not in arrays or arrays[name].dtype != dtype:
                raise ValueError(f"a forest needs an array {name!r} of {np.dtype(dtype).name}")
        return cls(**{name: np.asarray(arrays[name]) for name in ARRAYS})


def grow(inputs: Floats, targets: Floats, *, trees: int = 200, seed: int = 0) -> Forest:
    """Train a forest with scikit-learn: bootstrap samples, a third of the features a split, leaves of one sample.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import RandomForestRegressor
    except ImportError as error:
        raise ValueError(
            "training a predictor needs scikit-learn (using one does not): pip install 'mpq-search[learned]'"
        ) from error
    grown = RandomForestRegressor(n_estimators=trees, max_features=1 / 3, random_state=seed)
    return of_sklearn(grown.fit(inputs, targets))


def of_sklearn(model: Any) -> Forest:
    """The trees of a fitted `sklearn.ensemble.RandomForestRegressor` (or ExtraTreesRegressor) of one output."""
    trees = [estimator.tree_ for estimator in model.estimators_]
    sizes = np.array([tree.node_count for tree in trees])
    roots = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    is_leaf = np.concatenate([tree.children_left for tree in trees]) < 0
    shift = np.repeat(roots, sizes)

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(tree, name) for tree in trees])

    return Forest(
        feature=np.where(is_leaf, _LEAF, joined("feature")).astype(np.int32),
        threshold=np.where(is_leaf, 0.0, joined("threshold")),
        left=np.where(is_leaf, 0, joined("children_left") + shift).astype(np.int32),
        right=np.where(is_leaf, 0, joined("children_right") + shift).astype(np.int32),
        value=joined("value").reshape(-1).astype(np.float64),
        roots=roots.astype(np.int32),
    )
