"""Parameters that functions apply: found through views, casts and copies, counted as PyTorch counts them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mpq.parameters import Weights, convolution_layout, product_layout
from mpq.tracing import trace

E, D, H = 4, 8, 12  # experts, model width, hidden width


def counted_macs(model, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*args)
    return counter.get_total_flops() // 2


class Functional(nn.Module):
    """Applies one parameter by whatever function is given."""

    def __init__(self, shape, apply, dtype=torch.float32):
        super().__init__()
        self.w, self.apply_weight = nn.Parameter(torch.randn(*shape, dtype=dtype)), apply

    def forward(self, *args):
        return self.apply_weight(self.w, *args)


def by_expert(w, x, spread=False):
    """Each expert takes its own tokens, as mixtures of experts loop."""
    return torch.cat([F.linear(part, w[i]) for i, part in enumerate(x.split((1, 2, 3) if spread else 2))])


FUNCTIONS = {
    # name: (shape of the parameter, function, shape of the input, kind, (out, in) view, channel axis, calls)
    "linear": ((H, D), lambda w, x: F.linear(x, w), (2, 3, D), "linear", (H, D), 0, 1),
    "linear of a transposed input": (
        *((H, D), lambda w, x: F.linear(x.transpose(0, 1), w), (2, 3, D), "linear", (H, D), 0, 1),
    ),
    "matmul": ((D, H), lambda w, x: x @ w, (2, 3, D), "linear", (H, D), 1, 1),
    "from the left": ((H, D), lambda w, x: w @ x, (D, 6), "linear", (H, D), 0, 1),
    "cast and back": ((H, D), lambda w, x: F.linear(x, w.double().t().float().t()), (2, D), "linear", (H, D), 0, 1),
    "detached": ((H, D), lambda w, x: F.linear(x, w.data), (2, D), "linear", (H, D), 0, 1),
    "two halves": (
        (H, D),
        lambda w, x: torch.cat([F.linear(x, c) for c in w.chunk(2)], 1),
        (2, D),
        "linear",
        (H, D),
        0,
        1,
    ),
    "twice": ((D, D), lambda w, x: F.linear(torch.relu(F.linear(x, w)), w), (2, D), "linear", (D, D), 0, 2),
    "one input": ((H, 1), lambda w, x: F.linear(x, w), (2, 1), "linear", (H, 1), 0, 1),
    "one output": ((1, D), lambda w, x: F.linear(x, w), (2, D), "linear", (1, D), 0, 1),
    "einsum": ((D, H), lambda w, x: torch.einsum("btd,dh->bth", x, w), (2, 3, D), "linear", (H, D), 1, 1),
    "baddbmm": (
        *((E, D, H), lambda w, x: torch.baddbmm(torch.zeros(E, 1, 1), x, w), (E, 3, D)),
        *("experts", (E * H, D), 2, 1),
    ),
    "bmm": ((E, D, H), lambda w, x: torch.bmm(x, w), (E, 3, D), "experts", (E * H, D), 2, 1),
    "bmm of the transpose": ((E, H, D), lambda w, x: x @ w.mT, (E, 3, D), "experts", (E * H, D), 1, 1),
    "bmm of a cast": ((E, D, H), lambda w, x: torch.bmm(x, w.double().float()), (E, 3, D), "experts", (E * H, D), 2, 1),
    "batch of bmm": ((E, D, H), lambda w, x: x[:, None] @ w, (2, 3, D), "experts", (E * H, D), 2, 1),
    "expert by expert": ((E, H, D), by_expert, (2 * E, D), "experts", (E * H, D), 1, 1),
    "some experts": ((E, H, D), lambda w, x: by_expert(w, x, spread=True), (6, D), "experts", (E * H, D), 1, 1),
    "gathered experts": (
        *((E, H, D), lambda w, x: torch.bmm(w[torch.arange(6) % E], x[:, :, None]), (6, D)),
        *("experts", (E * H, D), 1, 1),
    ),
    "selected experts": (
        *((E, D, H), lambda w, x: torch.bmm(x, w.index_select(0, torch.tensor([1, 3]))), (2, 3, D)),
        *("experts", (E * H, D), 2, 1),
    ),
    "einsum of experts": (
        *((E, D, H), lambda w, x: torch.einsum("td,edh->teh", x, w), (6, D), "experts", (E * H, D), 2, 1),
    ),
    "einsum over hidden": (
        *((E, D, H), lambda w, x: torch.einsum("teh,edh->ted", x, w), (6, E, H), "experts", (E * D, H), 1, 1),
    ),
    "conv2d": ((6, 2, 3, 3), lambda w, x: F.conv2d(x, w, groups=2), (2, 4, 5, 5), "conv2d", (6, 2, 3, 3), 0, 1),
    "conv_transpose1d": (
        *((4, 3, 3), lambda w, x: F.conv_transpose1d(x, w, groups=2), (2, 4, 5), "conv_transpose1d", (6, 2, 3), 1, 1),
    ),
    "a convolution's weight, flattened": (
        *((6, 3, 2, 2), lambda w, x: F.linear(x, w.flatten(1)), (2, 5, 12), "linear", (6, 3, 2, 2), 0, 1),
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_count_what_pytorch_counts(name, device):
    shape, apply, given, kind, weight_shape, channel_axis, calls = FUNCTIONS[name]
    with torch.device(device):
        model, x = Functional(shape, apply), torch.randn(given)
        network = trace(model, x)
        assert network.skipped == {}
        (layer,) = network.layers
        assert layer.macs == counted_macs(model, x) > 0
    assert (layer.name, layer.weight_name, layer.module) == ("w", "w", None)
    assert (layer.kind, layer.weight_shape, layer.channel_axis) == (kind, weight_shape, channel_axis)
    assert layer.calls == calls
    m, k, n, repeats = layer.matmul()
    assert k * n * repeats == layer.parameters
    assert 0 <= m * k * n * repeats - layer.macs < layer.parameters


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_matrix_products(dtype, device):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this version of PyTorch has no grouped_mm")
    offsets = torch.tensor([2, 4, 6, 8], dtype=torch.int32, device=device)
    model = Functional((E, 16, D), lambda w, x: F.grouped_mm(x, w.mT, offs=offsets), dtype).to(device)
    (layer,) = trace(model, torch.zeros(8, D, dtype=dtype, device=device)).layers
    assert (layer.kind, layer.weight_shape, layer.experts) == ("experts", (E * 16, D), E)
    assert layer.macs == 8 * D * 16  # every row meets one expert; PyTorch's counter does not know this operation
    assert layer.matmul() == (2, D, 16, E)


def test_shapes_are_those_before_linear_flattened_them():
    (layer,) = trace(Functional((H, D), lambda w, x: F.linear(x, w)), torch.zeros(2, 3, D)).layers
    assert (layer.input_shape, layer.output_shape) == ((2, 3, D), (2, 3, H))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(batch_first, device):
    model = nn.MultiheadAttention(16, 4, batch_first=batch_first, device=device)
    x = torch.zeros(2, 5, 16, device=device)
    network = trace(model, (x, x, x))
    assert [(layer.name, layer.module, layer.weight_shape, layer.macs) for layer in network.layers] == [
        ("in_proj_weight", None, (48, 16), 10 * 768),
        ("out_proj", None, (16, 16), 10 * 256),
    ]
    assert network["out_proj"].weight_name == "out_proj.weight"
    assert network.edges == (("in_proj_weight", "out_proj"),)


def test_multihead_cross_attention_applies_parts_of_one_weight():
    model = nn.MultiheadAttention(16, 4)
    layer = trace(model, (torch.zeros(5, 2, 16), torch.zeros(7, 2, 16), torch.zeros(7, 2, 16)))["in_proj_weight"]
    assert layer.macs == 10 * 256 + 14 * 512
    assert (layer.calls, layer.matmul()) == (1, (13, 16, 48, 1))  # 12.67 positions on average


def test_transformer_encoder_is_not_hidden_by_its_fast_path():
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    network = trace(nn.TransformerEncoder(block, 2).eval(), torch.zeros(2, 5, 16))
    names = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    assert [layer.name for layer in network.layers] == [f"layers.{i}.{name}" for i in range(2) for name in names]


def test_a_forward_that_is_not_called_counts_as_a_function():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.table = nn.Linear(D, H), nn.Embedding(5, D)

        def forward(self, ids):
            return self.fc.forward(F.embedding(ids, self.table.weight))

    network = trace(Direct(), torch.zeros(2, 3, dtype=torch.long))
    assert [(layer.name, layer.kind, layer.module) for layer in network.layers] == [
        ("table", "embedding", None),
        ("fc", "linear", None),
    ]


def test_low_rank_adapters_inside_a_linear_are_layers_of_their_own():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(D, H)
            self.a, self.b = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(H, 2))

        def forward(self, x):
            return super().forward(x) + F.linear(F.linear(x, self.a), self.b)

    network = trace(nn.Sequential(Adapted()), torch.zeros(3, D))
    assert {layer.name: layer.macs for layer in network.layers} == {"0.a": 48, "0.b": 72, "0": 288}
    assert network["0"].module == "0"


class Inference(nn.Module):
    """In inference mode PyTorch hands composite operations on whole."""

    def __init__(self):
        super().__init__()
        self.filter, self.q, self.k = nn.Parameter(torch.randn(D, 3, 1, 1)), nn.Linear(D, D), nn.Linear(D, D)

    @torch.inference_mode()
    def forward(self, image):
        x = F.conv2d(image, self.filter)
        return self.q(x.flatten(2).mT.contiguous()) @ self.k(x.movedim(1, -1).reshape(2, -1, D)).mT


def test_works_in_inference_mode():
    network = trace(Inference(), torch.zeros(2, 3, 4, 4))
    assert [(layer.name, layer.kind, layer.macs) for layer in network.layers] == [
        ("filter", "conv2d", 32 * 3 * D),
        ("q", "linear", 32 * D * D),
        ("k", "linear", 32 * D * D),
    ]
    assert network.edges == (("filter", "q"), ("filter", "k"))
    assert network.siblings == (("q", "k"),)


UNKNOWN = {
    "scaled": lambda w, x: F.linear(x, w * 2),
    "added": lambda w, x: x + w[0],
    "looked up": lambda w, x: x + w[torch.tensor([1, 2])],
    "replaced": lambda w, x: F.linear(x, torch.zeros_like(w)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_computed_weights_are_not_the_parameter(name):
    network = trace(Functional((D, D), UNKNOWN[name]), torch.zeros(2, D))
    assert network.layers == ()
    assert network.skipped == {"w": "used, but not as the weight of a linear, a convolution or an embedding"}


def test_a_freed_copy_is_not_mistaken_for_a_weight():
    def churn(w, x):
        for _ in range(50):
            x = torch.relu(F.linear(x, w.double().float()) @ (x.T @ x))
        return x

    (layer,) = trace(Functional((D, D), churn), torch.zeros(2, D)).layers
    assert layer.macs == 50 * 2 * D * D


def test_parameters_cut_from_one_memory_are_told_apart():
    flat = torch.randn(2 * D * D)
    model = nn.Sequential(nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False))
    for position, layer in enumerate(model):
        layer.weight.data = flat[position * D * D : (position + 1) * D * D].view(D, D)
    weights = Weights(model)
    assert weights.find(model[1].weight.t()).name == "1.weight"
    assert weights.find(model[0].weight[3:]).name == "0.weight"
    assert weights.find(torch.zeros(3, 3)) is None


def test_excluded_parameters_are_not_recognised():
    model = nn.Linear(D, D)
    assert Weights(model, excluded=["weight"]).find(model.weight) is None


@pytest.mark.parametrize(
    ("shape", "axis", "width", "expected"),
    [
        ((H, D), 1, D, ((H, D), 0, 1)),
        ((D, H), 0, D, ((H, D), 1, 1)),
        ((E, H, D), 2, D, ((E * H, D), 1, E)),
        ((E, D, H), 1, D, ((E * H, D), 2, E)),
        ((6, 3, 2, 2), 3, 12, ((6, 3, 2, 2), 0, 1)),
        ((E, D, H), 0, E, None),
        ((2, E, D, H), 3, H, None),
        ((H, D), None, D, None),
    ],
)
def test_product_layout(shape, axis, width, expected):
    layout = product_layout(shape, axis, width)
    assert (layout and (layout.weight_shape, layout.channel_axis, layout.experts)) == expected


def test_convolution_layout():
    assert convolution_layout((6, 2, 3), 2, transposed=False).weight_shape == (6, 2, 3)
    assert convolution_layout((4, 3, 5, 5), 2, transposed=True)[:3] == ("conv_transpose2d", (6, 2, 5, 5), 1)
