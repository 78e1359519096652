"""Relevance of whole networks against loops and matrices without autograd; and the model's return."""

import copy

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from test_sensitivity_relevance_rules import RULES, numbers, slow_rule
from torch import nn
from torch.nn import functional

import mpq
from mpq.sensitivity.layer_relevance import relevance, shares
from mpq.sensitivity.relevance_rules import parse_rule


def one_hot_of_largest(values):
    return torch.where(values == values.max(), values, torch.zeros_like(values))


def mlp(bias):
    torch.manual_seed(0)
    sizes = [(6, 8), (8, 5), (5, 4)]
    layers = [part for a, b in sizes for part in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double().eval()


def slow_mlp(model, x, rule, absorbing=True):
    """{layer: R at its input} of one sample."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    given = [x]
    for layer in layers:
        z = layer.weight.detach() @ given[-1] + (0 if layer.bias is None else layer.bias.detach())
        given.append(z.clamp_min(0) if layer is not layers[-1] else z)
    current, found = one_hot_of_largest(given[-1]), []
    for layer, inputs in zip(reversed(layers), reversed(given[:-1]), strict=True):
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        current = slow_rule(rule, inputs, layer.weight.detach(), bias, current, absorbing)
        found.append(current)
    return found[::-1]


@pytest.mark.parametrize("bias", [None, "absorb", "distribute"])
@pytest.mark.parametrize("name", RULES)
def test_an_mlp_equals_loops(name, bias):
    model, x = mlp(bias is not None), numbers(4, 6)
    frame = relevance(model, x, rule=name, bias=bias or "absorb")
    slow = [slow_mlp(model, sample, parse_rule(name), bias != "distribute") for sample in x]
    magnitudes = np.mean([[float(r.abs().sum()) for r in sample] for sample in slow], 0)
    np.testing.assert_allclose(frame["input"], magnitudes / magnitudes.sum(), rtol=1e-10)
    signed = np.mean([[float(r.sum()) for r in sample] for sample in slow], 0)
    np.testing.assert_allclose(frame["input_signed"], signed, rtol=1e-10)


@pytest.mark.parametrize("name", ["z", "z+", "alpha-beta:2,1", "gamma"])
def test_a_bias_free_mlp_conserves_the_logit_at_every_layer(name):
    model, x = mlp(bias=False), numbers(7, 6)
    frame = relevance(model, x, rule=name)
    logit = float(model(x).detach().max(1).values.mean())
    np.testing.assert_allclose(frame[["input_signed", "output_signed"]], logit, rtol=1e-12)
    assert frame.attrs["conservation"] == pytest.approx(1, abs=1e-12)
    assert frame.attrs["unruled"] == {}


class ConvNet(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.second = nn.Conv2d(3, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        hidden = functional.relu(self.norm(self.first(images)), inplace=True)
        return self.head(functional.relu(self.second(hidden)).mean((2, 3)))


def conv_net():
    torch.manual_seed(1)
    model = ConvNet().double().eval()
    for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
        nn.init.normal_(tensor)
    model.norm.running_var.uniform_(0.5, 2)
    return model


def dense(conv, shape):
    """The matrix and the bias of a convolution for inputs of a shape."""
    size = int(np.prod(shape))
    with torch.no_grad():
        zero = conv(torch.zeros(1, *shape, dtype=torch.float64))
        matrix = conv(torch.eye(size, dtype=torch.float64).reshape(size, *shape)) - zero
    return matrix.reshape(size, -1).T, zero.flatten()


def slow_conv_net(model, image, rule, fold):
    folded = copy.deepcopy(model)
    scale = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach()
    shift = (model.norm.bias - model.norm.running_mean * scale).detach()
    if fold:
        folded.first.weight.data *= scale[:, None, None, None]
        folded.first.bias.data = folded.first.bias.data * scale + shift
    first, first_bias = dense(folded.first, (2, 5, 5))
    second, second_bias = dense(folded.second, (3, 3, 3))
    a = image.flatten()
    z = first @ a + first_bias
    each = 9
    y = z if fold else z * scale.repeat_interleave(each) + shift.repeat_interleave(each)
    b = y.clamp_min(0)
    c = (second @ b + second_bias).clamp_min(0)
    pooled = c.reshape(4, -1).mean(1)
    w, bias = model.head.weight.detach(), model.head.bias.detach()
    at_head = slow_rule(rule, pooled, w, bias, one_hot_of_largest(w @ pooled + bias))
    at_pool = (c.reshape(4, -1) / c.reshape(4, -1).sum(1, keepdim=True).clamp_min(1e-300) * at_head[:, None]).flatten()
    at_second = slow_rule(rule, b, second, second_bias, at_pool)
    at_norm = at_second if fold else at_second * z * scale.repeat_interleave(each) / y
    at_first = slow_rule(rule, a, first, first_bias, at_norm)
    return [at_first, at_second, at_head]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_a_convolutional_net_with_batch_norm_equals_dense_matrices(name, fold):
    model, data = conv_net(), numbers(3, 2, 5, 5, seed=5)
    frame = relevance(model, data, rule=name, fold_norms=fold, task="classification")
    slow = [slow_conv_net(model, image, parse_rule(name), fold) for image in data]
    magnitudes = np.mean([[float(r.abs().sum()) for r in sample] for sample in slow], 0)
    np.testing.assert_allclose(frame["input"], magnitudes / magnitudes.sum(), rtol=1e-9)
    assert frame.attrs["unruled"] == {}


def test_z_box_rules_the_first_layer_alone_and_its_relevance_arrives():
    model, data = conv_net(), numbers(3, 2, 5, 5, seed=5)
    plain, boxed = (relevance(model, data, rule="gamma", input_rule=r, bias="distribute") for r in (None, "z-box"))
    assert boxed.loc["second", "input_signed"] == pytest.approx(plain.loc["second", "input_signed"], rel=1e-12)
    assert boxed.loc["first", "input_signed"] == pytest.approx(boxed.loc["first", "output_signed"], rel=1e-9)
    assert boxed["input"]["first"] != pytest.approx(plain["input"]["first"], rel=1e-3)
    assert boxed.attrs["conservation"] == pytest.approx(1, abs=1e-9)


class Attention(nn.Module):
    """One head with a residual connection."""

    def __init__(self, fused):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.head, self.fused = nn.Linear(4, 3, bias=False), fused

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
        return self.head((x + self.o(mixed)).mean(1))


def slow_matmul(a, b, relevance):
    """Half of every product's relevance to each of its two factors."""
    at_a, at_b = torch.zeros_like(a), torch.zeros_like(b)
    z = a @ b
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            for m in range(a.shape[1]):
                part = a[i, m] * b[m, j] / z[i, j] * relevance[i, j]
                at_a[i, m] += part / 2
                at_b[m, j] += part / 2
    return at_a, at_b


def slow_tokens(rule, x, weight, relevance):
    none = torch.zeros(len(weight), dtype=torch.float64)
    return torch.stack([slow_rule(rule, x[t], weight, none, relevance[t]) for t in range(len(x))])


def slow_attention(model, x, rule):
    weight = {name: getattr(model, name).weight.detach() for name in ("q", "k", "v", "o", "head")}
    q, k, v = (x @ weight[name].T for name in "qkv")
    scores = q @ k.T / 2
    probabilities = scores.softmax(-1)
    mixed = probabilities @ v
    branch = mixed @ weight["o"].T
    stream = x + branch
    pooled = stream.mean(0)
    none = torch.zeros(3, dtype=torch.float64)
    at = {"head": slow_rule(rule, pooled, weight["head"], none, one_hot_of_largest(weight["head"] @ pooled))}
    at_stream = stream / stream.sum(0) * at["head"]
    at["o"] = slow_tokens(rule, mixed, weight["o"], at_stream * branch / stream)
    at_probabilities, at_v = slow_matmul(probabilities, v, at["o"])
    at_scores = torch.zeros_like(scores)
    for t in range(len(x)):
        for s in range(len(x)):  # AttnLRP: x_i (R_i - s_i Σ R)
            rest = probabilities[t, s] * at_probabilities[t].sum()
            at_scores[t, s] = scores[t, s] * (at_probabilities[t, s] - rest)
    at_q, at_k = slow_matmul(q, k.T / 2, at_scores)
    at |= {name: slow_tokens(rule, x, weight[name], r) for name, r in (("q", at_q), ("k", at_k.T), ("v", at_v))}
    return [at[name] for name in ("q", "k", "v", "o", "head")]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["z", "z+", "gamma:0.5"])
