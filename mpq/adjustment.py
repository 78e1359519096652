"""`Adjustment`: values of parameters and buffers that go with a quantised model, instead of those that were trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq.atomic import write_atomically
from mpq.layers import Layer
from mpq.surgery import owners

_AND = ", "  # between the names of what was done one after the other


@dataclass(frozen=True, eq=False)
class Adjustment:
    """Tensors of a model by their names, made for one plan: corrected biases, tuned statistics, calibrated weights.

    They are used inside `mpq.quantized`, whose weights they may replace:

        with mpq.quantized(model, plan), correction.applied(model):
            ...

    `plan.with_help(*adjustment.steps)` says in the plan what was done. `mpq.adjuster.Adjuster` makes several of them,
    one after the other, for whatever plan.

    Args:
        name: what was done, such as ``bias correction``.
        tensors: new values by the name of the parameter or buffer. A bias may be new where its module has None.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> with Adjustment("shift", {"0.bias": torch.tensor([3.0])}).applied(model), torch.no_grad():
        ...     model(torch.zeros(1, 2))
        tensor([[3.]])
        >>> model[0].bias is None
        True
    """

    name: str
    tensors: Mapping[str, Tensor] = field(repr=False)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with these tensors; what was there comes back, also after an error.

        Raises:
            ValueError: if the model has no such tensor, or one of another shape.
        """
        with ExitStack() as stack:
            for name, value in self.tensors.items():
                stack.enter_context(_replaced(model, name, value))
            yield model

    @property
    def steps(self) -> tuple[str, ...]:
        """What was done, one name each: for `Plan.with_help`."""
        return tuple(self.name.split(_AND))

    def then(self, other: Adjustment) -> Adjustment:
        """This and one that was made after it, as one; where both have a tensor it is the other's.

        Example:
            >>> import torch
            >>> first, second = torch.zeros(1), torch.ones(1)
            >>> both = Adjustment("AdaQuant", {"b": first}).then(Adjustment("bias correction", {"b": second}))
            >>> both.name, both.steps, both.tensors["b"]
            ('AdaQuant, bias correction', ('AdaQuant', 'bias correction'), tensor([1.]))
        """
        return Adjustment(f"{self.name}{_AND}{other.name}", {**self.tensors, **other.tensors})

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, whole or not at all; its name is in the metadata."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        write_atomically(Path(path), lambda partial: save_file(tensors, partial, metadata={"help": self.name}))

    @classmethod
    def load(cls, path: str | Path) -> Adjustment:
        """Read it.

        Raises:
            ValueError: if the file cannot be read or is none of an adjustment.
        """
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read adjustment {str(path)!r}: {error}") from error
        if "help" not in metadata:
            raise ValueError(f"{str(path)!r} is no adjustment of mpq: its metadata does not say what was done")
        return cls(metadata["help"], tensors)


def modules_with_bias(model: nn.Module, layer: Layer) -> list[tuple[str, nn.Module]]:
    """Name of the bias and module, of the modules of a layer that have a bias or None in its place.

    There are none for lookups and for weights that a function uses.
    """
    if layer.module is None:
        return []
    applying = {id(module) for module, _ in owners(model, layer)}
    outputs = layer.weight_shape[0]
    return [
        (f"{name}.bias" if name else "bias", module)
        for name, module in model.named_modules()
        if id(module) in applying
        and "bias" in module._parameters
        and (module.bias is None or tuple(module.bias.shape) == (outputs,))
    ]


@contextmanager
def _replaced(model: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    original = module._parameters.get(attribute, module._buffers.get(attribute))
    is_new = attribute == "bias" and attribute in module._parameters and original is None
    if not is_new and (original is None or original.shape != value.shape):
        found = "it has none" if original is None else f"the model's is {tuple(original.shape)}"
        raise ValueError(
            f"the adjustment needs a tensor {name!r} of shape {tuple(value.shape)} in the model, {found}: "
            "it was made for another model"
        )
    if is_new:
        like = next(iter(p for p in module.parameters(recurse=False)), value)
        module._parameters[attribute] = nn.Parameter(value.to(like), requires_grad=False)
    elif attribute in module._buffers:
        module._buffers[attribute] = value.to(original)
    else:
        kept = module._parameters[attribute].data  # type: ignore[union-attr]
        module._parameters[attribute].data = value.to(kept)  # type: ignore[union-attr]
    try:
        yield
    finally:
        if is_new:
            module._parameters[attribute] = None
        elif attribute in module._buffers:
            module._buffers[attribute] = original
        else:
            module._parameters[attribute].data = kept  # type: ignore[union-attr]
