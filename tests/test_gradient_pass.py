"""Captures and per-sample weight gradients against autograd on one sample at a time."""

import copy

import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn
from torch.nn import functional

import mpq
from mpq.batches import batches_of, split_batch
from mpq.cache import Pieces
from mpq.options import SearchSpace
from mpq.quantizer import RoundToNearest
from mpq.sensitivity import Measurement
from mpq.sensitivity.gradient_pass import captures, captures_together
from mpq.task_choice import choose_task
from mpq.tasks import CustomLoss, Distribution
from mpq.weight_view import as_rows


def measurement(model, data, task=None, options=("int4",), granularity="layer", seed=0):
    batches = batches_of(data)
    network, space = mpq.trace(model, split_batch(batches[0])[0]), SearchSpace(list(options), ties=None)
    return Measurement(
        model=model,
        batches=batches,
        network=network,
        options=space.all_options,
        candidates=space.candidates(network),
        granularity=granularity,
        task=choose_task(model, batches[0], task),
        quantizer=RoundToNearest(),
        seed=seed,
        pieces=Pieces(),
        progress=False,
    )


def captured(measured, index=0, labels="data", **settings):
    """{layer: per-sample gradients}, captures of single samples put together."""
    found = {}

    def receive(capture):
        found.setdefault(capture.layer.name, []).append(capture.sample_gradients())

    captures(measured, index, labels, receive, **settings)
    return {name: torch.cat(parts) for name, parts in found.items()}


def one_at_a_time(measured, index=0):
    """{layer: gradients of every sample's loss summed over positions}, from autograd on a copy of the model."""
    inputs, labels = split_batch(measured.batches[index])
    samples = len(labels)
    model = copy.deepcopy(measured.model).requires_grad_(True)
    found = {layer.name: [] for layer in measured.network.layers}
    for number in range(samples):
        part = slice(number, number + 1)
        if isinstance(inputs, torch.Tensor):
            batch = (inputs[part], labels[part])
        else:
            batch = {key: value[part] for key, value in inputs.items()} | {"labels": labels[part]}
        model.zero_grad()
        outputs = measured.task.run(model, batch)
        (measured.task.losses(outputs) * outputs.positions()).sum().backward()
        for layer in measured.network.layers:
            gradient = model.get_parameter(layer.weight_name).grad
            empty = torch.zeros_like(model.get_parameter(layer.weight_name))
            found[layer.name].append(as_rows(empty if gradient is None else gradient, layer).clone())
    return {name: torch.stack(parts) for name, parts in found.items()}


def assert_same(fast, slow, tolerance=1e-5):
    assert fast.keys() == slow.keys()
    for name in slow:
        scale = float(slow[name].abs().max()) or 1.0
        torch.testing.assert_close(fast[name], slow[name].to(fast[name].dtype), rtol=1e-4, atol=tolerance * scale)


