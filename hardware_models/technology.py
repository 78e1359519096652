"""Technology scaling: what an operation's energy and area become in another process and at another voltage.

    energy(Y, V_Y) / energy(X, V_X) = p_Y(V_Y) / p_X(V_X),  p(V) = a V^2 + b V + c
    area(Y) / area(X) = A_Y / A_X

after Stillmaker and Baas (2017), "Scaling equations for the accurate prediction of CMOS device performance from 180 nm
to 7 nm", Integration 58, with the coefficients and areas that Accelergy's library plug-in carries; the paper itself was
not read. Between two nodes of the table the factor is interpolated in log-log, outside it is refused.

Good for moving a published table of energies by a node or two. The fits are of inverters: memories and wires scale
less. The polynomials fall with voltage at its low end, which no circuit does: voltages there are refused, those above
1.3 V too (from memory, the fits end near there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NODES_NM = (130, 90, 65, 45, 32, 20, 16, 14, 10, 7)
ENERGY_COEFFICIENTS = (
    (7.171, -6.709, 2.904),
    (4.762, -4.781, 2.092),
    (3.755, -4.398, 1.975),
    (1.103, -0.362, 0.2767),
    (0.9559, -0.7823, 0.471),
    (0.373, -0.1582, 0.04104),
    (0.2958, -0.1241, 0.03024),
    (0.2363, -0.09675, 0.02239),
    (0.2068, -0.09311, 0.02375),
    (0.1776, -0.09097, 0.02447),
)
AREAS_FROM_45_NM = (6.4, 2.8, 1.5, 1.0, 0.46, 0.21, 0.19, 0.17, 0.1, 0.059)

HIGHEST_V = 1.3


def energy_factor(from_nm: float, from_V: float, to_nm: float, to_V: float) -> float:
    """Energy of a switch in the process `to_nm` at `to_V` over that in `from_nm` at `from_V`.

    Args:
        from_nm: the node that the energy is known for, 7 to 130 nm.
        from_V: the supply voltage that it is known for.
        to_nm: the node that it is wanted for.
        to_V: the supply voltage there.

    Raises:
        ValueError: if a node or a voltage lies outside of what was fitted.

    Example:
        >>> round(energy_factor(45, 0.9, 16, 0.8), 3), energy_factor(28, 0.9, 28, 0.9)
        (0.142, 1.0)
    """
    return _switch(to_nm, to_V) / _switch(from_nm, from_V)


def area_factor(from_nm: float, to_nm: float) -> float:
    """Area in the process `to_nm` over that in `from_nm`.

    Raises:
        ValueError: if a node lies outside the table.

    Example:
        >>> area_factor(45, 7), round(area_factor(16, 7), 2)
        (0.059, 0.31)
    """
    return _between(to_nm, AREAS_FROM_45_NM) / _between(from_nm, AREAS_FROM_45_NM)


def is_interpolated(nm: float) -> bool:
    """Whether a node lies between those of the table."""
    return nm not in NODES_NM


def _switch(nm: float, volts: float) -> float:
    _check_voltage(nm, volts)
    return _between(nm, [a * volts**2 + b * volts + c for a, b, c in ENERGY_COEFFICIENTS])


def _check_voltage(nm: float, volts: float) -> None:
    _check_node(nm)
    turning = [-b / (2 * a) for a, b, _ in ENERGY_COEFFICIENTS]  # the energy rises with voltage above
    around = [v for node, v in zip(NODES_NM, turning, strict=True) if node in _neighbours(nm)]
    if not max(around) <= volts <= HIGHEST_V:
        limits = f"{max(around):.2f} to {HIGHEST_V} V at {nm:g} nm"
        raise ValueError(f"voltage must lie where the scaling polynomials hold, {limits}, got {volts:g} V")


def _check_node(nm: float) -> None:
    if not NODES_NM[-1] <= nm <= NODES_NM[0]:
        raise ValueError(f"process must lie between {NODES_NM[-1]} and {NODES_NM[0]} nm, got {nm:g} nm")


def _neighbours(nm: float) -> tuple[int, int]:
    return min(node for node in NODES_NM if node >= nm), max(node for node in NODES_NM if node <= nm)


def _between(nm: float, values: Sequence[float]) -> float:
    _check_node(nm)
    if nm in NODES_NM:
        return values[NODES_NM.index(int(nm))]
    logs = np.interp(math.log(nm), np.log(NODES_NM[::-1]), np.log(values[::-1]))
    return float(np.exp(logs))
