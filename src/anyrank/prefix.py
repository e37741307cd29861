"""Hidden states that enter the lowest adapted block, computed once for every example and kept.

Below the lowest block in which a client applies anything, trained or not, a pass computes the same for an example at every
step and in every round. So it is computed once, and later passes begin at that block. This serves clients whose lower blocks
carry no adapter: `lora.target_modules` that name layers of upper blocks only, and methods that give clients a depth and apply
nothing below it (`legend` with `send_frozen = false`). It does not serve methods that apply the global adapter there, since
that one changes with every round.

What is kept is a function of the client's own examples: all of them pass, in order of length, before the client trains. And
whether it is kept is a function of its task, as long as the disk has room for what memory has not. So the same recipe gives
the same bytes, whoever trains the client, with whom, and wherever a run was resumed.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyrank.federation import Layer, Method, Task
from anyrank.hf import BLOCK, ENTERING, AdaptedModel, Stem
from anyrank.problem import Examples
from anyrank.train import Training

__all__ = ["Prefix", "Store", "possible"]

_SOON = 10  # rounds; a run is not asked for how many it has, since it may be extended


def possible(method: Method, layers: Sequence[Layer]) -> bool:
    """Whether clients can have first blocks in which they apply nothing.

    Args:
        method: who trains what.
        layers: of the run's adapters.
    """
    lowest = min((layer.block for layer in layers), default=0)
    return lowest > 0 or (method.claims.mixed_depths and not method.frozen)


class _Place(NamedTuple):
    """Where a client's states are: from which byte of the file (or else of the memory) on, how many tokens."""

    number: int
    tokens: int
    on_disk: bool
    start: int


