"""Who averages with whom. A topology plays one round: it makes tasks, has them carried out, and reduces what comes back.

The same reducer, `combine`, is used by the server, by an edge of a hierarchy and by a peer in a ring. A run chooses a
topology by name; the keyword arguments of its function are its settings.

    star        one server, everyone its client
    hierarchy   edges between the clients and the cloud, each averaging on its own for some repeats
    ring        no server: every peer averages with its two neighbours
    gossip      no server: random neighbours, new ones in every round
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.errors import ConfigError
from anyrank.federation import Claims, Device, Inbox, Method, Plan, State, Task, Update, make_task
from anyrank.seeding import numpy_generator
from anyrank.wire import nbytes

__all__ = ["TOPOLOGIES", "Asked", "Round", "Topology", "check_topology", "combine", "metropolis", "reduce"]


class Asked(NamedTuple):
    """What came of a set of tasks: the valid updates with their tasks, each one's share of the examples asked for, and the
    simulated seconds until the last was there."""

    inbox: Inbox
    weights: Sequence[float]
    seconds: float


@runtime_checkable
class Round(Protocol):
    """A round as a topology sees it."""

    number: int
    seed: int

    def ask(
        self, tasks: Sequence[Task], *, neighbours: Mapping[str, Sequence[str]] | None = None, late: bool = False
    ) -> Asked:
        """Have tasks carried out, and account for them.

        Args:
            tasks: at most one for each client.
            neighbours: between peers, to which others each client's update goes; a task then does not travel.
            late: a reply that misses the deadline is waited for, and is in the inbox of the round in which it comes, with
                the weight that it would have had in its own.
        """
        ...

    def carry(self, down: int, up: int) -> None:
        """Account for bytes that travel besides those of the clients' tasks, such as between cloud and edges."""
        ...

    def held(self, client: str) -> int:
        """The newest fold that a client holds."""
        ...


class Played(NamedTuple):
    """The next state, the next states of the peers (none where there is a server), and the simulated seconds."""

    state: State
    peers: Mapping[str, State]
    seconds: float


class Topology(NamedTuple):
    """One round of a federation.

    Attributes:
        name: in `TOPOLOGIES`.
        peers: there is no server; every client has a state of its own.
        play: from the method, the server's state (the mean of the peers), the peers' states, the sampled devices and the
            round, what the round makes of them. The server's state has its round counted on.
    """

    name: str
    peers: bool
    play: Callable[[Method, State, Mapping[str, State], Sequence[Device], Round], Played]


def combine(method: Method, state: State, inbox: Inbox, weights: Sequence[float]) -> State:
    """One aggregation: the method's layers; of the dense tensors the mean over their holders, or what they changed."""
    aggregated = method.aggregate(state, inbox, weights)
    dense = (_changed_dense if method.claims.change else _mean_dense)(state, inbox, weights)
    return aggregated.with_adapter(Adapter(aggregated.adapter.layers, dense))


def reduce(method: Method, state: State, inbox: Inbox, weights: Sequence[float]) -> State:
    """An aggregation and the server's step after it."""
    return method.step(state, combine(method, state, inbox, weights))


def _mean_dense(state: State, inbox: Inbox, weights: Sequence[float]) -> dict[str, Tensor]:
    mean = dict(state.adapter.dense)
    for name in mean:
        held = [
            (update.adapter.dense, weight)
            for (_, update), weight in zip(inbox, weights, strict=True)
            if update.adapter and name in update.adapter.dense
        ]
        if held:
            total = sum(weight for _, weight in held)
            sums = torch.zeros_like(mean[name], dtype=torch.promote_types(mean[name].dtype, torch.float32))
            for dense, weight in held:  # one tensor after another, as a change of a whole weight is large
                sums.add_(dense[name], alpha=weight / total)
            mean[name] = sums.to(mean[name].dtype)
    return mean


def _changed_dense(state: State, inbox: Inbox, weights: Sequence[float]) -> dict[str, Tensor]:
    changed = dict(state.adapter.dense)
    for (task, update), weight in zip(inbox, weights, strict=True):
        for name, tensor in update.adapter.dense.items() if update.adapter else ():
            changed[name] = changed[name] + weight * (tensor - task.start.dense[name])
    return changed


