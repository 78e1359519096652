"""Residual sums whose branches share relevance by magnitude, as Chefer et al.'s code does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from .relevance_graph import operation
from .relevance_rules import at_least_float
from .relevance_steps import Gradients, Hook


class SeenSums(TorchFunctionMode):
    """Remembers the two terms of every sum that Python code makes, by its operation in the autograd graph.

    Sums inside one compiled operation are not seen. Memory: both terms of each sum, copies where a sum is in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[Node, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch and note what was added."""
        tensors = len(args) == 2 and all(isinstance(term, Tensor) for term in args)
        name = getattr(func, "__name__", "") if tensors else ""
        terms = tuple(term.detach() for term in args) if "add" in name else None
        if terms is not None and name in ("add_", "__iadd__"):
            terms = tuple(term.clone() for term in terms)
        result = func(*args, **(kwargs or {}))
        node = getattr(result, "grad_fn", None)
        if terms is not None and node is not None and operation(node) == "Add":
            self.terms[node] = (terms[0], terms[1])
        return result


def rescaled_residual(terms: tuple[Tensor, Tensor], samples: int) -> Hook:
    """Each branch's relevance times a factor of its sample, such that what it gets in all goes by magnitude.

        R_a = a R / (a + b),  Σ R_a → |Σ R_a| / (|Σ R_a| + |Σ R_b|) · Σ R

    Σ R is kept, and the branches' sums stay bounded by it where they cancel. Chefer et al. 2021, read in their code.
    """

    def hook(given: Gradients, _: Gradients) -> tuple[Tensor | None, ...] | None:
        first, second, *rest = given
        if first is None or second is None or (first.shape, second.shape) != (terms[0].shape, terms[1].shape):
            return None
        sums = torch.stack([_a_sample(terms[0], first, samples), _a_sample(terms[1], second, samples)])
        share = sums.abs() / sums.abs().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        factors = share * sums.sum(0) / sums.masked_fill(sums == 0, 1)
        return _times(first, factors[0]), _times(second, factors[1]), *rest

    return hook


def _a_sample(term: Tensor, coefficient: Tensor, samples: int) -> Tensor:
    """(samples,): Σ R of a term."""
    relevance = at_least_float(term) * at_least_float(coefficient)
    return relevance.reshape(samples, -1).double().sum(1)


def _times(coefficient: Tensor, factor: Tensor) -> Tensor:
    a_row = factor.repeat_interleave(coefficient.shape[0] // factor.numel())
    return coefficient * a_row.reshape(-1, *[1] * (coefficient.ndim - 1)).to(coefficient)