class Store:
    """Room for hidden states of clients, shared by this process and those that are forked from it afterwards.

    Nothing is left of it when the last of them ends: its file has no name.

    Args:
        tokens: of all examples of each client.
        stem: what hidden states look like.
        in_memory: bytes; clients beyond that are in a file, which is mapped into memory.
        folder: where the file is. It takes at most half of what is free there; clients beyond that have no room.
    """

    def __init__(self, tokens: Mapping[str, int], stem: Stem, *, in_memory: int, folder: Path):
        """Give everyone a place; memory and disk are taken only as it is filled."""
        limits, used = (in_memory, shutil.disk_usage(folder).free // 2), [0, 0]
        self._stem, self._places = stem, dict[str, _Place]()
        for number, (client, count) in enumerate(tokens.items()):
            size = count * stem.width * stem.dtype.itemsize
            part = next((part for part in (0, 1) if 0 < size <= limits[part] - used[part]), None)
            if part is not None:
                self._places[client] = _Place(number, count, bool(part), used[part])
                used[part] += size
        self._memory = mmap.mmap(-1, max(1, used[0]))
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the store
        weakref.finalize(self, self._file.close)
        self._file.truncate(max(1, used[1]))
        self._disk = mmap.mmap(self._file.fileno(), 0)
        self._blocks = np.frombuffer(mmap.mmap(-1, 2 * len(tokens) or 1), dtype=np.int16)

    def __contains__(self, client: object) -> bool:
        """Whether there is room for a client."""
        return client in self._places

    def states(self, client: str, block: int, *, fill: Callable[[Tensor], object]) -> Tensor | None:
        """A client's states `[tokens, width]`, kept from before or filled in now; None if there is no disk left for them.

        Args:
            client: there is room for it.
            block: that the states enter; of each client those of one block are kept.
            fill: writes them.
        """
        place, width, dtype = self._places[client], self._stem.width, self._stem.dtype
        memory, count = self._disk if place.on_disk else self._memory, place.tokens * width
        states = torch.frombuffer(memory, dtype=dtype, count=count, offset=place.start).view(-1, width)
        if self._blocks[place.number] == block:
            return states
        self._blocks[place.number] = 0
        if place.on_disk and not self._reserved(place.start, states.nbytes):
            return None
        fill(states)
        self._blocks[place.number] = block
        return states

    def _reserved(self, start: int, size: int) -> bool:
        """Take disk before memory that stands for it is written to: where there is none, that would kill the process."""
        reserve = getattr(os, "posix_fallocate", None)  # macOS has none
        try:
            return reserve is None or reserve(self._file.fileno(), start, size) is None
        except OSError:
            return False


@dataclass(frozen=True, eq=False)
class Prefix:
    """Has clients begin their passes at the lowest block in which they apply anything.

    Args:
        model: the base model.
        training: how clients train.
        lengths: of all examples, in tokens.
        blocks: the lowest block of each layer of the run.
        stem: what of the model can be left out.
        store: where hidden states are kept.
        share: of the clients that take part in a round.
    """

    model: AdaptedModel
    training: Training
    lengths: np.ndarray
    blocks: Mapping[str, int]
    stem: Stem
    store: Store
    share: float

    @classmethod
    def of(
        cls,
        model: AdaptedModel,
        training: Training,
        *,
        layers: Sequence[Layer],
        data: Examples,
        lengths: np.ndarray,
        shards: Mapping[str, np.ndarray],
        per_round: int,
        in_memory: int,
        folder: Path,
    ) -> "Prefix | None":
        """None if passes of this model cannot begin at a block; its adapter is replaced.

        Args:
            model: the base model.
            training: how clients train.
            layers: of the run's adapters.
            data: all clients' examples.
            lengths: of these, in tokens.
            shards: positions in `data` by client.
            per_round: how many clients take part in a round.
            in_memory: bytes that may be kept in memory.
            folder: where the rest is kept.
        """
        order = np.argsort(lengths, kind="stable")
        longer = order[lengths[order] > lengths[order[0]]]  # the two shortest, of different lengths if there are any
        tried = [int(order[0]), int(longer[0] if len(longer) else order[-1])]
        stem = model.stem(training.collate([data[i] for i in tried]))
        if not stem.blocks:
            return None
        tokens = {client: int(lengths[rows].sum()) for client, rows in shards.items()}
        store = Store(tokens, stem, in_memory=in_memory, folder=folder)
        blocks = {layer.name: layer.block for layer in layers}
        return cls(model, training, lengths, blocks, stem, store, per_round / len(shards))

    def block(self, task: Task, *, num_examples: int) -> int:
        """The block at which a client's passes begin; 0 if at the input.

        Filling costs as much as one use of each example saves. So a round has to use each once at least, and twice are due
        in this round or soon.

        Args:
            task: what is asked of it.
            num_examples: that it trains on.
        """
        uses = task.plan.steps * self.training.batch_size / max(1, num_examples)
        pays = uses >= 1 and uses * max(1, _SOON * self.share) >= 2
        if task.kind != "train" or not pays or task.plan.client not in self.store:
            return 0
        applied = [task.start, task.frozen, *(fold.adapter for fold in task.folds)]
        lowest = min((self.blocks[name] for adapter in applied for name in adapter.layers), default=self.stem.blocks)
        return min(lowest, self.stem.blocks)

    def examples(self, task: Task, data: Any) -> Examples:
        """A client's examples, with the hidden states that enter its lowest block where they are kept.

        Args:
            task: what is asked of it.
            data: the `Subset` of all examples that it trains on.
        """
        block = self.block(task, num_examples=len(data))
        if not block:
            return data
        ends = np.cumsum(self.lengths[data.indices])
        fill = partial(self._fill, data, block, ends)
        states = self.store.states(task.plan.client, block, fill=fill)
        return data if states is None else _Begun(data, block, states, ends)

    def _fill(self, data: Any, block: int, ends: np.ndarray, states: Tensor) -> None:
        order = np.argsort(self.lengths[data.indices], kind="stable").tolist()
        size = self.training.batch_size  # in order of length these pad less than any step, so filling is no dearer
        for some in (order[first : first + size] for first in range(0, len(order), size)):
            batch = self.training.collate([data[i] for i in some])
            hidden, mask = self.model.entering(batch, block).cpu(), batch["attention_mask"].bool()
            for i, mine, own in zip(some, hidden, mask, strict=True):
                _rows(states, ends, i).copy_(mine[own])


def _rows(states: Tensor, ends: np.ndarray, i: int) -> Tensor:
    return states[ends[i - 1] if i else 0 : ends[i]]


@dataclass(frozen=True, eq=False)
class _Begun:
    """Examples with the hidden states that enter a block."""

    data: Examples
    block: int
    states: Tensor
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return {**self.data[i], ENTERING: _rows(self.states, self.ends, i), BLOCK: self.block}
