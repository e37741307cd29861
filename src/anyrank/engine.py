"""The one round loop. It knows no method by name: it moves tasks out, updates in, and the state one round on.

sample -> topology (assign, dispatch -> ask -> aggregate, dense tensors, server step) -> evaluate -> Progress
ask:   clock (who drops out or is late is not trained, or later) -> transport -> validate, spool -> sort
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import fsum
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.clock import Arrival, Clock, Workload, round_seconds
from anyrank.device import compute_seconds, undisturbed
from anyrank.errors import RoundFailed, UpdateRejected
from anyrank.federation import Device, Failure, Method, Plan, State, Task, Times, Update, make_task
from anyrank.problem import ACCURACY, Metric
from anyrank.seeding import numpy_generator
from anyrank.spool import Spool, in_memory
from anyrank.topology import Asked, Topology
from anyrank.train import Score
from anyrank.transport import Transport
from anyrank.wire import LARGEST_METRIC, bytes_down, bytes_up, check_norms, check_update, completed, nbytes, norms

__all__ = ["Evaluation", "Federation", "Late", "Progress", "applied", "begin", "rounds", "sample"]

_RHO = 0.8  # weight of the past in the moving averages of a device's times
_HELD_OUT = 100  # times its training examples: the most that a client is scored on, with 99 % of its examples held out
_TOGETHER = 1000  # evaluations that are asked for at once: ten thousand tasks take 160 MB with all-MiniLM-L6-v2

Fleet = Mapping[str, Device]
Scorer = Callable[[Adapter, bool], Score]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When what is scored, and when to stop.

    Args:
        every: rounds between evaluations; the last round is always evaluated.
        classes: score what each rank class is sent in the `last` round only, or `always`.
        target: a value of the metric; the simulated time at which it is first reached is recorded.
        stop_at_target: end the run there.
    """

    every: int = 1
    classes: Literal["last", "always"] = "last"
    target: float | None = None
    stop_at_target: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """Everything that stays the same from round to round.

    Args:
        method: what is computed.
        topology: who averages with whom.
        transport: how tasks reach clients.
        clock: simulated deadlines, dropouts and stragglers.
        score: scores an adapter on the server's test set; at the end of a run also by what takes long. None where the server
            has none: then the score is that of the clients' own examples.
        per_round: clients sampled in a round.
        rounds: how many rounds the run has.
        metric: what the run is judged by.
        quorum: the fewest clients with a valid update with which a round counts.
        norm_limit: an update is rejected if one of its norms (`wire.norms`) is over this many times the round's median.
        evaluation: when to score what.
        seed: of the run.
        notify: called for every reply as it arrives.
        meet: called before a round: the fleet as it is now, and the clients of it that are here.
        disk: a folder on the disk to which updates go that are too many for memory; None takes the system's temporary one.
    """

    method: Method
    topology: Topology
    transport: Transport
    clock: Clock
    score: Scorer | None
    per_round: int
    rounds: int
    quorum: int = 1
    norm_limit: float
    evaluation: Evaluation
    seed: int
    metric: Metric = ACCURACY
    notify: Callable[[Update | Failure], None] = lambda reply: None
    meet: Callable[[Fleet], tuple[Fleet, Collection[str]]] = lambda fleet: (fleet, fleet)
    disk: Path | None = None


@dataclass(frozen=True, eq=False)
class Late:
    """A task whose reply missed its round, and counts in the one in which it comes.

    Args:
        task: what was asked. Its client is busy with it, and is not sampled before it has replied.
        weight: its share of the examples that were asked for in its own round.
        arrives: when its reply comes, on the virtual clock.
    """

    task: Task
    weight: float
    arrives: float


@dataclass(frozen=True, eq=False)
class Progress:
    """All that the next round depends on, and the record of the last one.

    Args:
        state: the method's state; without a server, the mean of the peers'.
        fleet: devices by client, as the server knows them now.
        peers: without a server, each client's own state.
        late: tasks of earlier rounds whose replies are still awaited; only methods that add changes wait for any.
        seconds: the virtual clock.
        target_seconds: what it showed when the target was reached, if it was.
        record: the last round as a flat JSON object; empty before the first.
    """

    state: State
    fleet: Fleet
    peers: Mapping[str, State] = field(default_factory=dict)
    late: tuple[Late, ...] = ()
    seconds: float = 0.0
    target_seconds: float | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def begin(federation: Federation, state: State, fleet: Fleet) -> Progress:
    """Before the first round; without a server all peers start alike."""
    return Progress(state, fleet, dict.fromkeys(fleet, state) if federation.topology.peers else {})


