"""Did-you-mean: the end of an error message about a mistyped name."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """Close matches as the tail of a sentence, or the first known names where nothing is close.

    Example:
        >>> did_you_mean("int88", ["int8", "int4", "nf4"])
        ": did you mean 'int8', 'int4'?"
        >>> did_you_mean("zzz", ["int8", "int4"])
        ': known are int8, int4'
    """
    names = list(known)
    if close := get_close_matches(word, names, n=count, cutoff=0.6):
        return f": did you mean {', '.join(map(repr, close))}?"
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f": known are {listed}" if names else ""
