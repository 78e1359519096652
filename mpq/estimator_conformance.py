"""What every sensitivity method promises: subclass `EstimatorConformance` and give it a fixture `estimator`.

    from mpq.estimator_conformance import EstimatorConformance

    class TestMine(EstimatorConformance):
        @pytest.fixture
        def estimator(self):
            return MyEstimator()

A small network with batch norm and dropout is scored on a few random samples, weights only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.cache import description
from mpq.conformance import expect, in_another_process
from mpq.options import SearchSpace
from mpq.tracing import trace

Batches = Sequence[tuple[Tensor, Tensor]]
Values = NDArray[np.float64]

OPTIONS = {"*": ["int2", "int4", "int8"], "second": ["int4", "fp32"]}  # layers with other candidates
LAYERS = {"first": (1, 1, 1, 0), "second": (0, 1, 0, 1), "last": (1, 1, 1, 0)}  # int2, int4, int8, fp32


class SmallNetwork(nn.Module):
    """Three linear layers, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(samples, 6) to (samples, 3)."""
        logits: Tensor = self.last(self.second(self.drop(self.norm(self.first(x).relu()))).tanh())
        return logits


def small_network() -> SmallNetwork:
    """A network whose answers are decided, so that coarse formats change them; the random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallNetwork().eval()
    with torch.no_grad():
        model.last.weight.mul_(4)
    return model


def small_data(batches: int = 2, samples: int = 6) -> Batches:
    """Batches of inputs and the classes that `small_network` gives them."""
    generator, model = torch.Generator().manual_seed(1), small_network()
    inputs = [torch.randn(samples, 6, generator=generator) for _ in range(batches)]
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in inputs]


def state_of(model: nn.Module) -> dict[str, object]:
    """All that must come back after a measurement, in a form that compares."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "values": [(tensor.data_ptr(), tensor.dtype, tensor.tolist()) for tensor in tensors],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "asks": [p.requires_grad for p in model.parameters()],
        "hooks": [[len(getattr(module, kind)) for kind in kinds] for module in model.modules()],
        "tensor hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
        "post hooks": [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "forwards": ["forward" in vars(module) for module in model.modules()],
        "grad mode": torch.is_grad_enabled(),
    }


class Watched:
    """An estimator that keeps what another one returned."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator
        self.scores: Any = None

    def __call__(self, measurement: Any) -> Any:
        """Score with the other one."""
        self.scores = self.estimator(measurement)
        return self.scores

    def __repr__(self) -> str:
        return f"Watched({self.estimator!r})"


def scored(
    estimator: Any, model: nn.Module | None = None, batches: Batches | None = None, **how: Any
) -> tuple[Values, Values]:
    """(3 layers, 4 options) scores and standard errors, NaN where an option is no candidate, checked for shape.

    Raises:
        AssertionError: if the scores have another shape or measure, or the model does not come back as it was.
    """
    model, batches = small_network() if model is None else model, small_data() if batches is None else batches
    network, watched, before = trace(model, batches[0][0]), Watched(estimator), state_of(model)
    try:
        frame = import_module("mpq.sensitivity").estimate(
            model, batches, network, SearchSpace(OPTIONS), watched, progress=False, **how
        )
    finally:
        after = state_of(model)
        changed = [what for what, value in before.items() if after[what] != value]
        expect(not changed, f"the model comes back as it was; changed: {', '.join(changed)}")
    shape = (len(network.units(how.get("granularity", "layer"))), 4)
    for what in ("mean", "standard_error"):
        got = np.shape(getattr(watched.scores, what))
        expect(got == shape, f"{what} has the shape (units, options), {shape}, got {got}")
    expect(isinstance(watched.scores.measure, str), f"the measure is a text, got {watched.scores.measure!r}")
    mean, error = frame.to_numpy(dtype=np.float64).T.reshape(2, *shape)
    return mean, error


def values(estimator: Any) -> list[list[float]]:
    """Scores of the candidates, as plain numbers."""
    return [np.nan_to_num(part, nan=-1.0).ravel().tolist() for part in scored(estimator)]


