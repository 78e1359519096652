"""Which modules come to one convolution of their weight, and what that convolution was given."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.sensitivity.watched_convolution import watched_convolution
from mpq.sensitivity.weight_gradients import convolution_gradients

STOCK = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (9,)),
    (nn.Conv2d(4, 4, (2, 3), padding=(1, 0), groups=4), (6, 5)),
    (nn.Conv2d(4, 8, (3, 2), stride=(1, 2), dilation=(2, 1), padding=1, groups=4), (7, 6)),
    (nn.Conv2d(4, 4, 3, stride=3, groups=4), (7, 8)),
    (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (6, 5)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (6, 5)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4), (6, 5)),
    (nn.Conv1d(1, 3, 3), (5,)),
    (nn.Conv3d(4, 4, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0), groups=4), (2, 4, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), (5,)),
    (nn.ConvTranspose2d(4, 2, (2, 3), stride=(1, 2), output_padding=(0, 1)), (3, 4)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("module", "places"), STOCK, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_every_kind_equal_those_of_each_entry_by_autograd(module, places, dtype):
    torch.manual_seed(0)
    module = module.to(dtype)
    inputs = torch.randn(6, module.in_channels, *places, dtype=dtype)
    gradient = torch.randn_like(module(inputs))
    found = watched_convolution(module.forward, inputs, module.weight)
    each = []
    for entry, weights in zip(inputs, gradient, strict=True):
        each.append(torch.autograd.grad((module(entry[None]) * weights).sum(), module.weight)[0])
    expected = torch.stack(each)
    exact = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    made = convolution_gradients(found, gradient, module.weight.detach(), 6)
    torch.testing.assert_close(made, expected, **exact)
    pairs = convolution_gradients(found, gradient, module.weight.detach(), 3)  # two entries a sample
    torch.testing.assert_close(pairs, expected.reshape(3, 2, *module.weight.shape).sum(1), **exact)
    some = convolution_gradients(found.part(slice(1, 4)), gradient[1:4], module.weight.detach(), 3)
    torch.testing.assert_close(some, expected[1:4], **exact)


class Padded(nn.Conv2d):
    def forward(self, x):
        height, width = self.weight.shape[-2:]
        return functional.conv2d(
            functional.pad(x, (0, width - 1, 0, height - 1)), self.weight, bias=self.bias, stride=self.stride
        )


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).mul_(2)


class OfItself(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * self.weight.sum())


class BiasOfWeight(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.weight.sum((1, 2, 3)))


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(super().forward(x))


class Listed(nn.Conv2d):
    def forward(self, x):
        return [super().forward(x)][:1]


class Unused(nn.Conv2d):
    def forward(self, x):
        super().forward(x)
        return x


class OtherFirst(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.first = nn.Conv2d(2, 2, 1).requires_grad_(False)

    def forward(self, x):
        return super().forward(self.first(x))


@pytest.mark.parametrize("kind", [Standardised, Scaled, OfItself, BiasOfWeight, Twice, Listed, Unused])
def test_what_does_more_or_else_is_not_taken_for_a_convolution(kind):
    module = kind(2, 2, 1)
    assert watched_convolution(module.forward, torch.ones(3, 2, 4, 4), module.weight) is None


def test_what_comes_before_is_run():
    x = torch.randn(3, 2, 4, 5)
    padded, other = Padded(2, 2, 3, stride=2), OtherFirst(2, 2, 1)
    found = watched_convolution(padded.forward, x, padded.weight)
    torch.testing.assert_close(found.inputs, functional.pad(x, (0, 2, 0, 2)), rtol=0, atol=0)
    assert (found.stride, found.padding, found.groups) == ((2, 2), (0, 0), 1)
    found = watched_convolution(other.forward, x, other.weight)
    torch.testing.assert_close(found.inputs, other.first(x), rtol=0, atol=0)
    assert watched_convolution(other.first.forward, x, other.weight) is None  # another's weight
    assert watched_convolution(padded.forward, x[0], padded.weight) is None  # no axis of entries


@pytest.mark.parametrize("asks", [True, False])
def test_the_parameter_comes_back_as_it_was(asks):
    module = OfItself(2, 2, 1)
    module.weight.requires_grad_(asks)
    with torch.no_grad():
        for apply in (module.forward, lambda x: 1 / 0):
            with suppress(ZeroDivisionError):
                assert watched_convolution(apply, torch.ones(3, 2, 4, 4), module.weight) is None
            assert module.weight.requires_grad is asks
