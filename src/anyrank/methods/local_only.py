"""Local only: no federation at all, the floor that a federated method has to beat.

    A_k, B_k, head_k stay with client k from round to round

The server plays the client's memory: what a client returns is what it starts from when it is next sampled. A run counts
these messages and their time as those of any method; without a server there would be none.
"""

from collections.abc import Sequence

from anyrank.adapter import Adapter
from anyrank.federation import Inbox, Method, Plan, State
from anyrank.methods.zero_padding import zero_padding

__all__ = ["local_only"]


def local_only() -> Method:
    """Every client trains alone, at its own rank."""
    baseline = zero_padding()

    def dispatch(state: State, plan: Plan) -> Adapter:
        # Not the state's dense tensors: the engine averages those over the clients.
        fresh = Adapter(state.prefix(plan.ranks).layers, state.spec.start.dense)
        return state.extra.get(f"client {plan.client}", fresh)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        mine = {f"client {update.client}": update.adapter for _, update in inbox if update.adapter}
        return state.with_extra(mine)

    claims = baseline.claims._replace(
        paper="none: a baseline",
        cost="none",
        down="nothing",
        up="nothing",
        keeps_no_op=True,
        personal=True,
        topologies=("star",),
        needs="there is nothing to average",
    )
    return baseline._replace(dispatch=dispatch, aggregate=aggregate, claims=claims)