def rounds(federation: Federation, progress: Progress) -> Iterator[Progress]:
    """Play round after round, from where `progress` stands, until the last one or the target.

    Raises:
        RoundFailed: a round without a valid update.
    """
    stop = federation.evaluation.stop_at_target
    while progress.state.round < federation.rounds and not (stop and progress.target_seconds is not None):
        progress = _play(federation, progress)
        yield progress


def sample(fleet: Fleet, *, per_round: int, seed: int, round: int) -> list[Device]:
    """The devices that take part in a round, in the fleet's order: a function of the fleet, the seed and the round alone."""
    devices = list(fleet.values())
    rng = numpy_generator(seed, "sample", round)
    chosen = rng.choice(len(devices), size=min(per_round, len(devices)), replace=False)
    return [devices[i] for i in sorted(chosen)]


def _play(federation: Federation, progress: Progress) -> Progress:
    number = progress.state.round + 1
    fleet, here = federation.meet(progress.fleet)
    peers = progress.peers
    if federation.topology.peers:  # who has come since starts from what the others have reached
        peers = {**peers, **{client: progress.state for client in fleet if client not in peers}}
    progress = replace(progress, fleet=fleet, peers=peers)
    busy = {late.task.plan.client for late in progress.late}
    free = {c: device for c, device in fleet.items() if c not in busy and c in here}
    sampled = sample(free, per_round=federation.per_round, seed=federation.seed, round=number)
    with Spool(federation.disk) as spool:
        round = _Round(federation, progress, spool)
        state, peers, took = federation.topology.play(federation.method, progress.state, progress.peers, sampled, round)
        if spool.used:  # a method may keep what a client returned
            state, peers = _read(state), {client: _read(peer) for client, peer in peers.items()}
    valid = len({update.client for _, update in round.inbox})
    if valid < federation.quorum:
        reasons = "; ".join(f"{f.client} ({f.stage}: {f.reason})" for f in round.failures)
        if not round.tasks:
            reasons = f"no work fits the devices of {', '.join(device.client for device in sampled)}"
        needed = f", and server.quorum asks for {federation.quorum}" if federation.quorum > 1 else ""
        raise RoundFailed(
            f"round {number}: {valid or 'none'} of {len(sampled)} clients returned a valid update{needed}: {reasons}. Resuming "
            "would play the same round again; start a new run with other settings (learning rate, deadline, dropout) or "
            "another seed."
        )
    fleet = {**progress.fleet, **round.learned()}
    seconds = progress.seconds + took
    after = Progress(state, fleet, peers, tuple(round.late), seconds, progress.target_seconds)
    scores = _evaluate(federation, after, [fleet[device.client] for device in sampled], here)
    target = federation.evaluation.target
    if after.target_seconds is None and target is not None and federation.metric.reached(scores["score"], target):
        after = replace(after, target_seconds=seconds)
    record = {
        "round": number,
        **scores,
        **round.account(),
        "simulated_seconds": seconds,
        "target_seconds": after.target_seconds,
        "energy": _energy(state),
        "truncation_error": state.notes.get("truncation_error"),
    }
    return replace(after, record=record)


def _read(state: State) -> State:
    """The state without anything on disk."""
    folds = tuple(replace(fold, adapter=in_memory(fold.adapter)) for fold in state.folds)
    extra = {name: in_memory(adapter) for name, adapter in state.extra.items()}
    return replace(state, adapter=in_memory(state.adapter), folds=folds, extra=extra)


# --- asking clients -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Received:
    """A valid update to a task, and what was worked out while its tensors were in memory.

    Args:
        task: what was asked.
        update: what came back.
        nbytes: what of it travelled.
        norms: what `wire.norms` says of it.
    """

    task: Task
    update: Update
    nbytes: int
    norms: Mapping[str, float]