# --- with a server ------------------------------------------------------------------------------------------------


def star() -> Topology:
    """One server; every sampled client is asked once. Changes to what was sent count also when they come late."""

    def play(
        method: Method, state: State, peers: Mapping[str, State], devices: Sequence[Device], round: Round
    ) -> Played:
        plans = method.assign(state, devices)
        tasks = [make_task(method, state, plan, held=round.held(plan.client)) for plan in plans]
        asked = round.ask(tasks, late=method.claims.change)
        if not asked.inbox:
            return Played(state, {}, asked.seconds)
        after = reduce(method, state, asked.inbox, asked.weights)
        return Played(replace(after, round=round.number), {}, asked.seconds)

    return Topology("star", peers=False, play=play)


def hierarchy(*, edges: Annotated[int, Ge(1)] = 2, repeats: Annotated[int, Ge(1)] = 1) -> Topology:
    """Edges between the clients and the cloud.

    In a round every edge gets the cloud's adapter, asks its clients `repeats` times and averages what they return; then the
    cloud averages the edges, weighted by their clients' examples. An edge answers for the slots and layers that those of its
    clients hold who replied, and it counts for each of them with the examples of all its clients, also where few of them
    hold it; of a product it answers for all. Averages over owners are therefore a star's only where edges are alike.

    Args:
        edges: groups that the sampled clients are dealt to in turn, unless the method forms groups itself.
        repeats: aggregations of an edge in a round, unless the method's plans say.
    """

    def play(
        method: Method, state: State, peers: Mapping[str, State], devices: Sequence[Device], round: Round
    ) -> Played:
        examples = {device.client: device.num_examples for device in devices}
        groups = _groups(method.assign(state, devices), edges)
        total = sum(examples[plan.client] for plans in groups.values() for plan in plans)
        inbox, weights, seconds = [], [], []
        for name, plans in groups.items():
            edge, took, heard = state, 0.0, set()
            round.carry(nbytes(state.adapter, plans[0].down), 0)
            for phase in range(max(plan.repeats for plan in plans) if plans[0].group else repeats):
                asked = round.ask([make_task(method, edge, plan, phase=phase) for plan in plans])
                took += asked.seconds
                if asked.inbox:
                    edge = combine(method, edge, asked.inbox, asked.weights)
                    heard |= {update.client for _, update in asked.inbox}
            seconds.append(took)
            if heard:
                inbox.append(_answer(method, name, [p for p in plans if p.client in heard], state, edge))
                weights.append(sum(examples[plan.client] for plan in plans) / total)
                round.carry(0, nbytes(inbox[-1][1].adapter, plans[0].up))
        if not inbox:
            return Played(state, {}, max(seconds, default=0.0))
        after = reduce(method, state, inbox, weights)
        return Played(replace(after, round=round.number), {}, max(seconds))

    return Topology("hierarchy", peers=False, play=play)


def _groups(plans: Sequence[Plan], edges: int) -> dict[str, list[Plan]]:
    groups: dict[str, list[Plan]] = {}
    for i, plan in enumerate(plans):
        groups.setdefault(plan.group or f"edge {i % edges}", []).append(plan)
    return dict(sorted(groups.items()))


def _answer(method: Method, name: str, plans: Sequence[Plan], cloud: State, edge: State) -> tuple[Task, Update]:
    """An edge as a client of the cloud. It speaks for what its clients hold; of a product, for all of it."""
    layers = {layer: part for layer, part in edge.adapter.layers.items() if any(layer in p.ranks for p in plans)}
    slots = None
    if method.claims.space == "factor":
        held = [range(plan.rank) if plan.slots is None else plan.slots for plan in plans]
        slots = tuple(sorted(set().union(*held)))
        layers = {n: lowrank.take(p, [slot for slot in slots if slot < p.rank]) for n, p in layers.items()}
    plan = Plan(name, {layer: part.rank for layer, part in layers.items()}, steps=0, slots=slots)
    task = make_task(method, cloud, plan)
    return task, Update(name, task.round, Adapter(layers, edge.adapter.dense), 0, {})


# --- without a server ---------------------------------------------------------------------------------------------


