"""The product of two weights that moves a hidden state, and its gradient."""

from __future__ import annotations

import torch

from ..products import add_matmul, matmul


class Coupling:
    """C = left @ right, which moves the hidden state: as one h x h matrix, or, where few rows use
    it, as its two factors."""

    def __init__(
        self, left: torch.Tensor, right: torch.Tensor, dense: bool, operand: torch.dtype
    ) -> None:
        self.left, self.right, self.operand = left, right, operand
        self.matrix = matmul(left, right, operand) if dense else None
        self._grad: torch.Tensor | None = None
        self._grad_left: torch.Tensor | None = None
        self._grad_right: torch.Tensor | None = None

    def rounded(self) -> torch.Tensor | None:
        """The matrix as products read it; None where there is none."""
        return None if self.matrix is None else self.matrix.to(self.operand)

    def move(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """C applied to each row of x; C^T with `transposed`."""
        if self.matrix is not None:
            return matmul(x, self.matrix if transposed else self.matrix.mT, self.operand)
        first, second = (self.left, self.right) if transposed else (self.right.mT, self.left.mT)
        return matmul(matmul(x, first, self.operand), second, self.operand)

    def add_gradient(
        self, grad_moved: torch.Tensor, x: torch.Tensor, transposed: bool = False
    ) -> None:
        """Adds the gradient of ``move(x, transposed)``."""
        rows, columns = (x, grad_moved) if transposed else (grad_moved, x)
        if self.matrix is not None:
            self._grad = add_matmul(self._grad, rows.mT, columns, self.operand)
            return
        self._grad_left = add_matmul(
            self._grad_left, rows.mT, matmul(columns, self.right.mT, self.operand), self.operand
        )
        self._grad_right = add_matmul(
            self._grad_right, matmul(rows, self.left, self.operand).mT, columns, self.operand
        )

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of left and right, once `add_gradient` was called."""
        if self._grad is not None:
            return matmul(self._grad, self.right.mT, self.operand), matmul(
                self.left.mT, self._grad, self.operand
            )
        assert self._grad_left is not None and self._grad_right is not None
        return self._grad_left, self._grad_right
