"""How much of a box a front dominates: one figure to compare fronts of any shape."""

import numpy as np
import numpy.typing as npt

from .dominance import nondominated


def hypervolume(points: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Volume of the points of the box below ``reference`` that some given point equals or beats everywhere. Exact.

    Zitzler & Thiele (1998, PPSN V). Two objectives: the area under a staircase. More: slices between neighbouring
    values of the last objective, each with the volume of one objective less. Points outside the box count nothing.

    Args:
        points: ``(points, objectives)``, lower is better.
        reference: ``(objectives,)``, the worst corner.

    Raises:
        ValueError: if the shapes do not fit.

    Cost: n log n for two objectives, a factor n for each further one.

    Example:
        >>> hypervolume([[1, 2], [2, 1]], [3, 3])
        3.0
        >>> hypervolume([[1, 1, 1], [0, 2, 2]], [3, 3, 3])
        9.0
    """
    corner = np.asarray(reference, dtype=np.float64)
    found = np.asarray(points, dtype=np.float64)
    if found.size and found.shape[1:] != corner.shape:
        raise ValueError(f"points must have {len(corner)} objectives as the reference, got shape {found.shape}")
    found = found.reshape(-1, len(corner))
    return _volume(found[(found < corner).all(1)], corner)


def _volume(points: npt.NDArray[np.float64], corner: npt.NDArray[np.float64]) -> float:
    if not len(points):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - points.min())
    points = points[nondominated(points)]
    if len(corner) == 2:
        right = np.append(points[1:, 0], corner[0])
        return float(((right - points[:, 0]) * (corner[1] - points[:, 1])).sum())
    order = np.argsort(points[:, -1], kind="stable")
    levels = np.append(points[order, -1], corner[-1])
    slices = np.diff(levels)
    return float(
        sum(
            _volume(points[order[: index + 1], :-1], corner[:-1]) * height
            for index, height in enumerate(slices)
            if height > 0
        )
    )