def ring() -> Topology:
    """Every sampled peer averages with the one before and the one after it, in the fleet's order."""

    def neighbours(count: int, round: Round) -> np.ndarray:
        following = np.roll(np.eye(count, dtype=bool), 1, axis=1)
        return (following | following.T) & ~np.eye(count, dtype=bool)

    return Topology("ring", peers=True, play=_among_peers(neighbours))


def gossip(*, probability: Annotated[float, Gt(0), Le(1)] = 0.5) -> Topology:
    """Every pair of sampled peers meets with a probability, drawn anew in every round (an Erdős–Rényi graph).

    Args:
        probability: that two peers exchange their updates in a round.
    """

    def neighbours(count: int, round: Round) -> np.ndarray:
        meet = numpy_generator(round.seed, "gossip", round.number).random((count, count)) < probability
        upper = np.triu(meet, 1)
        return upper | upper.T

    return Topology("gossip", peers=True, play=_among_peers(neighbours))


def metropolis(neighbours: np.ndarray) -> np.ndarray:
    """Metropolis-Hastings weights of a graph: symmetric, doubly stochastic, and every peer counts itself.

        w_ij = 1 / (1 + max(degree_i, degree_j))    w_ii = 1 - sum_j w_ij

    Args:
        neighbours: symmetric, `[n, n]`, true where two different peers meet.
    """
    degree = neighbours.sum(axis=0)
    weights = np.where(neighbours, 1 / (1 + np.maximum.outer(degree, degree)), 0.0)
    return weights + np.diag(1 - weights.sum(axis=1))


def _among_peers(neighbours: Callable[[int, Round], np.ndarray]) -> Callable[..., Played]:
    """A round in which each sampled peer trains from its own state and averages what its neighbours and itself return."""

    def play(
        method: Method, state: State, peers: Mapping[str, State], devices: Sequence[Device], round: Round
    ) -> Played:
        plans = [plan for device in devices for plan in method.assign(peers[device.client], [device])]
        names = [plan.client for plan in plans]
        meet = neighbours(len(names), round)
        weights = metropolis(meet)
        tasks = [make_task(method, peers[plan.client], plan) for plan in plans]
        met = {name: [names[j] for j in np.flatnonzero(row)] for name, row in zip(names, meet, strict=True)}
        asked = round.ask(tasks, neighbours=met)
        if not asked.inbox:
            return Played(state, peers, asked.seconds)
        arrived = {update.client: (task, update) for task, update in asked.inbox}
        after = dict(peers)
        for i, name in enumerate(names):
            if name in arrived:  # who dropped out stays as it is
                members = [j for j, other in enumerate(names) if weights[i, j] > 0 and other in arrived]
                inbox, row = [arrived[names[j]] for j in members], [float(weights[i, j]) for j in members]
                after[name] = reduce(method, peers[name], inbox, row)
        # All count on, so that those who were not sampled stay in step with a plan that alternates.
        after = {name: replace(peer, round=round.number) for name, peer in after.items()}
        return Played(replace(_mean(method, state, after), round=round.number), after, asked.seconds)

    return play


def _mean(method: Method, state: State, peers: Mapping[str, State]) -> State:
    """The mean of all peers, by the method's own rule: what is reported and saved."""
    inbox = []
    for name, peer in peers.items():
        plan = Plan(name, peer.adapter.ranks, steps=0)
        task = Task("train", state.round + 1, plan, state.adapter)
        inbox.append((task, Update(name, task.round, peer.adapter, 0, {})))
    return combine(method, state, inbox, [1 / len(inbox)] * len(inbox))


TOPOLOGIES: Mapping[str, Callable[..., Topology]] = {
    "star": star,
    "hierarchy": hierarchy,
    "ring": ring,
    "gossip": gossip,
}


def check_topology(method: str, claims: Claims, topology: str) -> None:
    """Refuse a pair of method and topology that does not work.

    Raises:
        ConfigError: saying why, and what to use.
    """
    if topology not in claims.topologies:
        raise ConfigError(
            f"topology.name: {method} does not work in the topology {topology!r}: {claims.needs}. "
            f"Use {' or '.join(claims.topologies)}, or another method."
        )
