"""Build a `Network` from a torch model by running it once on example inputs."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mpq.activations import Activations, name_running_modules, report_whole_attention
from mpq.attention import Attention
from mpq.calls import tensors
from mpq.dataflow import Dataflow, Use, members
from mpq.layers import Layer, Network
from mpq.parameters import Layout, Weights, convolution_layout, identity

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def trace(model: nn.Module, example_inputs: Any) -> Network:
    """Find the layers of a model, the work they do, and how they feed each other.

    One forward without gradients, with every module in evaluation mode, on whatever device the model is; on the meta
    device it takes neither weights nor memory. The model is left as it was, bit for bit: training flags, hooks,
    gradients, parameters, buffers and random state, also after an error.

    A layer is a floating-point parameter of two or more dimensions that multiplies activations: linears, convolutions,
    embeddings, and stacks of experts in one 3-D parameter. The forward hook of a module of a known kind reports its
    layer; a parameter that a function applies instead (nn.MultiheadAttention, mixtures of experts) is recognised where
    it is used, also as a slice, a transpose, a cast or a gathered copy. Multiply-adds are those of
    torch.utils.flop_counter, halved.

    Siblings are (a) linears that read the same tensor and whose outputs meet in a product before another layer, as
    query, key and value or gate and up do; (b) convolutions whose outputs, seen through batch norm, are added, unless
    one comes after the other. Where operations are hidden from PyTorch's dispatcher (a kernel called through another
    library), layers and shapes are still right but edges and siblings behind it may be missing.

    Args:
        model: The model.
        example_inputs: A tensor, a tuple (or list) of positional arguments, or a mapping of keyword arguments.

    Returns:
        The network; its ``batch`` is the first dimension of the first tensor in ``example_inputs``.

    Raises:
        TypeError: If ``model`` is no module or ``example_inputs`` is none of the above.
        ValueError: If the model cannot run on ``example_inputs``, or its parameters are not yet initialised.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mpq.tracing import trace
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
        >>> network = trace(model, torch.zeros(2, 3, 4, 4))
        >>> [(layer.name, layer.kind, layer.macs) for layer in network.layers]
        [('0', 'conv2d', 1728), ('3', 'linear', 320)]
        >>> network.edges
        (('0', '3'),)
    """
    args, kwargs = _arguments(model, example_inputs)
    given = tensors((args, kwargs))
    batch = given[0].shape[0] if given and given[0].ndim else 1
    if not batch:
        raise ValueError(f"example_inputs must hold at least one sample, got a first tensor of {tuple(given[0].shape)}")
    hopeless = _hopeless(model)
    weights = Weights(model, excluded=hopeless)
    flow = Dataflow(weights, watched=[*model.parameters(), *model.buffers(), *given], activations=Activations(batch))
    for tensor in given:
        flow.give(tensor)
    naming = name_running_modules(model, flow.activations.running)
    whole = report_whole_attention(flow, flow.activations, flow.attend)
    with _unchanged(model, flow), naming, whole, _reporting(model, flow), torch.no_grad(), flow:
        try:
            result = tensors(model(*args, **kwargs))
        except Exception as error:
            raise ValueError(_cannot_run(model, given, error)) from error
    return _network(model, flow, batch, hopeless, [flow.trail(tensor).value for tensor in result])


def fingerprint(model: nn.Module) -> str:
    """sha256 over the sorted names and shapes of a model's parameters; shared ones under each name.

    Example:
        >>> import torch
        >>> from mpq.tracing import fingerprint
        >>> fingerprint(torch.nn.Linear(4, 2)) == fingerprint(torch.nn.Linear(4, 2, device="meta"))
        True
    """
    named = model.named_parameters(remove_duplicate=False)
    lines = sorted(f"{name} {tuple(parameter.shape)}\n" for name, parameter in named)
    return sha256("".join(lines).encode()).hexdigest()


def module_layout(module: nn.Module) -> Layout | None:
    """How the weight of a module of a known kind is stored; None for every other module.

    Example:
        >>> import torch
        >>> from mpq.tracing import module_layout
        >>> module_layout(torch.nn.ConvTranspose1d(6, 4, 3, groups=2)).weight_shape
        (4, 3, 3)
    """
    weight = None if isinstance(module, torch.jit.ScriptModule) else module._parameters.get("weight")
    if weight is None or weight.ndim < 2 or not weight.is_floating_point():
        return None
    shape = tuple(weight.shape)
    if isinstance(module, _CONVOLUTIONS):
        return convolution_layout(shape, module.groups, transposed=module.transposed)
    if isinstance(module, nn.Linear):
        return Layout("linear", shape)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Layout("embedding", shape)
    if type(module).__name__ == "Conv1D" and len(shape) == 2:  # transformers, stored as (in, out)
        return Layout("linear", shape[::-1], 1)
    return None


def _arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(f"model must be initialised, but {lazy[0]!r} has no shape yet; run the model once before")
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(name): value for name, value in example_inputs.items()}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a mapping of keyword arguments, "
        f"got {type(example_inputs).__name__}; put a single argument into a tuple: (argument,)"
    )


def _cannot_run(model: nn.Module, given: list[Tensor], error: Exception) -> str:
    seen = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in given[:4])
    places = {str(p.device) for p in model.parameters()}
    hint = ""
    if places and not {str(t.device) for t in given} <= places:
        hint = f"; the model is on {', '.join(sorted(places))}"
    reason = str(error) if len(str(error)) <= 500 else f"{str(error)[:500]} …"
    return (
        f"model must run on example_inputs, but {type(model).__name__} cannot run on {seen or 'no tensors'}{hint}: "
        f"{type(error).__name__}: {reason}"
    )


@contextmanager
def _unchanged(model: nn.Module, flow: Dataflow) -> Iterator[None]:
    """Evaluation mode inside; outside, everything as it was.

    That covers values written in place, and one level of the modules' attributes: a forward may store buffers, install
    hooks, or keep counters and caches.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    slots = [d for m in plain for d in (vars(m), *vars(m).values()) if isinstance(d, dict)]
    copies = [dict(slot) for slot in slots]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one fused kernel would hide the layers inside
        for module in modules:
            module.training = False
        # compiled parts run eagerly: torch.compile refuses to work under a dispatch mode
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for slot, before in zip(slots, copies, strict=True):
            if {key: id(value) for key, value in slot.items()} != {key: id(value) for key, value in before.items()}:
                slot.clear()
                slot.update(before)
        with torch.no_grad():
            for tensor, value in reversed(flow.overwritten.values()):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def _reporting(model: nn.Module, flow: Dataflow) -> Iterator[None]:
    """Hooks on every module of a known kind; its own weight is not looked for while it runs."""
    with ExitStack() as handles:
        for name, module in model.named_modules():
            layout = module_layout(module)
            if layout is not None:
                before, after = _hooks(flow, name, layout)
                handles.callback(module.register_forward_pre_hook(before).remove)
                handles.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _hooks(flow: Dataflow, name: str, layout: Layout) -> tuple[Callable[..., None], Callable[..., None]]:
    weight = flow.weights.canonical[_join(name, "weight")]

    def before(module: nn.Module, args: Any) -> None:
        flow.inside.append(weight)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        flow.inside.remove(weight)
        read, written = tensors((args, kwargs)), tensors(output)
        if not read or not written:
            return
        parameter = flow.weights.parameters[weight]
        shapes = tuple(read[0].shape), tuple(written[0].shape)
        part = (parameter.storage_offset(), parameter.numel())
        use = Use(weight, name, layout, _positions(layout, *shapes) * parameter.numel(), part, *shapes)
        flow.mark(written[0], flow.record(use, read))

    return before, after