class _Round:
    """One round's exchanges with clients: carries them out, and keeps the books."""

    def __init__(self, federation: Federation, progress: Progress, spool: Spool):
        self.federation, self.spool = federation, spool
        self.fleet, self.spec = progress.fleet, progress.state.spec
        self.number, self.seed = progress.state.round + 1, federation.seed
        self.tasks: list[Task] = []
        self.inbox: list[tuple[Task, Update]] = []
        self.failures: list[Failure] = []
        self.arrivals: list[Arrival] = []
        self.now, self.late = progress.seconds, list(progress.late)
        self.bytes_down = self.bytes_up = 0

    def ask(
        self, tasks: Sequence[Task], *, neighbours: Mapping[str, Sequence[str]] | None = None, late: bool = False
    ) -> Asked:
        """Have tasks carried out, and account for them."""
        arrivals = self._arrivals(tasks, neighbours)
        until = self.now + round_seconds(arrivals, self.federation.clock.deadline)
        examples = {task.plan.client: self.fleet[task.plan.client].num_examples for task in tasks}
        shares = {client: count / sum(examples.values()) for client, count in examples.items()}
        due: list[Late] = []
        if late:
            arrivals, due, until = self._wait(tasks, arrivals, shares, until)
        shares |= {come.task.plan.client: come.weight for come in due}
        received, failures = self._collect([*tasks, *(come.task for come in due)], arrivals)
        if neighbours is None:
            self.carry(sum(bytes_down(task) for task in tasks), sum(each.nbytes for each in received))
        else:
            sent = sum(each.nbytes * len(neighbours[each.update.client]) for each in received)
            self.carry(sent, sent)
        inbox = [(each.task, each.update) for each in received]
        self.tasks += tasks
        self.inbox += inbox
        self.failures += failures
        self.arrivals += arrivals
        return Asked(inbox, [shares[update.client] for _, update in inbox], until - self.now)

    def _wait(
        self, tasks: Sequence[Task], arrivals: Sequence[Arrival], shares: Mapping[str, float], until: float
    ) -> tuple[list[Arrival], list[Late], float]:
        """The arrivals, the replies to earlier tasks that come in the round, and when it ends; who is late now is noted.

        If nobody is in time, the round lasts until the first late reply.
        """
        awaited = list(self.late)
        for task, arrival in zip(tasks, arrivals, strict=True):
            if arrival.outcome == "late":
                task = replace(task, frozen=task.applied, folds=())  # the state's folds may be other ones by then
                awaited.append(Late(task, shares[arrival.client], self.now + arrival.seconds))
        if awaited and not any(arrival.outcome == "in time" for arrival in arrivals):
            until = max(until, min(late.arrives for late in awaited))
        heard = [
            replace(arrival, outcome="in time")
            if arrival.outcome == "late" and self.now + arrival.seconds <= until
            else arrival
            for arrival in arrivals
        ]
        due = [late for late in self.late if late.arrives <= until]
        self.late = [late for late in awaited if late.arrives > until]
        return heard, due, until

    def carry(self, down: int, up: int) -> None:
        """Account for bytes that travel besides those of the clients' tasks."""
        self.bytes_down += down
        self.bytes_up += up

    def held(self, client: str) -> int:
        """The newest fold that a client holds."""
        return self.fleet[client].folds

    def _arrivals(self, tasks: Sequence[Task], neighbours: Mapping[str, Sequence[str]] | None) -> list[Arrival]:
        sizes = {task.plan.client: nbytes(task.start, task.plan.up) for task in tasks}
        workloads = []
        for task in tasks:
            device = self.fleet[task.plan.client]
            down, up = bytes_down(task), sizes[device.client]
            if neighbours is not None:  # a peer sends to its neighbours, and hears from them
                met = neighbours[device.client]
                down, up = sum(sizes[other] for other in met), up * len(met)
            times = undisturbed(device.profile, self.spec.cost)
            seconds = compute_seconds(task.plan, times, model=self.spec.cost, layers=self.spec.layers)
            workloads.append(Workload(device.client, device.kind, seconds, down, up, device.profile))
        return self.federation.clock.arrivals(workloads, self.number) if tasks else []

    def _collect(self, tasks: Sequence[Task], arrivals: Sequence[Arrival]) -> tuple[list[_Received], list[Failure]]:
        """Run the tasks that arrive in time; the valid updates and who failed why, each in the order of the tasks."""
        by_client = {task.plan.client: task for task in tasks}
        replies: dict[str, _Received | Failure] = {
            late.client: Failure(late.client, by_client[late.client].round, late.outcome, f"after {late.seconds:.3g} s")
            for late in arrivals
            if late.outcome != "in time"
        }
        expected = {client: task for client, task in by_client.items() if client not in replies}
        for reply in self.federation.transport.run(list(expected.values())):
            self.federation.notify(reply)
            if reply.client in expected:
                replies[reply.client] = self._received(expected[reply.client], reply)
        for client in expected.keys() - replies.keys():
            replies[client] = Failure(client, by_client[client].round, "dropped", "sent no reply")
        received = {client: r.norms for client in by_client if isinstance(r := replies[client], _Received)}
        for client, error in check_norms(received, self.federation.norm_limit).items():
            replies[client] = _rejection(by_client[client], error)
        ordered = [replies[client] for client in by_client]
        return [r for r in ordered if isinstance(r, _Received)], [r for r in ordered if isinstance(r, Failure)]

    def _received(self, task: Task, reply: Update | Failure) -> _Received | Failure:
        """A reply checked and completed, and out of the way."""
        if isinstance(reply, Failure):
            return reply
        try:
            check_update(task, reply, may_prune=self.federation.method.claims.prunes)
        except UpdateRejected as error:
            return _rejection(task, error)
        update = completed(task, reply)
        if update.adapter is None:
            return _Received(task, update, 0, {})
        stored = replace(update, adapter=self.spool.keep(update.adapter))
        return _Received(task, stored, bytes_up(task, update), norms(update.adapter))

    def learned(self) -> dict[str, Device]:
        """What the round taught about the devices: ranks that shrank, folds they now hold, measured times."""
        fleet, slowdowns = {}, self._slowdowns()
        for task, update in self.inbox:
            device = fleet.get(update.client, self.fleet[update.client])
            if self.federation.method.claims.prunes and update.adapter:
                device = replace(device, rank=min(device.rank, max(update.adapter.ranks.values())))
            if task.folds:
                device = replace(device, folds=task.folds[-1].number)
            fleet[update.client] = device
        for arrival in self.arrivals:
            if arrival.outcome != "dropped":
                device = fleet.get(arrival.client, self.fleet[arrival.client])
                slowdown = slowdowns.get(arrival.client, arrival.slowdown)
                fleet[arrival.client] = replace(device, times=self._measured(device, slowdown))
        return fleet

    def _slowdowns(self) -> dict[str, float]:
        """By how much the steps of those who measured them took longer than their device's profile says."""
        found = {}
        for task, update in self.inbox:
            times = undisturbed(self.fleet[update.client].profile, self.spec.cost)
            expected = compute_seconds(task.plan, times, model=self.spec.cost, layers=self.spec.layers)
            if update.seconds and expected:
                found[update.client] = update.seconds / expected
        return found

    def _measured(self, device: Device, slowdown: float) -> Times:
        now = undisturbed(device.profile, self.spec.cost)
        now = Times(now.forward * slowdown, now.backward * slowdown, now.up)
        past = device.times
        if past is None:
            return now
        mean = [_RHO * old + (1 - _RHO) * new for old, new in zip(vars(past).values(), vars(now).values(), strict=True)]
        return Times(*mean)

    def account(self) -> dict[str, Any]:
        """What was sent, trained and received, for the round's record."""
        blocks = {layer.name: layer.block for layer in self.spec.layers}
        return {
            "train_loss": fmean(update.metrics["loss"] for _, update in self.inbox),
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "steps": sum(task.plan.steps for task, _ in self.inbox),
            "examples": int(sum(update.metrics.get("examples", 0.0) for _, update in self.inbox)),
            "planned_ranks": {task.plan.client: task.plan.rank for task in self.tasks},
            "planned_blocks": {t.plan.client: len({blocks[name] for name in t.plan.ranks}) for t in self.tasks},
            "returned_ranks": {u.client: max(u.adapter.ranks.values(), default=0) for _, u in self.inbox if u.adapter},
            "late_replies": {u.client: u.round for _, u in self.inbox if u.round < self.number},
            "rejected": [{"client": f.client, "stage": f.stage, "reason": f.reason} for f in self.failures],
        }


