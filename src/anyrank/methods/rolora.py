"""RoLoRA: B and A are trained in turn, one in each round, so that every mean is exact and both can learn.

Chen, Guo, Ju, Dalal, Zhu, Khisti. Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA.
NeurIPS 2025, arXiv 2502.01755.

    odd rounds:   clients train B_k, A is frozen:    B = sum_k w_k pad(B_k)
    even rounds:  clients train A_k, B is frozen:    A = sum_k w_k pad(A_k)        so that  B A = sum_k w_k B_k A_k

Names: w_k = weights, divided by the sum that arrived; pad = zero slots up to the server's rank.
Our readings: B first, since it starts at zero, where A has no gradient; the paper has one rank, and on a mixed fleet client
k uses the first r_k slots of both factors, which keeps the mean exact.
Deviations: slots above the largest rank of the round keep their value.
Traps: server momentum moves the resting factor on, too. Exact only with a server: among peers the frozen factors differ,
and nothing mixes them (`adf_lora` does).
Cost: O(sum_k r_k (d_in + d_out)); down both factors at the client's rank, up the one of the round.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from anyrank import lowrank
from anyrank.adapter import LowRank
from anyrank.federation import Device, Inbox, Method, Plan, State
from anyrank.methods.zero_padding import zero_padding

__all__ = ["rolora"]


def rolora() -> Method:
    """Averaging of one factor at a time."""
    baseline = zero_padding()

    def active(state: State) -> Literal["A", "B"]:
        return "B" if state.round % 2 == 0 else "A"  # the running round is state.round + 1

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        factor = active(state)
        return [replace(plan, train=factor, up=factor) for plan in baseline.assign(state, devices)]

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        factor, layers = active(state), {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            mean = lowrank.padded_mean(parts, shares, previous)
            layers[layer] = LowRank(previous.A, mean.B) if factor == "B" else LowRank(mean.A, previous.B)
        return state.with_layers(layers)

    claims = baseline.claims._replace(paper="Chen et al., arXiv 2502.01755", up="m r_k and n r_k in turn", exact=True)
    return baseline._replace(assign=assign, aggregate=aggregate, claims=claims)
