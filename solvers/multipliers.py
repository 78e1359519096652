"""What one more unit of a budget is worth."""

from mpq.problem import AllocationProblem

from .ilp import ILPSolver
from .lagrangian_dual import maximise
from .reduction import merge

TAKEN = frozenset({"several budgets"})


def shadow_prices(problem: AllocationProblem) -> dict[str, float]:
    """The decrease of the objective that one more unit of each budget buys, by its Lagrange multiplier.

    The multipliers maximise L(λ) = Σ_g min_k (score_gk + λ · usage_gk) − λ · limits (`lagrangian_dual.maximise`). They
    are the slope of the convex lower envelope of (budgets, least objective), the objective of the linear relaxation:
    what a budget buys on average over many units. They are not the exact marginal of the choice of whole options,
    which falls in steps. A budget that does not bind has the price 0; at a corner of the envelope any slope between
    those on its two sides may come back.

    Args:
        problem: with any number of sum budgets, and norm 1.

    Returns:
        ``{budget: price}``, in units of the objective per unit of the resource.

    Raises:
        InfeasibleError: if no plan meets the budgets.
        ValueError: for a problem with other features, which have no such price.

    Example:
        A loss of 4 buys 4 bytes: from 2 to 6 bytes each byte is worth 1.

        >>> problem = AllocationProblem(objective=[[5, 1]], resources={"size": [[2, 6]]}, budgets={"size": 4})
        >>> shadow_prices(problem)
        {'size': 1.0}
    """
    other = sorted(problem.features - TAKEN)
    if other:
        raise ValueError(f"shadow prices are known for sum budgets and norm 1 alone, got a problem with {other}")
    dual = maximise(merge(problem))
    if dual is None:
        ILPSolver().solve(problem)
        raise ValueError("the budgets can only just be met: there the price of a budget has no limit")
    return dict(zip(problem.budgets, dual.price.tolist(), strict=True))
