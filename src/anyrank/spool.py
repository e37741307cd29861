"""Updates that wait on disk until the server reads them, one factor at a time.

What many clients return in a round can be far more than a reducer needs at once. Up to a limit it stays in memory; what
comes after goes into a file, and is an adapter like any other, but for its tensors: they are read each time they are asked
for, and not kept.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from anyrank.adapter import Adapter, LowRank

__all__ = ["IN_MEMORY", "Spool", "in_memory"]

IN_MEMORY = 256 * 2**20
"""Bytes of a round's updates that stay in memory: half of what the process takes before it has a model."""


class Spool:
    """The updates of one round, for a `with` statement: at its end, whatever ends it, what is on disk is gone.

    The file has no name, so that a process that is killed leaves nothing behind.

    Args:
        folder: on the disk to use; None takes the system's folder for temporary files, which may itself be in memory.
    """

    def __init__(self, folder: Path | None = None):
        """The file is made when it is first needed."""
        self._folder, self._file, self._kept = folder, None, 0

    def __enter__(self) -> "Spool":
        """Nothing to do."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the disk back; adapters on it cannot be read any more."""
        if self._file:
            self._file.close()

    @property
    def used(self) -> bool:
        """Whether anything is on disk."""
        return self._file is not None

    def keep(self, adapter: Adapter) -> Adapter:
        """The same adapter: in memory while the round's updates are within the limit, then on disk."""
        self._kept += sum(tensor.nbytes for tensor in adapter.tensors().values())
        if self._kept <= IN_MEMORY:
            return adapter
        layers = {
            name: _LowRankOnDisk(self._write(part.A), self._write(part.B)) for name, part in adapter.layers.items()
        }
        return Adapter(layers, _DenseOnDisk({name: self._write(tensor) for name, tensor in adapter.dense.items()}))

    def _write(self, tensor: Tensor) -> "_Place":
        self._file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - __exit__ closes it
        place = _Place(self._file, self._file.seek(0, 2), tensor.shape, tensor.dtype)
        self._file.write(_bytes(tensor.detach().contiguous()))
        return place


def in_memory(adapter: Adapter) -> Adapter:
    """The same adapter without anything on disk."""
    return adapter.map(lambda tensor: tensor)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a tensor is."""

    file: IO[bytes]
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.file.seek(self.offset)
        self.file.readinto(_bytes(tensor))  # pyright: ignore[reportAttributeAccessIssue] - files of bytes have it
        return tensor


class _LowRankOnDisk(LowRank):
    """Factors on disk; only their rank is known without reading them."""

    def __init__(self, A: _Place, B: _Place):
        self._places = A, B

    @property
    def A(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - read only, as what it overrides
        return self._places[0].read()

    @property
    def B(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._places[1].read()

    @property
    def rank(self) -> int:
        return self._places[0].shape[0]


class _DenseOnDisk(Mapping[str, Tensor]):
    """Dense tensors on disk."""

    def __init__(self, places: Mapping[str, _Place]):
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy()
