"""Who gets which rank and which device: the policies of a recipe, and the plans and scores that methods share.

A policy is a function of the clients and a generator; its keyword arguments are what a recipe can set. Ranks
are drawn once per run and stored, never per round: runs with redrawn ranks cannot be compared.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from math import inf
from typing import Literal

import numpy as np

from anyrank.adapter import Adapter
from anyrank.device import memory_bytes, reply_seconds
from anyrank.errors import ConfigError
from anyrank.federation import Device, Inbox, Plan, Spec, State
from anyrank.seeding import numpy_generator

__all__ = [
    "RANK_POLICIES",
    "Candidate",
    "affordable",
    "at_depth",
    "at_own_rank",
    "at_random_slots",
    "at_rank",
    "auto",
    "data_size",
    "deal_classes",
    "due",
    "fisher",
    "fisher_scores",
    "listed",
    "ordered",
    "per_class",
    "power_law",
    "ratios",
    "seconds_by_depth",
]


def _unknown(**settings: object) -> tuple[int, int]:
    raise ConfigError(
        "ranks.name: auto goes by what each device affords, which the candidates do not say; give them `afford`"
    )


@dataclass(frozen=True)
class Candidate:
    """A client that is to get a rank.

    Args:
        client: its name.
        kind: its device class.
        num_examples: its training examples.
        class_rank: the rank that its device class names, if any.
        afford: from the settings of `auto`, the rank and the depth that its device affords; see `affordable`.
    """

    client: str
    kind: str
    num_examples: int
    class_rank: int | None
    afford: Callable[..., tuple[int, int]] = _unknown


def per_class(clients: Sequence[Candidate], rng: np.random.Generator) -> dict[str, int]:
    """Each client trains at the rank that its device class names.

    Raises:
        ConfigError: a class names no rank, or one below 1.
    """
    silent = sorted({client.kind for client in clients if client.class_rank is None})
    if silent:
        raise ConfigError(
            [f"device class {kind!r}: has no rank; give it one, or choose another rank policy" for kind in silent]
        )
    low = sorted({(c.kind, c.class_rank) for c in clients if c.class_rank is not None and c.class_rank < 1})
    if low:
        raise ConfigError([f"device class {kind!r}: rank is {rank}; expected at least 1" for kind, rank in low])
    return {client.client: client.class_rank for client in clients if client.class_rank is not None}


def listed(clients: Sequence[Candidate], rng: np.random.Generator, *, values: Sequence[int]) -> dict[str, int]:
    """A rank for each client, in the order of the clients.

    Args:
        clients: who gets a rank.
        rng: not used.
        values: as many ranks as there are clients.

    Raises:
        ConfigError: another number of ranks, or a rank below 1.
    """
    problems = [
        f"ranks.values, position {position}: rank is {value}; expected at least 1"
        for position, value in enumerate(values, start=1)
        if value < 1
    ]
    if len(values) != len(clients):
        problems.append(f"ranks.values: {len(values)} values for {len(clients)} clients; give one rank for each client")
    if problems:
        raise ConfigError(problems)
    return {client.client: value for client, value in zip(clients, values, strict=True)}


def data_size(clients: Sequence[Candidate], rng: np.random.Generator, *, largest: int = 8) -> dict[str, int]:
    """More data, more rank: the share of clients with no more examples than this one, times the largest rank.

    The rule of HLoRA's prototype (arXiv 2503.00813): `r_k = max(1, floor(share * largest))`.

    Args:
        clients: who gets a rank.
        rng: not used.
        largest: rank of the client with the most examples.

    Raises:
        ConfigError: a largest rank below 1.
    """
    if largest < 1:
        raise ConfigError(f"ranks.largest: expected a rank of at least 1, got {largest}")
    sizes = [client.num_examples for client in clients]
    covered = {size: sum(other <= size for other in sizes) for size in set(sizes)}
    return {c.client: max(1, covered[c.num_examples] * largest // len(sizes)) for c in clients}


def power_law(
    clients: Sequence[Candidate],
    rng: np.random.Generator,
    *,
    smallest: int = 5,
    largest: int = 50,
    alpha: float = 0.1,
) -> dict[str, int]:
    """Ranks drawn from a truncated power law, `P(r) ∝ r^(alpha - 1)`, most of them small for `alpha` below 1.

    The defaults are HetLoRA's range and exponent (arXiv 2401.06432).

    Args:
        clients: who gets a rank.
        rng: where the draws come from.
        smallest: lowest rank that can be drawn.
        largest: highest rank that can be drawn.
        alpha: exponent plus one; 1 draws uniformly.

    Raises:
        ConfigError: an empty range, a rank below 1, or an exponent that is not finite.
    """
    problems = []
    if largest > 100_000:  # wider than any layer
        problems.append(f"ranks.largest: expected a rank of at most 100000, got {largest}")
    if not 1 <= smallest <= largest:
        problems.append(
            f"ranks.smallest, ranks.largest: expected 1 <= smallest <= largest, got {smallest} and {largest}"
        )
    if not -inf < alpha < inf:
        problems.append(f"ranks.alpha: expected a finite number, got {alpha}")
    if problems:
        raise ConfigError(problems)
    ranks = np.arange(smallest, largest + 1)
    logs = (alpha - 1) * np.log(ranks)
    weights = np.exp(logs - logs.max())
    drawn = rng.choice(ranks, size=len(clients), p=weights / weights.sum())
    return {client.client: int(rank) for client, rank in zip(clients, drawn, strict=True)}


def ratios(
    clients: Sequence[Candidate], rng: np.random.Generator, *, values: Sequence[float], of: int
) -> dict[str, int]:
    """Shares of a full rank, dealt to the clients in their order and again from the first when they run out.

    RBLA's rule (arXiv 2408.08699): `r_k = max(1, int(ratio * of))`.

    Args:
        clients: who gets a rank.
        rng: not used.
        values: shares above 0, up to 1.
        of: the full rank.

    Raises:
        ConfigError: no shares, one out of range, or a full rank below 1.
    """
    problems = [
        f"ranks.values: expected shares above 0, up to 1, got {value}" for value in values if not 0 < value <= 1
    ]
    if not values:
        problems.append("ranks.values: expected at least one share, got none")
    if of < 1:
        problems.append(f"ranks.of: expected a full rank of at least 1, got {of}")
    if problems:
        raise ConfigError(problems)
    # 0.29 * 100 is 28.999999999999996: without the small term a share of exactly 29 would lose a rank.
    return {
        client.client: max(1, int(ratio * of + 1e-9)) for client, ratio in zip(clients, cycle(values), strict=False)
    }


def auto(
    clients: Sequence[Candidate],
    rng: np.random.Generator,
    *,
    largest: int = 64,
    memory_share: float = 0.8,
    seconds: float | None = None,
) -> dict[str, int]:
    """The largest rank that each client's device affords, see `affordable`.

    Args:
        clients: who gets a rank.
        rng: not used.
        largest: highest rank that is given.
        memory_share: of the device's memory that a plan may take.
        seconds: that a round's local steps and upload may take; None sets no limit.

    Raises:
        ConfigError: a largest rank below 1, a share or a time that is not above 0, or a share above 1.
    """
    problems = []
    if largest < 1:
        problems.append(f"ranks.largest: expected a rank of at least 1, got {largest}")
    if not 0 < memory_share <= 1:
        problems.append(f"ranks.memory_share: expected a share above 0, up to 1, got {memory_share}")
    if seconds is not None and not seconds > 0:
        problems.append(f"ranks.seconds: expected a time above 0, got {seconds}; leave it out to set no limit")
    if problems:
        raise ConfigError(problems)
    return {c.client: c.afford(largest=largest, memory_share=memory_share, seconds=seconds)[0] for c in clients}


RANK_POLICIES: Mapping[str, Callable[..., dict[str, int]]] = {
    "per_class": per_class,
    "list": listed,
    "data_size": data_size,
    "power_law": power_law,
    "ratios": ratios,
    "auto": auto,
}
"""Rank policies by the name a recipe uses; each one's keyword-only arguments are its settings."""


