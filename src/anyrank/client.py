"""The client's half of a round, the same on every transport: enter, train or score, leave, keep."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from anyrank import fused
from anyrank.adapter import Adapter
from anyrank.federation import Failure, Method, Task, Update
from anyrank.hf import AdaptedModel
from anyrank.problem import Examples
from anyrank.seeding import generator
from anyrank.train import Training, evaluate, train

__all__ = ["Assignment", "Reply", "work", "work_together"]


@dataclass(frozen=True, eq=False)
class Assignment:
    """A task and what its client has at hand.

    Args:
        task: what is asked.
        data: the client's examples by the kind of task that uses them.
        kept: what the client kept from its last round.
    """

    task: Task
    data: Mapping[str, Examples]
    kept: Adapter | None = None


Reply = tuple[Update | Failure, Adapter | None]


def work(model: AdaptedModel, method: Method, asked: Assignment, *, training: Training, seed: int) -> Reply:
    """Carry out a task.

    Args:
        model: the base model.
        method: its `enter`, `penalty`, `observe`, `local`, `leave` and `keep` act here.
        asked: what is asked of whom.
        training: how to train.
        seed: of the run.

    Returns:
        the reply, and what the client keeps from this round, if anything.
    """
    task, examples = asked.task, asked.data[asked.task.kind]
    start = _start(method, asked)
    if task.kind != "train":
        if not len(examples):
            return Update(task.plan.client, task.round, None, 0, {}), None
        # Of a client on its own data only the first is looked at, and some take longer to work out than the answers.
        metrics = training.objective.metrics if task.kind == "test" else [training.objective.metric]
        score = evaluate(
            model, start, examples, training=training, frozen=task.applied, scale=task.plan.scale, metrics=metrics
        )
        metrics = {"loss": score.loss, **score.metrics}
        return Update(task.plan.client, task.round, None, score.num_examples, metrics), None
    rng = _order(task, seed)
    try:
        adapter, metrics = train(model, task, start, examples, training=training, method=method, rng=rng)
        return _reply(method, task, start, adapter, metrics, len(examples))
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        return _failure(task, error)


def work_together(
    model: AdaptedModel, method: Method, asked: Sequence[Assignment], *, training: Training, seed: int, room: int
) -> Iterator[Reply]:
    """Carry out training tasks that are `fused.alike`, up to `room` of them in one pass; otherwise as `work`."""
    clients = [
        fused.Client(each.task, _start(method, each), each.data["train"], _order(each.task, seed)) for each in asked
    ]
    for client, adapter in fused.train_together(model, clients, room=room, training=training, method=method):
        try:
            if client.error:
                raise client.error
            yield _reply(method, client.task, client.start, adapter, client.metrics, len(client.data))
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            yield _failure(client.task, error)


def _start(method: Method, asked: Assignment) -> Adapter:
    return method.enter(asked.task.start, asked.kept) if method.enter else asked.task.start


def _order(task: Task, seed: int) -> torch.Generator:
    """What draws the order of a client's examples; the key of its only task in a round does not name the phase."""
    return generator(seed, "batches", task.round, task.plan.client, *[task.phase] * bool(task.phase))


def _reply(
    method: Method, task: Task, start: Adapter, adapter: Adapter, metrics: Mapping[str, float], num_examples: int
) -> Reply:
    update = Update(task.plan.client, task.round, method.leave(adapter, start), num_examples, metrics)
    kept = method.keep(adapter) if method.keep else None
    finite = kept and all(bool(tensor.isfinite().all()) for tensor in kept.tensors().values())
    return update, kept if finite else None


def _failure(task: Task, error: Exception) -> Reply:
    """Numbers that no decomposition takes: training has diverged."""
    return Failure(task.plan.client, task.round, "rejected", f"training: {error}"), None
