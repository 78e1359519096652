"""Plans as bytes: what measured plans are found by."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def key_of(choices: ArrayLike) -> bytes:
    """The options of a plan, (units,) indices, as bytes: two a unit, since there may be millions.

    Example:
        >>> choices_of_key(key_of([3, 0, 300])).tolist()
        [3, 0, 300]
    """
    return np.asarray(choices).astype("<u2").tobytes()


def choices_of_key(key: bytes) -> NDArray[np.int64]:
    """(units,): the options that a key stands for."""
    return np.frombuffer(key, dtype="<u2").astype(np.int64)
