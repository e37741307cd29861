"""What a device does: train an adapter on its own examples, or score one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from anyrank.adapter import Adapter
from anyrank.federation import Local, Method, Task, Update
from anyrank.hf import AdaptedModel
from anyrank.seeding import generator

__all__ = ["Examples", "Score", "Training", "evaluate", "examples_in", "train", "work"]

Batch = Mapping[str, Tensor]


@runtime_checkable
class Examples(Protocol):
    """A map-style data set: anything with a length and items by position."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One example, as the collate function takes it."""
        ...


@dataclass(frozen=True)
class Training:
    """How every client trains.

    Args:
        local: the way of training, unless the method brings one.
        learning_rate: of the optimizer.
        weight_decay: of the optimizer.
        batch_size: examples a step.
        collate: examples to a batch of tensors, padded to the longest of them; `labels` among them.
    """

    local: Local
    learning_rate: float
    weight_decay: float
    batch_size: int
    collate: Callable[[list[Any]], Batch]


@dataclass(frozen=True)
class Score:
    """Means over examples.

    Args:
        loss: mean loss.
        accuracy: share of examples whose label got the largest logit.
        num_examples: how many there were.
    """

    loss: float
    accuracy: float
    num_examples: int


def examples_in(steps: int, *, num_examples: int, batch_size: int) -> int:
    """How many examples `steps` local steps go through; the last batch of an epoch may be smaller."""
    epoch = math.ceil(num_examples / batch_size)
    return steps // epoch * num_examples + steps % epoch * batch_size


def train(
    model: AdaptedModel,
    start: Adapter,
    data: Examples,
    *,
    steps: int,
    training: Training,
    penalty: Callable[[Adapter, Adapter], Tensor] | None,
    local: Local,
    rng: torch.Generator,
) -> tuple[Adapter, float]:
    """Local training with a fresh optimizer.

    Args:
        model: the shared base model; its adapter is replaced.
        start: where to start from.
        data: the client's examples; at least one.
        steps: optimizer steps.
        training: learning rate, batch size and the like.
        penalty: the method's addition to the loss.
        local: the optimizer, and what happens around its steps.
        rng: draws the order of the examples.

    Returns:
        the trained adapter, and the mean loss over the steps (without the penalty).
    """
    live = model.load(start)
    optimizer = local.optimizer(list(live.tensors().values()), training.learning_rate, training.weight_decay)
    total = 0.0
    for batch in _batches(data, steps, training, rng):
        loss = model.model(**batch).loss
        objective = loss if penalty is None else loss + penalty(live, start)
        optimizer.zero_grad()
        objective.backward()
        local.on_grad(live)
        optimizer.step()
        with torch.no_grad():
            local.on_step(live)
        total += loss.item()
    return live.map(lambda tensor: tensor.detach().clone()), total / steps


def _batches(data: Examples, steps: int, training: Training, rng: torch.Generator) -> Iterator[Batch]:
    done = 0
    while done < steps:
        order = torch.randperm(len(data), generator=rng).tolist()
        for first in range(0, len(order), training.batch_size):
            if done == steps:
                return
            yield training.collate([data[i] for i in order[first : first + training.batch_size]])
            done += 1


def evaluate(model: AdaptedModel, adapter: Adapter, data: Examples, *, training: Training) -> Score:
    """Score an adapter on examples; in order of length they are padded least."""
    model.load(adapter)
    size = 4 * training.batch_size  # no gradients are kept, so larger batches fit
    loss, correct = 0.0, 0
    for first in range(0, len(data), size):
        batch = training.collate([data[i] for i in range(first, min(first + size, len(data)))])
        with torch.inference_mode():
            output, labels = model.model(**batch), batch["labels"]
        loss += output.loss.item() * len(labels)
        correct += int((output.logits.argmax(-1) == labels).sum())
    return Score(loss / len(data), correct / len(data), len(data))


def work(
    model: AdaptedModel,
    method: Method,
    task: Task,
    data: Sequence[Examples],
    *,
    training: Training,
    seed: int,
) -> Update:
    """The client's half of a round, the same on every transport.

    Args:
        model: the base model.
        method: its `penalty`, `local` and `leave` act here.
        task: what is asked.
        data: the client's training examples, and those it holds out for evaluation.
        training: how to train.
        seed: of the run.
    """
    client = task.plan.client
    if task.kind == "evaluate":
        if not len(data[1]):
            return Update(client, task.round, None, 0, {})
        score = evaluate(model, task.start, data[1], training=training)
        metrics = {"loss": score.loss, "accuracy": score.accuracy}
        return Update(client, task.round, None, score.num_examples, metrics)
    adapter, loss = train(
        model,
        task.start,
        data[0],
        steps=task.plan.steps,
        training=training,
        penalty=method.penalty,
        local=method.local or training.local,
        rng=generator(seed, "batches", task.round, client),
    )
    seen = examples_in(task.plan.steps, num_examples=len(data[0]), batch_size=training.batch_size)
    metrics = {"loss": loss, "examples": float(seen)}
    return Update(client, task.round, method.leave(adapter, task.start), len(data[0]), metrics)
