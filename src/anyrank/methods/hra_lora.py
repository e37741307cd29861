"""HRALoRA: a budget of ranks for each client, shared among its layers by their importance; A and B trained in turn.

Xie, Lian, Chen, Latif, Zhao, Farivar. Heterogeneous-Resource-Aware Federated Learning with Intelligent LoRA Allocation and
Aggregation. CCGrid 2026.

    client:  sum_l r_{k,l} = r_k L        r_{k,l} proportional to F_l, from low = least r_min to high = most r_max
             F_l = squared gradients of the factors of layer l, summed, for each slot
             A and B are trained for `warmup` rounds, then only B, only A, only B, ...
    server:  nu_k = ||B_k A_k||_F        D = sum_k nu_k B_k A_k / sum_k nu_k = U S V^T
             A = V^T[:high],  B = (U S)[:, :high]        client k is sent the first r_{k,l} slots of layer l

Names: r_k = the rank that the device affords, here the mean over its layers; r_min, r_max = lowest and highest of the fleet;
L = adapted layers; nu_k = `lowrank.norm`, per layer.
Our readings: ranks are dealt one at a time to the layer with the largest F_l / (r_l + 1/2) (Sainte-Lague), so a larger budget
never gives a layer less; equal ranks before the first scores; without any product yet the weights are equal.
Deviations: r_k comes from the recipe, not from estimates of memory and bandwidth; scores are the clients', not taken on data of
the server; ranks are not doubled while one factor rests.
Cost: O((d_in + d_out) R^2 + R^3), R = sum_k r_{k,l}; up one factor after the warm-up, down both.
"""

import math
from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace
from typing import Annotated

from annotated_types import Ge, Gt, Le

from anyrank import lowrank
from anyrank.allocate import due, fisher, fisher_scores
from anyrank.federation import Device, Factors, Inbox, Method, Plan, Spec, State
from anyrank.methods.fedavg import init_at
from anyrank.methods.zero_padding import zero_padding
from anyrank.seeding import generator

__all__ = ["dealt", "hra_lora"]


def hra_lora(
    *,
    least: Annotated[float, Gt(0), Le(1)] = 0.8,
    most: Annotated[float, Ge(1), Le(100)] = 2.0,
    warmup: Annotated[int, Ge(0)] = 20,
    refresh: Annotated[int, Ge(1)] = 20,
) -> Method:
    """Ranks by layer importance, one factor at a time, product averaging by norm.

    Args:
        least: no layer gets less than this share of the fleet's smallest rank.
        most: no layer gets more than this multiple of the fleet's largest rank.
        warmup: rounds in which both factors are trained, at equal ranks.
        refresh: rounds between new scores.
    """
    baseline = zero_padding()

    def high(spec: Spec) -> int:
        return math.floor(most * spec.levels[-1])

    def init(spec: Spec) -> State:
        return init_at(spec, high(spec))

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        spec, turn = state.spec, state.round - warmup
        train: Factors = "AB" if turn < 0 else "A" if turn % 2 else "B"
        low = max(1, math.floor(least * spec.levels[0]))
        fisher = state.notes.get("fisher") or {layer.name: 1.0 for layer in spec.layers}
        scores = {
            layer.name: fisher[layer.name] for layer in spec.layers
        }  # of equal scores the first layer's goes first
        ranks = {
            rank: dealt(rank * len(scores), scores, low=min(low, rank), high=high(spec))
            for rank in {device.rank for device in devices}
        }
        return [Plan(device.client, ranks[device.rank], device.steps, train=train, up=train) for device in devices]

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers = {}
        for layer, parts, _, previous in state.holders(inbox, weights):
            nu = [float(lowrank.norm(part)) for part in parts]
            nu = nu if sum(nu) > 0 else [1.0] * len(parts)
            mean = lowrank.weighted_sum(parts, [norm / sum(nu) for norm in nu])
            layers[layer] = lowrank.svd(mean, previous.rank, generator(state.spec.seed, "hra_lora", state.round, layer))
        after, scores = state.with_layers(layers), fisher_scores(inbox, weights)
        return after.with_notes(fisher=scores) if scores and due(state.round + 1, warmup, refresh) else after

    claims = baseline.claims._replace(
        paper="Xie et al., CCGrid 2026",
        cost="O((d_in + d_out) R^2 + R^3)",
        up="(m + n) r_k, then m r_k or n r_k in turn",
        space="product",
        keeps_uncovered=False,
        topologies=("star",),
        needs="the layers' Fisher scores are gathered by one server",
    )
    return baseline._replace(init=init, assign=assign, observe=fisher, aggregate=aggregate, claims=claims)


def dealt(budget: int, scores: Mapping[str, float], *, low: int, high: int) -> dict[str, int]:
    """Whole ranks in proportion to the scores, each from `low` to `high`, that add up to the budget where that is possible."""
    ranks = dict.fromkeys(scores, low)
    # Of equal claims the lower rank goes first, so that layers without a score share what is left.
    queue = [(-score / (low + 0.5), low, i, name) for i, (name, score) in enumerate(scores.items())]
    heapify(queue)
    for _ in range(min(budget, high * len(ranks)) - low * len(ranks)):
        _, rank, i, name = queue[0]
        ranks[name] = rank + 1
        claim = -scores[name] / (rank + 1.5) if rank + 1 < high else math.inf
        heapreplace(queue, (claim, rank + 1, i, name))
    return ranks
