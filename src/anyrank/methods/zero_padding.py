"""Zero padding: FedAvg on a mixed fleet, smaller adapters filled up with zero slots.

The baseline of Cho et al. (arXiv 2401.06432) and of Chen et al. (arXiv 2408.08699).

    A = sum_k w_k pad(A_k)        B = sum_k w_k pad(B_k)        client k is sent the first r_k slots

Names: pad = zero rows of A and zero columns of B up to the server's rank; w_k = weights.
Traps: a slot held by clients of total weight w keeps w of A and w of B, so w^2 of its product, in every round.
Deviations: slots above the largest rank of the round keep their value (the literal sum makes them zero, and a slot that is
zero in A and B can never learn again).
Cost: O(sum_k r_k (d_in + d_out)); up and down one adapter of the client's rank.
"""

from anyrank.allocate import at_own_rank
from anyrank.federation import Method, Spec, State
from anyrank.methods.fedavg import fedavg, init_at

__all__ = ["zero_padding"]


def zero_padding() -> Method:
    """Factor averaging over padded adapters, every client at its own rank."""
    baseline = fedavg()

    def init(spec: Spec) -> State:
        return init_at(spec, max(spec.levels))

    claims = baseline.claims._replace(
        paper="in Cho et al., arXiv 2401.06432",
        down="(m + n) r_k",
        up="(m + n) r_k",
        mixed_ranks=True,
        keeps_no_op=False,
    )
    return baseline._replace(init=init, assign=at_own_rank, claims=claims)
