"""RBLA: each rank slot is averaged over the clients that own it.

Chen, Tavallaie, Nazemi, Zomaya. RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous Models in FLaaS.
ICWS 2024, arXiv 2408.08699.

    A[j]    = sum_{k: r_k > j} w_k A_k[j]    / sum_{k: r_k > j} w_k
    B[:, j] = sum_{k: r_k > j} w_k B_k[:, j] / sum_{k: r_k > j} w_k        client k is sent the first r_k slots

Names: w_k = weights (data sizes), r_k = rank of the update, j = slot. `fedilora` and the server's step of `prelort` are
this rule, and this code.
Deviations: slots that nobody owns this round keep their value (the authors' code makes them zero, which is for good).
Cost: O(sum_k r_k (d_in + d_out)); up and down one adapter of the client's rank.
"""

from collections.abc import Sequence

from anyrank import lowrank
from anyrank.federation import Inbox, Method, State
from anyrank.methods.zero_padding import zero_padding

__all__ = ["rbla"]


def rbla() -> Method:
    """Slot-wise factor averaging over the owners of each slot."""
    baseline = zero_padding()

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        return state.with_layers(
            {
                layer: lowrank.by_slot(parts, shares, previous)
                for layer, parts, shares, previous in state.holders(inbox, weights)
            }
        )

    claims = baseline.claims._replace(paper="Chen et al., arXiv 2408.08699", keeps_no_op=True)
    return baseline._replace(aggregate=aggregate, claims=claims)
