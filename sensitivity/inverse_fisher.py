"""The inverse of a damped Fisher matrix from the gradients it is made of, without ever forming it."""

from __future__ import annotations

import torch
from torch import Tensor


class InverseFisher:
    """F⁻¹ of F = λ I + 1/m Σ_j g_j g_jᵀ, as products and as a diagonal.

        F⁻¹ x         = ( x - Gᵀ (m λ I + G Gᵀ)⁻¹ G x ) / λ
        diag(F⁻¹)_i   = ( 1 - Σ_k B_ki² ) / λ,      B = L⁻¹ G,   L Lᵀ = m λ I + G Gᵀ

    G has one gradient a row. Source: M-FAC (Frantar, Kurtic and Alistarh 2021, arXiv:2107.03356) computes the same by a
    recursion over the gradients; the Woodbury identity with one Cholesky factor gives it at once, and loses fewer
    digits.

    Args:
        gradients: (m, d).
        damping: λ, positive.

    Cost: O(m² d) once, O(m d) a product. Memory: twice the gradients.

    Raises:
        ValueError: for a damping that is not positive: F would be singular.

    Example:
        >>> inverse = InverseFisher(torch.eye(2, 3, dtype=torch.float64), damping=0.5)  # F = diag(1, 1, .5)
        >>> inverse.diagonal().round(decimals=12).tolist()
        [1.0, 1.0, 2.0]
        >>> inverse.product(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).round(decimals=12).tolist()
        [1.0, 2.0, 6.0]
    """

    def __init__(self, gradients: Tensor, damping: float) -> None:
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping:g}: without it the Fisher matrix is singular")
        count = len(gradients)
        gram = gradients @ gradients.T + count * damping * torch.eye(count, dtype=gradients.dtype)
        self.damping = damping
        self._whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), gradients, upper=False)

    def product(self, vectors: Tensor) -> Tensor:
        """F⁻¹ x for x of shape (d,) or (d, n)."""
        product: Tensor = (vectors - self._whitened.T @ (self._whitened @ vectors)) / self.damping
        return product

    def diagonal(self) -> Tensor:
        """(d,): the diagonal of F⁻¹; between 0 and 1/λ."""
        diagonal: Tensor = (1 - self._whitened.square().sum(0)) / self.damping
        return diagonal
