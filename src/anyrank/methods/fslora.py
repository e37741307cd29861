"""FSLoRA: a client trains a random sketch of the global adapter; what it changed is averaged over all participants.

Fang, Han, Yuan, Hosseinalipour, Brinton. Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative
Fine-Tuning of Large Language Models. arXiv 2501.19389.

    client:  W x + scale * B S_k A x,  S_k = R / r_k on r_k random slots J_k, zero elsewhere, so that E[S_k] = I
             trains A[J_k] and B[:, J_k], which are all it is sent
    server:  A[j] += sum_{k: j in J_k} w_k (A_k[j] - A[j])        B[:, j] likewise

Names: R = the server's rank, r_k = the client's, J_k = `Plan.slots`, drawn in every round; R / r_k = `Plan.scale`;
w_k = weights, divided by the sum over all participants that arrived, not only the owners of a slot.
Traps: the smaller r_k / R, the further is B S_k A from B A; small ranks train against much noise.
Deviations: weights by data size; the paper's server optimizer is the recipe's (`[server]`), for every method alike.
Cost: O(sum_k r_k (d_in + d_out)); up and down one adapter of the client's rank.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.allocate import at_random_slots
from anyrank.federation import Device, Inbox, Method, Plan, State, holders_tasks
from anyrank.methods.zero_padding import zero_padding

__all__ = ["fslora"]


def fslora() -> Method:
    """Averaged changes of random slots, which a client scales up to stand for all."""
    baseline = zero_padding()

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        rank = max(state.spec.levels)
        return [replace(plan, scale=rank / max(plan.rank, 1)) for plan in at_random_slots(state, devices)]

    def dispatch(state: State, plan: Plan) -> Adapter:
        slots = plan.slots or range(plan.rank)
        layers = {name: lowrank.take(state.adapter.layers[name], slots) for name in plan.ranks}
        return Adapter(layers, state.adapter.dense)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            asked = holders_tasks(inbox, layer)
            slots, starts = [task.plan.slots for task in asked], [task.start.layers[layer] for task in asked]
            changes = [LowRank(now.A - then.A, now.B - then.B) for now, then in zip(parts, starts, strict=True)]
            mean = lowrank.padded_mean(changes, shares, previous.map(torch.zeros_like), slots)
            layers[layer] = LowRank(previous.A + mean.A, previous.B + mean.B)
        return state.with_layers(layers)

    claims = baseline.claims._replace(
        paper="Fang et al., arXiv 2501.19389",
        keeps_no_op=True,
        topologies=("star", "hierarchy"),
        needs="what clients changed is counted from one server's adapter",
    )
    return baseline._replace(assign=assign, dispatch=dispatch, aggregate=aggregate, claims=claims)
