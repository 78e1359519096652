"""Lifetimes of activations: networks worked out by hand, and random ones against a replay that counts references."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq.buffers import Buffer, Liveness, peak_elements
from mpq.tracing import trace

DEVICES = ["cpu", "meta"]


class Net(nn.Module):
    """Layers by keyword and a forward to go with them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args):
        return self.run(self, *args)


def listed(network):
    return [(b.owner, b.elements, b.first, b.last) for b in network.buffers]


def alive(buffers):
    """Elements alive in each step, counted one by one."""
    steps = 1 + max(buffer.last for buffer in buffers)
    return [sum(b.elements for b in buffers if b.first <= step <= b.last) for step in range(steps)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_chain_holds_the_input_and_the_output_of_each_layer(device):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 5), nn.Sigmoid()),
    )
    network = trace(model.to(device), torch.zeros(2, 3, 6, 6, device=device))
    assert listed(network) == [
        *(("0", 2 * 3 * 36, 0, 0), ("6", 2 * 8 * 16, 0, 1), ("6", 2 * 8 * 4, 1, 2), ("6", 2 * 5, 2, 2)),
    ]
    assert network.peak_elements() == 2 * (3 * 36 + 8 * 16)


class Block(nn.Module):
    """ResNet's: two convolutions, and a convolution on the skip where it changes size."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.c2, self.b2 = nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(width, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)))))
        y += self.short(x)
        return F.relu(y, inplace=True)


@pytest.mark.parametrize("device", DEVICES)
def test_resnet_8_of_mlperf_tiny(device):
    """Its first block holds three maps of 16 channels and 32 × 32: 48 KiB in int8."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10), nn.Softmax(-1))
    model = nn.Sequential(stem, Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), head)
    network = trace(model.to(device), torch.zeros(1, 3, 32, 32, device=device))
    assert listed(network) == [
        ("0.0", 3 * 1024, 0, 0),
        *(("1.c1", 16 * 1024, 0, 2), ("1.c2", 16 * 1024, 1, 2)),
        *(("2.c1", 16 * 1024, 2, 5), ("2.c2", 32 * 256, 3, 4), ("3.c1", 32 * 256, 4, 8)),
        *(("3.c1", 32 * 256, 5, 5), ("3.c2", 64 * 64, 6, 7), ("4.2", 64 * 64, 7, 9)),
        *(("4.2", 64 * 64, 8, 8), ("4.2", 64, 9, 10), ("4.2", 10, 10, 11), ("4.2", 10, 11, 11)),
    ]
    assert network.peak_elements() == 3 * 16 * 32 * 32 == 48 * 1024
    routes = [(buffer.producer, buffer.readers) for buffer in network.buffers]
    assert routes == [
        *(("", ("0.0",)), ("0.0", ("1.c1",)), ("1.c1", ("1.c2",))),
        *(("1.c2", ("2.c1", "2.short")), ("2.c1", ("2.c2",)), ("2.c2", ("3.c1", "3.short"))),
        *(("2.short", ()), ("3.c1", ("3.c2",)), ("3.c2", ())),
        *(("3.short", ()), ("3.c2", ("4.2",)), ("4.2", ()), ("4.2", ())),
    ]


def test_dense_connections_keep_every_map_until_it_is_joined():
    def run(net, x):
        a = F.relu(net.a(x))
        b = net.b(torch.cat([x, a], 1))
        return net.c(torch.cat([x, a, b], 1))

    convolutions = {"a": nn.Conv2d(4, 2, 1), "b": nn.Conv2d(6, 2, 1), "c": nn.Conv2d(8, 1, 1)}
    network = trace(Net(run, **convolutions), torch.zeros(1, 4, 1, 1))
    assert listed(network) == [
        *(("a", 4, 0, 3), ("b", 2, 0, 3), ("b", 6, 1, 2), ("c", 2, 2, 3), ("c", 8, 3, 4), ("c", 1, 4, 4)),
    ]
    assert network.peak_elements() == 4 + 2 + 2 + 8


