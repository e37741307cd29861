"""FedSA-LoRA: A is shared, B stays with its client; both are trained.

Guo, Zeng, Wang, Fan, Wang, Qu. Selective Aggregation for Low-Rank Adaptation in Federated Learning. ICLR 2025,
arXiv 2410.01463.

    client:  trains A_k from A[:r_k] and B_k from its own last B_k, the server's the first time; sends A_k, keeps B_k
    server:  A[j] = sum_{k: r_k > j} w_k A_k[j] / sum_{k: r_k > j} w_k

Names: w_k = weights, r_k = rank of the update, j = slot.
Our readings: the paper has one rank; on a mixed fleet each row of A is averaged over the clients that own it, as in `rbla`,
so that those without the row do not dilute it. A client whose rank has changed keeps the first columns of its B; columns
that it did not have start at zero.
Deviations: rows that nobody owns this round keep their value; the head is averaged, as by every method.
Traps: there is no global adapter: on the server B stays at its first value, zero unless the run starts from an adapter.
Cost: O(sum_k r_k d_in); up and down A at the client's rank.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Device, Inbox, Method, Plan, State
from anyrank.methods.rbla import rbla

__all__ = ["fedsa_lora"]


def fedsa_lora() -> Method:
    """Slot-wise averaging of A over its owners, with a B for each client."""
    baseline = rbla()

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        return [replace(plan, down="A", up="A") for plan in baseline.assign(state, devices)]

    def enter(start: Adapter, kept: Adapter | None) -> Adapter:
        own, layers = kept.layers if kept else {}, {}
        for name, part in start.layers.items():
            mine = own.get(name, part)
            B = torch.cat([mine.B[:, : part.rank], part.B[:, mine.rank :]], dim=1)
            layers[name] = LowRank(part.A, B)
        return Adapter(layers, start.dense)

    def keep(now: Adapter) -> Adapter:
        return Adapter(now.layers)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        return state.with_layers(
            {
                layer: LowRank(lowrank.by_slot(parts, shares, previous).A, previous.B)
                for layer, parts, shares, previous in state.holders(inbox, weights)
            }
        )

    claims = baseline.claims._replace(
        paper="Guo et al., arXiv 2410.01463", cost="O(R d_in)", down="n r_k", up="n r_k", personal=True
    )
    return baseline._replace(assign=assign, enter=enter, keep=keep, aggregate=aggregate, claims=claims)
