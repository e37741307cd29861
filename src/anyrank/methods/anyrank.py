"""anyrank: the server adds the change each client made to what it was sent, in product space.

Our own method; there is no paper. What it takes up: the whole global model as the point from which clients start (FedHL,
arXiv 2505.18494; Fed-PLoRA, arXiv 2602.16936), averages of products kept factored (FlexLoRA, arXiv 2402.11505), and
weights by the owners of a slot (raFLoRA, arXiv 2602.13486).

    server:    D = B A of rank R, slots sorted by size
    client k:  is sent  S_k = the first r_k slots of D, to train, and  F_k = D - S_k, the others, frozen
               returns  U_k, what became of S_k
    server:    D <- SVD_R( D + sum_k sum_{j < r_k} w_kj (U_k[j] - S_k[j]) )        X[j] = the product of slot j
               w_kj = w_k sum_i w_i / sum_{i: r_i > j} w_i

Names: w_k = weights, as shares of the examples that were asked for, so that sum_i w_i over those who replied is below 1 if
some did not, and the step smaller. Of a reply that comes late, S_k is what its client was sent, and w_k its share of the
round in which it was asked. With `weights = "asked"`, w_kj = w_k. SVD_R = `lowrank.svd` of the stacked factors.
What follows: a client says nothing about directions that it did not receive, so nothing is diluted, and a round in which
nobody changes anything changes nothing. With the frozen part every client starts from the global model, so that an
optimum is a fixed point; without it (`frozen = false`, half the download of a small client and less work) clients of small
rank push towards making up for the slots they lack.
Traps: weights by owners depend on how a client splits its change into slots; `asked` does not, but a slot that few hold
moves by their small share only.
Cost: O((d_in + d_out) (r + R)^2), R = sum_k r_k, r the server's rank: an S_k of this round is taken off D's own slots, only
that of a late reply adds its r_k; down r, up r_k slots.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Inbox, Method, Plan, State, holders_tasks
from anyrank.methods.zero_padding import zero_padding
from anyrank.seeding import generator

__all__ = ["anyrank"]


def anyrank(*, frozen: bool = True, weights: Literal["owners", "asked"] = "owners") -> Method:
    """Averaging of changes to the product, by clients that start from the whole global model.

    Args:
        frozen: clients apply the slots above their rank, frozen.
        weights: a slot's change is averaged over the clients that hold it, or over all who were asked.
    """
    baseline, by_owners = zero_padding(), weights == "owners"

    def rest(state: State, plan: Plan) -> Adapter:
        return state.rest(plan.ranks)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, U, w, D in state.holders(inbox, weights):
            S = [task.start.layers[layer] for task in holders_tasks(inbox, layer)]
            by_slot = (
                [sum(w) * share for share in lowrank.slot_shares(U, w, D)]
                if by_owners
                else [torch.full((part.rank,), w_k) for part, w_k in zip(U, w, strict=True)]
            )
            kept, older = torch.ones(D.rank, dtype=torch.float64), []
            for part, share in zip(S, by_slot, strict=True):
                if _are_first_slots(part, D):
                    kept[: part.rank] -= share
                else:
                    older.append((part, -share))
            terms, factors = zip((D, kept), *zip(U, by_slot, strict=True), *older, strict=True)
            changed = lowrank.weighted_sum(terms, factors)
            layers[layer] = lowrank.svd(changed, D.rank, generator(state.spec.seed, "anyrank", state.round, layer))
        return state.with_layers(layers)

    claims = baseline.claims._replace(
        paper="our own",
        cost="O((d_in + d_out) (r + R)^2)",
        space="product",
        down="(m + n) r" if frozen else "(m + n) r_k",
        keeps_uncovered=False,
        keeps_no_op=True,
        change=True,
        topologies=("star", "hierarchy"),
        needs="clients answer with a change to what one server sent them",
    )
    return baseline._replace(aggregate=aggregate, frozen=rest if frozen else None, claims=claims)


def _are_first_slots(part: LowRank, whole: LowRank) -> bool:
    first = lowrank.truncate(whole, part.rank)
    return torch.equal(part.A, first.A) and torch.equal(part.B, first.B)
