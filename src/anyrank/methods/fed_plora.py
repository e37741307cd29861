"""Fed-PLoRA: a client trains random slots and applies all others frozen, so that it starts at the whole global model.

Zhang, Hu, Xu. Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation. ICLR 2026, arXiv 2602.16936.

    client:  draws r_k of the R slots, J_k;  W_k = W + scale * sum_{j not in J_k} B[:, j] A[j] stays as it is
             trains A[J_k] and B[:, J_k] on top
    server:  A[j] = sum_{k: j in J_k} w_k A_k[j] / sum_{k: j in J_k} w_k        B[:, j] likewise

Names: R = the server's rank, r_k = the client's, J_k = `Plan.slots`, drawn in every round (the paper's Select-N-Fold);
w_k = weights.
Deviations: the frozen slots are kept beside the base (`Method.frozen`) in place of being added into it, which computes
the same; the server draws J_k, from the run's seed; weights by data size; slots that nobody trained keep their value.
Cost: O(sum_k r_k (d_in + d_out)); down travels the whole global adapter, up the client's slots.
"""

from collections.abc import Sequence

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.allocate import at_random_slots
from anyrank.federation import Inbox, Method, Plan, State, holders_tasks
from anyrank.methods.fslora import fslora
from anyrank.methods.rbla import rbla

__all__ = ["fed_plora"]


def fed_plora() -> Method:
    """Slot-wise factor averaging of random slots, the others applied frozen."""
    baseline = fslora()

    def frozen(state: State, plan: Plan) -> Adapter:
        trained = set(plan.slots or range(plan.rank))
        rest = {n: [j for j in range(part.rank) if j not in trained] for n, part in state.adapter.layers.items()}
        return Adapter({name: lowrank.take(state.adapter.layers[name], slots) for name, slots in rest.items() if slots})

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            slots = [task.plan.slots for task in holders_tasks(inbox, layer)]
            layers[layer] = lowrank.by_slot(parts, shares, previous, slots)
        return state.with_layers(layers)

    claims = rbla().claims._replace(paper="Zhang et al., arXiv 2602.16936", down="(m + n) r")
    return baseline._replace(assign=at_random_slots, frozen=frozen, aggregate=aggregate, claims=claims)
