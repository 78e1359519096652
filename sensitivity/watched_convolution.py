"""The one convolution that a module's forward comes to, whatever its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PLAIN: tuple[Any, ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED: tuple[Any, ...] = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
ARGUMENTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(PLAIN, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    **dict.fromkeys(
        TRANSPOSED, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    ),
}


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """What a convolution was given and how its kernel moves; tuples have an entry for each axis of places.

    Attributes:
        inputs: (entries, channels, places...), after any padding that the module did itself.
        stride: of the kernel.
        padding: zeros that the convolution adds at either end; for a transposed one what it leaves out.
        dilation: of the kernel.
        groups: of channels.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution.
    """

    inputs: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...]

    @property
    def is_depthwise(self) -> bool:
        """Whether every group has one input channel, and there are several."""
        return not self.transposed and self.groups == self.inputs.shape[1] > 1

    def part(self, entries: slice) -> Convolution:
        """That of some of the entries."""
        return replace(self, inputs=self.inputs[entries])


def watched_convolution(apply: Callable[[Tensor], Any], inputs: Tensor, parameter: nn.Parameter) -> Convolution | None:
    """The convolution of `inputs` by `parameter` that `apply` comes to; None where it comes to anything else.

    Subclasses of convolutions often pad their input in their own way and then convolve. Their forward is run up to the
    convolution, which is noted in place of being computed. It counts if its weight is the parameter itself, if neither
    its input nor its bias depends on this or another parameter that asks for gradients, and if what it returns is what
    the forward returns: the gradient of the parameter is then that of this convolution, exactly.

    Args:
        apply: a module's forward, without hooks.
        inputs: what the module was given.
        parameter: the module's weight.

    Cost: what the module does before it convolves, such as a padded copy.

    Example:
        >>> class Padded(nn.Conv2d):
        ...     def forward(self, x):
        ...         return self._conv_forward(functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)
        >>> module = Padded(2, 4, 3, stride=2)
        >>> found = watched_convolution(module.forward, torch.zeros(5, 2, 8, 8), module.weight)
        >>> found.inputs.shape, found.stride
        (torch.Size([5, 2, 9, 9]), (2, 2))
        >>> watched_convolution(lambda x: module(x).relu(), torch.zeros(5, 2, 8, 8), module.weight) is None
        True
    """
    asked = parameter.requires_grad
    watch = _Watch(parameter)
    try:
        parameter.requires_grad_(True)
        with torch.enable_grad(), watch:
            made = apply(inputs.detach())
    except _MoreThanAConvolutionError:
        return None
    finally:
        parameter.requires_grad_(asked)
    return watch.found if made is watch.mark else None


class _MoreThanAConvolutionError(Exception):
    """Something is done with what the convolution returns."""


class _Watch(TorchFunctionMode):
    """Lets every function run but the convolution by a parameter, which returns an empty mark; none may follow it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter
        self.found: Convolution | None = None
        self.mark = torch.empty(0)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.found is not None:
            raise _MoreThanAConvolutionError
        if func in ARGUMENTS:
            given = dict(zip(ARGUMENTS[func], args, strict=False)) | kwargs
            self.found = _convolution(self.parameter, func in TRANSPOSED, given)
        return func(*args, **kwargs) if self.found is None else self.mark


def _convolution(parameter: Tensor, transposed: bool, given: Mapping[str, Any]) -> Convolution | None:
    """What a function was given, by name; None where it is no convolution by the parameter alone."""
    inputs, weight, bias = given["input"], given["weight"], given.get("bias")
    depends = inputs.requires_grad or (bias is not None and bias.grad_fn is not None)
    if weight is not parameter or depends or inputs.ndim != weight.ndim:
        return None
    axes = weight.ndim - 2
    stride, dilation = (_each(given.get(name, 1), axes) for name in ("stride", "dilation"))
    padding, inputs = given.get("padding", 0), inputs.detach()
    if padding == "same":
        lengths = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        inputs = functional.pad(inputs, [end for n in reversed(lengths) for end in (n // 2, n - n // 2)])
    return Convolution(
        inputs=inputs, stride=stride, padding=_each(0 if isinstance(padding, str) else padding, axes),
        dilation=dilation, groups=given.get("groups", 1), transposed=transposed,
        output_padding=_each(given.get("output_padding", 0), axes),
    )  # fmt: skip


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
