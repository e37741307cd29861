"""LoRA-RITE: an adaptive optimizer whose steps do not depend on how a product is split into its factors.

Yen, Si, Meng, Yu, Duvvuri, Dhillon, Hsieh, Kumar. LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA
Optimization. ICLR 2025, arXiv 2410.20625.

For X = B with Y = A^T, and for X = A^T with Y = B, both from the same A and B:

    Y   = U R                                      thin QR
    g   = grad_X R^-1                              the unmagnified gradient
    P   = U^T U_before                             how the basis has turned
    rho = beta2 (rho + escaped(V, P V P^T))        mass that has left the basis
    V   = beta2 P V P^T + (1 - beta2) g^T g / n    second moment, r x r
    S   = ((V + rho I)^1/2 + eps I)^-1
    M   = beta1 M P^T + (1 - beta1) g S            first moment, of what is preconditioned
    X   = X - eta (M R^-T + decay X)

    escaped(V, W) = the smaller of max_i (lambda_i(V) - lambda_i(W)) and tr V - tr W, at least 0

Names: beta1, beta2 = the arguments, corrected for moments that start at zero; n = rows of X; lambda_i = i-th eigenvalue;
eta, decay = `train.learning_rate` and `train.weight_decay`.
Our readings: all unmagnified gradients together are shortened to the length `clip`. R^-1 is a pseudo-inverse, so at B = 0 the
first step moves B alone. A frozen factor is only ever Y. Tensors trained whole (the head) are moved by AdamW.
Deviations: the released code also drops gradients of outlying size, and leaves rho out unless asked.
Traps: eta is a rate of the product's, not of the factors': while B is small, A moves far in a single step.
Cost: O(r^2 (d_in + d_out) + r^3) for each layer and step; 2 r (d_in + d_out) + 2 r^2 numbers are kept between steps.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW, Optimizer

from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Local
from anyrank.local.lora import lora

__all__ = ["lora_rite"]


def lora_rite(
    *,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-6,
    clip: Annotated[float, Gt(0)] = 1.0,
) -> Local:
    """RITE on the factors, AdamW on the dense tensors.

    Args:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        clip: largest norm of all unmagnified gradients together.
    """

    def optimizer(live: Adapter, learning_rate: float, weight_decay: float) -> Optimizer:
        settings = {"beta1": beta1, "beta2": beta2, "eps": eps, "clip": clip}
        return _Rite(live, {"lr": learning_rate, "weight_decay": weight_decay, **settings})

    return lora()._replace(optimizer=optimizer)


class _Rite(Optimizer):
    def __init__(self, live: Adapter, settings: dict[str, float]):
        self._parts = tuple(live.layers.values())
        factors = [factor for part in self._parts for factor in (part.A, part.B) if factor.requires_grad]
        dense = [tensor for tensor in live.dense.values() if tensor.requires_grad]
        super().__init__([{"params": factors}, {"params": dense}], settings)
        self._whole = AdamW([{"params": dense}], lr=settings["lr"], weight_decay=settings["weight_decay"], fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        group = self.param_groups[0]
        prepared = []
        for factor, X, grad_X, Y in _sides(self._parts):
            U, R = torch.linalg.qr(Y)
            inverse = torch.linalg.pinv(R)
            prepared.append((factor, X, U, inverse, grad_X @ inverse))
        norm = sum(float(g.square().sum()) for *_, g in prepared) ** 0.5
        shrink = min(1.0, group["clip"] / norm) if norm else 1.0
        for factor, X, U, inverse, g in prepared:
            step = _direction(self.state[factor], U, shrink * g, group) @ inverse.T + group["weight_decay"] * X
            X -= (group["lr"] * step).to(X)
        self._whole.step()


def _sides(parts: tuple[LowRank, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each factor with a gradient: itself, and long side first, a view of it, its gradient and the other factor."""
    for part in parts:
        for factor, X, Y in ((part.A, part.A.T, part.B), (part.B, part.B, part.A.T)):
            if factor.grad is not None:
                dtype = torch.promote_types(X.dtype, torch.float32)
                grad_X = factor.grad if X is factor else factor.grad.T
                yield factor, X, grad_X.to(dtype), Y.to(dtype)


def _direction(
    memory: dict[str, Any], U: Float[Tensor, "m r"], g: Float[Tensor, "n r"], group: dict[str, Any]
) -> Float[Tensor, "n r"]:
    """The first moment after this step; `memory` is brought up to date."""
    if not memory:
        zero = g.new_zeros(g.shape[1], g.shape[1])
        memory.update(steps=0, U=torch.zeros_like(U), V=zero, M=torch.zeros_like(g), rho=g.new_zeros(()))
    memory["steps"] += 1
    beta1, beta2 = (_corrected(group[beta], memory["steps"]) for beta in ("beta1", "beta2"))
    P = U.T @ memory["U"]
    turned = P @ memory["V"] @ P.T
    rho = beta2 * (memory["rho"] + _escaped(memory["V"], turned))
    V = beta2 * turned + (1 - beta2) * g.T @ g / len(g)
    values, vectors = torch.linalg.eigh(V)
    S = vectors / ((values + rho).clamp(min=0).sqrt() + group["eps"]) @ vectors.T
    M = beta1 * memory["M"] @ P.T + (1 - beta1) * g @ S
    memory.update(U=U, V=V, M=M, rho=rho)
    return M


def _corrected(beta: float, steps: int) -> float:
    """The decay with which a moment that started at zero is the weighted mean of what it has seen."""
    return beta * (1 - beta ** (steps - 1)) / (1 - beta**steps)


def _escaped(V: Float[Tensor, "r r"], W: Float[Tensor, "r r"]) -> Float[Tensor, ""]:
    """A bound on the second moment of `V` that is missing in `W`."""
    largest = (torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(W)).max()
    return torch.minimum(largest, V.trace() - W.trace()).clamp(min=0)