def test_an_attention_block_with_a_residual_equals_loops(name, fused):
    torch.manual_seed(0)
    model, data = Attention(fused).double().eval(), numbers(2, 3, 4)
    frame = relevance(model, data, rule=name, task="classification").loc[["q", "k", "v", "o", "head"]]
    slow = [slow_attention(model, sample, parse_rule(name)) for sample in data]
    magnitudes = np.mean([[float(r.abs().sum()) for r in sample] for sample in slow], 0)
    np.testing.assert_allclose(frame["input"], magnitudes / magnitudes.sum(), rtol=1e-9)
    np.testing.assert_allclose(
        frame["input_signed"], np.mean([[float(r.sum()) for r in sample] for sample in slow], 0), rtol=1e-9
    )
    half = frame.loc["o", "input_signed"] / 2
    assert frame.loc["v", "input_signed"] == pytest.approx(half, rel=1e-10)


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down, self.head = nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        normed = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.head(x + self.down(functional.silu(self.gate(normed)) * self.up(normed)))


def slow_swiglu(model, x, rule):
    weight = {name: getattr(model, name).weight.detach() for name in ("gate", "up", "down", "head")}
    none = torch.zeros(9, dtype=torch.float64)
    normed = model.scale.detach() * x / (x.pow(2).mean() + 1e-6).sqrt()
    gate, up = weight["gate"] @ normed, weight["up"] @ normed
    product = gate * gate.sigmoid() * up
    branch = weight["down"] @ product
    stream = x + branch
    at = {"head": slow_rule(rule, stream, weight["head"], none, one_hot_of_largest(weight["head"] @ stream))}
    at["down"] = slow_rule(rule, product, weight["down"], none, at["head"] * branch / stream)
    at["gate"] = slow_rule(rule, normed, weight["gate"], none, at["down"] / 2)
    at["up"] = slow_rule(rule, normed, weight["up"], none, at["down"] / 2)
    return [at[name] for name in ("gate", "up", "down", "head")]


