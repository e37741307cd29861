"""ADF-LoRA: no server; peers train B and A in turn, for some rounds each, and mix both with their neighbours.

Wang, Li, Zhou, Li, Liu. ADF-LoRA: Alternating Low-Rank Aggregation for Decentralized Federated Fine-Tuning.
arXiv 2511.18291.

    phase p = 0, 1, ... is rounds p T + 1 .. (p + 1) T:  everyone trains B if p is even, A if p is odd
    every round:  A_i = sum_j w_ij A_j        B_i = sum_j w_ij B_j

Names: T = `period`; w_ij = the topology's weights, symmetric, with rows that sum to one, w_ii among them.
The frozen factor is mixed too: it becomes nearly equal among neighbours, and with it the product of their means nearly the
mean of their products. The difference is sum_j w_ij (B_j - B) (A_j - A), with B and A the two means.
Our readings: B first, since it starts at zero, where A has no gradient; weights are those of Metropolis and Hastings.
Deviations: on a mixed fleet everyone gets the smallest rank, as in `fedavg`. With a server all peers agree after every
round, so that the rule is `rolora`'s with longer phases, equal ranks and both factors on their way up.
Cost: O(r (d_in + d_out)) a neighbour; one adapter of rank r to and from every neighbour.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge

from anyrank.federation import Device, Factors, Method, Plan, State
from anyrank.methods.fedavg import fedavg

__all__ = ["adf_lora"]


def adf_lora(*, period: Annotated[int, Ge(1)] = 5) -> Method:
    """Averaging of both factors while one at a time is trained.

    Args:
        period: rounds of a phase.
    """
    baseline = fedavg()

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        factor: Factors = "B" if state.round // period % 2 == 0 else "A"
        return [replace(plan, train=factor) for plan in baseline.assign(state, devices)]

    return baseline._replace(assign=assign, claims=baseline.claims._replace(paper="Wang et al., arXiv 2511.18291"))
