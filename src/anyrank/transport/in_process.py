"""Simulation in this process: one base model in memory, one client after another, adapters swapped in and out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Subset

from anyrank.data import held_out
from anyrank.federation import Failure, Method, Task, Update
from anyrank.hf import AdaptedModel
from anyrank.memory import Memory
from anyrank.train import Examples, Training, work

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

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        """Carry out the tasks in order."""
        for task in tasks:
            client = task.plan.client
            parts = held_out(self.shards[client], share=self.held_out, seed=self.seed, client=client)
            train, evaluate = (Subset(self.data, part.tolist()) for part in parts)  # pyright: ignore[reportArgumentType]
            data: dict[str, Examples] = {"train": train, "evaluate": evaluate, "test": self.test}
            kept = None
            if self.method.keep:
                kept = self.memory.read(
                    client, before=(task.round, task.phase) if task.kind == "train" else (task.round + 1, 0)
                )
            try:
                update, keeps = work(
                    self.model, self.method, task, data, training=self.training, seed=self.seed, kept=kept
                )
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                # Numbers that no decomposition takes: training has diverged.
                yield Failure(client, task.round, "rejected", f"training: {error}")
                continue
            if keeps and all(bool(tensor.isfinite().all()) for tensor in keeps.tensors().values()):
                self.memory.write(client, (task.round, task.phase), keeps)
            yield update
