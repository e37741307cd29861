"""What one device does: train an adapter on its own examples, or score one."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from anyrank.adapter import NOTHING, Adapter, LowRank
from anyrank.federation import Local, Method, Task
from anyrank.hf import BLOCK, ENTERING, AdaptedModel, entering
from anyrank.problem import CLASSIFICATION, Answers, Batch, Examples, Metric, Objective

__all__ = [
    "Score",
    "Training",
    "after_backward",
    "batches",
    "collated",
    "evaluate",
    "examples_in",
    "pieces",
    "train",
]


@dataclass(frozen=True)
class Training:
    """How every client trains.

    Args:
        local: the way of training: the method's, where it brings one, or the recipe's.
        learning_rate: of the optimizer.
        weight_decay: of the optimizer.
        batch_size: examples a step.
        max_grad_norm: gradients of a step are shrunk to this norm, all of a client's together; None leaves them as they are.
        group_by_length: put examples of about the same length into a batch; they need a `length`.
        collate: examples to a batch of tensors, padded to the longest of them; `labels` among them.
        objective: the loss, and the metrics.
        micro_batch: examples in one pass; a step has several where its batch is larger. None passes it whole.
    """

    local: Local
    learning_rate: float
    weight_decay: float
    batch_size: int
    collate: Callable[[list[Any]], Batch]
    objective: Objective = CLASSIFICATION
    max_grad_norm: float | None = None
    group_by_length: bool = False
    micro_batch: int | None = None


@dataclass(frozen=True)
class Score:
    """How well an adapter does.

    Args:
        loss: mean over targets.
        metrics: by name.
        num_examples: how many there were.
    """

    loss: float
    metrics: Mapping[str, float]
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
        rng: draws the order of the examples, what is dropped, and whatever the way of training draws.

    Returns:
        the trained adapter; the mean loss over the steps (without penalties), the examples in them, and the sums of what was
        observed.
    """
    local, objective, plan = method.local or training.local, training.objective, task.plan
    inner = local.enter(start).map(lambda tensor: tensor.to(model.device))
    live = _live(model, local, task, inner)
    optimizer = local.optimizer(live, training.learning_rate, training.weight_decay)
    total, seen, observed = 0.0, 0, Counter[str]()
    for step, examples in enumerate(batches(data, plan.steps, training, rng)):
        if local.form:
            model.form(local.form(live, rng).layers)
        optimizer.zero_grad()
        parts = [collated(part, training) for part in pieces(examples, training.micro_batch)]
        count = sum(int(objective.targets(part).sum()) for part in parts)
        for number, batch in enumerate(parts):
            loss = objective.loss(model.logits(batch, rngs=[rng]), batch).sum() / count
            total += loss.item()
            if number == 0 and method.penalty:
                loss = loss + method.penalty(live, inner)
            if local.mixture and local.mixture.penalty:
                share = len(batch["labels"]) / len(examples)
                loss = loss + share * local.mixture.penalty(model.mean_gates(batch.get("attention_mask")))
            loss.backward(retain_graph=number < len(parts) - 1)  # they share what factors were formed from
        seen += len(examples)
        if not math.isfinite(total):
            break  # training has diverged: whoever gets this rejects it by its loss
        if method.observe:
            observed.update(method.observe(live))
        after_backward(live, optimizer, step, local=local, max_grad_norm=training.max_grad_norm)
    trained = live.map(lambda tensor: tensor.detach().to("cpu", copy=True))
    return local.leave(trained), {"loss": total / max(plan.steps, 1), "examples": float(seen), **observed}


def after_backward(
    live: Adapter, optimizer: Optimizer, step: int, *, local: Local, max_grad_norm: float | None
) -> None:
    """The rest of a local step: hooks, clipping, the optimizer."""
    if local.on_grad:
        local.on_grad(live, step)
    if max_grad_norm:
        nn.utils.clip_grad_norm_(live.tensors().values(), max_grad_norm)
    optimizer.step()
    if local.on_step:
        with torch.no_grad():
            local.on_step(live, optimizer, step)


def pieces(examples: Sequence[Any], size: int | None) -> list[Sequence[Any]]:
    """The examples of a step, in as many passes as it takes."""
    return [examples[first : first + size] for first in range(0, len(examples), size)] if size else [examples]


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


def batches(data: Examples, steps: int, training: Training, rng: torch.Generator) -> Iterator[list[Any]]:
    """The examples of each local step: epoch after epoch in a new order, the last batch of an epoch maybe smaller."""
    size = training.batch_size
    lengths = [data[i]["length"] for i in range(len(data))] if training.group_by_length and steps else []
    done = 0
    while done < steps:
        order = torch.randperm(len(data), generator=rng).tolist()
        if lengths:
            order.sort(key=lengths.__getitem__)
        parts = [order[first : first + size] for first in range(0, len(order), size)]
        if lengths:
            parts = [parts[i] for i in torch.randperm(len(parts), generator=rng).tolist()]
        for part in parts[: steps - done]:
            yield [data[i] for i in part]
        done += len(parts)


def collated(examples: Sequence[Any], training: Training) -> Batch:
    """Examples to a batch, with the hidden states that enter a block where all of them bring some along."""
    states = [example[ENTERING] for example in examples if isinstance(example, Mapping) and ENTERING in example]
    if not states:
        return training.collate(list(examples))
    batch = training.collate([{k: v for k, v in example.items() if k not in (ENTERING, BLOCK)} for example in examples])
    whole = len(states) == len(examples)
    return {**batch, **entering(states, examples[0][BLOCK], batch["attention_mask"])} if whole else batch


def evaluate(
    model: AdaptedModel,
    adapter: Adapter,
    data: Examples,
    *,
    training: Training,
    frozen: Adapter = NOTHING,
    scale: float = 1.0,
    metrics: Sequence[Metric] | None = None,
) -> Score:
    """Score an adapter on examples; in order of length they are padded least.

    Args:
        model: the shared base model; its adapter is replaced.
        adapter: what is scored.
        data: at least one example.
        training: batch size, loss, metrics.
        frozen: what is applied besides.
        scale: a factor on the run's scale, for `adapter` alone.
        metrics: by which; None takes all.

    Raises:
        ConfigError: a metric is no number.
    """
    spread = training.local.spread
    model.load(spread(adapter), frozen=spread(frozen), scale=scale)
    objective = training.objective
    size = 4 * (training.micro_batch or training.batch_size)  # no gradients are kept, so larger batches fit
    loss, targets, answers = 0.0, 0, list[tuple[np.ndarray, np.ndarray]]()
    for first in range(0, len(data), size):
        batch = training.collate([data[i] for i in range(first, min(first + size, len(data)))])
        with torch.inference_mode():
            logits = model.logits(batch)
            loss += objective.loss(logits, batch).sum().item()
            predictions, labels = objective.predict(logits, batch)
        targets += int(objective.targets(batch).sum())
        answers.append((predictions.cpu().numpy(), labels.cpu().numpy()))
    predictions, labels = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    reached = Answers(predictions, labels, loss / targets)
    return Score(
        reached.loss, {metric.name: metric.value(reached) for metric in metrics or objective.metrics}, len(data)
    )
