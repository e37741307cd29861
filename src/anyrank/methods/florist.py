"""FLoRIST: average the products, and keep only as many singular directions as hold a share tau of the energy.

Ramesh, Dass. FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language
Models. MLSys 2026, arXiv 2506.09199.

    D = sum_k w_k B_k A_k = U S V^T        p = the least with  S_1^2 + ... + S_p^2 >= tau (S_1^2 + S_2^2 + ...)
    A = V^T[:p],  B = (U S)[:, :p]         client k is sent the first r_k slots

Names: w_k = weights, divided by the sum that arrived. With tau = 1 this is `flexlora`.
Deviations: p is at most the server's rank, and the slots from p to there are filled up as in `flexlora`, A random and B
zero: shapes stay as they are, and the rank can grow again. The paper sends p slots to every client.
Traps: a round in which nobody learns anything still drops up to 1 - tau of the energy.
Cost: O((d_in + d_out) R^2 + R^3), R = sum_k r_k; up and down one adapter of the client's rank.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Gt, Le

from anyrank import lowrank
from anyrank.federation import Inbox, Method, State
from anyrank.methods.flexlora import flexlora
from anyrank.seeding import generator

__all__ = ["florist"]


def florist(*, tau: Annotated[float, Gt(0), Le(1)] = 0.95) -> Method:
    """Product averaging with a rank chosen by energy.

    Args:
        tau: share of the squared singular values that is kept.
    """
    baseline = flexlora()

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            mean = lowrank.weighted_sum(parts, [share / sum(shares) for share in shares])
            rng = generator(state.spec.seed, "florist", state.round, layer)
            layers[layer] = lowrank.svd(mean, previous.rank, rng, energy=tau)
        return state.with_layers(layers)

    claims = baseline.claims._replace(paper="Ramesh and Dass, arXiv 2506.09199", exact=tau == 1)
    return baseline._replace(aggregate=aggregate, claims=claims)
