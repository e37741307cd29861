"""FedAvg of LoRA factors (FedIT): A and B are averaged apart, everyone at one rank.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen. Towards Building the Federated GPT: Federated Instruction Tuning.
ICASSP 2024, arXiv 2305.05644. McMahan et al. Communication-Efficient Learning ..., AISTATS 2017, arXiv 1602.05629.

    A = sum_k w_k A_k        B = sum_k w_k B_k

Names: w_k = weights, divided by the sum that arrived; A_k, B_k = the update's factors.
Deviations: on a mixed fleet everyone gets the smallest rank of the fleet, since factors of different ranks have no mean.
Cost: O(r (d_in + d_out)) a client; up and down one adapter of rank r.
"""

from collections.abc import Mapping, Sequence

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.allocate import at_rank
from anyrank.federation import Claims, Device, Inbox, Method, Plan, Spec, State
from anyrank.seeding import generator

__all__ = ["fedavg", "init_at", "init_with"]


def fedavg() -> Method:
    """Factor averaging at the smallest rank of the fleet."""

    def init(spec: Spec) -> State:
        return init_at(spec, min(spec.levels))

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        return [at_rank(state.spec, device, min(state.spec.levels)) for device in devices]

    def dispatch(state: State, plan: Plan) -> Adapter:
        return state.prefix(plan.ranks)

    def leave(now: Adapter, start: Adapter) -> Adapter:
        return now

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        return state.with_layers(
            {
                layer: lowrank.padded_mean(parts, shares, previous)
                for layer, parts, shares, previous in state.holders(inbox, weights)
            }
        )

    def step(before: State, after: State) -> State:
        return after

    return Method(
        init,
        assign,
        dispatch,
        frozen=None,
        enter=None,
        penalty=None,
        observe=None,
        leave=leave,
        keep=None,
        aggregate=aggregate,
        step=step,
        local=None,
        claims=Claims(
            paper="Zhang et al. (FedIT), arXiv 2305.05644",
            cost="O(R (d_in + d_out))",
            space="factor",
            down="(m + n) r",
            up="(m + n) r",
            mixed_ranks=False,
            keeps_uncovered=True,
            keeps_no_op=True,
        ),
    )


def init_at(spec: Spec, rank: int) -> State:
    """The state before the first round: the given start at `rank`, or a fresh adapter on every layer."""
    return init_with(spec, {layer.name: rank for layer in spec.layers})


def init_with(spec: Spec, ranks: Mapping[str, int]) -> State:
    """The same with a rank for each layer."""
    layers = {}
    for layer in spec.layers:
        rank, rng = ranks[layer.name], generator(spec.seed, "init", layer.name)
        given = spec.start.layers.get(layer.name)
        layers[layer.name] = (
            lowrank.resize(given, rank, rng)
            if given
            else lowrank.fresh(rank, d_in=layer.d_in, d_out=layer.d_out, rng=rng)
        )
    return State(spec, Adapter(layers, spec.start.dense))
