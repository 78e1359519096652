"""Edges against the graph that torch.export makes, ties against lists written by hand."""

import copy
import operator
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq.tracing import trace


class Network(nn.Module):
    """Layers by keyword and a forward to go with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args):
        return self.run(self, *args)


def linears(names, d=16, **others):
    return {name: nn.Linear(d, d) for name in names.split()} | others


def heads(x, count=4):
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


def sdpa(net, x, memory=None):
    memory = x if memory is None else memory
    mixed = F.scaled_dot_product_attention(heads(net.q(x)), heads(net.k(memory)), heads(net.v(memory)))
    return net.o(merged(mixed))


def rotate(x):
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] / 10
    return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()


def eager(net, x):
    """Grouped queries, normalised and rotated, masked, with a cast softmax and dropout."""
    q, k, v = heads(net.q(x)), heads(net.k(x), 2), heads(net.v(x), 2)
    k, v = (z[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for z in (k, v))
    q, k = (rotate(z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)) for z in (q, k))
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -9.0)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float64).to(q.dtype), training=net.training)
    return net.o(merged(weights @ v))


def einsum_attention(net, x):
    q, k, v = (layer(x).unflatten(-1, (4, 4)) for layer in (net.q, net.k, net.v))
    return net.o(torch.einsum("bhts,bshd->bthd", torch.einsum("bthd,bshd->bhts", q, k).softmax(-1), v).flatten(2))


def gated(net, x):
    return net.down(F.silu(net.gate(x)) * net.up(x))


def basic_block(net, x, add=operator.add):
    """ResNet's, with a downsampling shortcut, then one with an identity."""
    x = F.relu(net.stem_norm(net.stem(x)))
    y = net.n2(net.c2(F.relu(net.n1(net.c1(x)))))
    x = F.relu(add(y, net.short_norm(net.short(x))))
    return F.relu(net.n4(net.c4(F.relu(net.n3(net.c3(x))))) + x)


def residual_convolutions():
    norms = {name: nn.BatchNorm2d(8) for name in ("n1", "n2", "short_norm", "n3", "n4")}
    convolutions = {name: nn.Conv2d(8, 8, 3, padding=1) for name in ("c2", "c3", "c4")}
    first = {"c1": nn.Conv2d(4, 8, 3, 2, 1), "short": nn.Conv2d(4, 8, 1, 2)}
    return {"stem": nn.Conv2d(3, 4, 3), "stem_norm": nn.BatchNorm2d(4), **first, **convolutions, **norms}


def inverted(net, x):
    """MobileNetV2's: the input of each block is itself the direct output of a projection."""
    x = net.stem(x)
    for block in (net.a, net.b, net.c):
        x = x + block(x)
    return x


def inverted_block():
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(4)
    wide, deep, narrow = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 4, 1)
    return nn.Sequential(wide, norms[0], nn.ReLU6(), deep, norms[1], nn.ReLU6(), narrow, norms[2])


def excited(net, x):
    """Squeeze and excite, then two heads that read the same features."""
    x = net.conv(x)
    gate = net.f2(F.relu(net.f1(x.mean((2, 3))))).sigmoid()
    features = (x * gate[:, :, None, None]).mean((2, 3))
    return net.classes(features), net.boxes(features)


def mixture(net, x):
    """A router, gated experts that take their own tokens, linear experts that take all, and a gated shared expert."""
    weights = net.router(x).softmax(-1)
    best, chosen = weights.topk(2)
    routed = torch.zeros_like(x)
    for i, (gate, up, down) in enumerate(((net.g0, net.u0, net.d0), (net.g1, net.u1, net.d1))):
        token, place = torch.where(chosen == i)
        own = x[token]
        routed[token] += down(F.silu(gate(own)) * up(own)) * best[token, place, None]
    dense = torch.einsum("te,ted->td", weights[:, :2], torch.stack([net.e0(x), net.e1(x)], 1))
    shared = net.shared_gate(x).sigmoid() * net.sd(F.silu(net.sg(x)) * net.su(x))
    return routed + dense + shared


def pre_norm(net, x):
    x = x + sdpa(net, net.n1(x))
    return net.head((x + gated(net, net.n2(x))).mean(1))