def _rejection(task: Task, error: UpdateRejected) -> Failure:
    return Failure(error.client, task.round, "rejected", f"{error.tensor}: {error.reason}")


# --- scores -------------------------------------------------------------------------------------------------------


def _evaluate(
    federation: Federation, progress: Progress, members: Sequence[Device], here: Collection[str]
) -> dict[str, Any]:
    plan, method, state = federation.evaluation, federation.method, progress.state
    everyone = [device for client, device in progress.fleet.items() if client in here]
    last = state.round == federation.rounds
    if not last and state.round % plan.every:
        return {"score": None, "loss": None, "metrics": None, "class_scores": None, "federated": None}
    if federation.score is None:
        own = _federated(
            _replies(federation, progress, everyone if last else members, "evaluate"), federation.metric.name
        )
        return {
            "score": own and own["score"],
            "loss": None,
            "metrics": None,
            "class_scores": None,
            "federated": own,
        }
    scores = _judge(federation, federation.score, progress, everyone if last else members, last)
    metric = federation.metric
    means = {name: fmean(score.metrics[name] for score in scores) for name in scores[0].metrics} if scores else {}
    score = means.get(metric.name)
    if plan.stop_at_target and plan.target is not None and metric.reached(score, plan.target):
        last = True
    by_class = None
    if score is not None and not (method.claims.personal or progress.peers) and (last or plan.classes == "always"):
        by_class = _class_scores(federation, federation.score, state, everyone, score)
    own = _replies(federation, progress, everyone if last else members, "evaluate")
    return {
        "score": score,
        "loss": fmean(score.loss for score in scores) if scores else None,
        "metrics": means or None,
        "class_scores": by_class,
        "federated": _federated(own, metric.name),
    }


