"""Read-only arrays out of what a caller hands over."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def read_only(values: npt.ArrayLike) -> FloatArray:
    """A float64 copy that nobody can write to."""
    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return array


def whole_numbers(name: str, values: npt.ArrayLike) -> IntArray:
    """An int64 copy that nobody can write to.

    Raises:
        ValueError: for anything that is not a whole number, under the name given.
    """
    array = np.asarray(values)
    is_whole = np.issubdtype(array.dtype, np.integer)
    if array.size and not is_whole and (not np.issubdtype(array.dtype, np.number) or (array != np.floor(array)).any()):
        raise ValueError(f"{name} must hold whole numbers, got {values!r}")
    whole = array.astype(np.int64)
    whole.flags.writeable = False
    return whole
