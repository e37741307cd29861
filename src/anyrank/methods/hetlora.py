"""HetLoRA: norm-weighted aggregation, and clients that prune the tail of their own rank.

Cho, Liu, Xu, Fahrezi, Joshi. Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models.
EMNLP 2024, arXiv 2401.06432.

    client:  q = floor(gamma r_k),  tail = slots q .. r_k - 1
             loss + lam * ||B[:, tail]|| ||A[tail]||
             if the tail's norm product shrank during training:  r_k := q, the tail is dropped
    server:  nu_k = ||B_k A_k||_F
             A = sum_k nu_k pad(A_k) / sum_k nu_k        B likewise
             client k is sent the first r_k slots

Names: gamma, lam = the paper's decay factor and regularisation weight; nu_k = `lowrank.norm`, per layer; || || = Frobenius.
Our readings: the tail's products are summed over the layers, and all layers of a client are pruned together (r_k belongs to
the client); the rank never falls below `rank_min`; without any product yet (all nu_k zero) the weights are equal.
Deviations: slots above the largest rank of the round keep their value.
Cost: O(sum_k r_k^2 (d_in + d_out)); up and down one adapter of the client's rank.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.federation import Inbox, Method, State
from anyrank.methods.zero_padding import zero_padding

__all__ = ["hetlora"]


def hetlora(
    *,
    gamma: Annotated[float, Gt(0), Le(1)] = 0.99,
    lam: Annotated[float, Ge(0), Le(1e6)] = 0.01,
    rank_min: Annotated[int, Ge(1)] = 1,
) -> Method:
    """Norm-weighted zero padding with self-pruning clients.

    Args:
        gamma: share of the slots that are never pruned in one round; 1 never prunes.
        lam: weight of the tail's norm product in the loss.
        rank_min: no client prunes below this rank.
    """
    baseline = zero_padding()

    def kept(rank: int) -> int:
        # 0.58 * 50 is 28.999999999999996: without the small term a floor of exactly 29 would lose a rank.
        return min(rank, max(rank_min, math.floor(gamma * rank + 1e-9)))

    def tail_norm(adapter: Adapter) -> Tensor:
        norms = [
            part.B[:, kept(part.rank) :].norm() * part.A[kept(part.rank) :].norm() for part in adapter.layers.values()
        ]
        return torch.stack(norms).sum()

    def penalty(now: Adapter, start: Adapter) -> Tensor:
        return lam * tail_norm(now)

    def leave(now: Adapter, start: Adapter) -> Adapter:
        if tail_norm(now) >= tail_norm(start):
            return now
        layers = {name: lowrank.truncate(part, kept(part.rank)) for name, part in now.layers.items()}
        return Adapter(layers, now.dense)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, parts, _, previous in state.holders(inbox, weights):
            nu = [float(lowrank.norm(part)) for part in parts]
            layers[layer] = lowrank.padded_mean(parts, nu if sum(nu) > 0 else [1.0] * len(parts), previous)
        return state.with_layers(layers)

    claims = baseline.claims._replace(
        paper="Cho et al., arXiv 2401.06432",
        cost="O(sum r_k^2 (d_in + d_out))",
        prunes=True,
    )
    return baseline._replace(penalty=penalty, leave=leave, aggregate=aggregate, claims=claims)
