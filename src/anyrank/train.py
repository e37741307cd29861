"""What a device does: train an adapter on its own examples, or score one."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from anyrank.adapter import NOTHING, Adapter, LowRank
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
        local: the way of training: the method's, where it brings one, or the recipe's.
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
    task: Task,
    start: Adapter,
    data: Examples,
    *,
    training: Training,
    method: Method,
    rng: torch.Generator,
) -> tuple[Adapter, dict[str, float]]:
    """Local training with a fresh optimizer.

    Args:
        model: the shared base model; its adapter is replaced.
        task: says how many steps, which factors, and what is frozen beside them.
        start: where to start from.
        data: the client's examples; at least one.
        training: learning rate, batch size and the like.
        method: its penalty, its observations, its way of training if it has one.
        rng: draws the order of the examples, and whatever the way of training draws.

    Returns:
        the trained adapter; the mean loss over the steps (without penalties) and the sums of what was observed.
    """
    local, plan = method.local or training.local, task.plan
    inner = local.enter(start)
    live = _live(model, local, task, inner)
    optimizer = local.optimizer(live, training.learning_rate, training.weight_decay)
    total, observed = 0.0, Counter[str]()
    for step, batch in enumerate(_batches(data, plan.steps, training, rng)):
        if local.form:
            model.form(local.form(live, rng).layers)
        loss = model.model(**batch).loss
        total += loss.item()
        if not math.isfinite(total):
            break  # training has diverged: whoever gets this rejects it by its loss
        objective = loss if method.penalty is None else loss + method.penalty(live, inner)
        if local.mixture and local.mixture.penalty:
            objective = objective + local.mixture.penalty(model.mean_gates(batch.get("attention_mask")))
        optimizer.zero_grad()
        objective.backward()
        if method.observe:
            observed.update(method.observe(live))
        local.on_grad(live, step)
        optimizer.step()
        with torch.no_grad():
            local.on_step(live, optimizer, step)
    trained = live.map(lambda tensor: tensor.detach().clone())
    return local.leave(trained), {"loss": total / plan.steps, **observed}


def _live(model: AdaptedModel, local: Local, task: Task, inner: Adapter) -> Adapter:
    """The tensors that the optimizer moves: the model's own, or leaves from which its factors are formed."""
    frozen, plan = local.spread(task.applied), task.plan
    if local.form is None:
        return model.load(inner, frozen=frozen, scale=plan.scale, train=plan.train)
    formed = local.form(inner, torch.Generator())
    own = model.load(formed, frozen=frozen, scale=plan.scale).dense
    layers = {
        name: LowRank(
            part.A.clone().requires_grad_("A" in plan.train), part.B.clone().requires_grad_("B" in plan.train)
        )
        for name, part in inner.layers.items()
    }
    further = {name: t.clone().requires_grad_() for name, t in inner.dense.items() if name not in own}
    return Adapter(layers, {**own, **further})


def _batches(data: Examples, steps: int, training: Training, rng: torch.Generator) -> Iterator[Batch]:
    done = 0
    while done < steps:
        order = torch.randperm(len(data), generator=rng).tolist()
        for first in range(0, len(order), training.batch_size):
            if done == steps:
                return
            yield training.collate([data[i] for i in order[first : first + training.batch_size]])
            done += 1


def evaluate(
    model: AdaptedModel,
    adapter: Adapter,
    data: Examples,
    *,
    training: Training,
    frozen: Adapter = NOTHING,
    scale: float = 1.0,
) -> Score:
    """Score an adapter on examples; in order of length they are padded least."""
    spread = training.local.spread
    model.load(spread(adapter), frozen=spread(frozen), scale=scale)
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
    data: Mapping[str, Examples],
    *,
    training: Training,
    seed: int,
    kept: Adapter | None = None,
) -> tuple[Update, Adapter | None]:
    """The client's half of a round, the same on every transport.

    Args:
        model: the base model.
        method: its `enter`, `penalty`, `observe`, `local`, `leave` and `keep` act here.
        task: what is asked.
        data: the client's examples by the kind of task that uses them.
        training: how to train.
        seed: of the run.
        kept: what the client kept from its last round.

    Returns:
        the reply, and what the client keeps from this round, if anything.
    """
    client, examples = task.plan.client, data[task.kind]
    start = method.enter(task.start, kept) if method.enter else task.start
    if task.kind != "train":
        if not len(examples):
            return Update(client, task.round, None, 0, {}), None
        score = evaluate(model, start, examples, training=training, frozen=task.applied, scale=task.plan.scale)
        metrics = {"loss": score.loss, "accuracy": score.accuracy}
        return Update(client, task.round, None, score.num_examples, metrics), None
    # The key of a client's only task in a round does not name the phase.
    rng = generator(seed, "batches", task.round, client, *[task.phase] * bool(task.phase))
    adapter, metrics = train(model, task, start, examples, training=training, method=method, rng=rng)
    seen = examples_in(task.plan.steps, num_examples=len(examples), batch_size=training.batch_size)
    update = Update(
        client, task.round, method.leave(adapter, start), len(examples), {**metrics, "examples": float(seen)}
    )
    return update, method.keep(adapter) if method.keep else None
