"""Multiply-adds of a run against PyTorch's flop counter, which counts two operations a multiply-add."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mpq.hardware_models as hardware
from mpq.hardware_models.attention import attention_work
from mpq.hardware_models.cells import Cells
from mpq.options import Option, SearchSpace
from mpq.tracing import trace


class Encoder(nn.Module):
    """Attention in one kernel between two linear layers."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(48, 3 * 48), nn.Linear(48, 48)

    def forward(self, x):
        query, key, value = self.inward(x).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        return self.outward(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Shared(nn.Module):
    """One linear layer that runs three times."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(16, 16)

    def forward(self, x):
        return self.step(self.step(self.step(x)))


CONVOLUTIONS = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    nn.Conv2d(16, 16, 3, groups=16),
    nn.Conv2d(16, 32, 3, stride=2, groups=4),
    nn.ConvTranspose2d(32, 8, 2, stride=2, groups=2),
    nn.Flatten(),
    nn.Linear(8 * 8 * 8, 10),
)
MODELS = {
    "convolutions": (CONVOLUTIONS, (3, 12, 12)),
    "one dimension": (nn.Sequential(nn.Conv1d(4, 8, 5), nn.ReLU(), nn.Conv1d(8, 2, 3, groups=2)), (4, 30)),
    "perceptron": (nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 7)), (20,)),
    "shared": (Shared(), (5, 16)),
    "attention": (Encoder(), (9, 48)),
}


def counted(model, inputs):
    # The counter knows products, but not PyTorch's one kernel for attention on a processor.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [2, 6])
def test_operations_are_twice_the_multiply_adds(name, batch):
    model, shape = MODELS[name]
    network = trace(model.eval(), torch.zeros(2, *shape))
    cells = Cells.of(network, [Option("int8")], batch=batch)
    attention = sum(run.macs for run in attention_work(cells))
    assert 2 * (cells.work.macs.sum() + attention) == counted(model, torch.zeros(batch, *shape))
    assert (attention > 0) == (name == "attention")


def test_bit_operations_are_of_the_same_multiply_adds():
    model, shape = MODELS["convolutions"]
    network = trace(model.eval(), torch.zeros(2, *shape))
    frame = hardware.storage().costs(network, SearchSpace(["int4/int8"]), batch=6)
    assert frame["bops"].sum() == 32 * counted(model, torch.zeros(1, *shape)) / 2
