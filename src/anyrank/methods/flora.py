"""FLoRA: the clients' adapters are stacked, the stack goes into the base model, and everyone starts afresh.

Wang, Shen, He, Sun, Wang, Lyu, Li. FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations. NeurIPS 2024, arXiv 2409.05976.

    W := W + scale * [w_1 B_1 ... w_K B_K] [A_1; ...; A_K]        which is  W + scale * sum_k w_k B_k A_k
    A drawn anew, B = 0                                           client k starts from the first r_k slots

Names: w_k = weights, divided by the sum that arrived, on one side of the stack only; the stack is a fold, see `Fold`.
Our readings: the new A is drawn from the run's seed and the fold's number, the same for all, so that it never travels.
Deviations: an adapter that the run starts from is the first fold; folds are kept beside the base and applied with it,
which computes the same; once they have more slots than a layer has dimensions, they become one.
Traps: what travels down grows with the number of participants; a client that missed rounds gets every stack it lacks.
Cost: O(R (d_in + d_out)), R = sum_k r_k; down the stacks at rank R, up one adapter of the client's rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Device, Inbox, Method, Plan, Spec, State
from anyrank.methods.zero_padding import zero_padding
from anyrank.seeding import generator

__all__ = ["flora", "restarted"]


def flora() -> Method:
    """Stacking into the base model, with fresh adapters in every round."""
    baseline = zero_padding()

    def init(spec: Spec) -> State:
        state = baseline.init(spec)
        return restarted(state, spec.start.layers) if spec.start.layers else state

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        return [replace(plan, down="") for plan in baseline.assign(state, devices)]

    def dispatch(state: State, plan: Plan) -> Adapter:
        if state.folds and state.notes.get("drawn") != state.folds[-1].number:  # a client's, who only knows the folds
            state = _afresh(state)
        return baseline.dispatch(state, plan)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        return restarted(
            state,
            {
                layer: lowrank.stack(parts, [share / sum(shares) for share in shares])
                for layer, parts, shares, _ in state.holders(inbox, weights)
            },
        )

    claims = baseline.claims._replace(
        paper="Wang et al., arXiv 2409.05976",
        cost="O(R (d_in + d_out))",
        space="product",
        down="(m + n) R",
        exact=True,
        folds=True,
        keeps_uncovered=False,
        keeps_no_op=True,
        topologies=("star",),
        needs="folds are numbered by one server",
    )
    return baseline._replace(init=init, assign=assign, dispatch=dispatch, aggregate=aggregate, claims=claims)


def restarted(state: State, layers: Mapping[str, LowRank]) -> State:
    """The state with these products in the base model, and a fresh adapter in each of their layers."""
    return _afresh(state.with_fold(layers))


def _afresh(state: State) -> State:
    """The state with the adapter that everyone draws after its last fold."""
    fold, fresh = state.folds[-1], {}
    for layer in fold.adapter.layers:
        rng = generator(state.spec.seed, "restart", fold.number, layer)
        before = state.adapter.layers[layer]
        part = lowrank.fresh(before.rank, d_in=before.A.shape[1], d_out=before.B.shape[0], rng=rng)
        fresh[layer] = part.map(lambda tensor, like=before.A: tensor.to(like))
    return state.with_layers(fresh).with_notes(drawn=fold.number)
