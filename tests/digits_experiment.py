"""A small residual CNN on handwritten digits, random plans in three bands of bits, and what they do to the outputs.

Eight layers, about 95 % of the test digits right; weights per output channel, {2, 3, 4, 6, 8} bits, inputs in full
precision; 512 calibration images; the truth is the test images' mean KL from full precision. The trained weights are
beside this file, for training depends on the number of threads: ``python tests/digits_experiment.py`` makes them again.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import mpq
from mpq.random_plans import random_plans
from mpq.table_entries import entries_of
from mpq.tasks import Distribution

WEIGHTS = Path(__file__).parent / "digits_cnn.safetensors"
BITS = (2, 3, 4, 6, 8)
BANDS = ((2.2, 2.8), (3.3, 3.8), (4.5, 5.5))
PLANS = 100


class Residual(nn.Module):
    """Two 3×3 convolutions around a skip; where the shape changes, a 1×1 convolution joins their sum."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return functional.relu(self.skip(x) + self.second(functional.relu(self.first(x))))


class DigitsCNN(nn.Module):
    """A stem, two residual blocks, a convolution and a linear head: eight layers with weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(Residual(16, 16), Residual(16, 32, stride=2))
        self.last = nn.Conv2d(32, 48, 3, padding=1)
        self.fc = nn.Linear(48, 10)

    def forward(self, x):
        x = functional.relu(self.last(self.blocks(functional.relu(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Experiment:
    """The net, its data, and plans with their measured divergence, a band each."""

    model: nn.Module
    calibration: list
    network: mpq.Network
    space: mpq.SearchSpace
    accuracy: float
    plans: tuple
    measured: tuple


@cache
def experiment():
    """Load, draw, measure: some ten seconds. Everything is seeded."""
    x, y = digits()
    calibration, test = slice(800, 1312), slice(1312, None)
    model = DigitsCNN()
    model.load_state_dict(load_file(WEIGHTS))
    model.eval()
    data = [(x[calibration], y[calibration])]
    network = mpq.trace(model, data[0][0])
    space = mpq.SearchSpace([f"int{bits}" for bits in BITS], ties=None)
    with torch.no_grad():
        accuracy = float((model(x[test]).argmax(1) == y[test]).float().mean())
    plans = tuple(band_plans(network, *band) for band in BANDS)
    measured = tuple(divergences(model, network, space, x[test], drawn) for drawn in plans)
    return Experiment(model, data, network, space, accuracy, plans, measured)


def digits():
    """Images (1797, 1, 8, 8) and labels, shuffled: 800 to train on, 512 to calibrate, the rest to test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return torch.tensor(images[order] / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels[order])


def trained(x, y, epochs=30):
    """The net after some seconds of training."""
    torch.manual_seed(0)
    model = DigitsCNN()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimiser.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    return model.eval()


def band_plans(network, low, high):
    """(plans, layers) option indices with an average of low to high bits a weight."""
    weights = np.array([layer.parameters for layer in network.layers], dtype=float)
    cost = np.outer(weights / weights.sum(), BITS)
    rng = np.random.default_rng(int(10 * low))
    return random_plans(cost, np.arange(len(cost)), low=low, high=high, count=PLANS, rng=rng)


def divergences(model, network, space, images, plans):
    """(plans,) mean KL from full precision."""
    task = Distribution()
    entries = empty_table(network, space)
    plan = mpq.Plan(entries=entries_of(entries, plans[0]), fingerprint="")
    found = []
    with torch.no_grad():
        reference = task.run(model, images)
        for choices in plans:
            with mpq.quantized(model, replace(plan, entries=entries_of(entries, choices))):
                found.append(float(task.divergence(reference, task.run(model, images)).mean()))
    return np.array(found)


def empty_table(network, space):
    """A table with the layers and options alone, to turn choices into plans."""
    shape = len(network.layers), len(BITS)
    return mpq.CostTable(
        units=[layer.name for layer in network.layers],
        options=[str(option) for option in space.all_options],
        quantities={"sensitivity": np.zeros(shape)},
        layers=network.layers,
    )


if __name__ == "__main__":
    everything = digits()
    save_file(trained(everything[0][:800], everything[1][:800]).state_dict(), WEIGHTS)
