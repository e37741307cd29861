"""GaLore with direct averaging: clients train whole weights in a low-rank gradient subspace, the server averages the weights.

Mahla, Jadhav, Ramakrishnan. Exploring Gradient Subspaces: Addressing and Overcoming LoRA's Limitations in Federated
Fine-Tuning of Large Language Models. arXiv 2410.23111.

    client:  every `interval` steps  P = top `rank` left singular vectors of the gradient G
             W_k = W_k - eta scale P Adam(P^T G)        (`local/galore.py`)
    server:  W = sum_k w_k W_k

Names: w_k = weights, divided by the sum that arrived; W = W0 + `<layer>.change`, and it is the change that travels.
Our readings: the server does nothing but average, and the projections P stay with the clients.
Deviations: there are no factors: every layer has rank 0, whatever a device affords, and its change is one of the dense
tensors, whose mean every topology takes. What is exported is the change as a product of its exact rank.
Cost: O(sum_k d_in d_out); up and down whole matrices, of whatever rank their changes are.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from anyrank.adapter import CHANGE, Adapter
from anyrank.allocate import at_rank
from anyrank.federation import Device, Method, Plan, Spec, State
from anyrank.local.galore import whole_weights
from anyrank.methods.fedavg import fedavg, init_at

__all__ = ["galore"]


def galore(
    *,
    rank: Annotated[int, Ge(1)] = 8,
    interval: Annotated[int, Ge(1)] = 200,
    scale: Annotated[float, Gt(0)] = 0.25,
) -> Method:
    """Averaging of whole weights that clients train with GaLore.

    Args:
        rank: of the gradient's projection, on every client.
        interval: local steps for which a projection is kept.
        scale: a factor on the learning rate of the projected weights.
    """
    baseline = fedavg()

    def init(spec: Spec) -> State:
        changes = {layer.name + CHANGE: torch.zeros(layer.d_out, layer.d_in) for layer in spec.layers}
        state = init_at(spec, 0)
        return state.with_adapter(Adapter(state.adapter.layers, {**changes, **spec.start.dense}))

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        return [at_rank(state.spec, device, 0) for device in devices]

    claims = baseline.claims._replace(
        paper="Mahla et al., arXiv 2410.23111",
        cost="O(clients * d_in d_out)",
        down="m n",
        up="m n",
        exact=True,
    )
    local = whole_weights(rank=rank, interval=interval, scale=scale)
    return baseline._replace(init=init, assign=assign, local=local, claims=claims)
