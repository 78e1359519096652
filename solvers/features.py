"""What a solver takes, asked before it starts."""

from mpq.problem import AllocationProblem

EVERYTHING = frozenset(
    {
        "several budgets",
        "peak budgets",
        "pairs",
        "transitions",
        "max_formats",
        "format_costs",
        "max norm",
        "p-norm",
    }
)


def refuse(solver: str, features: frozenset[str], problem: AllocationProblem) -> None:
    """Raise a ValueError that names a solver able to, where a problem asks for more than ``features``."""
    missing = sorted(problem.features - features)
    if missing:
        raise ValueError(
            f"solver {solver!r} does not take {', '.join(missing)}: use solver='auto' or 'ilp', which take everything"
        )
