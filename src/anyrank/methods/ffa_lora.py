"""FFA-LoRA: A stays as it was drawn, only B is trained and averaged, so that the mean is exact.

Sun, Li, Li, Ding. Improving LoRA in Privacy-preserving Federated Learning. ICLR 2024, arXiv 2403.12313.

    client:  trains B_k, starting from B[:, :r_k]; A[:r_k] is frozen
    server:  B = sum_k w_k pad(B_k)        so that  B A = sum_k w_k B_k A[:r_k]

Names: w_k = weights, divided by the sum that arrived; pad = zero columns up to the server's rank.
Our readings: the paper has one rank; on a mixed fleet client k uses the first r_k rows of the one A, which keeps the mean
exact. A is LoRA's own first value, drawn from the run's seed by everyone, so that it never travels; that of a start adapter
is known to everyone like the base model.
Deviations: slots above the largest rank of the round keep their value.
Traps: exact is not lossless: of a slot held by clients of total weight w, w is left after every round.
Cost: O(sum_k r_k d_out); up and down B at the client's rank.
"""

from collections.abc import Sequence
from dataclasses import replace

from anyrank import lowrank
from anyrank.adapter import LowRank
from anyrank.federation import Device, Inbox, Method, Plan, State
from anyrank.methods.zero_padding import zero_padding

__all__ = ["ffa_lora"]


def ffa_lora() -> Method:
    """Averaging of B over one frozen A."""
    baseline = zero_padding()

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        return [replace(plan, train="B", down="B", up="B") for plan in baseline.assign(state, devices)]

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        return state.with_layers(
            {
                layer: LowRank(previous.A, lowrank.padded_mean(parts, shares, previous).B)
                for layer, parts, shares, previous in state.holders(inbox, weights)
            }
        )

    claims = baseline.claims._replace(
        paper="Sun et al., arXiv 2403.12313", cost="O(R d_out)", down="m r_k", up="m r_k", exact=True
    )
    return baseline._replace(assign=assign, aggregate=aggregate, claims=claims)