@pytest.mark.parametrize("name", ["z", "z+", "gamma:0.5"])
def test_a_gated_block_with_rms_norm_equals_loops_and_conserves(name):
    torch.manual_seed(0)
    model, data = SwiGLU().double().eval(), numbers(3, 4)
    frame = relevance(model, data, rule=name, task="classification").loc[["gate", "up", "down", "head"]]
    slow = [slow_swiglu(model, sample, parse_rule(name)) for sample in data]
    magnitudes = np.mean([[float(r.abs().sum()) for r in sample] for sample in slow], 0)
    np.testing.assert_allclose(frame["input"], magnitudes / magnitudes.sum(), rtol=1e-9)
    assert frame.attrs["conservation"] == pytest.approx(1, abs=1e-12)
    assert frame.attrs["unruled"] == {}


class Around(nn.Module):
    """A step between two linears with a residual over it."""

    def __init__(self, step, residual=True):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)
        self.step, self.residual = step, residual

    def forward(self, x):
        hidden = self.first(x)
        stepped = self.step(hidden)
        return self.head(hidden + stepped if self.residual else stepped)


def newgelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3))))


class AtEveryPosition(nn.Module):
    """A norm over (samples, channels, positions), with the positions made up."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.reshape(-1, 4, 2)).flatten(1)


STEPS = {
    "gelu": functional.gelu,
    "gelu written out": newgelu,
    "swish written out": lambda x: x * torch.sigmoid(x),
    "gated linear unit": lambda x: functional.glu(torch.cat([x, x.flip(1)], 1)),
    "sigmoid gate": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "square": lambda x: x * x,
    "squared relu": lambda x: functional.relu(x).pow(2),
    "tanh": torch.tanh,
    "elu": functional.elu,
    "hardswish": functional.hardswish,
    "mish": functional.mish,
    "leaky relu": lambda x: functional.leaky_relu(x, 0.1),
    "layer norm": nn.LayerNorm(8, elementwise_affine=False),
    "layer norm by hand": lambda x: (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True).add(1e-5).sqrt(),
    "rms norm": nn.RMSNorm(8),
    "l2 norm": functional.normalize,
    "group norm": AtEveryPosition(nn.GroupNorm(2, 4)),
    "instance norm": AtEveryPosition(nn.InstanceNorm1d(4)),
    "max pool": lambda x: functional.max_pool1d(x[:, None], 2)[:, 0].repeat(1, 2),
    "outer product": lambda x: torch.einsum("bi,bj->bij", x, x).mean(2),
}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_steps_conserve_and_none_of_them_falls_back(name, residual):
    torch.manual_seed(0)
    model, data = Around(STEPS[name], residual).double().eval(), numbers(3, 8)
    frame = relevance(model, data, rule="z+", task="classification")
    np.testing.assert_allclose(frame["input_signed"], frame["output_signed"]["head"], rtol=1e-12)
    assert frame.attrs["unruled"] == {}


def test_written_out_and_built_in_are_the_same():
    torch.manual_seed(0)
    built_in = Around(lambda x: functional.gelu(x, approximate="tanh")).double().eval()
    written = copy.deepcopy(built_in)
    written.step = newgelu
    by_hand = copy.deepcopy(built_in)
    by_hand.step = STEPS["layer norm by hand"]
    layer_norm = copy.deepcopy(built_in)
    layer_norm.step = lambda x: functional.layer_norm(x * (7 / 8) ** 0.5, (8,), eps=1e-5) / (7 / 8) ** 0.5
    data = numbers(3, 8)
    a, b = (relevance(model, data, rule="gamma", task="classification") for model in (built_in, written))
    np.testing.assert_allclose(a, b, rtol=1e-10)
    a, b = (relevance(model, data * 100, rule="gamma", task="classification") for model in (by_hand, layer_norm))
    np.testing.assert_allclose(a["input"], b["input"], rtol=1e-3)


def test_layer_norm_keeps_the_share_of_its_shift():
    torch.manual_seed(0)
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.weight)
    model, data = Around(norm, residual=False).double().eval(), numbers(1, 8)
    frame = relevance(model, data, rule="z", task="classification")
    chosen = model.head.weight[model(data).argmax()].detach()
    kept = float((chosen * norm.bias.detach()).sum())
    assert frame.loc["first", "output_signed"] == pytest.approx(frame.loc["head", "output_signed"] - kept, rel=1e-10)


class Residual(nn.Module):
    """x + fc(x) and a head; `inplace` adds to the branch."""

    def __init__(self, inplace):
        super().__init__()
        self.fc, self.head, self.inplace = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False), inplace

    def forward(self, x):
        branch = self.fc(x)
        if self.inplace:
            branch += x
            return self.head(functional.relu(branch, inplace=True))
        return self.head(functional.relu(x + branch))


@pytest.mark.parametrize("inplace", [False, True])
def test_branches_may_share_by_the_magnitude_of_their_sums(inplace):
    torch.manual_seed(0)
    model, data = Residual(inplace).double().eval(), numbers(4, 6)
    model.fc.weight.data -= 0.7 * torch.eye(6)  # the branches cancel
    frame = relevance(model, data, rule="z", residual="rescaled", task="classification")
    expected = []
    for x in data:
        branch = model.fc.weight.detach() @ x
        stream = (x + branch).clamp_min(0)
        logits = model.head.weight.detach() @ stream
        at_stream = stream * model.head.weight.detach()[logits.argmax()]
        a, b = (float((at_stream * term / (x + branch)).sum()) for term in (x, branch))
        expected.append(abs(b) / (abs(a) + abs(b)) * (a + b))
        assert a + b == pytest.approx(float(logits.max()))
    assert frame.loc["fc", "input_signed"] == pytest.approx(np.mean(expected), rel=1e-10)
    assert frame.attrs["conservation"] == pytest.approx(1, abs=1e-12)
    split = relevance(model, data, rule="z", task="classification")
    assert split.loc["fc", "input_signed"] != pytest.approx(np.mean(expected), rel=1e-3)
    assert split.attrs["conservation"] == pytest.approx(1, abs=1e-12)


def test_an_operation_without_rule_is_counted():
    model = Around(torch.sin).double().eval()
    assert relevance(model, numbers(3, 8), task="classification").attrs["unruled"] == {"Sin": 1}


def test_channels_add_up_to_their_layer_and_rows_are_those_of_the_weight():
    model, data = cnn(), images()
    whole, rows = relevance(model, data), relevance(model, data, per="channel")
    assert list(rows.loc["up"].index) == list(range(6))
    np.testing.assert_allclose(rows["output"].groupby(level=0).sum()[whole.index], whole["output"], rtol=1e-9)
    signed = rows["output_signed"].groupby(level=0).sum()[whole.index]
    np.testing.assert_allclose(signed, whole["output_signed"], rtol=1e-9, atol=1e-12)
    assert rows["output"].sum() == pytest.approx(1)


def test_entries_that_are_looked_up_are_the_channels_of_an_embedding():
    model, data = decoder(), {"input_ids": torch.tensor([[1, 1, 4]])}
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    rows = relevance(model, data, per="channel").loc["embed"]
    assert rows.index[rows["output"] > 0].tolist() == [1, 4]


def test_shares_and_standard_errors_are_over_samples():
    model, data = cnn(), images(batches=2, samples=3)
    frame = relevance(model, data)
    singles = [(x[None], y[None]) for inputs, targets in data for x, y in zip(inputs, targets, strict=True)]
    raw = [relevance(model, [single], rule="epsilon") for single in singles]
    signed = np.stack([one["input_signed"] for one in raw])
    np.testing.assert_allclose(frame["input_signed"], signed.mean(0), rtol=1e-5, atol=1e-9)
    assert (frame["input_se"] > 0).all()
    np.testing.assert_allclose(frame[["input", "output"]].sum(), 1, rtol=1e-12)


def test_the_truth_lies_within_two_standard_errors_of_a_share():
    generator = torch.Generator().manual_seed(0)
    within = 0
    for _ in range(300):
        common = torch.rand(40, 1, generator=generator, dtype=torch.float64)
        amounts = common * (0.2 + torch.rand(40, 3, generator=generator, dtype=torch.float64)) * torch.tensor([1, 2, 5])
        share, error = shares(amounts)
        within += int((share[1] - 2 / 8).abs() < 2 * error[1])
    assert 0.9 < within / 300 < 0.98


class Overwrites(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.fc, self.head, self.inplace = nn.Linear(4, 4), nn.Linear(4, 3), inplace

    def forward(self, x):
        if self.inplace:
            x -= 0.5
            y = self.fc(x)
            x += y.detach()
            return self.head(functional.relu_(y))
        return self.head(functional.relu(self.fc(x - 0.5)))


def test_what_a_model_overwrites_is_kept():
    torch.manual_seed(0)
    overwrites, keeps = Overwrites(inplace=True).eval(), Overwrites(inplace=False).eval()
    keeps.load_state_dict(overwrites.state_dict())
    x = torch.randn(5, 4)
    before = x.clone()
    a, b = (relevance(model, x, task="classification") for model in (overwrites, keeps))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert torch.equal(x, before)


def test_a_module_that_is_called_twice_has_the_relevance_of_both_calls():
    class Twice(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.a, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)
            self.b = nn.Linear(4, 4, bias=False) if other else self.a

        def forward(self, x):
            return self.head(self.b(functional.relu(self.a(x))))

    torch.manual_seed(0)
    apart, x = Twice(other=True).double().eval(), numbers(3, 4)
    apart.b.load_state_dict(apart.a.state_dict())
    shared = Twice(other=False).double().eval()
    shared.load_state_dict(apart.state_dict())
    a, b = (relevance(model, x, task="classification")["input"] for model in (apart, shared))
    assert b["a"] == pytest.approx(a["a"] + a["b"], rel=1e-12)


def test_padding_has_no_relevance_and_samples_count_alike():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 4, bias=False)

        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.head(self.embed(input_ids))}

    torch.manual_seed(0)
    model = Tagger().double().eval()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    padded = relevance(model, {"input_ids": ids, "attention_mask": (ids > 0).long()}, per="channel")
    assert padded.loc[("embed", 0), "output"] == 0
    each = [relevance(model, {"input_ids": ids[n : n + 1, : 4 - 2 * n]}) for n in (0, 1)]
    whole = relevance(model, {"input_ids": ids, "attention_mask": (ids > 0).long()})
    np.testing.assert_allclose(whole["input_signed"], sum(one["input_signed"] for one in each) / 2, rtol=1e-12)


def test_targets_are_what_they_say():
    model, (data, *_) = cnn(), images()
    with torch.no_grad():
        values = model(data[0])
    started = {target: relevance(model, data, target=target).loc["head", "output_signed"] for target in TARGETS}
    assert started["auto"] == started["argmax"] == pytest.approx(float(values.max(1).values.mean()), rel=1e-5)
    assert started["label"] == pytest.approx(float(values.gather(1, data[1][:, None]).mean()), rel=1e-5)
    assert started["output"] == pytest.approx(float(values.square().sum(1).mean()), rel=1e-5)
    with pytest.raises(ValueError, match="needs data with one class label"):
        relevance(model, data[0], target="label")


TARGETS = ("auto", "argmax", "label", "output")


def test_the_model_comes_back():
    model, data = cnn().train(), images()
    model.first.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again = relevance(model, data), relevance(model, data)
    assert first.equals(again)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    asking = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert asking == {"first.weight"}
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    exact = relevance(cnn(), [x for x, _ in images()], task="classification", rule="z+")
    half = relevance(cnn().to(dtype), [x.to(dtype) for x, _ in images()], task="classification", rule="z+")
    np.testing.assert_allclose(half["input"], exact["input"], rtol=0.1)


CROSS = {"src": numbers(2, 3, 8).float(), "tgt": numbers(2, 4, 8).float()}


def test_weights_used_by_functions_one_sample_and_one_element():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    frame = relevance(model, torch.randn(3, 5, 8), task="features")
    assert frame.attrs["unruled"] == {}
    assert (frame["input"] > 0).all()
    assert frame.loc["self_attn.in_proj_weight", "input_se"] > 0
    whole = relevance(nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval(), CROSS, task="features")
    assert whole.attrs["unruled"] == {}
    assert (whole["input"] > 0).all()
    one = relevance(nn.Linear(1, 1, bias=False), torch.ones(1, 1), task="features")
    assert one.loc["weight", "input"] == 1
    assert one.loc["weight", "input_se"] == 0


class CutBias(nn.Module):
    """Two projections whose weights and biases are cut from one parameter, or given whole."""

    def __init__(self, cut):
        super().__init__()
        self.joined, self.head = nn.Linear(4, 6), nn.Linear(3, 3)
        self.cut = cut

    def forward(self, x):
        if not self.cut:
            a, b = self.joined(x).chunk(2, -1)
            return self.head(a * b)
        first, second = self.joined.bias.chunk(2)
        zero = torch.zeros(0, dtype=x.dtype)
        a, b = self.joined.weight.split([3, 3])
        biases = torch.cat([first, zero]), second
        return self.head(functional.linear(x, a, biases[0]) * functional.linear(x, b, biases[1]))


@pytest.mark.parametrize("bias", ["absorb", "distribute"])
def test_biases_that_are_cut_from_a_parameter_are_found(bias):
    torch.manual_seed(0)
    cut, whole = CutBias(cut=True).double().eval(), CutBias(cut=False).double().eval()
    whole.load_state_dict(cut.state_dict())
    a, b = (relevance(model, numbers(3, 4), rule="z+", bias=bias, task="classification") for model in (cut, whole))
    np.testing.assert_allclose(a["input"].to_numpy(), b["input"].to_numpy(), rtol=1e-12)
    np.testing.assert_allclose(a["output_signed"].to_numpy(), b["output_signed"].to_numpy(), rtol=1e-12)


def test_what_cannot_be_followed_is_named():
    class Computed(CutBias):
        def forward(self, x):
            return functional.linear(x, self.joined.weight, self.joined.bias.exp())

    with pytest.raises(ValueError, match=r"one that is computed from parameters of shapes \[\(6,\)\]"):
        relevance(Computed(cut=True).eval(), torch.ones(2, 4), task="classification")

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.bag(x))

    with pytest.raises(ValueError, match=r"embedding bag: use nn.Embedding"):
        relevance(Bag().eval(), torch.zeros(2, 3, dtype=torch.long), task="classification")


def test_errors_name_the_thing_and_the_way_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    model[0].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="relevance at layer '1' holds NaN or infinity"):
        relevance(model, torch.ones(2, 4), task="classification")
    with pytest.raises(ValueError, match="bias must be one of 'absorb', 'distribute', got 'keep'"):
        relevance(cnn(), images(), bias="keep")
    with pytest.raises(ValueError, match="per must be 'layer' or 'channel'"):
        relevance(cnn(), images(), per="row")
    with pytest.raises(ValueError, match="target must be one of 'auto'"):
        relevance(cnn(), images(), target="largest")
    with pytest.raises(ValueError, match="relevance is 0 in every layer"):
        relevance(nn.Linear(3, 3, bias=False), torch.zeros(2, 3), task="classification")
    frozen = nn.Sequential(nn.Linear(4, 3)).eval()
    frozen.forward = torch.no_grad()(frozen.forward)
    with pytest.raises(ValueError, match="outputs have no gradient"):
        relevance(frozen, torch.ones(2, 4), task="classification")


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(10).reshape(2, 5)
FAMILIES = {
    "Llama": ("ForCausalLM", {"vocab_size": 50, **SIZES, "num_key_value_heads": 2}),
    "Bert": ("Model", {"vocab_size": 50, **SIZES}),
    "ViT": ("ForImageClassification", {**SIZES, "image_size": 8, "patch_size": 4}),
    "GPT2": ("LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4},
    ),
    "Mixtral": (
        "ForCausalLM",
        {"vocab_size": 50, **SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_the_transformers_library(family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    head, settings = FAMILIES[family]
    frames = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**settings, attn_implementation=attention)
        model = getattr(transformers, family + head)(config).eval()
        data = {"pixel_values": numbers(2, 3, 8, 8).float()} if family == "ViT" else {"input_ids": IDS}
        data |= {"decoder_input_ids": IDS} if family == "T5" else {}
        frames.append(relevance(model, data, rule="z"))
    assert frames[0].attrs["unruled"] == {}
    np.testing.assert_allclose(frames[0]["input"], frames[1]["input"], rtol=1e-3, atol=1e-7)
    used = [name for name in frames[0].index if "pooler" not in name]
    assert (frames[0].loc[used, ["input", "output"]] > 0).all(axis=None)
    if family == "Llama":
        signed = frames[0]["input_signed"]
        block = "model.layers.1.mlp."
        assert signed[block + "gate_proj"] == pytest.approx(signed[block + "down_proj"] / 2, rel=1e-3)
        assert signed[block + "up_proj"] == pytest.approx(signed[block + "down_proj"] / 2, rel=1e-3)


def test_the_network_may_be_given_and_layers_it_leaves_out_have_no_row():
    model, data = cnn(), images()
    network = mpq.trace(model, data[0][0])
    assert relevance(model, data, network).equals(relevance(model, data))
    assert list(relevance(model, tokens() and data, network).index) == ["first", "depthwise", "up", "head"]
