"""Finished pieces of a long measurement on disk, under a fingerprint of all that they depend on."""

from __future__ import annotations

import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.atomic import write_atomically
from mpq.version import VERSION

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the repr of an object: another one in every process


@dataclass(frozen=True)
class Pieces:
    """Arrays by name in a folder of their own, written whole; without a folder nothing is kept.

    A measurement that was killed finds its finished pieces again. The folder's name is the fingerprint of the model,
    data, task, options, method, settings and versions, so a change of any of them starts anew.
    """

    folder: Path | None = None

    def get(self, name: str, make: Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
        """The piece of that name, made and kept if it is not there yet."""
        if self.folder is None:
            return make()
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"
        if path.exists():
            return np.asarray(np.load(path, allow_pickle=False))
        piece = make()
        write_atomically(path, lambda partial: np.save(partial, piece, allow_pickle=False))
        return piece


def pieces_in(cache: str | Path | None, fingerprint: str) -> Pieces:
    """The pieces of one measurement below a cache folder, which is made if need be.

    Raises:
        ValueError: if the folder cannot be made.
    """
    if cache is None:
        return Pieces()
    folder = Path(cache) / fingerprint[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache must be a folder that can be written, got {str(cache)!r}: {error.strerror}") from error
    return Pieces(folder)


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]], *texts: str) -> str:
    """SHA-256 over named tensors (shape, dtype and bytes), texts, and the versions of mpq and torch."""
    digest = hashlib.sha256(f"mpq {VERSION}, torch {torch.__version__};".encode())
    for text in texts:
        digest.update(f"{len(text)}:{text};".encode())
    for name, tensor in tensors:
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def description(value: Any) -> str:
    """A text that is equal for equal settings, whatever the process.

    Tensors, arrays and modules count with every number, dataclasses and collections with their parts, functions with
    their code, defaults and what they close over. Globals that a function reads are not followed.

    Raises:
        ValueError: if a part can only be told by its address.

    Example:
        >>> factor = 2
        >>> description(lambda x: factor * x) == description(lambda x: factor * x)
        True
        >>> description({"labels": torch.zeros(2)}) == description({"targets": torch.zeros(2)})
        False
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor):
        return fingerprint_of([("", value)])
    for types_of_kind, parts_of in _PARTS:
        if isinstance(value, types_of_kind):
            return _joined(kind, parts_of(value))
    if is_dataclass(value) and not isinstance(value, type):
        return _joined(kind, [(field.name, getattr(value, field.name)) for field in fields(value)])
    if not isinstance(value, str) and ADDRESS.search(repr(value)):
        raise ValueError(
            f"cache must be None with {value!r}, which only its address tells from others: "
            "make its class a frozen dataclass or give it a __repr__ with its settings"
        )
    return f"{kind}: {value!r}"


def _function_parts(function: types.FunctionType) -> list[Any]:
    closed_over = [cell.cell_contents for cell in function.__closure__ or ()]
    others = [content for content in closed_over if content is not function]
    return [function.__module__, function.__code__, function.__defaults__, function.__kwdefaults__, others]


_PARTS: tuple[tuple[Any, Callable[[Any], Iterable[Any]]], ...] = (
    (np.ndarray, lambda array: [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()]),
    (nn.Module, lambda m: [ADDRESS.sub("", repr(m)), *m.named_parameters(), *m.named_buffers()]),
    (types.FunctionType, _function_parts),
    (types.CodeType, lambda code: [code.co_code.hex(), code.co_names, code.co_varnames, code.co_consts]),
    (types.MethodType, lambda method: [method.__func__, method.__self__]),
    (functools.partial, lambda call: [call.func, call.args, call.keywords]),
    (Mapping, lambda mapping: mapping.items()),
    (set | frozenset, lambda members: sorted(map(description, members))),
    (tuple | list, list),
)


def _joined(kind: str, parts: Iterable[Any]) -> str:
    texts = [description(part) for part in parts]
    return f"{kind}({','.join(f'{len(text)}:{text}' for text in texts)})"
