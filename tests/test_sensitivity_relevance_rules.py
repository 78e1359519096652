"""Rules of weighted sums against loops over outputs and inputs, and what they conserve."""

import pytest
import torch
from torch.nn import functional

from mpq.sensitivity.relevance_rules import AlphaBeta, Epsilon, Gamma, WeightedSum, ZBox, parse_rule

RULES = ["z", "epsilon:0.1", "z+", "alpha-beta:2,1", "gamma:0.5"]


def slow_rule(rule, x, w, bias, relevance, absorbing=True):
    """R at the inputs of z = w x + bias of one sample, entry by entry, with w (out, in)."""
    result = [0.0] * len(x)
    for j, r in enumerate(relevance):
        parts = [float(x[i] * w[j, i]) for i in range(len(x))]
        b = float(bias[j]) if absorbing else 0.0
        z = sum(parts) + float(bias[j])
        whole, plus, minus = sum(parts) + b, sum(p for p in parts if p > 0), sum(p for p in parts if p < 0)
        plus, minus = plus + max(b, 0), minus + min(b, 0)
        for i, part in enumerate(parts):
            positive, negative = max(part, 0), min(part, 0)
            if isinstance(rule, Epsilon):
                result[i] += part / (whole + rule.epsilon * (1 if whole > 0 else -1)) * float(r)
            elif isinstance(rule, AlphaBeta):
                alpha = rule.alpha if minus else 1.0
                beta = rule.beta if plus else -1.0
                result[i] += (alpha * positive / plus if plus else 0) * float(r)
                result[i] -= (beta * negative / minus if minus else 0) * float(r)
            else:
                signed, total = (positive, plus) if z > 0 else (negative, minus)
                result[i] += (part + rule.gamma * signed) / (whole + rule.gamma * total) * float(r)
    return torch.tensor(result, dtype=torch.float64)


def slow_box(x, w, bias, relevance, low, high):
    result = torch.zeros_like(x)
    for j in range(len(relevance)):
        parts = [x[i] * w[j, i] - (low if w[j, i] > 0 else high) * w[j, i] for i in range(len(x))]
        for i, part in enumerate(parts):
            result[i] += part / (sum(parts) + bias[j]) * relevance[j]
    return result


def linear_step(x, w, bias, absorbing=True):
    return WeightedSum(
        inputs=x,
        weight=w.T,
        bias=bias,
        product=lambda x, w: x @ w,
        transposed=lambda s, w: s @ w.T,
        absorbing=absorbing,
    )


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("absorbing", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_equals_a_loop_over_outputs_and_inputs(name, absorbing):
    rule, x, w, bias, coefficient = parse_rule(name), numbers(3, 6), numbers(4, 6, seed=1), numbers(4), numbers(3, 4)
    x[0, 1], x[2, 3], w[1] = 0, 0, w[1].abs()
    x[1] = x[1].abs()  # all contributions to output 1 of sample 1 are positive
    step = linear_step(x, w, bias, absorbing)
    fast = x * rule(step, coefficient)
    z = x @ w.T + bias
    slow = [slow_rule(rule, x[n], w, bias, z[n] * coefficient[n], absorbing) for n in range(3)]
    torch.testing.assert_close(fast, torch.stack(slow), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bounds", [None, (-3.0, 4.0)])
def test_z_box_equals_a_loop_and_conserves(bounds):
    x, w, coefficient = numbers(3, 6).clamp(-3, 4), numbers(4, 6, seed=1), numbers(3, 4, seed=2)
    rule = ZBox(*bounds) if bounds else ZBox()
    relevance = (x @ w.T) * coefficient
    fast = rule.relevance(linear_step(x, w, None), coefficient)
    low_high = [bounds or (float(sample.min()), float(sample.max())) for sample in x]
    slow = [slow_box(x[n], w, torch.zeros(4), relevance[n], *low_high[n]) for n in range(3)]
    torch.testing.assert_close(fast, torch.stack(slow), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast.sum(1), relevance.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["z", "z+", "alpha-beta:2,1", "alpha-beta:3,2", "gamma", "gamma:7"])
def test_without_bias_or_with_it_distributed_every_rule_but_epsilon_conserves(name):
    x, w, bias, coefficient = numbers(5, 6), numbers(4, 6, seed=1), numbers(4), numbers(5, 4)
    for given in (None, bias):
        step = linear_step(x, w, given, absorbing=False)
        arrived = (x * parse_rule(name)(step, coefficient)).sum(1)
        torch.testing.assert_close(arrived, (step.output * coefficient).sum(1), rtol=1e-11, atol=1e-12)


def test_z_plus_keeps_positive_relevance_positive_and_gamma_tends_to_it():
    x, w, coefficient = numbers(5, 6), numbers(4, 6, seed=1), numbers(5, 4)
    step = linear_step(x, w, None)
    coefficient = coefficient.abs() * (step.output > 0)
    plus = x * AlphaBeta()(step, coefficient)
    assert (plus >= 0).all()
    torch.testing.assert_close(x * Gamma(1e9)(step, coefficient), plus, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(Gamma(0.0)(step, coefficient), Epsilon(0.0)(step, coefficient))


def test_epsilon_keeps_its_share():
    step = linear_step(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), None)
    assert float((step.inputs * Epsilon(1.0)(step, torch.ones(1, 1))).sum()) == pytest.approx(3 * 3 / 4)


def test_a_convolution_is_the_matrix_it_stands_for():
    x, w = numbers(2, 2, 5, 5), numbers(3, 2, 3, 3, seed=1)
    step = WeightedSum(
        inputs=x,
        weight=w,
        bias=None,
        product=lambda x, w: functional.conv2d(x, w, stride=2, padding=1),
        transposed=lambda s, w: torch.nn.grad.conv2d_input(x.shape, w, s, stride=2, padding=1),
    )
    units = torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)
    matrix = step.product(units, w).reshape(50, -1).T
    coefficient = numbers(*step.output.shape, seed=3)
    for name in RULES:
        fast = (x * parse_rule(name)(step, coefficient)).reshape(2, -1)
        z = x.reshape(2, -1) @ matrix.T
        none = torch.zeros(len(matrix), dtype=torch.float64)
        slow = [
            slow_rule(parse_rule(name), x[n].flatten(), matrix, none, z[n] * coefficient[n].flatten()) for n in (0, 1)
        ]
        torch.testing.assert_close(fast, torch.stack(slow), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epsilonn", "did you mean 'epsilon'"),
        ("epsilon:-1", "epsilon must be at least 0, got -1"),
        ("gamma:nan", "gamma must be at least 0"),
        ("alpha-beta:2,2", "alpha - beta must be 1"),
        ("alpha-beta:1,2,3", "numbers of rule 'alpha-beta:1,2,3' do not fit"),
        ("epsilon:x", "numbers of rule"),
    ],
)
def test_rules_that_make_no_sense_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(text)