def ordered(
    ranks: Mapping[str, int],
    sizes: Mapping[str, int],
    *,
    order: Literal["as_drawn", "with_data", "against_data"],
) -> dict[str, int]:
    """Deal the same ranks again, the larger ones to clients with more data or with less.

    Args:
        ranks: rank by client.
        sizes: training examples by client.
        order: `with_data` (more data, more rank), `against_data`, or `as_drawn` (unchanged). Among clients of
            equal size the later name gets the larger rank.
    """
    if order == "as_drawn":
        return dict(ranks)
    sign = 1 if order == "with_data" else -1
    clients = sorted(ranks, key=lambda client: (sign * sizes[client], client))
    dealt = dict(zip(clients, sorted(ranks.values()), strict=True))
    return {client: dealt[client] for client in ranks}


def deal_classes(clients: Sequence[str], shares: Mapping[str, float], rng: np.random.Generator) -> dict[str, str]:
    """Give each client a device class, in exactly the rounded proportions (largest remainder), shuffled.

    Args:
        clients: names.
        shares: proportion of each class; they are divided by their sum.
        rng: where the shuffle comes from.

    Raises:
        ConfigError: no classes, or a share that is not above 0.
    """
    problems = [
        f"device class {kind!r}: share is {share}; expected a number above 0"
        for kind, share in shares.items()
        if not 0 < share < inf
    ]
    if problems or not shares:
        raise ConfigError(problems or "device classes: expected at least one, got none")
    kinds = list(_rounded(shares, len(clients)).elements())
    return {client: kinds[position] for client, position in zip(clients, rng.permutation(len(kinds)), strict=True)}


