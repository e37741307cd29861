"""Fed-RAC-LoRA: each round a fresh random A for all, B trained from zero, and their product goes into the base model.

Malinovsky, Michieli, Hammoud, Ceritli, Elesedy, Ozay, Richtárik. Randomized Asymmetric Chain of LoRA: The First
Meaningful Theoretical Framework for Low-Rank Adaptation. arXiv 2410.08305.

    client:  trains B_k from zero; A[:r_k] is frozen
    server:  B = sum_k w_k pad(B_k)        so that  B A = sum_k w_k B_k A[:r_k]
             W := W + scale * B A,  A drawn anew

Names: A = the shared sketch of the round; w_k = weights, divided by the sum that arrived; pad = zero columns.
Our readings: the paper has one rank; on a mixed fleet client k uses the first r_k rows of the sketch, which keeps the
mean exact. A is drawn as LoRA draws it. B is trained and A is the sketch; the paper allows either.
Deviations: those of `flora`; the fold travels with its A, which a client could also draw.
Traps: a row of the sketch that only some clients can hold counts by their weight.
Cost: O(sum_k r_k d_out); down one fold at the server's rank, up B at the client's rank.
"""

from collections.abc import Sequence
from dataclasses import replace

from anyrank import lowrank
from anyrank.adapter import LowRank
from anyrank.federation import Device, Inbox, Method, Plan, State
from anyrank.methods.flora import flora, restarted

__all__ = ["rac_lora"]


def rac_lora() -> Method:
    """Averaging of B over a fresh random A, into the base model."""
    baseline = flora()

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        return [replace(plan, train="B", up="B") for plan in baseline.assign(state, devices)]

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        products = {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            held = lowrank.truncate(previous, max(part.rank for part in parts))
            products[layer] = LowRank(held.A, lowrank.padded_mean(parts, shares, held).B)
        return restarted(state, products)

    claims = baseline.claims._replace(
        paper="Malinovsky et al., arXiv 2410.08305", cost="O(R d_out)", down="(m + n) r", up="m r_k"
    )
    return baseline._replace(assign=assign, aggregate=aggregate, claims=claims)