def test_an_inverted_residual_holds_its_narrow_input_beside_two_wide_maps():
    def run(net, x):
        x = net.stem(x)
        y = F.relu6(net.deep(F.relu6(net.wide(x))))
        gate = net.excite(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        return x + net.narrow(y * gate)

    layers = {"wide": nn.Conv2d(2, 12, 1), "deep": nn.Conv2d(12, 12, 3, 1, 1, groups=12), "narrow": nn.Conv2d(12, 2, 1)}
    model = Net(run, stem=nn.Conv2d(1, 2, 1), excite=nn.Conv2d(12, 12, 1), **layers)
    network = trace(model, torch.zeros(1, 1, 4, 4))
    assert listed(network) == [
        *(("stem", 16, 0, 0), ("wide", 32, 0, 5), ("deep", 192, 1, 2), ("narrow", 192, 2, 5)),
        *(("excite", 12, 3, 4), ("narrow", 12, 4, 4), ("narrow", 32, 5, 5)),
    ]
    assert network.peak_elements() == 32 + 192 + 192


@pytest.mark.parametrize("device", DEVICES)
def test_a_transformer_block(device):
    """Width 8, 2 heads, 5 positions, MLP of 32: the peak is the stream, and the MLP's input and output."""

    def run(net, x):
        n = net.n1(x)
        q, k, v = (layer(n).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        x = x + net.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + net.down(F.gelu(net.up(net.n2(x))))

    layers = {name: nn.Linear(8, 8) for name in "qkvo"} | {"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}
    model = Net(run, n1=nn.LayerNorm(8), n2=nn.LayerNorm(8), **layers)
    network = trace(model.to(device), torch.zeros(1, 5, 8, device=device))
    assert listed(network) == [
        *(("q", 40, 0, 5), ("q", 40, 0, 3), ("q", 40, 1, 4), ("k", 40, 2, 4), ("v", 40, 3, 4)),
        *(("o", 40, 4, 5), ("up", 40, 5, 8), ("up", 40, 6, 7), ("down", 160, 7, 8), ("down", 40, 8, 8)),
    ]
    assert network.peak_elements() == 40 + 40 + 160


def test_attention_that_is_spelled_out_stores_its_scores():
    model = Net(lambda net, x: net.o((net.q(x) @ x.mT).softmax(-1) @ x), q=nn.Linear(4, 4), o=nn.Linear(4, 4))
    assert listed(trace(model, torch.zeros(1, 6, 4))) == [
        *(("q", 24, 0, 3), ("q", 24, 0, 1), ("q", 36, 1, 2), ("q", 36, 2, 3), ("o", 24, 3, 4), ("o", 24, 4, 4)),
    ]


def two(run, **layers):
    return Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), **layers)


def written_into_parts(net, x):
    both = torch.zeros(2, 3, 4)
    both[0] = net.a(x)
    both[1].copy_(net.b(x))
    return both.flatten()


def changed_copy(net, x):
    y = net.a(x)
    z = y.clone().mul_(2)
    return net.b(y), z


def changed_original(net, x):
    y = net.a(x)
    z = y.clone()
    y.mul_(2)
    return net.b(y), z


CASES = {
    # name: (model, inputs, (owner, elements, first, last) of every buffer)
    "a layer that runs twice": (
        two(lambda net, x: net.a(net.a(x))),
        [("a", 12, 0, 0), ("a", 12, 0, 1), ("a", 12, 1, 1)],
    ),
    "functions with parameters": (
        two(lambda net, x: F.linear(F.linear(x, net.a.weight, net.a.bias), net.b.weight)),
        [("a", 12, 0, 0), ("b", 12, 0, 1), ("b", 12, 1, 1)],
    ),
    "a kernel that adds what it is given": (
        two(lambda net, x: torch.addmm(net.b(x), x, net.a.weight)),
        [("b", 12, 0, 1), ("b", 12, 0, 1), ("a", 12, 1, 1)],
    ),
    "views and permutations": (
        two(lambda net, x: net.b(net.a(x).t().contiguous().view(2, 6).reshape(3, 4))),
        [("a", 12, 0, 0), ("b", 12, 0, 1), ("b", 12, 1, 1)],
    ),
    "an operand that is read again": (
        two(lambda net, x: (y := net.a(x)) + net.b(y.relu())),
        [("a", 12, 0, 0), ("b", 12, 0, 2), ("b", 12, 1, 2), ("b", 12, 2, 2)],
    ),
    "a part of a tensor that lives on": (
        Net(lambda net, x: net.b(x[:, :2].relu()) + net.b(x[:, 2:]), b=nn.Linear(2, 2)),
        [("b", 12, 0, 2), ("b", 6, 0, 1), ("b", 6, 1, 2), ("b", 6, 2, 2)],
    ),
    "an early output is held to the end": (
        two(lambda net, x: [net.b(x), {"y": net.a(net.a(x))}]),
        [("b", 12, 0, 1), ("b", 12, 0, 2), ("a", 12, 1, 2), ("a", 12, 2, 2)],
    ),
    "an early result that nobody wants": (
        two(lambda net, x: (net.b(x), net.a(net.a(x)))[1]),
        [("b", 12, 0, 1), ("b", 12, 0, 0), ("a", 12, 1, 2), ("a", 12, 2, 2)],
    ),
    "written into parts": (
        two(written_into_parts),
        [("a", 12, 0, 2), ("a", 12, 0, 1), ("a", 24, 1, 2), ("b", 12, 2, 2)],
    ),
    "a copy that is changed": (
        two(changed_copy),
        [("a", 12, 0, 0), ("b", 12, 0, 2), ("a", 12, 1, 2), ("b", 12, 2, 2)],
    ),
    "a copied tensor that is changed": (
        two(changed_original),
        [("a", 12, 0, 0), ("b", 12, 0, 2), ("b", 12, 1, 2), ("b", 12, 2, 2)],
    ),
    "constants are no buffers": (
        two(lambda net, x: net.a(x) + net.b.weight[:3] + torch.ones(3, 4).cumsum(0) @ torch.ones(4, 4)),
        [("a", 12, 0, 0), ("a", 12, 0, 0)],
    ),
    "several outputs of one operator": (
        two(lambda net, x: net.b(torch.topk(net.a(x), 4)[0])),
        [("a", 12, 0, 0), ("b", 12, 0, 1), ("b", 12, 1, 2), ("b", 12, 2, 2)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_buffers_of(name):
    model, expected = CASES[name]
    assert listed(trace(model, torch.ones(3, 4))) == expected


def test_indices_are_an_input_and_masks_are_none():
    model = Net(lambda net, ids, mask: net.a(net.e(ids) * mask[..., None]), e=nn.Embedding(9, 4), a=nn.Linear(4, 4))
    network = trace(model, (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)))
    assert listed(network) == [("e", 6, 0, 0), ("a", 24, 0, 1), ("a", 24, 1, 1)]


def test_an_input_that_reaches_no_layer_directly():
    model = Net(lambda net, x, y: net.a(x @ y), a=nn.Linear(4, 4))
    network = trace(model, (torch.zeros(2, 3, 5), torch.zeros(2, 5, 4)))
    assert listed(network) == [("a", 30, 0, 0), ("a", 40, 0, 0), ("a", 24, 0, 1), ("a", 24, 1, 1)]


def test_a_network_without_layers_or_buffers():
    assert listed(trace(nn.ReLU(), torch.zeros(3, 4))) == [("", 12, 0, 0)]
    empty = trace(Net(lambda net, x: torch.ones(2)), torch.zeros(3))
    assert (empty.buffers, empty.peak_elements()) == ((), 0)


def test_the_peak_is_that_of_a_count_step_by_step():
    draw = random.Random(0)
    for _ in range(50):
        spans = [sorted((draw.randrange(9), draw.randrange(9))) for _ in range(draw.randrange(1, 8))]
        buffers = [Buffer("a", draw.randrange(1, 99), first, last) for first, last in spans]
        assert peak_elements(buffers) == max(alive(buffers))
    assert peak_elements(()) == 0


def test_other_outputs_are_stored_if_somebody_reads_them():
    run = Liveness()
    x = run.given(4)
    first, second, _ = run.step((x,), (4, 4, 4))
    run.step((second,), (1,), layer="a")
    assert [(b.owner, b.elements) for b in run.buffers()] == [("a", 4), ("", 4), ("a", 4), ("a", 1)]
    assert first != second


class Program(nn.Module):
    """Runs a list of (operator, tensors it reads, channels it writes); every operator writes a new tensor."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines
        self.layers = nn.ModuleDict(
            {str(i): nn.Conv2d(width, out, 1) for i, (op, _, width, out) in enumerate(lines) if op == "conv"}
        )
        self.norms = nn.ModuleDict({str(i): nn.BatchNorm2d(out) for i, (*_, out) in enumerate(lines)})

    def forward(self, x):
        values = [x]
        for i, (op, reads, *_) in enumerate(self.lines):
            given = [values[read] for read in reads]
            if op == "conv":
                values.append(self.layers[str(i)](*given))
            elif op == "norm":
                values.append(self.norms[str(i)](*given))
            else:
                values.append(OPERATORS[op](*given))
        return values[-1]


OPERATORS = {
    "relu": F.relu,
    "add": torch.add,
    "mul": torch.mul,
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "upsample": lambda x: F.interpolate(x, scale_factor=2)[..., ::2, ::2].contiguous(),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "view": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (2, 2)),
}
IN_PLACE = ("relu", "add", "mul", "norm")


def random_program(draw):
    """Up to twelve lines over tensors of 1 to 3 channels (more after a concatenation)."""
    lines, widths = [], [2]
    for _ in range(draw.randrange(3, 13)):
        op = draw.choice(["conv", "conv", "relu", "add", "mul", "norm", "pool", "cat", "view"])
        left = draw.randrange(max(len(widths) - 4, 0), len(widths))
        twins = [i for i, width in enumerate(widths) if width == widths[left]]
        right = draw.choice(twins)
        reads = (left, right) if op in ("add", "mul", "cat") else (left,)
        out = draw.randrange(1, 4) if op == "conv" else widths[left] + (op == "cat") * widths[right]
        lines.append((op, reads, widths[left], out))
        widths.append(out)
    return lines


def replayed(lines, batch):
    """Elements in memory while each operator that needs memory runs, line by line; memory is freed as soon as no line
    below reads any tensor in it; looking at it in another shape is no reading."""
    size = [2 * 4 * batch] + [out * 4 * batch for *_, out in lines]
    memory = {0: [0]}  # block: the tensors that live in it; a block is named after its first tensor
    totals = []

    def needed(tensor, line):
        readers = [(i, op) for i, (op, reads, *_) in enumerate(lines) if i >= line and tensor in reads]
        return tensor == len(lines) or any(op != "view" or needed(i + 1, i + 1) for i, op in readers)

    def free(line):
        for block in list(memory):
            if not any(needed(tensor, line) for tensor in memory[block]):
                del memory[block]

    free(0)
    for line, (op, reads, *_) in enumerate(lines):
        new = line + 1
        blocks = {block for block, held in memory.items() if set(held) & set(reads)}
        dying = [b for b in blocks if size[b] == size[new] and not any(needed(t, line + 1) for t in memory[b])]
        if op == "view":
            for block in blocks:  # none if nobody wants the view
                memory[block].append(new)
        elif op in IN_PLACE and dying:
            memory[max(dying)].append(new)
        else:
            memory[new] = [new]
            totals.append(sum(size[block] for block in memory))
        if new in memory and not needed(new, line + 1):
            del memory[new]  # a result that nobody wants
        free(line + 1)
    return totals


@pytest.mark.parametrize("seed", range(60))
def test_random_networks_against_a_replay(seed):
    lines = random_program(random.Random(seed))
    batch = 3
    network = trace(Program(lines), torch.zeros(batch, 2, 2, 2))
    expected = replayed(lines, batch)
    if expected:
        assert alive(network.buffers) == expected
        assert network.peak_elements() == max(expected)
    owners = {buffer.owner for buffer in network.buffers}
    assert owners <= {layer.name for layer in network.layers} | {""}