def _positions(layout: Layout, read: tuple[int, ...], written: tuple[int, ...]) -> int:
    """How often every weight of a module is used in one call, over the whole batch."""
    if layout.kind == "embedding":
        return 0
    if not layout.kernel:
        return prod(read[:-1])
    shape = read if "transpose" in layout.kind else written
    spatial = len(layout.kernel)
    return prod(shape[-spatial:]) * prod(shape[: -spatial - 1])


def _hopeless(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Parameters that cannot be planned whatever happens to them: {parameter: (name to report, reason)}."""
    found: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owned = dict(module.named_parameters(name, recurse=False))
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            reason = f"recurrent layers ({type(module).__name__}) are not planned"
        elif is_parametrized(module):
            reason = "its weight is computed from other parameters (parametrization)"
            inner = module.get_submodule("parametrizations")
            owned = dict(inner.named_parameters(_join(name, "parametrizations")))
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and "weight" not in module._parameters:
            sources = [key for key in module._parameters if key.startswith("weight")]
            reason = f"its weight is computed from {', '.join(sources) or 'something else'} at every call"
        else:
            continue
        found |= dict.fromkeys(owned, (name or type(module).__name__, reason))
    return found


def _network(
    model: nn.Module, flow: Dataflow, batch: int, hopeless: Mapping[str, tuple[str, str]], returned: list[int]
) -> Network:
    uses: dict[str, list[Use]] = {}
    for use in flow.uses:
        uses.setdefault(use.weight, []).append(use)
    named = model.named_modules(remove_duplicate=False)
    owners = {_join(name, "weight"): name for name, module in named if module_layout(module) is not None}
    layers = {weight: _layer(flow.weights, owners, each, batch) for weight, each in uses.items()}
    edges: dict[tuple[str, str], None] = {}
    for use in flow.uses:
        producers = [flow.uses[i].weight for i in members(use.sources)]
        edges |= {(layers[p].name, layers[use.weight].name): None for p in producers if p != use.weight}
    groups: dict[str, list[str]] = {}
    for weight, layer in layers.items():
        groups.setdefault(flow.ties.group(weight), []).append(layer.name)
    saved = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    total = sum({identity(value): value.numel() * value.element_size() for value in saved}.values())
    widths = Counter[torch.dtype]()
    for weight, layer in layers.items():
        widths[flow.weights.parameters[weight].dtype] += layer.parameters
    dtype = widths.most_common(1)[0][0] if widths else torch.float32
    return Network(
        layers=tuple(layers.values()),
        edges=tuple(edges),
        siblings=tuple(tuple(group) for group in groups.values() if len(group) > 1),
        batch=batch,
        total_bytes=total,
        outside_bytes=total - sum(layer.weight_bytes for layer in layers.values()),
        dtype=_FORMATS.get(dtype, str(dtype).removeprefix("torch.")),
        skipped=_skipped(flow, owners, hopeless),
        fingerprint=fingerprint(model),
        buffers=flow.activations.liveness.buffers(returned, {weight: layer.name for weight, layer in layers.items()}),
        attention=_attention(flow, layers),
    )


def _attention(flow: Dataflow, layers: Mapping[str, Layer]) -> tuple[Attention, ...]:
    """Every run of attention, with the names of the layers that feed it."""
    runs = []
    for run, operands in flow.activations.attention.found:
        used = [dict.fromkeys(flow.uses[i].weight for i in members(operand.sources)) for operand in operands]
        query, key, value = (tuple(layers[weight].name for weight in each) for each in used)
        runs.append(replace(run, query_layers=query, key_layers=key, value_layers=value))
    return tuple(runs)


def _layer(weights: Weights, owners: Mapping[str, str], uses: list[Use], batch: int) -> Layer:
    """One layer from all applications of its weight."""
    first, parameter = uses[0], weights.parameters[uses[0].weight]
    module = next((use.module for use in uses if use.module is not None), None)
    weight_name = first.weight if module is None else _join(module, "weight")
    return Layer(
        name=owners.get(weight_name) or weight_name,
        weight_name=weight_name,
        module=module,
        aliases=tuple(alias for alias in weights.aliases[first.weight] if alias != weight_name),
        parameters=parameter.numel(),
        weight_bytes=parameter.numel() * parameter.element_size(),
        macs=sum(use.macs for use in uses),
        input_shape=first.input_shape,
        output_shape=first.output_shape,
        calls=max(Counter(use.part for use in uses).values()),
        batch=batch,
        input_elements=sum(prod(use.input_shape) for use in uses),
        output_elements=sum(prod(use.output_shape) for use in uses),
        **first.layout._asdict(),
    )


def _skipped(flow: Dataflow, owners: Mapping[str, str], hopeless: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Matrices that are no layers, with the reason."""
    used = {use.weight for use in flow.uses}
    skipped = {}
    for weight, parameter in flow.weights.parameters.items():
        if parameter.ndim < 2 or weight in used:
            continue
        if weight in hopeless:
            name, reason = hopeless[weight]
        elif not parameter.is_floating_point():
            name, reason = weight, f"stored as {str(parameter.dtype).removeprefix('torch.')}, not in floating point"
        elif weight in flow.touched:
            name, reason = weight, "used, but not as the weight of a linear, a convolution or an embedding"
        else:
            name, reason = weight, "never ran on the example inputs"
        skipped[owners.get(name) or name] = reason
    return skipped


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
