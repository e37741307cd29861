"""LoRA-Pro: gradients of A and B that change the product as nearly as they can as full fine-tuning would.

Wang, Liang, He, Wang, Tan. LoRA-Pro: Are Low-Rank Adapters Properly Optimized? ICLR 2025, arXiv 2407.18242.

    grad_A' = (B^T B)^-1 grad_A + X A
    grad_B' = (I - P_B) grad_B (A A^T)^-1 - B X,      P_B = B (B^T B)^-1 B^T,      P_A = A^T (A A^T)^-1 A
    X solves  B^T B X + X A A^T = -(B^T B)^-1 grad_A A^T

so that B grad_A' + grad_B' A is proportional to P_B G + (I - P_B) G P_A, the matrix nearest to the gradient G of W + scale B A
among those that any gradients of A and B can give. X does not change that matrix; it picks the pair nearest to the plain
gradients.

Names: grad = what backward left, in which the scale s is contained: grad_A = s B^T G, grad_B = s G A^T.
Our readings: the inverses are pseudo-inverses. At B = 0 that gives grad_A' = 0 and grad_B' = grad_B (A A^T)^-1, which is the
released code's first step. Where one factor is frozen, the other's gradient is the best one alone: G P_A or P_B G.
Deviations: the paper has 1 / s^2 in front of both gradients; we leave it out, so the scale need not be known. AdamW, which
comes after, does not see a common factor. The variant with moments of the size of W is not included.
Cost: O(r^2 (d_in + d_out) + r^3) for each layer and step.
"""

import torch
from torch import Tensor

from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Local
from anyrank.local.lora import lora

__all__ = ["lora_pro"]


def lora_pro() -> Local:
    """AdamW on adjusted gradients."""

    def on_grad(live: Adapter, step: int) -> None:
        for part in live.layers.values():
            for factor, adjusted in zip((part.A, part.B), _adjusted(part), strict=True):
                if adjusted is not None:
                    factor.grad = adjusted.to(factor)

    return lora()._replace(on_grad=on_grad)


@torch.no_grad()
def _adjusted(part: LowRank) -> tuple[Tensor | None, Tensor | None]:
    """`grad_A'` and `grad_B'`, in float64; None for a factor without a gradient."""
    A, B = part.A.double(), part.B.double()
    eps = torch.finfo(part.A.dtype).eps * part.rank
    a, V = torch.linalg.eigh(A @ A.T)
    b, U = torch.linalg.eigh(B.T @ B)
    inverse_A, inverse_B = V * _inverse(a, eps) @ V.T, U * _inverse(b, eps) @ U.T
    # The best that each factor could do if the other were frozen.
    alone_A = None if part.A.grad is None else inverse_B @ part.A.grad.double()
    alone_B = None if part.B.grad is None else part.B.grad.double() @ inverse_A
    if alone_A is None or alone_B is None:
        return alone_A, alone_B
    X = -U @ (U.T @ alone_A @ A.T @ V * _inverse(b[:, None] + a, eps)) @ V.T
    return alone_A + X @ A, alone_B - B @ (inverse_B @ B.T @ alone_B + X)


def _inverse(values: Tensor, eps: float) -> Tensor:
    """`1 / x`, and 0 where `x` is rounding noise beside the largest."""
    return torch.where(values > eps * values.max(), 1 / values, 0.0)
