"""Simulation in this process: one base model in memory, one client after another, adapters swapped in and out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Subset

from anyrank.data import held_out
from anyrank.federation import Failure, Method, Task, Update
from anyrank.hf import AdaptedModel
from anyrank.train import Examples, Training, work

__all__ = ["InProcess"]


@dataclass(frozen=True, eq=False)
class InProcess:
    """A transport whose clients are slices of one data set.

    Args:
        model: the base model that all clients share.
        method: gives the client its penalty and its last step.
        training: how clients train.
        data: all clients' examples.
        shards: positions in `data` by client; memory beyond these does not grow with the number of clients.
        held_out: share of each shard that is kept for evaluation.
        seed: of the run.
    """

    model: AdaptedModel
    method: Method
    training: Training
    data: Examples
    shards: Mapping[str, np.ndarray]
    held_out: float
    seed: int

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        """Carry out the tasks in order."""
        for task in tasks:
            parts = held_out(
                self.shards[task.plan.client], share=self.held_out, seed=self.seed, client=task.plan.client
            )
            data = [Subset(self.data, part.tolist()) for part in parts]  # pyright: ignore[reportArgumentType]
            yield work(self.model, self.method, task, data, training=self.training, seed=self.seed)