X, IMAGE = torch.randn(2, 5, 16), torch.randn(2, 3, 8, 8)
EXPERTS = linears("g0 u0 d0 g1 u1 d1 e0 e1 sg su sd", router=nn.Linear(16, 3), shared_gate=nn.Linear(16, 1))
QKV = linears("q k v o")
NARROW = {"q": nn.Linear(16, 16), "k": nn.Linear(16, 8), "v": nn.Linear(16, 8), "o": nn.Linear(16, 16)}
SQUEEZE = {"f1": nn.Linear(16, 4), "f2": nn.Linear(4, 16)}
NORMS = {"n1": nn.LayerNorm(16), "n2": nn.LayerNorm(16)}
TIES = {
    # name: (network, inputs, groups)
    "attention": (Network(sdpa, **QKV), (X,), ["q k v"]),
    "eager attention": (Network(eager, **NARROW), (X,), ["q k v"]),
    "einsum attention": (Network(einsum_attention, **QKV), (X,), ["q k v"]),
    "cross attention": (Network(sdpa, **QKV), (X, torch.randn(2, 7, 16)), ["k v"]),
    "gated": (Network(gated, **linears("gate up down")), (X,), ["gate up"]),
    "block": (Network(pre_norm, **QKV, **linears("gate up down head"), **NORMS), (X,), ["q k v", "gate up"]),
    "read through reshapes": (
        *(Network(lambda n, x: n.a(x).flatten(0, 1) * n.b(x.view(10, 16)), **linears("a b")), (X,), ["a b"]),
    ),
    "read through the same slice": (
        *(Network(lambda n, x: n.a(x[:, 0]) * n.b(x[:, 0]).tanh(), **linears("a b")), (X,), ["a b"]),
    ),
    "different slices": (Network(lambda n, x: n.a(x[:, 0]) * n.b(x[:, 1]), **linears("a b")), (X,), []),
    "read before and after a write": (
        *(Network(lambda n, x: n.a(x) * n.b(x.add_(1)), **linears("a b")), (X.clone(),), []),
    ),
    "added only": (Network(lambda n, x: n.c(n.a(x) + n.b(x)), **linears("a b c")), (X,), []),
    "added, then normalised": (
        *(Network(lambda n, x: (y := n.a(x) + n.b(x)) * y.pow(2).mean(-1, True).rsqrt(), **linears("a b")), (X,), []),
    ),
    "gated by one number": (
        Network(lambda n, x: n.a(x) * n.gate(x).sigmoid(), **linears("a"), gate=nn.Linear(16, 1)),
        *((X,), []),
    ),
    "meet behind a layer": (Network(lambda n, x: n.c(n.a(x)) * n.b(x), **linears("a b c")), (X,), []),
    "plain perceptron": (Network(lambda n, x: n.b(F.relu(n.a(x))), **linears("a b")), (X,), []),
    "shared over depth": (Network(lambda n, x: sdpa(n, sdpa(n, x)), **QKV), (X,), ["q k v"]),
    "mixture of experts": (Network(mixture, **EXPERTS), (torch.randn(6, 16),), ["g0 u0", "g1 u1", "sg su"]),
    "squeeze and excite": (
        Network(
            excited, conv=nn.Conv2d(3, 16, 3), f1=nn.Linear(16, 4), f2=nn.Linear(4, 16), **linears("classes boxes")
        ),
        *((IMAGE,), []),
    ),
    "residual": (Network(basic_block, **residual_convolutions()), (IMAGE,), ["c2 short"]),
    "inverted residual": (
        Network(inverted, stem=nn.Conv2d(3, 4, 1), a=inverted_block(), b=inverted_block(), c=inverted_block()),
        *((IMAGE,), []),
    ),
    "three branches and an identity": (
        Network(lambda n, x: n.a(x) + n.b(x) + n.c(x) + x, **{k: nn.Conv2d(3, 3, 1) for k in "abc"}),
        *((IMAGE,), ["a b c"]),
    ),
    "upsampled branch": (
        Network(lambda n, x: n.a(x) + F.interpolate(n.b(x), 8), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 2, 2)),
        *((IMAGE,), []),
    ),
    "broadcast branch": (
        Network(lambda n, x: n.a(x) + n.b(x.mean((2, 3), True)), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)),
        *((IMAGE,), []),
    ),
    "added linears": (Network(lambda n, x: n.a(x) + n.b(x), **linears("a b")), (X,), []),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", TIES)
def test_ties(name, device):
    network, inputs, groups = TIES[name]
    if device == "meta" and name == "mixture of experts":
        pytest.skip("which token goes where depends on values, and the meta device has none")
    with torch.device(device):
        found = trace(copy.deepcopy(network).to(device), tuple(x.to(device) for x in inputs))
    assert list(found.siblings) == [tuple(group.split()) for group in groups]


def in_place(left, right):
    left += right
    return left


