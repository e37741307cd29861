"""Fed-HeLLo: one rank for all; clients train as many blocks as they can afford, chosen by importance or by a pattern.

Zhang, Liu, Xu, Hu. Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA Allocation.
IEEE TNNLS 2025, arXiv 2506.12213.

    blocks of client k:  n_k of L, from `least` L for the lowest rank class of the fleet to L for the highest
    gd:   the n_k blocks at which the pattern is widest
    rgd:  drawn without replacement; odds 3 for the half of the blocks at which the pattern is widest, 2 for the next
          quarter, 1 for the last
    fim:  drawn without replacement; odds 1, 2, 3 by cluster of F_b (3-means); equal odds before the first scores
          F_b = squared gradients of the factors in block b, summed
    server:  A_l = sum_k w_k A_{k,l} / sum_k w_k over the clients k that trained layer l        B_l likewise

Names: L = blocks with adapted layers; w_k = data sizes; triangle, inverted_triangle, bottleneck and uniform are widest at the
input, at the output, at both, nowhere. Blocks that a client does not train are applied, frozen.
Our readings: which end of the triangle is wide; equal classes take the whole model; unscored blocks count as zero.
Deviations: the paper takes F on data that the server holds; here clients take it from the gradients they have anyway.
Traps: a block costs its depth: whoever draws a block next to the input runs the backward pass through the whole model.
Cost: O(sum_k r (d_in + d_out)) over the holders of a layer; up the trained blocks, down the whole adapter.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from anyrank.adapter import Adapter
from anyrank.allocate import due, fisher, fisher_scores
from anyrank.federation import Device, Inbox, Method, Plan, Spec, State
from anyrank.methods.fedavg import fedavg
from anyrank.seeding import numpy_generator

__all__ = ["clustered", "fed_hello", "odds_of", "widest"]

Pattern = Literal["triangle", "inverted_triangle", "bottleneck", "uniform"]


def fed_hello(
    *,
    strategy: Literal["fim", "gd", "rgd"] = "fim",
    pattern: Pattern = "bottleneck",
    least: Annotated[float, Gt(0), Le(1)] = 0.5,
    warmup: Annotated[int, Ge(0)] = 10,
    refresh: Annotated[int, Ge(1)] = 10,
) -> Method:
    """A set of blocks for each client, all at the smallest rank of the fleet.

    Args:
        strategy: how blocks are chosen: by Fisher scores, by a pattern, or at random with the pattern as odds.
        pattern: the shape for `gd` and `rgd`.
        least: share of the blocks that the clients of the lowest rank class train.
        warmup: rounds before the first Fisher scores count.
        refresh: rounds between new odds from the scores.
    """
    baseline = fedavg()

    def blocks(state: State, device: Device) -> list[int]:
        spec = state.spec
        count, total = _how_many(spec, device, least), len(spec.blocks)
        if strategy == "gd":
            return [spec.blocks[i] for i in widest(pattern, total, count)]
        odds = np.array(odds_of(pattern, total) if strategy == "rgd" else state.notes.get("odds", [1] * total))
        rng = numpy_generator(spec.seed, "fed_hello", state.round, device.client)
        return [spec.blocks[i] for i in rng.choice(total, size=count, replace=False, p=odds / odds.sum())]

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        rank, plans = min(state.spec.levels), []
        for device in devices:
            chosen = blocks(state, device)
            ranks = {layer.name: rank for layer in state.spec.layers if layer.block in chosen}
            plans.append(Plan(device.client, ranks, device.steps))
        return plans

    def frozen(state: State, plan: Plan) -> Adapter:
        return state.rest(plan.ranks)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        after = baseline.aggregate(state, inbox, weights)
        scores = {**state.notes.get("fisher", {}), **fisher_scores(inbox, weights)}
        after = after.with_notes(fisher=scores)
        if not due(state.round + 1, warmup, refresh):
            return after
        layers = state.spec.layers
        return after.with_notes(
            odds=clustered([sum(scores.get(x.name, 0.0) for x in layers if x.block == b) for b in state.spec.blocks])
        )

    claims = baseline.claims._replace(
        paper="Zhang et al., arXiv 2506.12213", up="(m + n) r in the trained blocks", mixed_depths=True
    )
    method = baseline._replace(assign=assign, frozen=frozen, claims=claims)
    if strategy != "fim":
        return method
    claims = claims._replace(topologies=("star",), needs="the blocks' Fisher scores are gathered by one server")
    return method._replace(observe=fisher, aggregate=aggregate, claims=claims)


def _how_many(spec: Spec, device: Device, least: float) -> int:
    """Blocks for a device: in equal steps of its rank among the fleet's levels, from `least` of them to all."""
    steps = len(spec.levels) - 1
    share = least + (1 - least) * min(1, bisect_left(spec.levels, device.rank) / steps) if steps else 1
    return max(1, round(share * len(spec.blocks)))


def _by_width(pattern: Pattern, total: int) -> list[int]:
    """Positions of the blocks, those first at which the pattern is widest; of equals, the one nearer to the input."""
    height = {
        "triangle": lambda i: total - i,
        "inverted_triangle": lambda i: i,
        "bottleneck": lambda i: max(i, total - 1 - i),
        "uniform": lambda i: 0,
    }[pattern]
    return sorted(range(total), key=height, reverse=True)


def widest(pattern: Pattern, total: int, count: int) -> list[int]:
    """Positions of the `count` of `total` blocks at which a pattern is widest; evenly spread for `uniform`."""
    if pattern == "uniform":
        return [(2 * i + 1) * total // (2 * count) for i in range(count)]
    return sorted(_by_width(pattern, total)[:count])


def odds_of(pattern: Pattern, total: int) -> list[int]:
    """Odds of each block: 3 for the wider half of a pattern, 2 for the next quarter, 1 for the last."""
    if pattern == "uniform":
        return [1] * total
    order = _by_width(pattern, total)
    return [3 - (4 * order.index(i) >= 2 * total) - (4 * order.index(i) >= 3 * total) for i in range(total)]


def clustered(scores: Sequence[float]) -> list[int]:
    """1, 2 or 3 for each score: its cluster, from low to high, in the 3-means of least squared error."""
    ordered = np.sort(scores)

    def spread(cuts: tuple[int, int]) -> float:
        return sum(float(part.var() * len(part)) for part in np.split(ordered, cuts) if len(part))

    middle, high = min(combinations_with_replacement(range(len(ordered)), 2), key=spread)
    return [1 + int(score >= ordered[middle]) + int(score >= ordered[high]) for score in scores]
