"""The one round loop. It knows no method by name: it moves tasks out, updates in, and the state one round on.

sample -> assign -> dispatch -> clock (who drops out or is late is not trained) -> transport -> sort, validate
       -> aggregate, dense tensors, server step -> evaluate -> Progress
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any, Literal

import torch
from torch import Tensor

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.clock import Arrival, Clock, Workload, round_seconds
from anyrank.errors import RoundFailed, UpdateRejected
from anyrank.federation import Device, Failure, Inbox, Method, Plan, State, Task, Update
from anyrank.seeding import numpy_generator
from anyrank.train import Score
from anyrank.transport import Transport
from anyrank.wire import check_norms, check_update, nbytes

__all__ = ["Evaluation", "Federation", "Progress", "reduce", "rounds", "sample"]

Fleet = Mapping[str, Device]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When what is scored, and when to stop.

    Args:
        every: rounds between evaluations; the last round is always evaluated.
        classes: score what each rank class is sent in the `last` round only, or `always`.
        target: an accuracy; the simulated time at which it is first reached is recorded.
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
        transport: how tasks reach clients.
        clock: simulated deadlines, dropouts and stragglers.
        compute_seconds: simulated seconds of a plan's local steps on a device.
        score: scores an adapter on the server's test set.
        per_round: clients sampled in a round.
        rounds: how many rounds the run has.
        norm_limit: an update is rejected if a product's norm is over this many times the round's median.
        evaluation: when to score what.
        seed: of the run.
        notify: called for every reply as it arrives.
    """

    method: Method
    transport: Transport
    clock: Clock
    compute_seconds: Callable[[Plan, Device], float]
    score: Callable[[Adapter], Score]
    per_round: int
    rounds: int
    norm_limit: float
    evaluation: Evaluation
    seed: int
    notify: Callable[[Update | Failure], None] = lambda reply: None


@dataclass(frozen=True, eq=False)
class Progress:
    """All that the next round depends on, and the record of the last one.

    Args:
        state: the method's state.
        fleet: devices by client, with the ranks they have now.
        seconds: the virtual clock.
        target_seconds: what it showed when the target accuracy was reached, if it was.
        record: the last round as a flat JSON object; empty before the first.
    """

    state: State
    fleet: Fleet
    seconds: float = 0.0
    target_seconds: float | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


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
    """The devices that take part in a round, in the fleet's order: a function of the seed and the round alone."""
    devices = list(fleet.values())
    rng = numpy_generator(seed, "sample", round)
    chosen = rng.choice(len(devices), size=min(per_round, len(devices)), replace=False)
    return [devices[i] for i in sorted(chosen)]


def reduce(method: Method, state: State, inbox: Inbox, weights: Sequence[float]) -> State:
    """One aggregation: the method's layers, the mean of the dense tensors, the server's step."""
    aggregated = method.aggregate(state, inbox, weights)
    dense = _mean_dense(state, inbox, weights)
    return method.step(state, aggregated.with_adapter(Adapter(aggregated.adapter.layers, dense)))


def _mean_dense(state: State, inbox: Inbox, weights: Sequence[float]) -> dict[str, Tensor]:
    mean = dict(state.adapter.dense)
    for name in mean:
        held = [
            (update.adapter.dense[name], weight)
            for (_, update), weight in zip(inbox, weights, strict=True)
            if update.adapter and name in update.adapter.dense
        ]
        if held:
            total = sum(weight for _, weight in held)
            mean[name] = torch.stack([tensor * (weight / total) for tensor, weight in held]).sum(dim=0)
    return mean


