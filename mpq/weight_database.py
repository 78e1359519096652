"""`WeightDatabase`: quantised weights that another program made, read from safetensors files in place of rounding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from safetensors import SafetensorError, safe_open

from mpq.atomic import write_atomically
from mpq.cache import description, fingerprint_of
from mpq.formats import Float, NumberFormat
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace
from mpq.plan import weight_format
from mpq.progress import track
from mpq.quantizer import Quantizer, RoundToNearest, quantised_rows
from mpq.suggestions import did_you_mean
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows, from_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIX = ".safetensors"
_MADE_OF = "made_of"  # in a file's metadata: what the writer made it of
_BY_CHANCE = 5.0  # standard deviations of the correlation of two unrelated weights
_FEW = 256  # weights, below which a correlation says nothing
_READ_BYTES = 2**24


class WeightDatabase:
    """A quantiser that looks weights up: those of GPTQ, AWQ, AutoRound, an imatrix, whatever will be deployed.

    The folder holds de-quantised weights in floating point, in the layout in which the model stores them, in any of
    these forms, found at whatever depth:

        int4@group128.safetensors                   a file a format, tensors named like the parameters or the layers
        int4@group128/model-00001.safetensors       a folder a format, as a de-quantised checkpoint is
        anything.safetensors                        tensors named `layer|format`, such as `fc|int4@group128`

    Weights must belong to the model as it is: scales that a method moves into other layers (AWQ, SmoothQuant) or
    rotations are to be undone, or done to the model first. Units finer than a layer take their part of its weight. One
    tensor is read at a time, when it is asked for. Formats without codes (fp16, bf16, fp32) that are not in the folder
    are casts.

    Args:
        folder: where the files are; more than a format's files may be there, what no layer asks for is not read.
        otherwise: quantiser of layers and formats that are not there; None: an error.

    Its text, which goes into plans and into the fingerprints of caches, holds the SHA-256 of the files, so the files
    are read once for it. Cost of a look-up: reading the tensor.

    Raises:
        ValueError: if there is no such folder, it holds no tensors, or a tensor has no format or is there twice.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from mpq.formats import parse
        >>> fc = Layer("fc", "linear", (1, 3), 3, 3, (1, 3), (1, 1), weight_name="fc.weight")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.tensor([[0.9, 2.0, 0.0]])}, f"{folder}/int4.safetensors")
        ...     WeightDatabase(folder)(torch.tensor([[1.0, 2.1, 0.1]]), parse("int4").bind("weight"), fc)
        tensor([[0.9000, 2.0000, 0.0000]])
    """

    def __init__(self, folder: str | Path, *, otherwise: Quantizer | None = None) -> None:
        self.folder, self.otherwise = Path(folder), otherwise
        self._files = sorted(file for file in self.folder.rglob(f"*{SUFFIX}") if not file.name.startswith("."))
        if not self._files:
            raise ValueError(f"a database of weights must be a folder with {SUFFIX} files, got {str(folder)!r}")
        self._places: dict[tuple[str, NumberFormat], tuple[Path, str]] = {}
        for file in self._files:
            for name, fmt, key in self._entries(file):
                if (name, fmt) in self._places:
                    both = f"{str(self._places[name, fmt][0])!r} and {str(file)!r}"
                    raise ValueError(f"{name!r} in {fmt} must be there once, it is in {both}")
                self._places[name, fmt] = file, key

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        """The weight of that layer in that format, in the (out, in...) view and the dtype of `rows`.

        Raises:
            ValueError: if it is not there, or its shape or its values are not those of a quantised `rows`.
        """
        return self.units(rows, fmt, layer, "layer")

    def units(self, rows: Tensor, fmt: NumberFormat, layer: Layer, granularity: str) -> Tensor:
        """The same for units of any size, whose parts of the layer's weight are taken as they are."""
        names = (layer.name, layer.weight_name, *layer.aliases)
        name = next((name for name in names if (name, fmt) in self._places), None)
        if name is not None:
            return self._read(name, rows, fmt, layer)
        if self.otherwise is not None or isinstance(fmt, Float):
            return quantised_rows(rows, fmt, layer, granularity, self.otherwise or RoundToNearest())
        raise ValueError(self._missing(layer, fmt))

    def __repr__(self) -> str:
        otherwise = "" if self.otherwise is None else f", otherwise={self.otherwise!r}"
        return f"WeightDatabase({self.folder.name!r}, sha256={self.digest[:16]!r}{otherwise})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files and of their names within the folder."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.relative_to(self.folder).as_posix()}:{file.stat().st_size};".encode())
            with file.open("rb") as opened:
                while part := opened.read(_READ_BYTES):
                    digest.update(part)
        return digest.hexdigest()

    def _entries(self, file: Path) -> Iterator[tuple[str, NumberFormat, str]]:
        """(name of a layer or parameter, format, name of the tensor) of every tensor in a file."""
        of_file = file.relative_to(self.folder).parts[0].removesuffix(SUFFIX)
        try:
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {str(file)!r}: {error}") from error
        for key in keys:
            name, bar, label = key.rpartition("|")
            try:
                yield (name if bar else key), weight_format(Option.parse(label if bar else of_file)), key
            except ValueError as error:
                raise ValueError(
                    f"tensor {key!r} of {str(file)!r} must say its format, as the name of the file or folder "
                    f"(int4{SUFFIX}) or in its own name ({name if bar else key}|int4): {error}"
                ) from error

    def _read(self, name: str, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        file, key = self._places[name, fmt]
        with safe_open(file, framework="pt") as opened:
            stored: Tensor = opened.get_tensor(key)
        where = f"tensor {key!r} of {str(file)!r}"
        shape = tuple(from_rows(rows, layer).shape)
        if tuple(stored.shape) != shape or not stored.is_floating_point():
            raise ValueError(
                f"{where} must be a floating-point tensor of the shape in which the model stores {layer.name!r}, "
                f"{shape}, got {stored.dtype} of {tuple(stored.shape)}"
            )
        found = as_rows(stored, layer).to(rows)
        if found.numel() and not all(math.isfinite(end) for end in map(float, found.aminmax())):
            raise ValueError(f"{where} must be finite in {rows.dtype}, it holds NaN or infinity")
        if _is_unrelated(found, rows):
            raise ValueError(
                f"{where} must be the weight of {layer.name!r} after quantisation, it has nothing in common with it: "
                "is it of another model, transposed, or scaled or rotated?"
            )
        return found

    def _missing(self, layer: Layer, fmt: NumberFormat) -> str:
        names = {name for name, _ in self._places}
        own = sorted({str(found) for name, found in self._places if name in (layer.name, layer.weight_name)})
        hint = f"it has {', '.join(own)} of it" if own else f"it has no such layer{did_you_mean(layer.name, names)}"
        return (
            f"no weight of {layer.name!r} in {fmt} in {str(self.folder)!r}: {hint}. Add a tensor "
            f"'{layer.name}|{fmt}', leave the option out, or pass otherwise=RoundToNearest()"
        )


def save_quantized_weights(
    model: nn.Module,
    network: Network,
    space: SearchSpace,
    quantizer: Quantizer,
    folder: str | Path,
    *,
    granularity: str = "layer",
    progress: bool = True,
) -> WeightDatabase:
    """Quantise every layer once in every format it may take, and write the weights to a folder.

    For a quantiser that takes its time: a file a (format, layer), so that a run that was killed goes on where it was,
    and one layer is in memory at a time. A file that is there is made anew if the weight, the quantiser's settings or
    the version of mpq or torch have changed, or if the settings cannot be told (`mpq.cache.description`).

    Args:
        model: in full precision.
        network: of the model.
        space: which formats; those without codes (fp16, bf16, fp32) are left out.
        quantizer: what quantises.
        folder: where to; it is made if need be.
        granularity: of the units, each of which is quantised on its own.
        progress: show a bar on a terminal.

    Returns:
        The folder as a quantiser, for `quantizer=` of `search`, `verify` and `quantized`.

    Raises:
        ValueError: if the folder cannot be written, or the quantiser refuses a weight.

    Example:
        >>> import tempfile, torch, mpq
        >>> model, space = torch.nn.Sequential(torch.nn.Linear(4, 3)), SearchSpace(["int4", "int8"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     network = mpq.trace(model, torch.randn(1, 4))
        ...     _ = save_quantized_weights(model, network, space, RoundToNearest(), folder)
        ...     sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.safetensors"))
        ['int4/0.safetensors', 'int8/0.safetensors']
    """
    candidates = space.candidates(network)
    for layer in track(network.layers, "quantise", shown=progress):
        formats = {weight_format(option): None for option in candidates[layer.name]}
        for fmt in (fmt for fmt in formats if not isinstance(fmt, Float)):
            path = Path(folder) / str(Option(fmt)) / f"{quote(layer.name, safe='')}{SUFFIX}"
            _save(layer_parameters(model, layer)[0].detach(), fmt, layer, (granularity, quantizer), path)
    return WeightDatabase(folder)


def _save(weight: Tensor, fmt: NumberFormat, layer: Layer, how: tuple[str, Quantizer], path: Path) -> None:
    from safetensors.torch import save_file

    granularity, quantizer = how
    made_of = _made_of(weight, fmt, granularity, quantizer)
    if made_of and _metadata(path).get(_MADE_OF) == made_of:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror}") from error
    quantised = from_rows(quantised_rows(as_rows(weight, layer), fmt, layer, granularity, quantizer), layer)
    tensors = {layer.weight_name or layer.name: quantised.contiguous().cpu()}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata={_MADE_OF: made_of}))


def _made_of(weight: Tensor, fmt: NumberFormat, granularity: str, quantizer: Quantizer) -> str:
    """A fingerprint of the weight and of what quantises it, "" where the latter cannot be told."""
    try:
        return fingerprint_of([("weight", weight)], str(fmt), granularity, description(quantizer))
    except ValueError:
        return ""


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _is_unrelated(found: Tensor, rows: Tensor) -> bool:
    """Whether two weights correlate no more than by chance; zeros and small layers are taken as they are."""
    if rows.numel() < _FEW:
        return False
    a, b = found.reshape(-1).float(), rows.reshape(-1).float()
    scale = (float(a @ a) * float(b @ b)) ** 0.5
    return bool(scale > 0 and float(a @ b) / scale * rows.numel() ** 0.5 < _BY_CHANCE)
