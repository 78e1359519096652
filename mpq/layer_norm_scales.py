"""Scales a channel after a layer norm, moved into the norm and the linears behind it: one scale a tensor remains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpq.activation_ranges import Method, calibrate_ranges
from mpq.adjustment import Adjustment
from mpq.batches import Batch, batches_of, call, model_inputs, tensors_of
from mpq.formats import CHANNEL, TENSOR, UnsignedInteger
from mpq.input_range import InputRange, has_static_range
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan
from mpq.surgery import check_model, evaluating
from mpq.tasks import cloned

NAME = "layer-norm scales"
_UNCHANGED = 1e-4  # relative: more, and something besides the linears reads the norm


@dataclass(frozen=True)
class LayerNormScales:
    """What came of it.

    Args:
        adjustment: norms and linears that compute the same function; applied before `mpq.quantized`.
        plan: with the static range of each moved input, one a tensor.
        moved: {norm: linears behind it}.
        skipped: {norm: why its scales stay}.
    """

    adjustment: Adjustment
    plan: Plan
    moved: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str]


def move_scales_into_layer_norms(
    model: nn.Module, data: Any, plan: Plan, method: Method | str = "percentile99.9"
) -> LayerNormScales:
    """Give every channel that a layer norm writes the same range, by its gain and offset; linears undo it.

    From the calibrated range of each channel c, low_c to high_c, at b bits:

        with zero point    s_c = (high_c − low_c) / (2^b − 1),   z_c = −low_c / s_c
        s̃ = mean s_c,      z̃ = round(mean z_c),      r_c = s_c / s̃,      b_c = s̃ (z̃ − z_c)
        norm               γ ← γ / r,                β ← β / r − b
        linear             W ← W diag(r),            bias ← bias + W_new b
        symmetric          the same with s_c from the largest magnitude and z = 0: the offset stays

    In full precision nothing changes. The input is then quantised with one scale s̃ and zero point z̃, as finely as
    with one of each a channel. Source: RepQ-ViT (Li et al. 2023, arXiv:2212.08254), its program; the clipping before
    the mean, so that outliers do not inflate s̃, is LRP-QViT's (arXiv:2401.11243), which names no threshold that we
    could read: here the percentile of `method`, of all samples.

        scales = move_scales_into_layer_norms(model, data, plan)
        with scales.adjustment.applied(model), mpq.quantized(model, scales.plan):
            ...

    Weights change: sensitivities, Hessians and error databases are to be made with the adjustment applied.

    A norm is skipped, with the reason, if something besides planned linears reads it, if their inputs are not all in
    one format with a scale a tensor and a range, or if the offset needs a bias that the norm or a linear lacks.

    Args:
        model: in full precision; comes back bit for bit.
        data: batches, as for `mpq.search`.
        plan: whose activation formats are used, such as ``int4/uint4``.
        method: of the channels' ranges, as for `calibrate_ranges`.

    Cost: calibration a channel, and two runs of the first batch a norm.

    Raises:
        ValueError: if plan and model do not fit, or no norm is behind the rules above.
    """
    check_model(model, plan)
    batches = batches_of(data)
    entries = {entry.layer.name: entry for entry in plan.of_layers}
    with evaluating(model), torch.no_grad():
        behind = _linears_behind_norms(model, batches[0], entries)
        skipped = {norm: why for norm, names in behind.items() if (why := _refusal(model, norm, names, entries))}
        usable = {norm: names for norm, names in behind.items() if norm not in skipped}
        ranges = _channel_ranges(model, batches, plan, usable, method)
        tensors: dict[str, Tensor] = {}
        found: dict[str, InputRange] = {}
        for norm, names in usable.items():
            changed, given = _moved(model, norm, [entries[name].layer for name in names], ranges[norm])
            if _changes_outputs(model, batches[0], changed):
                skipped[norm] = "something besides planned linears reads it"
                continue
            tensors |= changed
            found |= dict.fromkeys(names, given)
    moved = {norm: tuple(names) for norm, names in usable.items() if norm not in skipped}
    if not moved:
        raise ValueError(f"no layer norm's scales can be moved: {skipped or 'no planned linear reads one directly'}")
    kept = tuple(replace(e, input_range=found.get(e.layer.name, e.input_range)) for e in plan.entries)
    return LayerNormScales(Adjustment(NAME, tensors), replace(plan, entries=kept).with_help(NAME), moved, skipped)


def _linears_behind_norms(model: nn.Module, batch: Batch, entries: Mapping[str, Entry]) -> dict[str, list[str]]:
    """{norm: linears whose input is the very tensor that the norm returned}, in order."""
    written: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other takes their place in memory
    found: dict[str, list[str]] = {}
    linears = {id(model.get_submodule(e.layer.module)): n for n, e in entries.items() if e.layer.module is not None}

    def note(norm: str, output: Any) -> None:
        if isinstance(output, Tensor):
            written[id(output)] = norm, output

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if id(given) in written and name not in found.setdefault(written[id(given)][0], []):
            found[written[id(given)][0]].append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if _is_norm(module):
                hook = module.register_forward_hook(lambda m, a, y, name=name: note(name, y))
                stack.callback(hook.remove)
            elif id(module) in linears:
                own = linears[id(module)]
                show = lambda m, a, k, own=own: look(own, a, k)  # noqa: E731
                stack.callback(module.register_forward_pre_hook(show, with_kwargs=True).remove)
        call(model, cloned(model_inputs(model, batch)))
    return found


def _is_norm(module: nn.Module) -> bool:
    """Layer norms and RMS norms by whatever class: a gain a channel, no running statistics."""
    gain = module._parameters.get("weight")
    return type(module).__name__.endswith("Norm") and gain is not None and gain.ndim == 1 and not module._buffers


def _refusal(model: nn.Module, norm: str, names: list[str], entries: Mapping[str, Entry]) -> str:
    """Why the scales of a norm cannot be moved, "" if they can."""
    layers = [entries[name].layer for name in names]
    if any(layer.kind != "linear" or layer.aliases for layer in layers):
        return "a layer behind it is no linear, or shares its weight"
    formats = {entries[name].activation for name in names}
    fmt = next(iter(formats))
    if len(formats) > 1 or fmt is None or not has_static_range(fmt) or fmt.granularity != TENSOR:
        return f"inputs behind it must be in one format with a scale a tensor, got {sorted(map(str, formats))}"
    modules = [model.get_submodule(norm), *(model.get_submodule(layer.module or "") for layer in layers)]
    if isinstance(fmt, UnsignedInteger) and any(module._parameters.get("bias") is None for module in modules):
        return f"the zero points of {fmt} move into biases, and the norm or a layer behind it has none"
    return ""


def _channel_ranges(
    model: nn.Module, batches: list[Batch], plan: Plan, usable: Mapping[str, list[str]], method: Method | str
) -> dict[str, InputRange]:
    """The range of each channel of each norm's output, as its first linear reads it."""
    first = {names[0]: norm for norm, names in usable.items()}
    entries = tuple(
        Entry(entry.layer, Option("fp32", replace(entry.activation, granularity=CHANNEL)))
        for entry in plan.entries
        if entry.layer.name in first and entry.activation is not None
    )
    if not entries:
        return {}
    calibrated = calibrate_ranges(model, batches, Plan(entries, plan.fingerprint), method)
    return {first[e.layer.name]: e.input_range for e in calibrated.entries if e.input_range is not None}