class Convolutions(nn.Module):
    """One of every kind of convolution, with paddings, strides, dilation and groups."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3, padding="same", dilation=2, padding_mode="circular")
        self.even = nn.Conv1d(4, 4, 4, padding="same", groups=2)
        self.up1 = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.two = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode="reflect")
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.up2 = nn.ConvTranspose2d(8, 3, 2, stride=2, dilation=2)
        self.three = nn.Conv3d(1, 2, 2, padding=1)
        self.up3 = nn.ConvTranspose3d(2, 2, 2, groups=2)
        self.head = nn.Linear(6 + 3 + 2, 4)

    def forward(self, x):
        a = self.up1(self.even(self.one(x.reshape(len(x), 2, -1)).relu())).mean(2)
        b = self.up2(self.depthwise(self.two(x)).relu(), output_size=None).square().mean((2, 3))
        c = self.up3(self.three(x[:, :, None]).relu()).square().mean((2, 3, 4))
        return self.head(torch.cat([a, b, c], 1))


def test_every_kind_of_convolution():
    torch.manual_seed(0)
    data = (torch.randn(3, 1, 6, 6), torch.tensor([0, 3, 1]))
    measured = measurement(Convolutions().eval(), data)
    assert len(measured.network.layers) == 9
    assert_same(captured(measured), one_at_a_time(measured))


def test_sequences_with_masks_and_tied_embeddings():
    batch = tokens(batches=1, samples=4)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 4:] = 0
    labels = batch["input_ids"].clone()
    labels[2, 3] = -100
    measured = measurement(decoder(), [{**batch, "attention_mask": mask, "labels": labels}], Distribution(causal=True))
    assert_same(captured(measured), one_at_a_time(measured))


def test_transposed_dense_layers_and_positions_of_transformers():
    """GPT-2: weights stored as (in, out), positions looked up once for all samples."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    batch = tokens(batches=1, samples=3)[0]
    measured = measurement(model, [{**batch, "labels": batch["input_ids"]}], Distribution(causal=True))
    assert any(layer.channel_axis == 1 for layer in measured.network.layers)
    assert_same(captured(measured), one_at_a_time(measured))


class Odd(nn.Module):
    """A layer called twice, one whose weight is standardised, flattened tokens, an unused one, a single weight."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.standardised = Standardised(4, 4)
        self.flat = nn.Linear(4, 4)
        self.single = nn.Linear(1, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.twice(self.twice(x).relu())
        x = self.standardised(x.reshape(-1, 4)).reshape(x.shape)
        x = self.flat(x.reshape(-1, 4)).reshape(x.shape)
        x = x + self.single(x[..., :1])
        return self.head(x.mean(1))


class Standardised(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight / self.weight.norm(), self.bias)


def test_shared_modules_own_forwards_and_flattened_tokens():
    torch.manual_seed(0)
    data = (torch.randn(3, 5, 4), torch.tensor([0, 2, 1]))
    measured = measurement(Odd().eval(), data)
    assert_same(captured(measured), one_at_a_time(measured))
    one_row = {}
    captures(measured, 0, "data", lambda c: one_row.update({c.layer.name: c.sample_gradients(slice(0, 1))}))
    assert_same(one_row, {name: rows[:, :1] for name, rows in one_at_a_time(measured).items()})


class SharedPositions(nn.Module):
    """Positions are looked up once for all samples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head((self.tokens(ids) + self.positions(torch.arange(5)[None])).tanh().mean(1))


