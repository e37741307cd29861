"""LEGEND: clients differ in depth; each trains the last blocks it has time and memory for, at ranks that rise to the output.

Liu, Liao, Xu, Xu, Liu, Qian. Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices. IEEE TMC
2025, arXiv 2412.20004.

    ranks:   r_l = max(1, r_L - (L - l) step)                            one list for the whole fleet
    time:    t_i(k) = steps (f_i + k mu_i) + up_i bytes(r_{L-k+1} .. r_L)    if the memory of client i holds depth k
    depths:  1. everyone as deep as memory allows
             2. while the mean of max_j t_j - t_i is over eps: one block less for the slowest, down to k_min
             3. one block more for whoever stays within max_j t_j
             4. if no one is deepest any more: the fastest of those that can be
    server:  A_l = sum_k w_k A_{k,l} / sum_k w_k over the clients k that trained block l        B_l likewise

Names: L = blocks with adapted layers, l = block, 1 nearest to the input; r_L = the largest rank of the fleet; f, mu, up =
`Device.times`; eps is a share of the slowest client's time in step 1; w_k = data sizes. The blocks below a client's depth are
applied and not trained.
Our readings: the rank list's form, the search for depths and its order, and the weights are not published in detail.
Traps: the blocks next to the input are trained by few clients and follow their data.
Cost: O(sum_k r_l (d_in + d_out)) over the holders of a layer; up the last k blocks, down the whole adapter.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from anyrank.adapter import Adapter
from anyrank.allocate import at_depth, seconds_by_depth
from anyrank.federation import Device, Inbox, Method, Plan, Spec, State
from anyrank.methods.fedavg import fedavg, init_with

__all__ = ["balanced", "legend", "rank_list"]

Shape = Literal["arithmetic", "halving", "uniform"]


def legend(
    *,
    shape: Shape = "arithmetic",
    step: Annotated[int, Ge(0)] = 1,
    k_min: Annotated[int, Ge(1)] = 1,
    eps: Annotated[float, Ge(0), Le(1)] = 0.1,
    weights: Literal["examples", "uniform"] = "examples",
    send_frozen: bool = True,
) -> Method:
    """A depth for each client, one rank for each block.

    Args:
        shape: how ranks fall from the output to the input: by `step` each, halved each, or not at all.
        step: how much lower the rank is one block further from the output, with `arithmetic`.
        k_min: the least depth; a client whose memory does not hold it sits out.
        eps: the mean wait that is tolerated, as a share of the time that the slowest client takes at its deepest.
        weights: of the holders of a layer: by their examples, or the same for all.
        send_frozen: also send the blocks below a client's depth, which it then applies.
    """
    baseline, alike = fedavg(), weights == "uniform"

    def init(spec: Spec) -> State:
        return init_with(spec, rank_list(spec, shape, step))

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        spec, ranks = state.spec, state.adapter.ranks
        least = min(k_min, len(spec.blocks))
        able = [(device, row) for device in devices if len(row := seconds_by_depth(spec, device, ranks)) > least]
        depths = balanced([row for _, row in able], least, eps)
        return [at_depth(spec, device, ranks, depth) for (device, _), depth in zip(able, depths, strict=True)]

    def frozen(state: State, plan: Plan) -> Adapter:
        return state.rest(plan.ranks)

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        return baseline.aggregate(state, inbox, [1.0] * len(inbox) if alike else weights)

    claims = baseline.claims._replace(
        paper="Liu et al., arXiv 2412.20004",
        down="(m + n) r" if send_frozen else "(m + n) r in the last k blocks",
        up="(m + n) r in the last k blocks",
        mixed_depths=True,
        topologies=("star", "hierarchy"),
        needs="depths are chosen for the whole cohort by one server",
    )
    return baseline._replace(
        init=init, assign=assign, frozen=frozen if send_frozen else None, aggregate=aggregate, claims=claims
    )


def rank_list(spec: Spec, shape: Shape, step: int) -> dict[str, int]:
    """The rank of each layer: all layers of a block share one, the last block has the largest of the fleet."""
    largest = spec.levels[-1]
    away = {block: i for i, block in enumerate(reversed(spec.blocks))}
    rank = {
        "arithmetic": lambda blocks: largest - blocks * step,
        "halving": lambda blocks: largest >> blocks,
        "uniform": lambda blocks: largest,
    }[shape]
    least = min(1, largest)  # 0 where clients train no factors
    return {layer.name: max(least, rank(away[layer.block])) for layer in spec.layers}


def balanced(seconds: Sequence[Sequence[float]], least: int, eps: float) -> list[int]:
    """The depth of each client, found greedily (steps 1 to 4 above).

    Args:
        seconds: for each client what depth 0, 1, ... takes, up to the deepest that its memory holds.
        least: no client is made shallower than this.
        eps: the mean wait that is tolerated, as a share of the longest time at the deepest.
    """
    if not seconds:
        return []
    limits = [len(row) - 1 for row in seconds]
    depths, now = list(limits), np.array([row[-1] for row in seconds])
    tolerated = eps * now.max()
    while (now.max() - now).mean() > tolerated and depths[slowest := int(now.argmax())] > least:
        depths[slowest] -= 1
        now[slowest] = seconds[slowest][depths[slowest]]
    for i, row in enumerate(seconds):
        depths[i] = max(depth for depth in range(depths[i], len(row)) if row[depth] <= now.max())
    deepest = max(limits)
    if max(depths) < deepest:
        fastest = min((i for i, limit in enumerate(limits) if limit == deepest), key=lambda i: seconds[i][deepest])
        depths[fastest] = deepest
    return depths
