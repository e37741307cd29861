"""Simulation in this process: one base model in memory, adapters swapped in and out, or many at once."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Subset

from anyrank.adapter import Adapter
from anyrank.client import Assignment, Reply, work, work_together
from anyrank.data import held_out
from anyrank.federation import Failure, Method, Task, Update
from anyrank.fused import alike, why_apart
from anyrank.hf import AdaptedModel
from anyrank.memory import Memory
from anyrank.prefix import Prefix
from anyrank.problem import Examples
from anyrank.train import Training

__all__ = ["InProcess"]


@dataclass(frozen=True, eq=False)
class InProcess:
    """A transport whose clients are slices of one data set.

    Args:
        model: the base model that all clients share.
        method: the client's part of it acts here.
        training: how clients train.
        data: all clients' examples.
        shards: positions in `data` by client; memory beyond these does not grow with the number of clients.
        test: the server's test set, on which clients' own models can be scored in simulation.
        held_out: share of each shard that is kept for evaluation.
        seed: of the run.
        memory: what clients keep between rounds.
        cohort: how many clients train in one pass, where they can; 1 trains one after another.
        prefix: what is kept of passes through blocks that nobody trains, if anything.
    """

    model: AdaptedModel
    method: Method
    training: Training
    data: Examples
    shards: Mapping[str, np.ndarray]
    test: Examples
    held_out: float
    seed: int
    memory: Memory
    cohort: int = 1
    prefix: Prefix | None = None

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        """Carry out the tasks; replies come in any order."""
        for some in self._groups(tasks):
            for task, (update, keeps) in self._carry_out(some):
                if keeps:
                    self.memory.write(task.plan.client, (task.round, task.phase), keeps)
                yield update

    def shares(self, tasks: Sequence[Task], count: int) -> list[list[Task]]:
        """The tasks cut up for several processes, the largest part first. The same tasks give the same shares.

        Those that share passes become `count` parts that take about as long. The others give the same wherever they are done,
        and become smaller parts, for whoever is free.
        """
        groups = self._groups(tasks)
        single = [task for some in groups if len(some) == 1 for task in some]
        parts = _dealt(single, self._cost, 8 * count)
        for some in groups:
            if len(some) > 1:
                parts += _dealt(some, self._cost, count)
        return sorted(parts, key=lambda part: -sum(map(self._cost, part)))

    def kept(self, task: Task) -> Adapter | None:
        """What a task's client has kept for it, if anything."""
        if not self.method.keep:
            return None
        before = (task.round, task.phase) if task.kind == "train" else (task.round + 1, 0)
        return self.memory.read(task.plan.client, before=before)

    def _cost(self, task: Task) -> int:
        """Examples that a task goes through, about."""
        size = len(self.shards[task.plan.client])
        return 1 + task.plan.steps * min(self.training.batch_size, size) if task.kind == "train" else 1

    def _groups(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Tasks that share passes: larger batches first, and more steps, so that they meet their like."""
        local = self.method.local or self.training.local
        apart = self.cohort == 1 or bool(why_apart(self.model, local))
        groups: dict[Hashable, list[Task]] = {}
        for task in tasks:
            alone = apart or task.kind != "train" or not task.plan.steps
            groups.setdefault(id(task) if alone else (alike(task), self._begins(task)), []).append(task)
        size = self.training.batch_size
        for some in groups.values():
            some.sort(key=lambda task: (-min(size, len(self.shards[task.plan.client])), -task.plan.steps))
        return list(groups.values())

    def _carry_out(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Reply]]:
        if len(tasks) == 1:
            yield tasks[0], work(self.model, self.method, self._asked(tasks[0]), training=self.training, seed=self.seed)
            return
        by_client = {task.plan.client: task for task in tasks}
        asked = [self._asked(task) for task in tasks]
        for reply in work_together(
            self.model, self.method, asked, training=self.training, seed=self.seed, room=self.cohort
        ):
            yield by_client[reply[0].client], reply

    def _begins(self, task: Task) -> int:
        """The block at which a client's passes begin."""
        return self.prefix.block(task, num_examples=len(self._parts(task.plan.client)[0])) if self.prefix else 0

    def _parts(self, client: str) -> tuple[np.ndarray, np.ndarray]:
        return held_out(self.shards[client], share=self.held_out, seed=self.seed, client=client)

    def _asked(self, task: Task) -> Assignment:
        client = task.plan.client
        train, evaluate = (Subset(self.data, part.tolist()) for part in self._parts(client))  # pyright: ignore[reportArgumentType]
        if self.prefix:
            train = self.prefix.examples(task, train)
        return Assignment(task, {"train": train, "evaluate": evaluate, "test": self.test}, self.kept(task))


def _dealt(tasks: Sequence[Task], cost: Callable[[Task], int], count: int) -> list[list[Task]]:
    """Each task to whoever has least to do so far, the dearest first."""
    hands: list[list[Task]] = [[] for _ in range(min(count, len(tasks)))]
    load = [0] * len(hands)
    for task in sorted(tasks, key=lambda task: -cost(task)):
        least = load.index(min(load))
        hands[least].append(task)
        load[least] += cost(task)
    return hands