class Routed(nn.Module):
    """Every expert sees the tokens that were sent to it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        flat, out = x.reshape(-1, 4), torch.zeros(x.numel() // 4, 4)
        choice = (flat[:, 0] > 0).long() + (flat[:, 1] > 1)
        for number, expert in enumerate(self.experts):
            out[choice == number] = expert(flat[choice == number])
        return self.head(out.reshape(x.shape).mean(1))


@pytest.mark.parametrize("kind", ["positions", "experts", "attention"])
def test_samples_that_cannot_be_told_apart_are_run_one_at_a_time(kind):
    torch.manual_seed(1)
    labels = torch.tensor([0, 2, 1])
    if kind == "positions":
        measured = measurement(SharedPositions().eval(), (torch.randint(0, 7, (3, 5)), labels))
    elif kind == "experts":
        measured = measurement(Routed().eval(), (torch.randn(3, 5, 4), labels))
    else:
        encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(20, 3)).eval()
        measured = measurement(model, (torch.randn(3, 5, 4), labels))
        with pytest.raises(ValueError, match="in_proj_weight' is used by a function"):
            captured(measured)
    assert_same(captured(measured, functional=True), one_at_a_time(measured))


def test_one_forward_serves_both_kinds_of_labels_and_kinds_that_are_the_same_share_a_capture():
    measured = measurement(cnn(), images(1))
    forwards = []
    handle = measured.model.register_forward_hook(lambda *_: forwards.append(1))
    found = {}

    def receive(seen):
        assert seen["auto"] is seen["data"]
        assert seen["model"] is not seen["data"]
        gradients = {label: capture.sample_gradients() for label, capture in seen.items()}
        found.update({(label, seen["data"].layer.name): value for label, value in gradients.items()})

    captures_together(measured, 0, ("auto", "model", "data"), receive)
    handle.remove()
    assert len(forwards) == 1
    assert_same({name: found["data", name] for name in one_at_a_time(measured)}, one_at_a_time(measured))
    alone = captured(measured, labels="model")
    assert_same({name: found["model", name] for name in alone}, alone)


def test_captures_come_once_a_layer_with_positions_and_free_what_they_held():
    measured = measurement(decoder(), [{**tokens(1)[0], "labels": tokens(1)[0]["input_ids"]}], "causal-lm")
    seen = []
    captures(measured, 0, "data", lambda capture: seen.append((capture.layer.name, capture.positions.tolist())))
    assert sorted(seen) == sorted((layer.name, [6, 6, 6]) for layer in measured.network.layers)


def test_a_layer_that_the_loss_does_not_depend_on_has_no_calls():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) + self.b(x).detach()

    measured = measurement(Detached().eval(), (torch.randn(2, 4), torch.tensor([0, 1])))
    assert (captured(measured)["b"] == 0).all()
    assert captured(measured)["b"].shape == (2, 3, 4)


def test_model_labels_are_drawn_from_the_model():
    """E g gᵀ over drawn labels is the sum over classes of p_c g_c g_cᵀ, and E g is zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False)).eval()
    x = torch.randn(1, 3)
    measured = measurement(model, (x.expand(20000, 3), torch.zeros(20000, dtype=torch.long)))
    each = captured(measured, labels="model")["0"].flatten(1)
    p = model(x).softmax(1)[0].detach()
    exact = torch.stack([torch.outer(p - functional.one_hot(torch.tensor(c), 4), x[0]).flatten() for c in range(4)])
    second = (p[:, None, None] * exact[:, :, None] * exact[:, None, :]).sum(0)
    torch.testing.assert_close(each.T @ each / len(each), second, rtol=0.1, atol=0.02)
    assert each.mean(0).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_do_not_underflow(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    factor = 1e-7  # below float16's smallest number
    task = CustomLoss(
        lambda model, batch: factor * functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")
    )
    exact = captured(measurement(copy.deepcopy(model), data, task))
    half = captured(measurement(model.to(dtype), (data[0].to(dtype), data[1]), task))
    for name in exact:
        assert half[name].dtype == torch.float32
        error = (half[name] - exact[name]).norm() / exact[name].norm()
        assert error < 0.05, name


def test_float64_stays_float64():
    measured = measurement(cnn().double(), [(x.double(), y) for x, y in images(1)])
    fast, slow = captured(measured), one_at_a_time(measured)
    assert all(value.dtype == torch.float64 for value in fast.values())
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-12, atol=1e-14)


def test_gradients_that_are_not_finite_name_the_layer():
    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b((self.a(x) * 0).sqrt())

    measured = measurement(Explodes().eval(), (torch.randn(2, 4), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="gradient at layer 'a' must be finite"):
        captured(measured)


def test_outputs_without_gradient_and_modules_without_tensors_are_named():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        @torch.no_grad()
        def forward(self, x):
            return self.a(x)

    with pytest.raises(ValueError, match="no gradient"):
        captured(measurement(Cut().eval(), (torch.randn(2, 4), torch.tensor([0, 1]))))


def test_everything_comes_back():
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(20, 3)).eval()
    model[2].weight.requires_grad_(False)
    weight = encoder.self_attn.in_proj_weight
    weight.grad = torch.ones_like(weight)
    measured = measurement(model, (torch.randn(3, 5, 4), torch.tensor([0, 2, 1])))
    before = copy.deepcopy(model.state_dict())
    captured(measured, functional=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not model[2].weight.requires_grad
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
