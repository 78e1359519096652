"""OBS scores against dense inverses, M-FAC's own recursion, and the loss after optimal compensation."""

import numpy as np
import pytest
import torch
from small_models import cnn, images
from torch import nn

import mpq
from mpq.sensitivity import estimate
from mpq.sensitivity.inverse_fisher import InverseFisher

DOUBLE = {"dtype": torch.float64}


def gradients(count=16, size=40, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def dense(g, damping):
    return damping * torch.eye(g.shape[1], **DOUBLE) + g.T @ g / len(g)


def recursion(g, damping, x):
    """M-FAC's recursion as published: one rank-one update after the other."""
    h, q = [], []
    for gradient in g:
        new = gradient / damping - sum((a * (a @ gradient) / b for a, b in zip(h, q, strict=True)), 0 * gradient)
        h.append(new)
        q.append(len(g) + gradient @ new)
    return x / damping - sum(a * (a @ x) / b for a, b in zip(h, q, strict=True))


@pytest.mark.parametrize("damping", [1e-2, 1e-5])
def test_products_and_diagonal_against_the_dense_inverse(damping):
    g, x = gradients(), torch.randn(40, generator=torch.Generator().manual_seed(1), **DOUBLE)
    inverse, exact = InverseFisher(g, damping), torch.linalg.inv(dense(g, damping))
    assert inverse.product(x) == pytest.approx(exact @ x, rel=1e-9, abs=1e-9 / damping)
    assert inverse.product(x) == pytest.approx(recursion(g, damping, x), rel=1e-8, abs=1e-8 / damping)
    assert inverse.diagonal() == pytest.approx(exact.diagonal(), rel=1e-9)
    with pytest.raises(ValueError, match="damping must be positive"):
        InverseFisher(g, 0.0)


def test_the_score_is_the_loss_after_optimal_compensation():
    """Move weight q by δ and let the others minimise ½ dᵀFd: what is left is δ² / (2 [F⁻¹]_qq)."""
    matrix = dense(gradients(), 1e-2)
    score = 0.5 * 0.3**2 / InverseFisher(gradients(), 1e-2).diagonal()
    for q in range(40):
        others = [i for i in range(40) if i != q]
        d = torch.full((40,), 0.3, **DOUBLE)
        d[others] = torch.linalg.solve(matrix[others][:, others], -0.3 * matrix[others, q])
        assert 0.5 * d @ matrix @ d == pytest.approx(float(score[q]), rel=1e-9)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def data():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in (5, 4)]


def scored(model, batches, options=("int2", "int4"), granularity="layer", **settings):
    space = mpq.SearchSpace(list(options), ties=None)
    network = mpq.trace(model, batches[0][0])
    how = {"method": "obs", "granularity": granularity, "progress": False}
    return estimate(model, batches, network, space, **how, **settings)


def changes(model, name, bits, granularity="layer"):
    from mpq.fake_quantize import fake_quantize
    from mpq.formats import parse

    weight = model.get_parameter(f"{name}.weight").detach()
    return weight.double(), (fake_quantize(weight, parse(f"int{bits}")) - weight).double()


@pytest.mark.parametrize("granularity", ["layer", "rows:1"])
def test_fisher_against_a_loop(granularity):
    """Per-sample gradients by autograd, the dense Fisher matrix of the layer, its dense inverse."""
    model = TwoLayers()
    frame = scored(model, data(), labels="data", granularity=granularity)
    for name in ("first", "second"):
        parameter, rows = model.get_parameter(f"{name}.weight"), []
        for x, y in data():
            for sample, label in zip(x, y, strict=True):
                loss = nn.functional.cross_entropy(model(sample[None]), label[None])
                rows.append(torch.autograd.grad(loss, parameter)[0].double().flatten())
        g = torch.stack(rows)
        inverse = torch.linalg.inv(dense(g, 1e-2 * float(g.square().mean()))).diagonal()
        for bits in (2, 4):
            weight, change = changes(model, name, bits)
            each = (0.5 * change.flatten() ** 2 / inverse).reshape(weight.shape)
            found = frame.xs(f"int{bits}", level=1).sensitivity
            if granularity == "layer":
                assert found[name] == pytest.approx(float(each.sum()), rel=1e-5)
            else:
                mine = [value for label, value in found.items() if label.startswith(name)]
                assert mine == pytest.approx(each.sum(1).tolist(), rel=1e-5)
    assert frame.attrs["measure"] == "score"
    assert (frame.sensitivity_se > 0).all()


@pytest.mark.parametrize("criterion", ["slim-llm", "shiftaddllm"])
def test_input_criteria_against_a_loop(criterion):
    model = TwoLayers()
    frame = scored(model, data(), criterion=criterion)
    inputs = torch.cat([x for x, _ in data()]).double()
    hessian = sum(2 / len(inputs) * torch.outer(x, x) for x in inputs)
    hessian = hessian + 1e-2 * hessian.diagonal().mean() * torch.eye(5, **DOUBLE)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    assert (upper.T @ upper) == pytest.approx(torch.linalg.inv(hessian), rel=1e-9)
    weight, change = changes(model, "first", 2)
    if criterion == "slim-llm":
        expected = sum(change[i, j] ** 2 / upper[j, j] ** 2 for i in range(4) for j in range(5))
    else:
        scaled = weight / upper.diagonal()
        expected = scaled.norm() * scaled.std(correction=0) ** 2 * change.norm() ** 2 / weight.norm() ** 2
    assert frame.sensitivity["first", "int2"] == pytest.approx(float(expected), rel=1e-5)


def test_a_convolution_is_a_product_with_patches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    x, model = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1)), Net()
    frame = scored(model, [(x, torch.tensor([0, 1, 2]))], criterion="slim-llm")
    padded, patches = nn.functional.pad(x, (1, 1, 1, 1)).double(), []
    for image in padded:
        patches += [image[:, r : r + 3, c : c + 3].flatten() for r in (0, 2, 4) for c in (0, 2, 4)]
    hessian = sum(2 / len(patches) * torch.outer(p, p) for p in patches)
    hessian = hessian + 1e-2 * hessian.diagonal().mean() * torch.eye(18, **DOUBLE)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
    _, change = changes(model, "conv", 2)
    expected = float((change.flatten(1) ** 2 / factor**2).sum())
    assert frame.sensitivity["conv", "int2"] == pytest.approx(expected, rel=1e-4)


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match="quantises inputs as well: use fisher or kl"):
        scored(TwoLayers(), data(), options=("int4/int8",))
    with pytest.raises(ValueError, match="depthwise.*criterion='fisher'"):
        scored(cnn(), images(), criterion="slim-llm")
    with pytest.raises(ValueError, match="criterion must be one of fisher, slim-llm, shiftaddllm"):
        scored(TwoLayers(), data(), criterion="hessian")
    assert np.isfinite(scored(cnn(), images()).sensitivity).all()


def test_a_layer_without_gradient_costs_nothing():
    model = TwoLayers()
    model.second.weight.data.zero_()
    assert scored(model, data(), labels="data").sensitivity["first", "int2"] == 0
