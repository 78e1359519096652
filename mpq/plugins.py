"""What other packages add to mpq: entry points in four groups, found when a name is first asked for.

A package that declares

    [project.entry-points."mpq.solvers"]
    my-solver = "my_package:MySolver"

in its `pyproject.toml` and is installed beside mpq is taken by name wherever mpq's own are: `solve(problem,
"my-solver")`, `mpq.search(..., solver="my-solver")`, `--solver my-solver`. What an entry point leads to, by group:

`mpq.estimators`  a class whose fields are the settings and whose objects are `mpq.sensitivity.Estimator`s, such as a
                  frozen dataclass; or an object or function `(measurement) -> Scores` itself, which has no settings.
`mpq.solvers`     a class whose fields are the settings and whose objects have `solve(problem) -> Allocation`; or such
                  an object itself.
`mpq.hardware`    a package (module), in whose folder lies the device file `NAME.toml`; a path of a device file; a
                  `mpq.hardware_models.Target`, or an object with its method `costs`; or a function without arguments
                  that returns one of these. A target may have cost models of its own (`Target.models`), and
                  `parse_target(..., families=...)` reads device files with tables of its own.
`mpq.exporters`   an `mpq.exporting.ExportTarget`.

Names: a name that mpq or another package has as well is an error when it is used, which names both packages; nothing is
shadowed. "auto" is mpq's own, whatever else calls itself so. A package that cannot be imported breaks nothing else: the
error comes when its name is used. `mpq list` shows every entry point, the package it comes from and what is wrong with
it. Conformance tests for each kind ship with mpq: `mpq.estimator_conformance`, `mpq.solver_conformance`,
`mpq.device_conformance`, `mpq.exporter_conformance`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, distributions
from types import ModuleType
from typing import Any

from mpq.version import VERSION

OURS = f"mpq-search {VERSION}"
AUTOMATIC = "auto"


@dataclass(frozen=True)
class Kind:
    """What one group of entry points holds: a noun for messages, a check of what was loaded, and what it must be."""

    noun: str
    fits: Callable[[Any], bool]
    must_be: str


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda loaded: all(callable(getattr(loaded, name, None)) for name in names)


def _leads_to_a_device(loaded: Any) -> bool:
    return isinstance(loaded, str | ModuleType) or hasattr(loaded, "__fspath__") or callable(loaded) or _costs(loaded)


_costs = _has("costs")
KINDS = {
    "mpq.estimators": Kind("sensitivity method", callable, "a class of estimators, or an estimator"),
    "mpq.solvers": Kind("solver", _has("solve"), "a class with a method solve(problem), or an object that has it"),
    "mpq.hardware": Kind(
        "device", _leads_to_a_device, "a package or path with a device file, a Target, or a function that returns one"
    ),
    "mpq.exporters": Kind("export target", _has("emit", "refused", "text"), "an mpq.exporting.ExportTarget"),
}


@dataclass(frozen=True, order=True)
class Plugin:
    """One entry point of another package.

    Attributes:
        group: of `KINDS`.
        name: what users call it.
        distribution: the package and its version, as it is installed: "acme-mpq 1.2".
        value: where it leads, as it was written: "acme_mpq:Solver".
    """

    group: str
    name: str
    distribution: str
    value: str

    def __str__(self) -> str:
        return f"{self.distribution} (entry point {self.name} = {self.value!r} in {self.group})"

    def load(self) -> Any:
        """What the entry point leads to.

        Raises:
            ValueError: if it cannot be imported, or is nothing of its kind; it names package and entry point.
        """
        kind = KINDS[self.group]
        try:
            loaded = EntryPoint(self.name, self.value, self.group).load()
        except (Exception, SystemExit) as error:  # what a stranger's module does when imported
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"{kind.noun} {self.name!r} of {self} cannot be loaded: {told}") from error
        if not kind.fits(loaded):
            raise ValueError(f"{kind.noun} {self.name!r} of {self} must be {kind.must_be}, got {loaded!r}")
        return loaded

    def make(self, settings: dict[str, Any]) -> Any:
        """What the entry point leads to, made with settings where it is a class.

        Raises:
            ValueError: as `load`.
            TypeError: if the class does not take the settings, or it is no class and there are some.
        """
        loaded = self.load()
        if isinstance(loaded, type):
            made = loaded(**settings)
            if not KINDS[self.group].fits(made):
                raise ValueError(
                    f"{KINDS[self.group].noun} {self.name!r} of {self} makes {made!r}, which does nothing: it must be "
                    f"{KINDS[self.group].must_be}"
                )
            return made
        if settings:
            raise TypeError(f"{self.name!r} of {self} is no class and takes no settings, got {sorted(settings)}")
        return loaded


def plugins(group: str) -> tuple[Plugin, ...]:
    """Every entry point of a group, in order of name and package; nothing is imported.

    Raises:
        ValueError: if there is no such group.

    Example:
        >>> all(plugin.group == "mpq.solvers" for plugin in plugins("mpq.solvers"))
        True
    """
    if group not in KINDS:
        raise ValueError(f"the groups of entry points are {', '.join(KINDS)}, got {group!r}")
    return tuple(plugin for plugin in _installed(tuple(sys.path)) if plugin.group == group)


def all_names(group: str, ours: Iterable[str]) -> list[str]:
    """Our names in their order, then those that other packages add."""
    own = list(ours)
    return own + sorted({plugin.name for plugin in plugins(group)} - {*own, AUTOMATIC})


def plugin_named(group: str, name: str, ours: Collection[str]) -> Plugin | None:
    """The entry point of a name, None where the name is ours or nobody's.

    Raises:
        ValueError: if two packages have the name, one of which may be mpq.
    """
    if name == AUTOMATIC:
        return None
    found = [plugin for plugin in plugins(group) if plugin.name == name]
    if reason := clash(name, found, ours):
        raise ValueError(f"{KINDS[group].noun} {reason}")
    return found[0] if found else None


def clash(name: str, found: Collection[Plugin], ours: Collection[str]) -> str | None:
    """Why a name is not clear, None where it is: its entry points, and mpq where it has the name too."""
    owners = [OURS] * (name in ours) + [str(plugin) for plugin in found]
    if len(owners) < 2:
        return None
    return f"{name!r} is of two packages, {' and '.join(owners)}: uninstall one, or pass the object instead of its name"


@lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """All entry points in our groups on an import path; the first of a package counts, as in imports."""
    found: dict[str, list[Plugin]] = {}
    for distribution in distributions(path=list(path)):
        try:
            declared = _declared(distribution)
        except Exception:  # broken metadata of any package on the path is not ours to report
            continue
        if declared:
            found.setdefault(distribution.name.lower().replace("_", "-"), declared)
    return tuple(sorted(plugin for declared in found.values() for plugin in declared))


def _declared(distribution: Distribution) -> list[Plugin]:
    if "mpq." not in (distribution.read_text("entry_points.txt") or ""):  # reads no other metadata: quick
        return []
    points = [point for point in distribution.entry_points if point.group in KINDS]
    told = f"{distribution.name} {distribution.version}"
    return [Plugin(point.group, point.name, told, point.value) for point in points]