def _rounded(shares: Mapping[str, float], count: int) -> Counter[str]:
    """Whole numbers in proportion to the shares, `count` in all; of equal remainders the earlier wins."""
    total = sum(shares.values())
    exact = {kind: count * share / total for kind, share in shares.items()}
    whole = Counter({kind: int(quota) for kind, quota in exact.items()})
    # Rounded, so that 0.1 + 0.2 style noise does not decide between equal remainders.
    by_remainder = sorted(exact, key=lambda kind: -round(exact[kind] - whole[kind], 9))
    whole.update(by_remainder[: count - whole.total()])
    return whole


def at_rank(spec: Spec, device: Device, rank: int) -> Plan:
    """A plan that trains every layer at one rank."""
    return Plan(device.client, {layer.name: rank for layer in spec.layers}, device.steps)


def at_own_rank(state: State, devices: Sequence[Device]) -> list[Plan]:
    """Everyone trains every layer at the rank its device affords."""
    return [at_rank(state.spec, device, device.rank) for device in devices]


def at_random_slots(state: State, devices: Sequence[Device]) -> list[Plan]:
    """Everyone trains as many of the server's slots as its device affords, drawn anew in every round."""
    rank, plans = max(state.spec.levels), []
    for plan in at_own_rank(state, devices):
        rng = numpy_generator(state.spec.seed, "slots", state.round, plan.client)
        drawn = rng.choice(rank, size=plan.rank, replace=False).tolist()
        plans.append(replace(plan, slots=tuple(sorted(drawn))))
    return plans


def at_depth(spec: Spec, device: Device, ranks: Mapping[str, int], depth: int) -> Plan:
    """A plan that trains the layers of the last `depth` blocks that hold any, each at the rank given for it."""
    blocks = spec.blocks[len(spec.blocks) - depth :]
    return Plan(
        device.client, {layer.name: ranks[layer.name] for layer in spec.layers if layer.block in blocks}, device.steps
    )


def seconds_by_depth(spec: Spec, device: Device, ranks: Mapping[str, int]) -> list[float]:
    """Seconds until the device should have replied at depth 0, 1, ..., as far as its memory holds what is trained."""
    found = []
    for depth in range(len(spec.blocks) + 1):
        plan = at_depth(spec, device, ranks, depth)
        if depth and _memory(plan, spec) > device.profile.memory_bytes:
            break
        found.append(reply_seconds(plan, device, spec))
    return found


def _memory(plan: Plan, spec: Spec) -> int:
    dense = sum(tensor.numel() for tensor in spec.start.dense.values())
    return memory_bytes(plan, model=spec.cost, layers=spec.layers, dense_parameters=dense)


def affordable(
    spec: Spec, device: Device, *, largest: int, memory_share: float, seconds: float | None
) -> tuple[int, int]:
    """The largest rank at which a device can train all layers, and how deep it can.

    Ranks are powers of two. If the device cannot train all layers even at rank 1, that is its rank, and its depth the
    largest that it can train: 0 where that is nothing.

    Args:
        spec: of the run; levels are not looked at.
        device: its rank is not looked at.
        largest: no rank is above this, nor above a side of a layer, where slots would be redundant.
        memory_share: of the device's memory that may be taken.
        seconds: that a round's local steps and upload may take; None sets no limit.
    """
    room, deepest = memory_share * device.profile.memory_bytes, len(spec.blocks)
    most = min(largest, *(min(layer.d_in, layer.d_out) for layer in spec.layers))

    def fits(rank: int, depth: int) -> bool:
        plan = at_depth(spec, device, {layer.name: rank for layer in spec.layers}, depth)
        in_time = seconds is None or reply_seconds(plan, device, spec) <= seconds
        return in_time and _memory(plan, spec) <= room

    ranks = (1 << power for power in reversed(range(1, most.bit_length())))
    if rank := next((rank for rank in ranks if fits(rank, deepest)), None):
        return rank, deepest
    return 1, next((depth for depth in range(deepest, 0, -1) if fits(1, depth)), 0)


def fisher(live: Adapter) -> dict[str, float]:
    """For `Method.observe`: the sum of squared gradients of each layer's factors, an empirical Fisher score."""
    return {
        f"fisher {name}": sum((float(f.grad.square().sum()) for f in (part.A, part.B) if f.grad is not None), 0.0)
        for name, part in live.layers.items()
    }


def fisher_scores(inbox: Inbox, weights: Sequence[float]) -> dict[str, float]:
    """For each layer, the mean of what clients observed with `fisher`, by step and slot, over those that trained it."""
    scores, totals = defaultdict[str, float](float), defaultdict[str, float](float)
    for (task, update), weight in zip(inbox, weights, strict=True):
        for name, rank in task.plan.ranks.items():
            if (observed := update.metrics.get(f"fisher {name}")) is not None:
                scores[name] += weight * observed / (task.plan.steps * rank)
                totals[name] += weight
    return {name: scores[name] / total for name, total in totals.items() if total > 0}


def due(round: int, warmup: int, refresh: int) -> bool:
    """Whether what is worked out from the scores is worked out anew: after the last warm-up round, then every `refresh`.

    Without a warm-up it is after the first round, which gives the first scores.
    """
    since = round - max(warmup, 1)
    return since >= 0 and since % refresh == 0
