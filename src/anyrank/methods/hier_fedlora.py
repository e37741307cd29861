"""HierFedLoRA: groups that each see about the global mix of labels, with an aggregation frequency and a depth of their own.

Liu, Liao, Xu, Xu. Resource-Efficient Federated Fine-Tuning Large Language Models for Heterogeneous Data. arXiv 2503.21213.

    groups:  each client starts or joins one, so that KL(labels of group || labels of all) and its spread of speeds stay small
    time:    T_g(f, k) = f max_{i in g} t_i(k)        t_i(k) = steps (f_i + k mu_i) + up_i bytes(last k blocks)
    choice:  (f_g, k_g) = argmax (1 - e_g) k / k_max + e_g f / f_max    with T_g(f, k) <= deadline max_g T_g(1, k_max)
             e_g = 1 - exp(-KL of group g)
    server:  f_g rounds of averages inside each group; then layer by layer over the groups that trained it, by examples

Names: f_g = `Plan.repeats`, k_g = depth, blocks counted from the output; f_i, mu_i, up_i = `Device.times`; k_max = what the
memory of all members holds. The blocks below a group's depth are applied, frozen.
Our readings: the structure is the paper's; the grouping, the objective and the solver are ours. Frequency helps a group whose
labels are off the global mix, depth helps one that is near it.
Cost: O(sum_k r (d_in + d_out)) over the holders of a layer, f_g times; up the last k_g blocks, down the whole adapter.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import exp
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from anyrank.adapter import Adapter
from anyrank.allocate import at_depth, seconds_by_depth
from anyrank.federation import Device, Method, Plan, State
from anyrank.methods.fedavg import fedavg

__all__ = ["chosen", "divergence", "grouped", "hier_fedlora"]


def hier_fedlora(
    *,
    groups: Annotated[int, Ge(1)] = 2,
    deadline: Annotated[float, Ge(1), Le(1000)] = 2.0,
    f_max: Annotated[int, Ge(1)] = 4,
    speed: Annotated[float, Ge(0), Le(1000)] = 0.1,
) -> Method:
    """Near-IID groups, each with a frequency and a depth, at the smallest rank of the fleet.

    Args:
        groups: how many, for the clients of a round.
        deadline: how long a round may take, in multiples of one aggregation of the slowest group at its deepest.
        f_max: a group aggregates at most this often in a round.
        speed: weight of different speeds against different labels when groups are formed; 0 looks at labels alone.
    """
    baseline = fedavg()

    def assign(state: State, devices: Sequence[Device]) -> list[Plan]:
        spec, ranks = state.spec, state.adapter.ranks
        able = [(device, row) for device in devices if len(row := seconds_by_depth(spec, device, ranks)) > 1]
        counts = _label_counts([device for device, _ in able])
        members = grouped(counts, [row[1] for _, row in able], groups, speed)
        slowest = [[max(column) for column in zip(*(able[i][1] for i in group), strict=False)] for group in members]
        limit = deadline * max((row[-1] for row in slowest), default=0.0)
        plans = {}
        for number, (group, row) in enumerate(zip(members, slowest, strict=True), start=1):
            away = divergence(counts[group].sum(axis=0, keepdims=True), counts.sum(axis=0))
            repeats, depth = chosen(row, float(away[0]), limit, f_max)
            for i in group:
                plan = at_depth(spec, able[i][0], ranks, depth)
                plans[i] = replace(plan, group=f"group {number}", repeats=repeats)
        return [plans[i] for i in range(len(able))]

    def frozen(state: State, plan: Plan) -> Adapter:
        return state.rest(plan.ranks)

    claims = baseline.claims._replace(
        paper="Liu et al., arXiv 2503.21213",
        up="(m + n) r in the last k blocks",
        mixed_depths=True,
        topologies=("hierarchy",),
        needs="its groups are the edges of a hierarchy",
    )
    return baseline._replace(assign=assign, frozen=frozen, claims=claims)


def _label_counts(devices: Sequence[Device]) -> np.ndarray:
    """Examples of each label, `[clients, labels]`; zeros where a client does not tell."""
    counts = np.zeros((len(devices), max((len(device.labels) for device in devices), default=0)))
    for row, device in zip(counts, devices, strict=True):
        row[: len(device.labels)] = device.labels
    return counts


def divergence(counts: np.ndarray, overall: np.ndarray) -> np.ndarray:
    """KL(mix || overall mix) in nats for each row of counts; 0 where nothing was counted."""
    mix = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    reference = overall / max(overall.sum(), 1)
    ratio = np.divide(mix, reference, out=np.ones_like(mix), where=mix > 0)
    return (mix * np.log(ratio)).sum(axis=-1)


def grouped(counts: np.ndarray, seconds: Sequence[float], groups: int, speed: float) -> list[list[int]]:
    """Positions of the clients in each group, found greedily.

    The clients with the most examples start a group each. Then the group with the fewest members takes, of all that are
    left, the client with which it comes nearest to the mix of all and which is about as fast as its members.

    Args:
        counts: examples of each client by label, `[clients, labels]`.
        seconds: how long each client takes.
        groups: how many; with fewer clients there are as many as clients.
        speed: weight of |log(seconds / mean seconds of the group)| against the divergence.
    """
    left = sorted(range(len(counts)), key=lambda i: -counts[i].sum())
    members = [[i] for i in left[:groups]]
    left, pace = left[groups:], np.asarray(seconds)
    while left:
        group = min(members, key=len)
        off = divergence(counts[group].sum(axis=0) + counts[left], counts.sum(axis=0))
        slower = np.abs(np.log(pace[left] / pace[group].mean()))
        group.append(left.pop(int(np.argmin(off + speed * slower))))
    return members


def chosen(seconds: Sequence[float], away: float, limit: float, f_max: int) -> tuple[int, int]:
    """Frequency and depth of a group; of equals the more frequent, then the deeper.

    Args:
        seconds: what one aggregation at depth 0, 1, ... takes its slowest member.
        away: divergence of the group's labels from all.
        limit: seconds that the group may take.
        f_max: highest frequency.
    """
    lean, deepest = 1 - exp(-away), len(seconds) - 1
    fits = [(f, k) for f, k in product(range(1, f_max + 1), range(1, deepest + 1)) if f * seconds[k] <= limit]
    return max(fits, key=lambda choice: ((1 - lean) * choice[1] / deepest + lean * choice[0] / f_max, *choice))
