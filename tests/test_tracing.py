"""`trace` against PyTorch's own flop counter, and against a bit-for-bit picture of the model taken before."""

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mpq.tracing import fingerprint, module_layout, trace

DEVICES = ["cpu", "meta"]


def counted_macs(model, *args, **kwargs):
    """{module: multiply-adds} by PyTorch's flop counter; "" is everything."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*args, **kwargs)
    prefix = type(model).__name__
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return {name.removeprefix(prefix).lstrip("."): macs for name, macs in counts.items()} | {"": counts["Global"]}


class Conv1D(nn.Module):
    """Stored as (in, out), like the module of this name in transformers."""

    def __init__(self, out, features):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(features, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


MODULES = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear on one vector": (lambda: nn.Linear(6, 4), (6,)),
    "linear subclass": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2), (2, 4, 9, 8)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "conv2d padded by hand": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3), (1, 2, 5, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 6)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "Conv1D": (lambda: Conv1D(4, 6), (2, 3, 6)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
def test_modules_count_what_pytorch_counts(name, device):
    make, shape = MODULES[name]
    with torch.device(device):
        model, x = nn.Sequential(nn.Identity(), make()), torch.zeros(shape)
    (layer,) = trace(model, x).layers
    if name != "linear on one vector":  # a matrix times a vector is missing from PyTorch's counter
        assert layer.macs == counted_macs(model, x)["1"]
    m, k, n, repeats = layer.matmul()
    assert layer.macs == m * k * n * repeats > 0
    assert (layer.name, layer.module, layer.weight_name) == ("1", "1", "1.weight")
    assert (layer.input_shape, layer.output_shape) == (shape, tuple(model(x).shape))
    assert layer.parameters == model[1].weight.numel()
    assert layer.weight_shape[0] == model(x).shape[-1 - len(layer.kernel)]
    assert layer.weight_bytes == 4 * layer.parameters


def test_shapes_of_transposed_layouts():
    network = trace(nn.Sequential(Conv1D(4, 6)), torch.zeros(2, 6))
    assert (network["0"].kind, network["0"].weight_shape, network["0"].channel_axis) == ("linear", (4, 6), 1)
    layer = trace(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)), torch.zeros(2, 4, 5, 5))["0"]
    assert (layer.weight_shape, layer.channel_axis, layer.groups, layer.kernel) == ((6, 2, 3, 3), 1, 2, (3, 3))


@pytest.mark.parametrize("module", [nn.Embedding(10, 4), nn.EmbeddingBag(10, 4)])
def test_embeddings_are_lookups(module):
    layer = trace(nn.Sequential(module), torch.zeros(2, 3, dtype=torch.long))["0"]
    assert (layer.kind, layer.weight_shape, layer.macs) == ("embedding", (10, 4), 0)


def test_a_known_module_as_the_model_itself():
    network = trace(nn.Linear(4, 3), torch.zeros(2, 4))
    assert [layer.name for layer in network.layers] == ["weight"]
    assert network["weight"].module == ""


class Tied(nn.Module):
    def __init__(self, first="embed"):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.middle(torch.relu(self.middle(self.embed(ids))))
        return {"scores": self.head(x), "again": (x, F.linear(x, self.embed.weight))}


@pytest.mark.parametrize("device", DEVICES)
def test_a_shared_weight_is_one_layer(device):
    with torch.device(device):
        model, ids = Tied(), torch.zeros(2, 3, dtype=torch.long)
    network = trace(model, ids)
    assert [layer.name for layer in network.layers] == ["embed", "middle"]
    embed, middle = network.layers
    assert (embed.kind, embed.aliases, embed.weight_name, embed.module) == (
        *("embedding", ("head.weight",), "embed.weight", "embed"),
    )
    assert (embed.calls, embed.macs) == (3, 2 * 6 * 80)
    assert (middle.calls, middle.macs, middle.input_elements) == (2, 2 * 6 * 64, 2 * 48)
    assert embed.input_elements == 6 + 48 + 48
    assert network.total_bytes == 4 * (80 + 64 + 8)
    assert network.outside_bytes == 4 * 8
    assert sum(layer.macs for layer in network.layers) == counted_macs(model, ids)[""]


def test_weights_that_share_memory_but_are_two_parameters():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data
    network = trace(model, torch.zeros(1, 4))
    assert [(layer.name, layer.aliases) for layer in network.layers] == [("0", ("1.weight",))]
    assert network.total_bytes == 64


def test_named_after_the_first_use():
    class HeadFirst(Tied):
        def forward(self, x):
            return self.embed(self.head(x).argmax(-1))

    (layer,) = trace(HeadFirst(), torch.zeros(2, 8)).layers
    assert (layer.name, layer.kind, layer.weight_name, layer.aliases) == (
        *("head", "linear", "head.weight", ("embed.weight",)),
    )


class Unplannable(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell, self.bilinear = nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.Bilinear(4, 4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        with pytest.warns(FutureWarning):
            self.old_normed = nn.utils.weight_norm(nn.Linear(4, 4))
        self.dead, self.position = nn.Linear(4, 4), nn.Parameter(torch.zeros(3, 4))
        self.packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.old_normed(self.normed(self.lstm(x)[0])) + self.position
        return self.fc(self.bilinear(x, x) + self.packed.float().sum())


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_skipped_says_why(device):
    model = Unplannable().to(device)
    network = trace(model, torch.zeros(5, 3, 4, device=device))
    assert [layer.name for layer in network.layers] == ["fc"]
    assert network.skipped == {
        "lstm": "recurrent layers (LSTM) are not planned",
        "cell": "recurrent layers (GRUCell) are not planned",
        "bilinear.weight": "used, but not as the weight of a linear, a convolution or an embedding",
        "normed": "its weight is computed from other parameters (parametrization)",
        "old_normed": "its weight is computed from weight_g, weight_v at every call",
        "dead": "never ran on the example inputs",
        "position": "used, but not as the weight of a linear, a convolution or an embedding",
        "packed": "stored as int8, not in floating point",
    }
    state = model.state_dict().values()
    assert network.total_bytes == sum(value.numel() * value.element_size() for value in state)
    assert network.outside_bytes == network.total_bytes - 4 * 8


class Stateful(nn.Module):
    """Changes whatever a forward can change."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()
        self.embed, self.fc = nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("kept", torch.zeros(3, 4))
        self.memory, self.count, self.fail = {}, 0, False

    def forward(self, x):
        x = self.drop(self.norm(self.conv(x)))
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True).mean((2, 3))
        self.steps += 1
        self.kept[1:] = x[0]
        self.kept = self.kept + 1
        self.memory["x"], self.count, self.last = x, self.count + 1, x
        self.fc.register_forward_hook(lambda *_: None)
        x = x + torch.rand_like(x) + self.embed(torch.tensor([1], device=x.device))
        if self.fail:
            raise KeyError("no such thing")
        return self.fc(x)


