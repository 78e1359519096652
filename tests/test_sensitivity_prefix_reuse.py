"""Runs that leave out what comes before the changed layer, against runs of the whole model."""

import warnings

import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn
from torch.nn import functional

import mpq
from mpq.batches import model_inputs
from mpq.fake_quantize import fake_quantize
from mpq.sensitivity.prefix_reuse import PrefixReuse
from mpq.surgery import layer_parameters, swapped_data
from mpq.task_choice import choose_task
from mpq.weight_view import as_rows, from_rows

KEEP = 2**30


def sequential_cnn():
    parts = []
    for width in (3, 6, 6, 6):
        parts += [nn.Conv2d(width, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 4))


class Residual(nn.Module):
    """Two convolutions with a skip; `functional.relu_` overwrites what a module returned, the sum overwrites it too."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out += self.down(x)
        return functional.relu_(out)


def resnet():
    blocks = [Residual(5, stride) for stride in (1, 2, 1, 2)]
    return nn.Sequential(nn.Conv2d(3, 5, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(x.flatten(2)).mean(1))


class Branches(nn.Module):
    """Two branches whose outputs travel in a dictionary, then a list, then a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.split = Split()
        self.left = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.right = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        parts = self.split(self.stem(x))
        parts["left"] = self.left(parts["left"])
        right = self.right(parts.pop("right"))
        return self.head(torch.cat([*parts.values(), right], -1))


class Split(nn.Module):
    def forward(self, x):
        return {"left": x, "right": x * 2}


class Recurrent(nn.Module):
    """One block called three times, between layers called once, and one called both before and within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12))
        self.between, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.shared(self.first(x))
        x = self.shared(self.between(x)) + x
        return self.head(self.shared(x))


class InPlace(nn.Module):
    """Overwrites what modules returned, through another name too, and ignores what an in-place module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(12, 12) for _ in range(4))
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        h = self.a(x)
        self.relu(h)
        g = self.same(h)
        k = self.b(h)
        k.mul_(2)
        g.add_(1)
        m = self.c(k)
        m[:, :6].mul_(3)
        return self.head(self.d(k + h) + m)


def llama(**settings):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        **settings,
    )
    return transformers.LlamaForCausalLM(config)


def flat(width=12, batches=2):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(5, width, generator=generator), torch.randint(0, 4, (5,))) for _ in range(batches)]


def pictures():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(3, 3, 9, 9, generator=generator), torch.randint(0, 4, (3,))) for _ in range(2)]


def sequences():
    return [(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3)), torch.randint(0, 4, (3,)))]


MODELS = {
    "sequential": (sequential_cnn, pictures),
    "resnet": (resnet, pictures),
    "encoder": (Encoder, sequences),
    "branches": (Branches, flat),
    "recurrent": (Recurrent, flat),
    "in place": (InPlace, flat),
    "llama": (llama, tokens),
    "tied llama": (lambda: llama(tie_word_embeddings=True, use_cache=False), tokens),
    "cnn": (cnn, images),
    "decoder": (decoder, tokens),
}


def compared(model, data, keep_bytes=KEEP, is_off=False):
    """Every layer of a model changed in turn, run with and without reuse; returns the matrix products of both."""
    model.eval()
    task = choose_task(model, data[0])
    network = mpq.trace(model, model_inputs(model, data[0]))
    reuse = PrefixReuse(model, network.layers, keep_bytes)
    work = {"reused": 0, "full": 0}
    with torch.no_grad():
        for batch in data:
            recorded = reuse.recorded(lambda batch=batch: task.run(model, batch))
            assert torch.equal(recorded.reference.values, task.run(model, batch).values)
            for layer in network.layers:
                parameters = layer_parameters(model, layer)
                changed = from_rows(fake_quantize(as_rows(parameters[0].detach(), layer), "int2"), layer)
                recorded.verify(layer)
                with swapped_data(parameters, changed):
                    with operations() as counted:
                        fast = recorded.outputs(layer).values
                    work["reused"] += counted.count
                    with operations() as counted:
                        slow = task.run(model, batch).values
                    work["full"] += counted.count
                assert torch.equal(fast, slow), layer.name
                assert not torch.equal(fast, recorded.reference.values), layer.name
    assert reuse.is_off == is_off
    assert all("forward" not in module.__dict__ for module in model.modules())
    return work


class operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products and convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("mm", "addmm", "bmm", "convolution", "_transformer_encoder_layer_fwd")
        self.count += func._schema.name.removeprefix("aten::") in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_equals_full_runs_to_the_last_bit_and_leaves_work_out(name):
    build, data = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        work = compared(build(), data())
    assert work["reused"] < 0.9 * work["full"], work


@pytest.mark.parametrize(("name", "bytes_of"), [("resnet", (0, 3000, 9000, KEEP)), ("llama", (0, 3000, 6000, KEEP))])
def test_with_less_room_less_is_left_out_and_nothing_is_wrong(name, bytes_of):
    build, data = MODELS[name]
    work = []
    for keep_bytes in bytes_of:
        torch.manual_seed(0)
        work.append(compared(build(), data()[:1], keep_bytes, is_off=keep_bytes == 0))
    reused = [each["reused"] for each in work]
    assert reused[0] == work[0]["full"]
    assert reused[0] > reused[1] > reused[2] > reused[3]


