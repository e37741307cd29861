"""raFLoRA: average the products slot by slot over the owners of each slot, redistribute by SVD.

Wu, Hu, Min, Wang. Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity.
arXiv 2602.13486.

    D = sum_k sum_{j < r_k} (w_k / sum_{i: r_i > j} w_i) B_k[:, j] A_k[j] = U S V^T
    A = V^T[:R],  B = (U S)[:, :R]        client k is sent the first r_k slots

Names: w_k = weights, r_k = rank of the update, j = slot, R = the server's rank. The paper sums over partitions, the
slots between two neighbouring ranks of the fleet; within one the owners are the same, so slot by slot is the same sum.
Traps: D depends on how a client splits its product into slots, since slots of low number are shared with more clients.
Deviations: the slots of the server that nobody owns this round join D as they are; the singular values go into B, where
the paper splits their root over both sides: a slot that is zero on both sides could never learn.
Cost: O((d_in + d_out) R^2 + R^3), R = sum_k r_k; up and down one adapter of the client's rank.
"""

from collections.abc import Sequence

from anyrank import lowrank
from anyrank.federation import Inbox, Method, State
from anyrank.methods.flexlora import flexlora
from anyrank.seeding import generator

__all__ = ["raflora"]


def raflora() -> Method:
    """Product averaging over the owners of each slot, with truncated SVD."""
    baseline = flexlora()

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            by_slot = lowrank.slot_shares(parts, shares, previous)
            unowned = lowrank.tail(previous, max(part.rank for part in parts))
            mean = lowrank.weighted_sum([*parts, unowned], [*by_slot, 1.0])
            rng = generator(state.spec.seed, "raflora", state.round, layer)
            layers[layer] = lowrank.svd(mean, previous.rank, rng)
        return state.with_layers(layers)

    claims = baseline.claims._replace(paper="Wu et al., arXiv 2602.13486", exact=False, keeps_no_op=True)
    return baseline._replace(aggregate=aggregate, claims=claims)
