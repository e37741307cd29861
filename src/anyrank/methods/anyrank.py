"""anyrank: the server adds the change each client made to what it was sent, in product space.

Our own method; there is no paper. What it takes up: the whole global model as the point from which clients start (FedHL,
arXiv 2505.18494; Fed-PLoRA, arXiv 2602.16936) and averages of products kept factored (FlexLoRA, arXiv 2402.11505).

    server:    D = B A of rank R, slots sorted by size
    client k:  is sent  S_k = the first r_k slots of D, to train, and  F_k = D - S_k, the others, frozen
               returns  U_k, what became of S_k
    server:    D <- SVD_R( D + sum_k w_k (U_k - S_k) )

Names: w_k = weights, as shares of the examples that were asked for, not divided by what arrived: a client that does not
reply has changed nothing. Of a reply that comes late, S_k is what its client was sent, and w_k its share of the round in
which it was asked. SVD_R = `lowrank.svd` of the stacked factors.
What follows: a client says nothing about directions that it did not receive, so nothing has to be diluted or scaled up for
them, and a round in which nobody changes anything changes nothing. With the frozen part every client starts from the
global model, so that an optimum is a fixed point; without it (`frozen = false`, half the download of a small client and
less work) clients of small rank push towards making up for the slots they lack.
Cost: O((d_in + d_out) (r + 2 R)^2), R = sum_k r_k, r the server's rank; down r, up r_k slots.
"""

from collections.abc import Sequence

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.federation import Inbox, Method, Plan, State
from anyrank.methods.zero_padding import zero_padding
from anyrank.seeding import generator

__all__ = ["anyrank"]


def anyrank(*, frozen: bool = True) -> Method:
    """Averaging of changes to the product, by clients that start from the whole global model.

    Args:
        frozen: clients apply the slots above their rank, frozen.
    """
    baseline = zero_padding()

    def rest(state: State, plan: Plan) -> Adapter:
        return state.rest(plan.ranks)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, U, w, D in state.holders(inbox, weights):
            S = [
                task.start.layers[layer] for task, update in inbox if update.adapter and layer in update.adapter.layers
            ]
            changed = lowrank.stack([D, *U, *S], [1.0, *w, *(-w_k for w_k in w)])
            layers[layer] = lowrank.svd(changed, D.rank, generator(state.spec.seed, "anyrank", state.round, layer))
        return state.with_layers(layers)

    claims = baseline.claims._replace(
        paper="our own",
        cost="O((d_in + d_out) (r + 2 R)^2)",
        space="product",
        down="(m + n) r" if frozen else "(m + n) r_k",
        keeps_uncovered=False,
        keeps_no_op=True,
        change=True,
        topologies=("star", "hierarchy"),
        needs="clients answer with a change to what one server sent them",
    )
    return baseline._replace(aggregate=aggregate, frozen=rest if frozen else None, claims=claims)
