"""LoRA-FAIR: factors are averaged, and B is corrected on the server towards the mean product.

Bian, Wang, Zhang, Xu. LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement.
ICCV 2025, arXiv 2411.14961.

    A = sum_k w_k pad(A_k)        B = sum_k w_k pad(B_k)        D = sum_k w_k B_k A_k
    sgd:    dB by gradient descent on  1 - cos(D, (B + dB) A) + lam ||dB||
    ridge:  dB = (D - B A) A^T (A A^T + lam I)^-1,  the least of  ||D - (B + dB) A||^2 + lam ||dB||^2
    B := B + dB                   client k is sent the first r_k slots

Names: w_k = weights, divided by the sum that arrived; || || = Frobenius, cos of the matrices as vectors. Both solvers
work on D A^T = sum_k w_k B_k (A_k A^T) and A A^T, `sgd` besides on ||D||; D is in factors.
Our readings: `sgd` has the paper's objective, with steps and learning rate of ours, and takes its norm by a proximal
step: a plain one would jitter around dB = 0, where the norm has a kink. `ridge`, ours, has the Frobenius distance in
place of the cosine, and a closed form. Smaller adapters are padded.
Deviations: slots above the largest rank of the round keep their value, and have no part in D.
Traps: lam weighs a norm with `sgd` and its square with `ridge`; the cosine does not see how large a product is.
Cost: O(R r (d_in + d_out) + r^3), R = sum_k r_k; up and down one adapter of the client's rank.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from anyrank import lowrank
from anyrank.adapter import LowRank
from anyrank.federation import Inbox, Method, State
from anyrank.methods.zero_padding import zero_padding

__all__ = ["lora_fair"]


def lora_fair(
    *,
    solver: Literal["ridge", "sgd"] = "ridge",
    lam: Annotated[float, Gt(0), Le(1e6)] = 0.01,
    steps: Annotated[int, Ge(1)] = 100,
    learning_rate: Annotated[float, Gt(0), Le(1e3)] = 0.01,
) -> Method:
    """Factor averaging with a correction of B.

    Args:
        solver: `ridge`, the closed form, or `sgd`, the paper's objective by gradient descent.
        lam: weight of the correction's norm.
        steps: of the server's gradient descent.
        learning_rate: of the server's gradient descent.
    """
    baseline = zero_padding()

    def correction(mean: LowRank, parts: Sequence[LowRank], shares: Sequence[float]) -> Tensor:
        toward = _product_with(mean.A.T, parts, shares)  # D A^T
        if solver == "ridge":
            return _ridge(mean, toward, lam)
        size = lowrank.norm(lowrank.weighted_sum(parts, shares))
        return _descent(mean, toward, size, lam=lam, steps=steps, learning_rate=learning_rate)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            mean = lowrank.padded_mean(parts, shares, previous)
            held = lowrank.truncate(mean, max(part.rank for part in parts)).map(Tensor.double)
            B = (held.B + correction(held, parts, [share / sum(shares) for share in shares])).to(mean.B)
            layers[layer] = LowRank(mean.A, torch.cat([B, mean.B[:, held.rank :]], dim=1))
        return state.with_layers(layers)

    claims = baseline.claims._replace(paper="Bian et al., arXiv 2411.14961", cost="O(R r (d_in + d_out) + r^3)")
    return baseline._replace(aggregate=aggregate, claims=claims)


def _product_with(X: Tensor, parts: Sequence[LowRank], shares: Sequence[float]) -> Tensor:
    """`sum_k w_k B_k (A_k X)`, one part after another."""
    total = X.new_zeros(parts[0].B.shape[0], X.shape[1])
    for part, share in zip(parts, shares, strict=True):
        total.addmm_(part.B.to(X), part.A.to(X) @ X, alpha=share)
    return total


def _ridge(mean: LowRank, toward: Tensor, lam: float) -> Tensor:
    gram = mean.A @ mean.A.T
    missed = toward - mean.B @ gram  # (D - B A) A^T
    return torch.linalg.solve(gram + lam * torch.eye(mean.rank).to(gram), missed, left=False)


def _descent(mean: LowRank, toward: Tensor, size: Tensor, *, lam: float, steps: int, learning_rate: float) -> Tensor:
    gram, change = mean.A @ mean.A.T, torch.zeros_like(mean.B)
    for _ in range(steps):
        now = mean.B + change
        reached = ((now.T @ now) * gram).sum().clamp(min=0).sqrt()
        if (lengths := reached * size) == 0:
            break  # there is no angle
        cosine = (toward * now).sum() / lengths
        moved = change - learning_rate * (cosine / reached**2 * (now @ gram) - toward / lengths)
        change = moved * (1 - learning_rate * lam / moved.norm()).clamp(min=0)
    return change