def _play(federation: Federation, progress: Progress) -> Progress:
    method, state = federation.method, progress.state
    round = state.round + 1
    sampled = sample(progress.fleet, per_round=federation.per_round, seed=federation.seed, round=round)
    tasks = [Task("train", round, plan, method.dispatch(state, plan)) for plan in method.assign(state, sampled)]
    arrivals = _arrivals(federation, progress.fleet, tasks)
    inbox, failures = _collect(federation, tasks, arrivals)
    if not inbox:
        reasons = "; ".join(f"{f.client} ({f.stage}: {f.reason})" for f in failures)
        raise RoundFailed(
            f"round {round}: none of {len(tasks)} clients returned a valid update: {reasons}. Resuming would play the same "
            "round again; start a new run with other settings (learning rate, deadline, dropout) or another seed."
        )

    asked = sum(progress.fleet[task.plan.client].num_examples for task in tasks)
    weights = [progress.fleet[update.client].num_examples / asked for _, update in inbox]
    state = replace(reduce(method, state, inbox, weights), round=round)
    fleet = {**progress.fleet, **_shrunk(progress.fleet, inbox)} if method.claims.prunes else progress.fleet
    seconds = progress.seconds + round_seconds(arrivals, federation.clock.deadline)
    scores = _evaluate(federation, state, [fleet[device.client] for device in sampled], fleet)
    target = federation.evaluation.target
    reached = progress.target_seconds
    if reached is None and target is not None and (scores["accuracy"] or 0.0) >= target:
        reached = seconds
    record = {
        "round": round,
        **scores,
        **_account(tasks, inbox, failures),
        "simulated_seconds": seconds,
        "target_seconds": reached,
        "energy": _energy(state),
    }
    return Progress(state, fleet, seconds, reached, record)


def _account(tasks: Sequence[Task], inbox: Inbox, failures: Sequence[Failure]) -> dict[str, Any]:
    """What was sent, trained and received in a round, for its record."""
    return {
        "train_loss": fmean(update.metrics["loss"] for _, update in inbox),
        "bytes_down": sum(nbytes(task.start) for task in tasks),
        "bytes_up": sum(nbytes(update.adapter) for _, update in inbox if update.adapter),
        "steps": sum(task.plan.steps for task, _ in inbox),
        "examples": int(sum(update.metrics.get("examples", 0.0) for _, update in inbox)),
        "planned_ranks": {task.plan.client: max(task.plan.ranks.values()) for task in tasks},
        "returned_ranks": {u.client: max(u.adapter.ranks.values()) for _, u in inbox if u.adapter},
        "rejected": [{"client": f.client, "stage": f.stage, "reason": f.reason} for f in failures],
    }


def _arrivals(federation: Federation, fleet: Fleet, tasks: Sequence[Task]) -> list[Arrival]:
    workloads = []
    for task in tasks:
        device, size = fleet[task.plan.client], nbytes(task.start)
        compute = federation.compute_seconds(task.plan, device)
        workloads.append(Workload(device.client, compute, size, size, device.profile))
    return federation.clock.arrivals(workloads, tasks[0].round) if tasks else []


def _collect(
    federation: Federation, tasks: Sequence[Task], arrivals: Sequence[Arrival]
) -> tuple[list[tuple[Task, Update]], list[Failure]]:
    """Run the tasks that arrive in time; return the valid updates in the order of the tasks, and who failed why."""
    by_client = {task.plan.client: task for task in tasks}
    replies: dict[str, Update | Failure] = {
        late.client: Failure(late.client, by_client[late.client].round, late.outcome, f"after {late.seconds:.3g} s")
        for late in arrivals
        if late.outcome != "in time"
    }
    expected = {client: task for client, task in by_client.items() if client not in replies}
    for reply in federation.transport.run(list(expected.values())):
        federation.notify(reply)
        if reply.client in expected:
            replies[reply.client] = _checked(federation.method, expected[reply.client], reply)
    for client in expected.keys() - replies.keys():
        replies[client] = Failure(client, tasks[0].round, "dropped", "sent no reply")
    updates = [reply for client in by_client if isinstance(reply := replies[client], Update)]
    for client, error in check_norms(updates, federation.norm_limit).items():
        replies[client] = _rejection(by_client[client], error)
    inbox: list[tuple[Task, Update]] = [
        (task, reply) for task in tasks if isinstance(reply := replies[task.plan.client], Update)
    ]
    return inbox, [reply for client in by_client if isinstance(reply := replies[client], Failure)]


