"""GaLore: whole weights are trained, but Adam's memory lives in a low-rank subspace of the gradient.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian. GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection. ICML 2024,
arXiv 2403.03507.

    every `interval` steps:  P = the top `rank` left singular vectors of the gradient G       [d_out, rank]
    every step:              W = W - eta scale P Adam(P^T G)

Names: eta = `train.learning_rate`; scale = the paper's alpha; W = W0 + `<layer>.change`, a dense tensor. A layer with at least
as many rows as columns is projected from the right, `W = W - eta scale Adam(G V) V^T`: always on its shorter side.
Our readings: weight decay pulls the change to zero, not the weight. Everything else that is trained gets AdamW as it is.
Traps: the moments are kept when P moves on, as in the released code. A round shorter than `interval` has one P.
Cost: rank (d_in + d_out) numbers or so of memory for each layer; an eigendecomposition of its shorter side for each P.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anyrank.adapter import CHANGE, Adapter
from anyrank.federation import Local
from anyrank.local.lora import lora

__all__ = ["GaLore", "whole_weights"]


def whole_weights(*, rank: int, interval: int, scale: float) -> Local:
    """Whole weights by GaLore, the rest by AdamW. A recipe gets it with the method of that name, which has the defaults.

    Args:
        rank: of the projection.
        interval: steps for which a projection is kept.
        scale: a factor on the learning rate of what is projected.
    """

    def optimizer(live: Adapter, learning_rate: float, weight_decay: float) -> Optimizer:
        trained = {name: tensor for name, tensor in live.tensors().items() if tensor.requires_grad}
        changes = [tensor for name, tensor in trained.items() if name.endswith(CHANGE)]
        rest = [tensor for name, tensor in trained.items() if not name.endswith(CHANGE)]
        return GaLore(
            changes, rest, lr=learning_rate, weight_decay=weight_decay, rank=rank, interval=interval, scale=scale
        )

    return lora()._replace(optimizer=optimizer, weights="whole")


class GaLore(Optimizer):
    """AdamW, with the gradients of some matrices projected onto their leading directions.

    Args:
        matrices: these are projected.
        rest: these are not.
        lr: learning rate of both.
        weight_decay: of both.
        rank: of the projection.
        interval: steps for which a projection is kept.
        scale: a factor on the learning rate of what is projected.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        rest: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
        rank: int,
        interval: int,
        scale: float,
    ):
        """Nothing is remembered yet."""
        groups = [{"params": list(matrices), "rank": rank, "scale": scale}, {"params": list(rest)}]
        defaults = {"lr": lr, "weight_decay": weight_decay, "rank": None, "interval": interval, "scale": 1.0}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every tensor that has a gradient."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    tensor.mul_(1 - group["lr"] * group["weight_decay"])
                    self._move(_wide(tensor), _wide(tensor.grad), self.state[tensor], group)

    def _move(self, W: Tensor, G: Tensor, memory: dict[str, Any], group: dict[str, Any]) -> None:
        t = memory["step"] = memory.get("step", 0) + 1
        P = None
        if group["rank"]:
            if (t - 1) % group["interval"] == 0:
                memory["P"] = torch.linalg.eigh(G @ G.T).eigenvectors[:, -group["rank"] :]
            P = memory["P"]
        N = _adam(G if P is None else P.T @ G, memory, t)
        W.sub_(group["lr"] * group["scale"] * (N if P is None else P @ N))


def _wide(tensor: Tensor) -> Tensor:
    """A view of a matrix whose rows are its shorter side."""
    return tensor.T if tensor.ndim == 2 and tensor.shape[0] >= tensor.shape[1] else tensor


def _adam(G: Tensor, memory: dict[str, Any], t: int) -> Tensor:
    """Adam's direction after a further gradient."""
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * G
    v = memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * G.square()
    return (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