def _moved(model: nn.Module, norm: str, layers: list[Layer], found: InputRange) -> tuple[dict[str, Tensor], InputRange]:
    """New tensors of a norm and the linears behind it, and the range of what it then writes."""
    ratio, shift, low, high = channel_scales(found)
    module: Any = model.get_submodule(norm)
    tensors: dict[str, Tensor] = {}
    tensors[f"{norm}.weight"] = _cast(module.weight.double() / ratio, module.weight)
    if module._parameters.get("bias") is not None:
        tensors[f"{norm}.bias"] = _cast(module.bias.double() / ratio - shift, module.bias)
    for layer in layers:
        name, weight = layer.weight_name, model.get_parameter(layer.weight_name)
        columns = ratio if layer.channel_axis == 0 else ratio[:, None]
        changed = weight.double() * columns
        tensors[name] = _cast(changed, weight)
        linear: Any = model.get_submodule(layer.module or "")
        if linear._parameters.get("bias") is not None:
            added = changed @ shift if layer.channel_axis == 0 else shift @ changed
            tensors[f"{layer.module}.bias"] = _cast(linear.bias.double() + added, linear.bias)
    fmt = replace(found.fmt, granularity=TENSOR)
    return tensors, InputRange(fmt, (low,), (high,), f"{found.method} a channel")


def channel_scales(found: InputRange) -> tuple[Tensor, Tensor, float, float]:
    """R and b a channel, and the range that all channels then have.

    Example:
        >>> from mpq.formats import parse
        >>> channels = InputRange(parse("int8@channel"), (-1.0, -2.0), (0.5, 6.0), "minmax")
        >>> ratio, shift, low, high = channel_scales(channels)
        >>> ratio.tolist(), shift.tolist(), low, high  # ±1 and ±6 become ±3.5
        ([0.2857142857142857, 1.7142857142857142], [0.0, 0.0], -3.5, 3.5)
    """
    low, high = (torch.tensor(ends, dtype=torch.float64) for ends in (found.low, found.high))
    if not isinstance(found.fmt, UnsignedInteger):
        scale = _positive(torch.maximum(-low, high))
        mean = float(scale.mean())
        return scale / mean, torch.zeros_like(scale), -mean, mean
    low, high, codes = low.clamp(max=0), high.clamp(min=0), 2**found.fmt.bits - 1
    scale = _positive((high - low) / codes)
    zero = -low / scale
    mean, zero_of_all = float(scale.mean()), float(zero.mean().round())
    return scale / mean, mean * (zero_of_all - zero), -zero_of_all * mean, (codes - zero_of_all) * mean


def _positive(scale: Tensor) -> Tensor:
    """Channels that are always 0 take the mean scale: dividing by theirs would not end."""
    mean = scale.mean() if bool(scale.any()) else torch.ones((), dtype=scale.dtype)
    return torch.where(scale < 1e-6 * mean, mean, scale)


def _cast(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous()


def _changes_outputs(model: nn.Module, batch: Batch, tensors: dict[str, Tensor]) -> bool:
    """Whether the model's outputs on a batch change by more than rounding."""

    def outputs() -> list[Tensor]:
        found = tensors_of(call(model, cloned(model_inputs(model, batch))))
        return [value.double() for value in found if value.is_floating_point()]

    exact = outputs()
    with Adjustment(NAME, tensors).applied(model):
        changed = outputs()
    return any(float((a - b).norm()) > _UNCHANGED * float(a.norm()) for a, b in zip(exact, changed, strict=True))
