"""What goes wrong in real models and data, for every method: an error that names it, or finite scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.estimator_conformance import state_of
from mpq.options import SearchSpace
from mpq.sensitivity import available, estimate

SETTINGS = {"hessian_trace": {"probes": 8}, "ggn_trace": {"draws": 2}, "linearity": {"levels": (0.1, 0.2)}}
WITHOUT_INPUTS = {"linearity", "obs"}
DATA_FREE = {"weight_error", "entropy"}
GRADIENTS = {"channel_salience", "first_order", "fisher", "fisher_full", "ggn_trace", "obs", "output_fisher"}


class MLP(nn.Module):
    """Three layers with batch norm and dropout; a subclass may put something in between."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5)
        self.second, self.last = nn.Linear(width, width), nn.Linear(width, 3)

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.drop(self.norm(self.between(self.first(x))))).tanh())


class Rooted(MLP):
    """Finite forward, infinite derivative: the root of exact zeros."""

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden * 0).sqrt() + hidden


class Aside(MLP):
    """The second layer is run, and nothing that the loss depends on comes of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        self.second(hidden)
        return self.last(hidden)


def made(kind: type[MLP] = MLP, width: int = 5) -> MLP:
    torch.manual_seed(0)
    return kind(width).eval()


def data(samples: int = 3, batches: int = 2, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(samples, 4, generator=generator).to(dtype), torch.randint(0, 3, (samples,), generator=generator))
        for _ in range(batches)
    ]


def scored(method: str, model: nn.Module, batches: list[tuple[torch.Tensor, ...]]) -> np.ndarray:
    """(layers, options) scores; the model must come back as it was, whatever happens."""
    network = mpq.trace(model, batches[0][0])
    options = ["int4", "int8"] if method in WITHOUT_INPUTS else ["int4/int8", "int8"]
    before = state_of(model)
    try:
        frame = estimate(
            model, batches, network, SearchSpace(options), method, progress=False, **SETTINGS.get(method, {})
        )
    finally:
        for what, value in state_of(model).items():
            assert value == before[what], what
    assert np.isfinite(frame.to_numpy()).all()
    assert (frame["sensitivity_se"] >= 0).all()
    return frame["sensitivity"].to_numpy().reshape(len(network.layers), 2)


@pytest.mark.parametrize("method", available())
class TestEveryMethod:
    def test_a_gradient_that_is_not_finite_names_the_layer(self, method):
        if method in GRADIENTS | {"hessian_trace", "lrp"}:
            with pytest.raises(ValueError, match=r"layer 'first'.*(finite|NaN or infinity)"):
                scored(method, made(Rooted), data())
        else:
            scored(method, made(Rooted), data())

    def test_a_layer_without_gradient_scores_nothing(self, method):
        found = scored(method, made(Aside), data())
        if method not in DATA_FREE | {"lrp"}:
            assert (np.abs(found[1]) < 1e-12).all()

    def test_a_layer_of_zeros_is_finite(self, method):
        model = made()
        model.second.weight.data.zero_()
        found = scored(method, model, data())
        if method not in {"lrp", "entropy"}:
            assert found[1, 1] == 0

    @pytest.mark.parametrize("batches", [1, 2])
    def test_batches_of_one(self, method, batches):
        scored(method, made(), data(samples=1, batches=batches))

    def test_a_layer_of_one_weight(self, method):
        scored(method, made(width=1), data())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_near_single(self, method, dtype):
        batches = data(dtype=dtype)
        half = made().to(dtype)
        found = scored(method, half, batches)
        single = scored(method, half.float(), [(x.float(), y) for x, y in batches])
        if method != "entropy":  # counts the bits that are saved
            assert np.abs(found - single).max() <= 0.25 * np.abs(single).max()

    def test_the_meta_device_is_refused_with_a_way_out(self, method):
        network = mpq.trace(made(), data()[0][0])
        with pytest.raises(ValueError, match=r"meta device.*load the weights first"):
            estimate(made().to("meta"), data(), network, SearchSpace(["int4"]), method, progress=False)

    def test_a_weight_that_is_not_finite_is_named(self, method):
        model = made()
        model.second.weight.data[0, 1] = math.inf
        with pytest.raises(ValueError, match="the weight of 'second' must be finite"):
            scored(method, model, data())


def test_methods_of_this_file_are_known():
    assert set(available()) > GRADIENTS | DATA_FREE | WITHOUT_INPUTS