def _checked(method: Method, task: Task, reply: Update | Failure) -> Update | Failure:
    if isinstance(reply, Failure):
        return reply
    try:
        check_update(task, reply, may_prune=method.claims.prunes)
    except UpdateRejected as error:
        return _rejection(task, error)
    return reply


def _rejection(task: Task, error: UpdateRejected) -> Failure:
    return Failure(error.client, task.round, "rejected", f"{error.tensor}: {error.reason}")


def _shrunk(fleet: Fleet, inbox: Inbox) -> dict[str, Device]:
    """A client that came back smaller than planned is planned at that size from now on."""
    return {
        update.client: replace(fleet[update.client], rank=max(update.adapter.ranks.values()))
        for _, update in inbox
        if update.adapter
    }


def _evaluate(federation: Federation, state: State, members: Sequence[Device], fleet: Fleet) -> dict[str, Any]:
    plan, method = federation.evaluation, federation.method
    last = state.round == federation.rounds
    if not last and state.round % plan.every:
        return {"accuracy": None, "loss": None, "class_accuracy": None, "federated": None}
    scores = [
        federation.score(adapter) for adapter in _judged(method, state, list(fleet.values()) if last else members)
    ]
    accuracy = fmean(score.accuracy for score in scores)
    if plan.stop_at_target and plan.target is not None and accuracy >= plan.target:
        last = True
    by_class = None
    if not method.claims.personal and (last or plan.classes == "always"):
        by_class = _class_accuracy(federation, state, list(fleet.values()), accuracy)
    plans = method.assign(state, list(fleet.values()) if last else members)
    tasks = [Task("evaluate", state.round, each, method.dispatch(state, each)) for each in plans]
    return {
        "accuracy": accuracy,
        "loss": fmean(score.loss for score in scores),
        "class_accuracy": by_class,
        "federated": _federated(federation, tasks),
    }


def _judged(method: Method, state: State, devices: Sequence[Device]) -> list[Adapter]:
    """What the server's test set is put to: the global adapter, or each of the clients' own."""
    if method.claims.personal:
        return [method.dispatch(state, plan) for plan in method.assign(state, devices)]
    return [state.adapter]


def _class_accuracy(federation: Federation, state: State, fleet: Sequence[Device], whole: float) -> dict[str, float]:
    """Accuracy of what clients of each rank are sent, by rank; at the full rank that is the whole adapter's."""
    one_of_each = {device.rank: device for device in sorted(fleet, key=lambda device: device.rank)}
    plans = {max(p.ranks.values()): p for p in federation.method.assign(state, list(one_of_each.values()))}
    return {
        str(rank): whole
        if plan.ranks == state.adapter.ranks
        else federation.score(federation.method.dispatch(state, plan)).accuracy
        for rank, plan in plans.items()
    }


def _federated(federation: Federation, tasks: Sequence[Task]) -> dict[str, float] | None:
    """The clients' own scores: the mean weighted by examples, and the spread over clients."""
    updates = [r for r in federation.transport.run(tasks) if isinstance(r, Update) and r.num_examples]
    if not updates:
        return None
    accuracy = [update.metrics["accuracy"] for update in updates]
    total = sum(update.num_examples for update in updates)
    return {
        "accuracy": sum(u.metrics["accuracy"] * u.num_examples for u in updates) / total,
        "std": pstdev(accuracy),
        "min": min(accuracy),
        "max": max(accuracy),
        "clients": len(updates),
    }


def _energy(state: State) -> dict[str, float]:
    """Share of the global product's squared singular values in the bands between consecutive class ranks."""
    levels = [level for level in state.spec.levels if level <= max(state.adapter.ranks.values())]
    bounds = list(zip([0, *levels[:-1]], levels, strict=True))
    bands = dict.fromkeys([f"{low + 1}-{high}" for low, high in bounds], 0.0)
    for part in state.adapter.layers.values():
        squares = lowrank.singular_values(part).double().square()
        for band, (low, high) in zip(bands, bounds, strict=True):
            bands[band] += float(squares[low:high].sum())
    total = sum(bands.values())
    return {band: energy / total for band, energy in bands.items()} if total > 0 else {}
