"""What processes of one simulation send each other: tasks, updates, and what went wrong."""

import io
import math
import pickle
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anyrank.adapter import Adapter
from anyrank.errors import AnyrankError, TransportError

__all__ = ["dumps", "heard", "told"]


def dumps(content: Any) -> bytes:
    """What `pickle.loads` reads again; an adapter is one array in it."""
    stream = io.BytesIO()
    _Pickler(stream).dump(content)
    return stream.getvalue()


def told(error: Exception) -> Exception | str:
    """What the parent is told: an error that a user can meet as it is, of any other its traceback."""
    if not isinstance(error, AnyrankError | OSError):
        return traceback.format_exc()
    error.add_note(traceback.format_exc())
    if isinstance(error, OSError):
        try:
            pickle.loads(dumps(error))
        except Exception:  # a library's own kind
            return OSError(str(error))
    return error


def heard(content: bytes, *, round: int) -> Any:
    """What a worker sent.

    Args:
        content: what `dumps` made of it, or of what an error was `told` as.
        round: in which it was asked.

    Raises:
        TransportError: it failed.
        AnyrankError: as the worker raised it.
        OSError: as the worker raised it.
    """
    reply = pickle.loads(content)
    if isinstance(reply, Exception):
        raise reply
    if isinstance(reply, str):
        raise TransportError(f"round {round}: a worker process failed:\n{reply}")
    return reply


class _Pickler(pickle.Pickler):
    """Sends an adapter as one array, not tensor by tensor, and adapters that are views of the same memory once."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._sent: dict[Any, tuple[Mapping[str, Tensor], Any]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Adapter):
            tensors = obj.tensors()
            if len({tensor.dtype for tensor in tensors.values()}) == 1:
                key = tuple((name, t.data_ptr(), t.shape, t.stride()) for name, t in tensors.items())
                if key not in self._sent:
                    # The tensors as well: the memory of one that is gone, as those read from disk soon are, is used again.
                    self._sent[key] = tensors, _flat(tensors)
                return _adapter, self._sent[key][1]
        if isinstance(obj, Tensor):
            numbers = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            return _tensor, (numbers, obj.dtype, tuple(obj.shape))
        if isinstance(obj, AnyrankError):  # not by calling its class, which may take more than the message
            return type(obj).__new__, (type(obj), *obj.args), vars(obj)
        return NotImplemented


def _flat(tensors: Mapping[str, Tensor]) -> tuple[list[tuple[str, tuple[int, ...]]], Tensor]:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return shapes, torch.cat([tensor.detach().cpu().reshape(-1) for tensor in tensors.values()])


def _adapter(shapes: Sequence[tuple[str, tuple[int, ...]]], flat: Tensor) -> Adapter:
    parts = flat.split([math.prod(shape) for _, shape in shapes])
    return Adapter.from_tensors({name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)})


def _tensor(numbers: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(numbers).view(dtype).reshape(shape)
