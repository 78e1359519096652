"""What the conformance tests share: a check that tells what was promised, and a second process to compare with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

_SECONDS = 900  # for one call: a busy machine may take long to start a process that imports torch
HASH_SEED = "7"  # of the second process, so that what goes by the order of a set differs


def expect(kept: object, promise: str) -> None:
    """Fail where a promise is not kept.

    A function and not the statement: `python -O` takes statements away, and pytest explains only those of test files.

    Raises:
        AssertionError: with the promise, if `kept` is false.

    Example:
        >>> expect(1 + 1 == 3, "a sum adds up")
        Traceback (most recent call last):
        ...
        AssertionError: not kept: a sum adds up
    """
    if not kept:
        raise AssertionError(f"not kept: {promise}")


def in_another_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, which hashes texts in another way.

    Function and arguments must be importable there: classes at the top of a module. The process is started once, and
    again where the import path has changed.

    Raises:
        AssertionError: if they are not.
    """
    try:
        return _other_process(tuple(sys.path)).submit(function, *arguments).result(timeout=_SECONDS)
    except (BrokenProcessPool, AttributeError, TypeError) as error:
        _other_process.cache_clear()
        raise AssertionError(f"not kept: {arguments} can be handed to another process, got {error!r}") from error


@lru_cache(maxsize=1)
def _other_process(path: tuple[str, ...]) -> ProcessPoolExecutor:
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = HASH_SEED
    try:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result(timeout=_SECONDS)  # starts it
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before
    return pool
