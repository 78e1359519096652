"""Numbers of a device file, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where numbers come from.

    `kind` is datasheet, paper, code, secondary, measured, derived (computed from published or measured numbers, as
    `read` says) or estimate (from memory, or a guess).
    """

    id: str
    title: str
    kind: str
    read: str
    url: str | None = None


@dataclass(frozen=True)
class Number:
    """One number of a device file; `where` is its table, `key` its name there, `unit` in words."""

    where: str
    key: str
    value: float
    unit: str
    sources: tuple[Source, ...]

    @property
    def is_estimate(self) -> bool:
        """Whether one of its sources is an estimate."""
        return any(source.kind == "estimate" for source in self.sources)


@dataclass(frozen=True)
class Entry:
    """One table of a device file: its values by key, and its numbers with their sources."""

    where: str
    values: Mapping[str, Any] = field(hash=False)
    numbers: tuple[Number, ...]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where the file has none."""
        return self.values.get(key, default)

    def texts(self, key: str, default: str = "*") -> tuple[str, ...]:
        """A text or a list of texts, as a tuple."""
        value = self.values.get(key, default)
        return (value,) if isinstance(value, str) else tuple(value)