def _replies(
    federation: Federation, progress: Progress, devices: Sequence[Device], kind: Literal["evaluate", "test"]
) -> Iterator[Update]:
    """The clients' answers to evaluations, in any order; of a large fleet some clients after others.

    An answer that cannot enter a mean is left out: that of a client whose adapter has diverged, or one that is made up.
    """
    own = [(progress.peers[device.client], [device]) for device in devices] if progress.peers else []
    asked = own or [(progress.state, devices)]
    plans = ((state, plan) for state, some in asked for plan in federation.method.assign(state, some))
    while some := list(islice(plans, _TOGETHER)):
        held = [progress.fleet[plan.client].folds for _, plan in some]
        tasks = [
            make_task(federation.method, state, plan, kind=kind, held=number)
            for (state, plan), number in zip(some, held, strict=True)
        ]
        for reply in federation.transport.run(tasks):
            if isinstance(reply, Update) and (kind == "test" or _sound(federation, progress.fleet, reply)):
                yield reply


def _sound(federation: Federation, fleet: Fleet, reply: Update) -> bool:
    """Whether a client's answer on its own examples can enter a mean. How many those are is known only roughly."""
    return (
        reply.client in fleet
        and federation.metric.name in reply.metrics
        and all(abs(value) < LARGEST_METRIC for value in reply.metrics.values())
        and 0 < reply.num_examples <= _HELD_OUT * max(1, fleet[reply.client].num_examples)
    )


def _judge(
    federation: Federation, by: Scorer, progress: Progress, devices: Sequence[Device], last: bool
) -> list[Score]:
    """How the server's test set is answered: by the global adapter, by each peer, or by each client's own model.

    Clients' own models are scored where they are, which only a simulation can ask for.
    """
    if federation.method.claims.personal:
        replies = _replies(federation, progress, devices, "test")
        return [
            Score(reply.metrics["loss"], {n: v for n, v in reply.metrics.items() if n != "loss"}, reply.num_examples)
            for reply in replies
        ]
    if progress.peers:
        return [by(progress.peers[device.client].whole, False) for device in devices]
    return [by(progress.state.whole, last)]


def _class_scores(
    federation: Federation, by: Scorer, state: State, fleet: Sequence[Device], whole: float
) -> dict[str, float]:
    """How what clients of each rank are sent does, by rank; at the full rank that is the whole adapter."""
    one_of_each = {device.rank: device for device in fleet}
    scores = {}
    for _, device in sorted(one_of_each.items()):
        for plan in federation.method.assign(state, [device]):
            scores[str(device.rank)] = (
                whole
                if plan.ranks == state.adapter.ranks and plan.scale == 1
                else by(applied(federation.method, state, plan), False).metrics[federation.metric.name]
            )
    return scores


def applied(method: Method, state: State, plan: Plan) -> Adapter:
    """All that a client applies, as one adapter."""
    return make_task(method, state, plan, kind="test").whole


def _federated(replies: Iterable[Update], metric: str) -> dict[str, float] | None:
    """The clients' own scores: the mean weighted by examples, and the spread over clients."""
    updates = [reply for reply in replies if reply.num_examples]
    if not updates:
        return None
    scores = [update.metrics[metric] for update in updates]
    total = sum(update.num_examples for update in updates)
    return {
        "score": fsum(u.metrics[metric] * u.num_examples for u in updates) / total,  # the same in any order
        "std": pstdev(scores),
        "min": min(scores),
        "max": max(scores),
        "clients": len(updates),
    }


def _energy(state: State) -> dict[str, float]:
    """Share of the global product's squared singular values in the bands between consecutive class ranks."""
    largest = max(state.adapter.ranks.values(), default=0)
    levels = [level for level in state.spec.levels if level <= largest]
    if not levels:
        return {}
    bounds = list(zip([0, *levels[:-1]], levels, strict=True))
    bands = dict.fromkeys([f"{low + 1}-{high}" for low, high in bounds], 0.0)
    for part in state.whole.layers.values():
        squares = lowrank.singular_values(part).double().square()
        for band, (low, high) in zip(bands, bounds, strict=True):
            bands[band] += float(squares[low:high].sum())
    total = sum(bands.values())
    return {band: energy / total for band, energy in bands.items()} if total > 0 else {}