ADDITIONS = {
    "+": (operator.add, True),
    "+=": (in_place, True),
    "torch.add": (torch.add, True),
    "add": (lambda a, b: a.add(b), True),
    "add_": (lambda a, b: a.add_(b), True),
    "out": (lambda a, b: torch.add(a, b, out=torch.empty_like(a)), True),
    "through identities": (lambda a, b: F.dropout(a, training=False).contiguous() + b.clone().double().float(), True),
    "quantizable": (torch.ao.nn.quantized.FloatFunctional().add, True),
    "-": (operator.sub, False),
    "activated": (lambda a, b: a + F.relu(b), False),
    "scaled": (lambda a, b: a + 2 * b, False),
    "broadcast": (lambda a, b: a + b.mean((2, 3), keepdim=True), False),
    "concatenated": (lambda a, b: torch.cat([a, b], 1)[:, :8], False),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_spellings_of_an_addition(name):
    add, tied = ADDITIONS[name]
    model = Network(lambda net, x: basic_block(net, x, add), **residual_convolutions())
    assert trace(model, IMAGE).siblings == ((("c2", "short"),) if tied else ())


def exported_edges(model, inputs):
    """(producer, consumer) pairs read off the graph of torch.export, node by node."""
    aten, reached, edges = torch.ops.aten, {}, set()
    applying = (aten.linear.default, aten.conv2d.default, aten.embedding.default)
    program = torch.export.export(model.eval(), inputs)
    parameters = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        sources = set().union(*(reached[read] for read in node.all_input_nodes))
        weights = [parameters[read.name] for read in node.all_input_nodes if read.name in parameters]
        if node.target in applying:
            (layer,) = (name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
            edges |= {(source, layer) for source in sources if source != layer}
            sources = {layer}
        reached[node] = sources
    return edges


GRAPHS = {name: TIES[name][:2] for name in TIES if name not in ("mixture of experts", "read before and after a write")}
GRAPHS["embedding"] = (
    Network(lambda n, ids: n.head(n.a(n.e(ids)) + n.e(ids)), **linears("a head"), e=nn.Embedding(9, 16)),
    (torch.zeros(2, 3, dtype=torch.long),),
)


@pytest.mark.parametrize("name", GRAPHS)
def test_edges_are_those_of_the_exported_graph(name):
    model, inputs = GRAPHS[name]
    edges = trace(model, inputs).edges
    assert len(set(edges)) == len(edges)
    assert set(edges) == exported_edges(model, inputs)


def test_edges_come_in_execution_order():
    model = Network(pre_norm, **QKV, **linears("gate up down head"), **NORMS)
    assert trace(model, X).edges == (
        *(("q", "o"), ("k", "o"), ("v", "o"), ("o", "gate"), ("o", "up"), ("gate", "down"), ("up", "down")),
        *(("o", "head"), ("down", "head")),
    )


def test_a_residual_path_keeps_every_writer():
    model = Network(lambda n, x: n.d(n.c(x + n.a(x) + n.b(x)) + n.a.weight.sum()), **linears("a b c d"))
    assert trace(model, X).edges == (("a", "c"), ("b", "c"), ("c", "d"))


def test_layers_that_write_into_one_buffer_both_reach_its_reader():
    def forward(net, x):
        both = torch.zeros(2, *x.shape)
        both[0] = net.a(x)
        both[1].copy_(net.b(x))
        return net.c(both.sum(0))

    assert trace(Network(forward, **linears("a b c")), X).edges == (("a", "c"), ("b", "c"))


def test_what_a_product_is_added_to_reaches_the_reader_too():
    model = Network(lambda n, x: n.c(torch.addmm(n.a(x), x, n.b.weight)), **linears("a b c"))
    assert trace(model, torch.randn(3, 16)).edges == (("a", "c"), ("b", "c"))


def test_a_loop_makes_an_edge_back_but_none_to_itself():
    model = Network(lambda n, x: n.a(n.b(n.a(n.a(x)))), **linears("a b"))
    assert trace(model, X).edges == (("a", "b"), ("b", "a"))


def test_indices_carry_no_format():
    model = Network(
        lambda n, x: n.e(n.a(x).argmax(-1)) + n.e(n.a(x)[..., 0].long()), **linears("a"), e=nn.Embedding(16, 4)
    )
    assert trace(model, torch.zeros(2, 5, 16)).edges == ()


def test_activations_are_not_kept_alive():
    seen = []

    def forward(net, x):
        for _ in range(5):
            x = net.a(x).relu()
            seen.append(weakref.ref(x))
        return sum(ref() is not None for ref in seen)

    alive = []
    model = Network(forward, **linears("a"))
    model.register_forward_hook(lambda module, args, output: alive.append(output))
    trace(model, X)
    assert alive == [1]