def picture(model):
    """Everything a forward may touch, values copied."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "objects": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(v) for v in vars(m).values() if isinstance(v, dict)] for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    torch.backends.mha.set_fastpath_enabled(True)
    model, x = Stateful().train(), torch.randn(2, 3, 4, 4)
    model.norm.eval()
    model(x).sum().backward()
    model.fail, given = fail, x.clone()
    before = picture(model)
    if fail:
        with pytest.raises(ValueError, match=r"cannot run on \(2, 3, 4, 4\) float32 on cpu: KeyError: 'no such thing'"):
            trace(model, x)
    else:
        trace(model, x)
    after = picture(model)
    for key in before:
        assert same(before[key], after[key]), key
    assert torch.equal(given, x)
    assert model.count == 1
    assert model.memory["x"] is model.last


def test_the_picture_sees_what_a_forward_does():
    model = Stateful().train()
    before = picture(model)
    model(torch.randn(2, 3, 4, 4))
    after = picture(model)
    assert not any(same(before[key], after[key]) for key in ("state", "objects", "hooks", "attributes", "random"))


def test_inputs_written_in_place_are_restored():
    x = torch.full((2, 4), -1.0)
    trace(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), x)
    assert (x == -1).all()


def test_runs_in_evaluation_mode_without_gradients():
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    model[1].register_forward_hook(lambda module, args, output: seen.append((module.training, args[0].requires_grad)))
    trace(model, torch.zeros(2, 4))
    assert seen == [(False, False)]


def test_the_cause_of_an_error_is_kept_and_devices_are_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"Sequential cannot run on .* float32 on cpu; the model is on meta") as caught:
        trace(model, torch.zeros(1, 3))
    assert isinstance(caught.value.__cause__, Exception)


@dataclass
class Output:
    logits: torch.Tensor


class Flexible(nn.Module):
    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 2), wrap

    def forward(self, x, scale=1.0, extra=None):
        return self.wrap(self.fc(x) * scale)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(3, 4),
        (torch.zeros(3, 4),),
        [torch.zeros(3, 4), 2.0],
        {"x": torch.zeros(3, 4), "extra": None},
        {"scale": 2.0, "x": torch.zeros(3, 4)},
    ],
)
def test_forms_of_example_inputs(inputs):
    network = trace(Flexible(), inputs)
    assert (network.batch, network["fc"].macs) == (3, 24)


@pytest.mark.parametrize("wrap", [lambda x: {"y": x}, lambda x: (x, None), lambda x: [[x]], Output, lambda x: None])
def test_forms_of_outputs(wrap):
    assert trace(Flexible(wrap), torch.zeros(3, 4))["fc"].macs == 24


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (Flexible(), "text", TypeError, "must be a tensor, a tuple.*got str; put a single argument into a tuple"),
        (len, torch.zeros(1), TypeError, "model must be a torch.nn.Module, got builtin"),
        (nn.Sequential(nn.LazyLinear(3)), torch.zeros(1, 2), ValueError, "'0.weight' has no shape yet; run the model"),
        (Flexible(), torch.zeros(0, 4), ValueError, r"at least one sample, got a first tensor of \(0, 4\)"),
        (Flexible(), torch.zeros(2, 5), ValueError, r"Flexible cannot run on \(2, 5\) float32 on cpu: RuntimeError"),
        (Flexible(), {"y": torch.zeros(2, 5)}, ValueError, "cannot run on.*TypeError.*unexpected keyword"),
    ],
)
def test_bad_arguments_are_explained(model, inputs, error, message):
    with pytest.raises(error, match=message):
        trace(model, inputs)


def test_fingerprint_depends_on_names_and_shapes_only():
    base = fingerprint(nn.Sequential(nn.Linear(4, 2)))
    assert base == fingerprint(nn.Sequential(nn.Linear(4, 2, device="meta")))
    assert base == fingerprint(nn.Sequential(nn.Linear(4, 2)).half())
    others = [nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 4))]
    assert len({base, *map(fingerprint, others)}) == 3
    assert trace(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4)).fingerprint == base


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float64, "fp64")]
)
def test_dtype_is_that_of_most_weights(dtype, name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)).to(dtype)
    network = trace(model, torch.zeros(1, 4, dtype=dtype))
    assert network.dtype == name
    assert network.total_bytes == 36 * dtype.itemsize


def test_compiled_and_scripted_parts_are_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    network = trace(torch.compile(model, fullgraph=True), torch.zeros(2, 4))
    assert [layer.name for layer in network.layers] == ["_orig_mod.0", "_orig_mod.2"]
    network = trace(torch.jit.script(model), torch.zeros(2, 4))
    assert [(layer.name, layer.module, layer.macs) for layer in network.layers] == [
        ("0.weight", None, 32),
        ("2.weight", None, 16),
    ]


def test_module_layout_of_other_modules_is_none():
    assert all(module_layout(m) is None for m in (nn.LayerNorm((3, 4)), nn.ReLU(), nn.LSTM(3, 4), nn.Bilinear(2, 2, 2)))