class EstimatorConformance:
    """Promises of a sensitivity method; a subclass has the fixture `estimator`.

    Attributes:
        granularities: finer units that the method must take; it may refuse the others with a ValueError.
        is_error: the score is an error, 0 where nothing changes; False for one that weighs an error against what is
            saved, as `mpq.sensitivity.Entropy` does.
    """

    granularities: Sequence[str] = ()
    is_error: bool = True

    def test_candidates_have_finite_scores_and_the_others_none(self, estimator: Any) -> None:
        """(units, options): finite where the layer may take the option, NaN elsewhere; errors not negative."""
        mean, error = scored(estimator)
        candidates = np.array(list(LAYERS.values()), dtype=bool)
        expect(np.isfinite(mean[candidates]).all(), f"candidates have finite scores, got {mean}")
        expect(np.isfinite(error[candidates]).all(), f"and finite standard errors, got {error}")
        expect((error[candidates] >= 0).all(), f"no standard error is negative, got {error}")
        none = np.isnan(mean[~candidates]).all() and np.isnan(error[~candidates]).all()
        expect(none, f"what is no candidate is NaN, got {mean} ± {error}")

    def test_full_precision_costs_nothing_and_two_bits_more_than_eight(self, estimator: Any) -> None:
        """Lower is better: an option that changes nothing scores 0, and int2 in all layers more than int8."""
        mean, _ = scored(estimator)
        if not self.is_error:
            return
        second = mean[1]
        expect(abs(second[3]) <= 1e-9 * max(abs(second[1]), 1e-12), f"fp32 changes nothing and scores 0, got {second}")
        coarse, fine = mean[[0, 2], 0].sum(), mean[[0, 2], 2].sum()
        expect(coarse > fine, f"2 bits score more than 8, got {coarse} and {fine}")

    def test_the_same_whatever_was_drawn_before(self, estimator: Any) -> None:
        """Random numbers come from the measurement's seed, not from torch's or numpy's global state."""
        before = torch.get_rng_state()
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - the state that an estimator must not read
            found.append(values(estimator))
        torch.set_rng_state(before)
        expect(found[0] == found[1], f"the same data gives the same scores, got {found[0]}, then {found[1]}")

    def test_another_process_gives_the_same_scores(self, estimator: Any) -> None:
        """Scores do not depend on the process or on how texts hash; the estimator's class is importable."""
        here, there = values(estimator), in_another_process(values, estimator)
        expect(np.allclose(here, there, rtol=1e-5, atol=1e-12), f"another process agrees: {here}, there {there}")

    def test_a_model_in_training_with_gradients_and_hooks_comes_back(self, estimator: Any) -> None:
        """Modes, gradients, frozen weights and hooks are as they were, and the scores those of the model in use."""
        model = small_network().train()
        model.norm.eval()
        model.second.weight.requires_grad_(False)
        model(small_data()[0][0]).sum().backward()
        handle = model.first.register_forward_hook(lambda *_: None)
        in_training, _ = scored(estimator, model)
        handle.remove()
        expect(np.allclose(in_training, scored(estimator)[0], equal_nan=True), "a model in training scores the same")

    def test_a_layer_of_zeros_and_a_single_sample(self, estimator: Any) -> None:
        """What divides by a norm or a variance: still finite."""
        model = small_network()
        model.second.weight.data.zero_()
        candidates = np.array(list(LAYERS.values()), dtype=bool)
        for found in (scored(estimator, model), scored(estimator, batches=small_data(1, 1))):
            finite = all(np.isfinite(part[candidates]).all() for part in found)
            expect(finite, f"scores of zeros, and of one sample, are finite, got {found}")

    def test_weights_that_a_format_holds_lose_nothing(self, estimator: Any) -> None:
        """A layer whose weights lie on the grid of 8 bits."""
        model = small_network()
        with torch.no_grad():
            model.last.weight.copy_(torch.arange(8.0).expand(3, 8) * 16 - 64)
            model.last.weight[:, 0] = 127.0
        mean, _ = scored(estimator, model)
        if not self.is_error:
            return
        expect(abs(mean[2, 2]) <= 1e-6 * max(1e-6, abs(mean[2, 0])), f"int8 holds the weights and scores 0: {mean[2]}")

    def test_units_finer_than_layers_are_scored_or_refused(self, estimator: Any) -> None:
        """Rows and groups: an array of (units, options), or a ValueError that says it cannot."""
        for granularity in ("rows:2", "groups:2"):
            try:
                mean, _ = scored(estimator, granularity=granularity)
            except ValueError as error:
                expect(granularity not in self.granularities, f"{granularity} is taken, got {error!r}")
                expect(str(error), "a refusal says why")
                continue
            expect(np.isfinite(mean).any(), f"some unit of {granularity} has a score")

    def test_settings_are_a_value_that_a_cache_can_tell(self, estimator: Any) -> None:
        """A cache goes by the settings: equal ones look alike, and finished pieces give the same scores again."""
        told = description(estimator)
        expect(told == description(estimator) and " at 0x" not in repr(estimator), "the repr has the settings")
        with tempfile.TemporaryDirectory() as folder:
            first, _ = scored(estimator, cache=folder)
            again, _ = scored(estimator, cache=folder)
        expect(np.array_equal(first, again, equal_nan=True), f"what is kept gives the same: {first}, then {again}")