class Keeps(nn.Module):
    """What it saw last is added to what a later block makes of its input: a replay would add what is out of date."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Seen(), Seen(), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x)) + self.first.seen)


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        self.seen = self.a(x)
        return self.b(self.seen)


class KeepsInObject(Keeps):
    """The same, in an object that stays the same object."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes()
        self.first, self.second = (Notes.block(self.notes) for _ in range(2))

    def forward(self, x):
        self.notes.notes.clear()
        return self.head(self.second(self.first(x)) + self.notes.notes[0])


class Cached(nn.Module):
    """Blocks that fill a shared object; the last block reads what the first one left there."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.blocks, self.head, self.listed = nn.ModuleList(Writes() for _ in range(4)), nn.Linear(12, 4), listed

    def forward(self, x):
        shared = [] if self.listed else Notes()
        for block in self.blocks:
            x = block(x, shared)
        notes = shared if self.listed else shared.notes
        return self.head(x + (notes[0] if notes else 0))


class Notes:
    def __init__(self) -> None:
        self.notes = []

    def block(self):
        return NotesBlock(self)


class NotesBlock(Seen):
    def __init__(self, shared) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x):
        self.shared.notes.append(self.a(x))
        return self.b(self.shared.notes[-1])


class Writes(Seen):
    def forward(self, x, shared):
        (shared if isinstance(shared, list) else shared.notes).append(x * 2)
        return self.b(self.a(x))


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(functional.dropout(self.fc(x), 0.5))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Keeps, "Seen keeps something from run to run"),
        (KeepsInObject, "keeps something from run to run"),
        (lambda: Cached(listed=True), "does more than its output tells"),
        (lambda: Cached(listed=False), "does more than its output tells"),
    ],
)
def test_modules_with_side_effects_are_run_in_full_with_a_warning(build, reason):
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=reason):
        compared(build(), flat(), is_off=True)


def test_a_random_model_is_run_in_full_with_a_warning():
    torch.manual_seed(0)
    model, (x, _) = Random().eval(), flat()[0]
    network, task = mpq.trace(model, x), choose_task(model, flat()[0])
    reuse = PrefixReuse(model, network.layers, KEEP)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="two runs on the same batch differ"):
        recorded = reuse.recorded(lambda: task.run(model, x))
    assert reuse.is_off
    assert not torch.equal(recorded.outputs(network.layers[1]).values, recorded.reference.values)


class Routed(nn.Module):
    """The path depends on the data, before some layers and after others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        x = self.a(x)
        x = self.b(x) if x.sum() > 0 else self.c(self.b(x))
        x = self.c(x) if x[0, 0] > 0 else x + self.c(2 * x)
        return self.head(x)


def test_a_path_that_depends_on_the_data_is_followed_again():
    torch.manual_seed(0)
    model = Routed()
    data = [(sign * x.abs(), y) for sign in (1, -1, 1) for x, y in flat(batches=1)]
    model.a.weight.data.abs_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compared(model, data)


class BufferedCount(nn.Module):
    """Writes to a buffer: the second half of the model reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.register_buffer("last", torch.zeros(5, 12))
        self.writer = Copies(self.last)

    def forward(self, x):
        return self.head(self.b(self.writer(self.a(x))) + self.last)


class Copies(nn.Module):
    def __init__(self, target) -> None:
        super().__init__()
        self.register_buffer("target", target)

    def forward(self, x):
        self.target.copy_(x)
        return x * 2


def test_modules_that_write_to_buffers_are_never_left_out():
    torch.manual_seed(0)
    compared(BufferedCount(), flat())


def test_hooks_and_forwards_of_the_users_own_stay_and_work():
    torch.manual_seed(0)
    model = sequential_cnn()
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    own = model[3].forward
    model[3].__dict__["forward"] = lambda x: 2 * own(x)
    data = pictures()
    model.eval()
    network, task = mpq.trace(model, data[0][0]), choose_task(model, data[0])
    kept = model[3].__dict__["forward"]
    with torch.no_grad():
        recorded = PrefixReuse(model, network.layers, KEEP).recorded(lambda: task.run(model, data[0]))
        model[9].weight.mul_(1.5)
        fast, slow = recorded.outputs(network.layers[3]).values, model(data[0][0])
    assert torch.equal(fast, slow)
    assert model[3].__dict__["forward"] is kept


def test_an_error_of_the_model_is_raised_and_the_model_is_left_whole():
    model = sequential_cnn().eval()
    network = mpq.trace(model, pictures()[0][0])
    with torch.no_grad():
        recorded = PrefixReuse(model, network.layers, KEEP).recorded(
            lambda: choose_task(model, pictures()[0]).run(model, pictures()[0])
        )
        model[9].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken on purpose")))
        with (
            pytest.warns(RuntimeWarning, match="broken on purpose"),
            pytest.raises(ValueError, match="broken on purpose"),
        ):
            recorded.outputs(network.layers[3])
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_negative_room_is_refused():
    with pytest.raises(ValueError, match="keep_bytes must be at least 0, got -1"):
        PrefixReuse(cnn(), (), -1)
