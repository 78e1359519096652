"""`GPTQ`: round column by column and let the columns that are left make up for the error in the layer's output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.activation_ranges import watched_inputs
from mpq.batches import batches_of, call, model_inputs
from mpq.fake_quantize import Limits, fake_quantize, group_limits
from mpq.formats import GGUF, NVFP4, BinaryCoded, Float, NumberFormat
from mpq.grids import on_grid
from mpq.layers import Layer, block_size
from mpq.quantizer import Quantizer, RoundToNearest, quantised_rows
from mpq.surgery import evaluating, owners
from mpq.tasks import cloned


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """A quantiser that compensates, column by column, by the second moments of the layer's inputs.

        H      = 2/N Σ x xᵀ + λ mean(diag) I,    U the upper Cholesky factor of H⁻¹
        q_i    = nearest level to w_i,           e = (w_i − q_i) / U_ii
        w_j   ←  w_j − e U_ij   for every column j > i

    Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323, algorithm 1; H of the full-precision model's inputs, where the
    published program takes those of the model quantised so far. Scales are of the weights as they are: a channel's of
    the whole row before anything is rounded, a group's when its first column is reached. Our addition: a row whose
    output error on the calibration data, (q − w) H (q − w)ᵀ, is above that of plain rounding is rounded.

    Units finer than layers: rows are independent. Where groups of columns take formats of their own, compensation
    stays within a group, as another group may end in another format.

    Args:
        hessians: of the layers by name, of `input_hessians`: (groups, in, in), columns as in the (out, in...) view.
        damping: λ.
        order: "columns" as they are stored; "activation": by falling diagonal of H (act-order), with the scales of
            groups taken from the weights as they were.
        otherwise: quantiser of layers without a Hessian and of formats whose levels do not follow from a range
            (binary-coded, GGUF, NVFP4); None: an error. Lookups in embeddings and casts (fp16) are always rounded,
            which is best for them.

    Cost: in³ for the factor, out · in² for the columns.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        Columns 2 and 3 see nearly the same input: what rounding takes from one, the other gives back.

        >>> from mpq.formats import parse
        >>> fc = Layer("fc", "linear", (1, 3), 3, 3, (1, 3), (1, 1))
        >>> moments = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]]])
        >>> weight = torch.tensor([[7.0, 1.4, 1.3]])
        >>> GPTQ(hessians={"fc": moments})(weight, parse("int4"), fc), fake_quantize(weight, "int4")
        (tensor([[7., 1., 2.]]), tensor([[7., 1., 1.]]))
    """

    hessians: Mapping[str, Tensor] = field(repr=False)
    damping: float = 0.01
    order: Literal["columns", "activation"] = "columns"
    otherwise: Quantizer | None = None

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0, got {self.damping}")
        if self.order not in ("columns", "activation"):
            raise ValueError(f"order must be 'columns' or 'activation', got {self.order!r}")

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        """The compensated weight, same shape and dtype as `rows`.

        Raises:
            ValueError: if there is no Hessian of the layer, or it has another size, or the format's levels do not
                follow from a range, and there is no quantiser otherwise.
        """
        return self.units(rows, fmt, layer, "layer")

    def units(self, rows: Tensor, fmt: NumberFormat, layer: Layer, granularity: str) -> Tensor:
        """The same for units of any size."""
        fmt = fmt.bind("weight")
        if fallback := self._fallback(fmt, layer):
            return quantised_rows(rows, fmt, layer, granularity, fallback)
        hessian = self._hessian(rows, layer)
        exact = rows.detach().reshape(rows.shape[0], -1)
        exact = exact if exact.dtype == torch.float64 else exact.float()
        kind, size = block_size(granularity)
        width = size if kind == "groups" else exact.shape[1]
        result = torch.empty_like(exact)
        for first in range(0, exact.shape[1], width):
            part = slice(first, first + width)
            blocks = zip(exact[:, part].chunk(len(hessian)), hessian[:, part, part], strict=True)
            shared = None if fmt.granularity and fmt.granularity.size else group_limits(exact[:, part], fmt)
            quantised = torch.cat(
                [
                    self._columns(w, h, fmt, limits)
                    for (w, h), limits in zip(blocks, _chunks(shared, len(hessian)), strict=True)
                ]
            )
            result[:, part] = _better_rows(exact[:, part], quantised, hessian[:, part, part], fmt, layer)
        return result.reshape(rows.shape).to(rows.dtype)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the Hessians."""
        found = hashlib.sha256()
        for name, hessian in sorted(self.hessians.items()):
            found.update(f"{name}:{tuple(hessian.shape)}:{hessian.dtype};".encode())
            found.update(hessian.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def __repr__(self) -> str:
        otherwise = "" if self.otherwise is None else f", otherwise={self.otherwise!r}"
        settings = f"damping={self.damping!r}, order={self.order!r}{otherwise}"
        return f"GPTQ({len(self.hessians)} layers, sha256={self.digest[:16]!r}, {settings})"

    def _fallback(self, fmt: NumberFormat, layer: Layer) -> Quantizer | None:
        known = layer.name in self.hessians
        if isinstance(fmt, Float) or (layer.kind == "embedding" and not known):
            return RoundToNearest()
        if known and not isinstance(fmt, BinaryCoded | GGUF | NVFP4):
            return None
        if self.otherwise is not None:
            return self.otherwise
        why = f"the levels of {fmt} do not follow from a range" if known else "there is no Hessian of its inputs"
        raise ValueError(
            f"GPTQ cannot quantise {layer.name!r} in {fmt}: {why}; pass otherwise=RoundToNearest() or leave it out"
        )

    def _hessian(self, rows: Tensor, layer: Layer) -> Tensor:
        hessian, columns = self.hessians[layer.name], rows[0].numel()
        if tuple(hessian.shape) != (layer.groups, columns, columns):
            raise ValueError(
                f"the Hessian of {layer.name!r} must be {(layer.groups, columns, columns)} (groups, in, in), "
                f"got {tuple(hessian.shape)}"
            )
        return hessian.to(device=rows.device, dtype=torch.float64)

    def _columns(self, exact: Tensor, hessian: Tensor, fmt: NumberFormat, limits: Limits | None) -> Tensor:
        """Rows of one group of the layer, (rows, in), with H (in, in) in float64."""
        mean = hessian.diagonal().mean()
        if mean <= 0:  # no input but zeros: nothing to compensate by
            return torch.full_like(exact, torch.nan)
        weight, permutation = exact.clone(), None
        if self.order == "activation":
            limits = limits or group_limits(exact, fmt)
            permutation = hessian.diagonal().argsort(descending=True, stable=True)
            weight, hessian = weight[:, permutation], hessian[permutation][:, permutation]
            limits = (limits[0][:, permutation], limits[1][:, permutation])
        damped = hessian + self.damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        factor = _factor_of_inverse(damped).to(weight)
        size = (fmt.granularity.size if fmt.granularity else 0) if limits is None else 0
        for first in range(0, len(factor), size or len(factor)):
            stop = min(first + (size or len(factor)), len(factor))
            ends = group_limits(weight[:, first:stop], fmt) if limits is None else limits
            _round_columns(weight, factor, fmt, ends, (first, stop))
        return weight if permutation is None else weight[:, permutation.argsort()]


def input_hessians(model: nn.Module, data: Any, layers: Iterable[Layer]) -> dict[str, Tensor]:
    """H = 2/N Σ x xᵀ over everything that a layer's weight multiplies, (groups, in, in) in float32, by layer name.

    For a convolution x are patches, N their number. Layers that `GPTQ` rounds or leaves to another quantiser are not
    among them: lookups, transposed and three-dimensional convolutions, weights that a function uses.

    Args:
        model: in full precision; comes back bit for bit.
        data: batches, as for `mpq.search`.
        layers: such as `network.layers`.

    Cost: one pass, and in² a position and layer; in² numbers a layer.

    Example:
        >>> import mpq
        >>> model, x = nn.Linear(2, 3), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> input_hessians(nn.Sequential(model), x, mpq.trace(nn.Sequential(model), x).layers)["0"]
        tensor([[[2., 2.],
                 [2., 4.]]])
    """
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(layer: Layer, module: nn.Module, given: Tensor) -> None:
        patches = _patches(module, layer, given)
        moment = (patches.mT @ patches).double()
        found[layer.name] = found[layer.name] + moment if layer.name in found else moment
        counts[layer.name] = counts.get(layer.name, 0) + patches.shape[1]

    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            module = _patched_module(model, layer)
            if module is not None:
                stack.enter_context(watched_inputs(model, layer, partial(add, layer, module)))
        for batch in batches_of(data):
            call(model, cloned(model_inputs(model, batch)))
    return {name: (2 / max(counts[name], 1) * moment).float() for name, moment in found.items()}


def _patched_module(model: nn.Module, layer: Layer) -> nn.Module | None:
    """The module whose inputs can be written as patches; None where there is none."""
    if layer.module is None or layer.kind in ("experts", "conv3d") or layer.kind.startswith("conv_transpose"):
        return None
    modules = [module for module, _ in owners(model, layer) if not isinstance(module, nn.Embedding)]
    return modules[0] if modules else None


def _patches(module: Any, layer: Layer, given: Tensor) -> Tensor:
    """(groups, positions, in): what each output position is a product with."""
    given = given if given.dtype == torch.float64 else given.float()
    if not layer.kind.startswith("conv"):
        return given.reshape(1, -1, given.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(given, module._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if len(kernel) == 1:
        padded, kernel, stride, dilation = padded[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    patches = functional.unfold(padded, kernel, dilation=dilation, stride=stride)  # (samples, in · taps, positions)
    grouped = patches.reshape(len(patches), layer.groups, -1, patches.shape[-1])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)


def _factor_of_inverse(matrix: Tensor) -> Tensor:
    """U, upper triangular, with Uᵀ U = matrix⁻¹.

    Raises:
        ValueError: if the matrix is singular.
    """
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise ValueError(
            "a Hessian of inputs is singular: take a larger damping, such as 0.01, or more data"
        ) from error
    return upper


def _round_columns(weight: Tensor, factor: Tensor, fmt: NumberFormat, ends: Limits, span: tuple[int, int]) -> None:
    """Round the columns of a span in place, a block at a time, and compensate in all columns after each.

    `ends` are those of the span's columns, (rows, columns of the span).
    """
    first, stop = span
    for start in range(first, stop, _BLOCK):
        end = min(start + _BLOCK, stop)
        errors = torch.empty_like(weight[:, start:end])
        for i in range(start, end):
            column = weight[:, i : i + 1].contiguous()
            low, high = (part[:, i - first : i - first + 1] for part in ends)
            rounded = on_grid(fmt, column, low, high)
            errors[:, i - start : i - start + 1] = error = (column - rounded) / factor[i, i]
            weight[:, i : i + 1] = rounded
            weight[:, i + 1 : end] -= error * factor[i, i + 1 : end]
        weight[:, end:] -= errors @ factor[start:end, end:]


def _better_rows(exact: Tensor, quantised: Tensor, hessian: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
    """Row by row what loses less of the output on the calibration data: compensated or plainly rounded."""
    rounded = fake_quantize(exact, fmt, name=layer.name)
    is_better = _output_errors(quantised - exact, hessian) <= _output_errors(rounded - exact, hessian)
    return torch.where(is_better[:, None], quantised, rounded)


def _output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """(rows,): e H eᵀ of every row, H that of its group; NaN where the error is."""
    grouped = error.double().reshape(len(hessian), -1, error.shape[1])
    return ((grouped @ hessian) * grouped).sum(2).flatten()


def _chunks(limits: Limits | None, groups: int) -> list[Limits | None]:
    if limits is None:
        return [None] * groups
    return list(zip(limits[0].chunk(groups), limits[1].chunk(groups), strict=True))


_BLOCK = 128  # columns: those after them are updated once a block, by one product
