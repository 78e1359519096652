"""Rules that hand the relevance of a weighted sum back to its inputs: epsilon, gamma, alpha-beta, z+, z-box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mpq.suggestions import did_you_mean

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """z = product(inputs, weight) + bias, and how a gradient at z comes back to the inputs.

    Args:
        inputs: what is summed.
        weight: its weights, as the operation took them.
        bias: what is added, broadcast to z; None: nothing.
        product: linear in each of (inputs, weight).
        transposed: (gradient at z, weight) to the gradient at the inputs.
        absorbing: whether the bias keeps its share of the relevance; else the inputs get all of it.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    product: Product
    transposed: Product
    absorbing: bool = True

    @cached_property
    def products(self) -> Tensor:
        """The sum without its bias."""
        return self.product(self.inputs, self.weight)

    @cached_property
    def output(self) -> Tensor:
        """The sum z."""
        return self.products if self.bias is None else self.products + self.bias

    def of_sign(self, sign: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Σ of the contributions x w of one sign, and the way back of a gradient at that sum."""
        with_positive = (self.weight * sign).clamp_min(0) * sign
        with_negative = (self.weight * -sign).clamp_min(0) * -sign
        positive, negative = self.inputs.clamp_min(0), self.inputs.clamp_max(0)
        total = self.product(positive, with_positive) + self.product(negative, with_negative)

        def back(ratio: Tensor) -> Tensor:
            from_positive = self.transposed(ratio, with_positive) * (self.inputs > 0)
            return from_positive + self.transposed(ratio, with_negative) * (self.inputs < 0)

        return total, back

    def absorbed(self, sign: int = 0) -> Tensor | float:
        """The bias in the denominator: all of it, or its part of one sign; 0 where the inputs get its share."""
        if self.bias is None or not self.absorbing:
            return 0.0
        return self.bias if sign == 0 else (self.bias * sign).clamp_min(0) * sign

    def in_float(self) -> WeightedSum:
        """The same sum in float32 at least."""
        bias = None if self.bias is None else at_least_float(self.bias)
        return replace(self, inputs=at_least_float(self.inputs), weight=at_least_float(self.weight), bias=bias)


class Rule(Protocol):
    """From the coefficient c at z, with R = z c its relevance, to the coefficient at the inputs, R_i = x_i c_i."""

    def __call__(self, step: WeightedSum, coefficient: Tensor) -> Tensor:
        """The coefficient at the inputs, shaped like them."""


@dataclass(frozen=True)
class Epsilon:
    """R_i = Σ_j x_i w_ij R_j / (z_j + ε sign z_j); with ε = 0 it is gradient times input (Bach et al. 2015, eq. 58).

    The sum over i is R_j less what ε and the bias keep. Relevances have both signs.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {self.epsilon:g}")

    def __call__(self, step: WeightedSum, coefficient: Tensor) -> Tensor:
        """See the class."""
        relevance = step.output * coefficient
        denominator = step.products + step.absorbed()
        return step.transposed(_ratio(relevance, denominator + self.epsilon * denominator.sign()), step.weight)


@dataclass(frozen=True)
class AlphaBeta:
    """R_i = Σ_j (α p_ij / Σp - β n_ij / Σn) R_j, p and n the positive and negative x_i w_ij, β = α - 1.

    α = 1 is the z+ rule, which keeps positive relevance positive. Bach et al. 2015, eq. 60. Where all contributions
    have one sign they share R_j as they are, so that nothing is lost (our decision).
    """

    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if not (self.alpha >= 1 and self.beta >= 0 and abs(self.alpha - self.beta - 1) < 1e-9):
            raise ValueError(f"alpha - beta must be 1 with beta at least 0, got {self.alpha:g} and {self.beta:g}")

    def __call__(self, step: WeightedSum, coefficient: Tensor) -> Tensor:
        """See the class."""
        relevance = step.output * coefficient
        positive, from_positive = step.of_sign(1)
        positive = positive + step.absorbed(1)
        if self.beta == 0 and not bool(((positive == 0) & (relevance != 0)).any()):
            return from_positive(_ratio(relevance, positive))
        negative, from_negative = step.of_sign(-1)
        negative = negative + step.absorbed(-1)
        alpha = torch.where(negative == 0, 1.0, self.alpha)
        result = from_positive(_ratio(alpha * relevance, positive))
        beta = torch.where(positive == 0, -1.0, self.beta)
        return result - from_negative(_ratio(beta * relevance, negative))


@dataclass(frozen=True)
class Gamma:
    """Contributions of the sign of z_j count (1 + γ) times: R_i = Σ_j (x_i w_ij + γ (x_i w_ij)^±) R_j / (their sum).

    Between epsilon (γ = 0) and z+ (γ → ∞). Montavon et al. 2019 for positive inputs; the form for inputs and outputs of
    either sign is from memory.
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma:g}")

    def __call__(self, step: WeightedSum, coefficient: Tensor) -> Tensor:
        """See the class."""
        products, output = step.products, step.output
        result = torch.zeros_like(step.inputs)
        for sign in (1, -1):
            relevance = torch.where(output * sign > 0, output * coefficient, 0)
            signed, back = step.of_sign(sign)
            denominator = products + step.absorbed() + self.gamma * (signed + step.absorbed(sign))
            ratio = _ratio(relevance, denominator)
            result = result + step.transposed(ratio, step.weight) + self.gamma * back(ratio)
        return result


@dataclass(frozen=True)
class ZBox:
    """R_i = Σ_j (x_i w_ij - l w_ij⁺ - h w_ij⁻) R_j / (their sum), for inputs that lie between l and h, such as pixels.

    Montavon et al. 2017 (z^B). Relevance need not vanish where the input does.

    Args:
        low: l; the least value of each sample by default.
        high: h; the greatest value of each sample by default.
    """

    low: float | None = None
    high: float | None = None

    def relevance(self, step: WeightedSum, coefficient: Tensor) -> Tensor:
        """R of the inputs."""
        flat = step.inputs.flatten(1)
        shape = (-1, *(1 for _ in step.inputs.shape[1:]))
        low = flat.amin(1).reshape(shape) if self.low is None else flat.new_tensor(self.low)
        high = flat.amax(1).reshape(shape) if self.high is None else flat.new_tensor(self.high)
        positive, negative = step.weight.clamp_min(0), step.weight.clamp_max(0)
        low, high = low.expand_as(step.inputs), high.expand_as(step.inputs)
        parts = ((step.inputs, step.weight), (-low, positive), (-high, negative))
        products = torch.stack([step.product(values, weight) for values, weight in parts]).sum(0)
        ratio = _ratio(step.output * coefficient, products + step.absorbed())
        return torch.stack([values * step.transposed(ratio, weight) for values, weight in parts]).sum(0)

    def __call__(self, step: WeightedSum, coefficient: Tensor) -> Tensor:
        """The coefficient R / x; where x is 0 its relevance cannot be handed on."""
        return _ratio(self.relevance(step, coefficient), step.inputs)


_RULES: dict[str, Callable[..., Rule]] = {
    "epsilon": Epsilon,
    "z": lambda: Epsilon(0.0),
    "z+": AlphaBeta,
    "alpha-beta": AlphaBeta,
    "gamma": Gamma,
    "z-box": ZBox,
}


def parse_rule(rule: Rule | str) -> Rule:
    """A rule, or the one a text names: "epsilon", "z", "z+", "gamma", "alpha-beta", "z-box"; numbers follow a colon.

    Raises:
        ValueError: if the name is unknown or the numbers do not fit.

    Example:
        >>> parse_rule("alpha-beta:2,1"), parse_rule("epsilon:0.01")
        (AlphaBeta(alpha=2.0, beta=1.0), Epsilon(epsilon=0.01))
    """
    if not isinstance(rule, str):
        return rule
    name, _, numbers = rule.partition(":")
    if name not in _RULES:
        raise ValueError(f"rule {name!r} is not known, rules are {', '.join(_RULES)}{did_you_mean(name, list(_RULES))}")
    try:
        return _RULES[name](*(float(number) for number in numbers.split(",") if number))
    except (TypeError, ValueError) as error:
        raise ValueError(f"numbers of rule {rule!r} do not fit: {error}") from error


def at_least_float(tensor: Tensor) -> Tensor:
    """The tensor in float32, float64 where it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _ratio(relevance: Tensor, denominator: Tensor) -> Tensor:
    """Relevance over the denominator, 0 where that is 0."""
    zero = denominator == 0
    return (relevance / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)
