"""What one operation does to the activations that are stored, and to the search for attention."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from mpq.attention import AttentionFinder, Operand, Product
from mpq.buffers import Liveness
from mpq.calls import COPIES, Call, Trail, has_format, tensors


class Activations:
    """Tells `Liveness` and `AttentionFinder` about a forward.

    Args:
        batch: Samples in the example inputs.

    Attributes:
        liveness: What is stored.
        attention: Where attention runs.
        copied: Values of which PyTorch made a copy that counts as the same value until one of them is written to.
        running: Paths of the modules that are running, the innermost last.
        hidden: Whether the operations that arrive are parts of one that will be reported as a whole.
    """

    def __init__(self, batch: int = 1) -> None:
        self.liveness = Liveness()
        self.attention = AttentionFinder(batch)
        self.copied: set[int] = set()
        self.running: list[str] = []
        self.hidden = False

    def layer(self, trails: Sequence[Trail], elements: int, weight: str) -> int:
        """A layer ran; returns the value it wrote."""
        return self.liveness.step(_values(trails), (elements,), layer=weight)[0]

    def add_to(self, value: int, trails: Sequence[Trail]) -> int:
        """The kernel of a layer added what else it read to the value it wrote."""
        others = _values(trails)
        return self.liveness.in_place((*others, value), 0, into=value) if others else value

    def follow(
        self, call: Call, trails: list[Trail], outputs: list[Tensor], trail: Callable[[Tensor], Trail]
    ) -> list[int]:
        """An operation ran that is no layer and looks at nothing but numbers; returns the values of its outputs."""
        rest = [0] * (len(outputs) - 1)
        if not has_format(outputs[0]):
            seen = call.is_view or call.name in COPIES
            return [trails[0].value if seen and trails else 0, *rest]
        reads = _values(t for operand, t in zip(call.operands, trails, strict=True) if has_format(operand))
        if self.hidden or not reads:
            return [0, *rest]
        if any(outputs[0] is tensor for tensor in call.written):
            return [self._overwrite(call, reads, outputs[0], trail), *rest]
        if call.works_in_place:
            return [self._pass_on(reads, self.liveness.in_place(reads, outputs[0].numel())), *rest]
        return self._step(call, trails, reads, outputs)

    def attend(self, operands: list[Tensor], trails: list[Trail], output: Tensor) -> int:
        """Attention ran in one kernel over queries, keys, values and perhaps a mask; returns the value it wrote."""
        (value,) = self.liveness.step(_values(trails), (output.numel(),), keeps_format=False)
        query, key, values = trails[:3]
        shapes = tuple(tuple(operand.shape) for operand in operands[:3])
        read = _operand(query), _operand(key), _operand(values)
        self.attention.kernel(read, shapes, self._caller, is_replaceable=True)
        return value

    def _overwrite(self, call: Call, reads: tuple[int, ...], output: Tensor, trail: Callable[[Tensor], Trail]) -> int:
        whole = output if output._base is None else output._base
        old = trail(output).value
        if old and old not in self.copied:
            return self._pass_on(reads, self.liveness.in_place(reads, 0, into=old))
        if call.works_in_place or call.name == "copy":
            return self._pass_on(reads, self.liveness.in_place(reads, whole.numel()))
        return self.liveness.step(reads, (whole.numel(),))[0]

    def _step(self, call: Call, trails: list[Trail], reads: tuple[int, ...], outputs: list[Tensor]) -> list[int]:
        kernel = call.name.startswith("_scaled_dot_product")
        softmax = "softmax" in call.name and "log" not in call.name
        sizes = [output.numel() * has_format(output) for output in outputs]
        kept = not (kernel or softmax or call.is_product)
        values = self.liveness.step(reads, sizes, keeps_format=kept)
        if kernel:
            shapes = tuple(tuple(operand.shape) for operand in call.operands[:3])
            query, key, value = map(_operand, trails[:3])
            self.attention.kernel((query, key, value), shapes, self._caller)
        elif softmax:
            axis = call.args[1] if len(call.args) > 1 and isinstance(call.args[1], int) else -1
            self.attention.softmax(trails[0].value, values[0], tuple(outputs[0].shape), axis)
        elif call.is_product:
            self._multiply(call, trails, outputs[0].numel(), values[0])
        else:
            self._pass_on(reads, values[0])
        return values

    def _multiply(self, call: Call, trails: list[Trail], elements: int, written: int) -> None:
        factors = call.factors
        known = [next(t for o, t in zip(call.operands, trails, strict=True) if o is factor) for factor in factors]
        if len(known) == 2 and all(t.value for t in known):
            left, right = map(_operand, known)
            self.attention.product(Product(left, right, factors[0].shape[-1], elements), written, self._caller)

    def _pass_on(self, reads: tuple[int, ...], written: int) -> int:
        self.attention.pass_on(reads, written)
        return written

    @property
    def _caller(self) -> str:
        return self.running[-1] if self.running else ""


@contextmanager
def name_running_modules(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the paths of the modules that are running, by hooks that all modules share: one on each would be slow."""
    paths = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in paths:
            running.append(paths[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in paths:
            running.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def report_whole_attention(
    mode: TorchDispatchMode, activations: Activations, report: Callable[[list[Tensor], Tensor], None]
) -> Iterator[None]:
    """F.scaled_dot_product_attention is one operator, whichever kernel or formula runs it on this device.

    Its parts are hidden from ``activations``; ``report`` takes queries, keys, values, perhaps a mask, and the output.
    It is seen where the function is looked up in torch.nn.functional when it is called, in the thread of ``mode``.
    """
    given = functional.scaled_dot_product_attention
    names = ("query", "key", "value", "attn_mask")

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        if _get_current_dispatch_mode() is not mode:
            return given(*args, **kwargs)
        activations.hidden = True
        try:
            output = given(*args, **kwargs)
        finally:
            activations.hidden = False
        named = dict(zip(names, args, strict=False)) | kwargs
        report(tensors([named.get(name) for name in names]), output)
        return output

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = given


def _values(trails: Iterable[Trail]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(trail.value for trail in trails if trail.value))


def _operand(trail: Trail) -> Operand:
    return Operand(trail.value, trail.sources, trail.distinct)
