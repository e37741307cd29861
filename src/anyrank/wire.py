"""Adapters as bytes: what a message or a checkpoint holds, how large it is, and what is let in.

The format is safetensors with one metadata key, `anyrank`, a JSON header with sorted keys. Nothing is ever unpickled, and
the same content gives the same bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import isfinite
from statistics import median
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save

from anyrank.adapter import Adapter, LowRank
from anyrank.errors import RecordError, ShapeError, UpdateRejected
from anyrank.federation import Factors, Task, Update

__all__ = [
    "LARGEST_METRIC",
    "bytes_down",
    "bytes_up",
    "check_norms",
    "check_update",
    "completed",
    "decode",
    "encode",
    "nbytes",
    "norms",
    "pack",
    "unpack",
]

LARGEST_METRIC = 1e30
"""A metric is below it: far above any loss, and far below what overflows when many are added or squared."""

_UNREADABLE = (
    safetensors.SafetensorError,
    ShapeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)  # all that bytes of foreign origin can set off in `decode`


def encode(adapters: Mapping[str, Adapter], header: Mapping[str, Any]) -> bytes:
    """Pack named adapters and a JSON-serialisable header."""
    return pack({group: adapter.tensors() for group, adapter in adapters.items()}, header)


def pack(groups: Mapping[str, Mapping[str, torch.Tensor]], header: Mapping[str, Any]) -> bytes:
    """Pack named groups of named tensors and a JSON-serialisable header."""
    # A copy of each, since safetensors refuses tensors that share memory, such as an adapter and its prefix.
    flat = {
        f"{group}:{name}": tensor.detach().clone(memory_format=torch.contiguous_format)
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    order = {group: list(tensors) for group, tensors in groups.items()}
    return save(flat, metadata={"anyrank": json.dumps({"header": header, "order": order}, sort_keys=True)})


def decode(packed: bytes) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """Unpack what `encode` made: the adapters by name, and the header.

    Raises:
        RecordError: the bytes are truncated or were not made by `encode`.
    """
    groups, header = unpack(packed)
    try:
        return {group: Adapter.from_tensors(tensors) for group, tensors in groups.items()}, header
    except _UNREADABLE as error:
        raise _incomplete(error) from error


def unpack(packed: bytes) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The named groups of tensors that `pack` packed, and the header.

    Raises:
        RecordError: the bytes are truncated or were not made by `pack`.
    """
    try:
        length = int.from_bytes(packed[:8], "little")
        content = json.loads(json.loads(packed[8 : 8 + length])["__metadata__"]["anyrank"])
        flat = load(packed)
        groups = {group: {name: flat[f"{group}:{name}"] for name in names} for group, names in content["order"].items()}
        return groups, dict(content["header"])
    except _UNREADABLE as error:
        raise _incomplete(error) from error


def _incomplete(error: Exception) -> RecordError:
    return RecordError(f"not a complete anyrank file ({type(error).__name__}: {error})")


def nbytes(adapter: Adapter, factors: Factors = "AB") -> int:
    """Size of the adapter as a message, header included; only those factors of it that travel, and the dense tensors."""
    left_out = tuple(f"{factor}/" for factor in "AB" if factor not in factors)
    travels = ((name, t.shape, t.dtype) for name, t in adapter.tensors().items() if not name.startswith(left_out))
    return _packed_size(tuple(travels))


@lru_cache(maxsize=4096)
def _packed_size(outline: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> int:
    """Size of a message with tensors of these names, shapes and dtypes: whatever they hold, it is the same."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in outline}
    return len(pack({"adapter": tensors}, {}))


def bytes_down(task: Task) -> int:
    """Size of what travels to the client: the start, what is frozen beside it, and the folds that the client lacks.

    A client whose folds were compressed on the server since it was last here gets the compressed one.
    """
    news = [fold.adapter for fold in task.folds if fold.number > task.held]
    frozen = [task.frozen] if task.frozen.layers else []
    return nbytes(task.start, task.plan.down) + sum(nbytes(part) for part in [*frozen, *news])


def bytes_up(task: Task, update: Update) -> int:
    """Size of what travels back."""
    return nbytes(update.adapter, task.plan.up) if update.adapter else 0


def completed(task: Task, update: Update) -> Update:
    """The update with the factors that did not travel as they are in the task, whatever the client did to them.

    A client may have returned fewer slots than it was sent; then it is the first of them that are completed.
    """
    if update.adapter is None or task.plan.up == "AB":
        return update
    layers = {}
    for name, part in update.adapter.layers.items():
        known = task.start.layers.get(name)
        A = part.A if known is None or "A" in task.plan.up else known.A[: part.rank]
        B = part.B if known is None or "B" in task.plan.up else known.B[:, : part.rank]
        layers[name] = LowRank(A, B)
    return replace(update, adapter=Adapter(layers, update.adapter.dense))


def check_update(task: Task, update: Update, *, may_prune: bool) -> None:
    """Let an update in only if it fits its task: round, layers, shapes, dtypes, ranks, finite numbers, a loss.

    How large its numbers are is for `check_norms` to say.

    Args:
        task: what was asked.
        update: what came back.
        may_prune: a rank below the plan's is allowed.

    Raises:
        UpdateRejected: naming the first tensor or metric at fault.
    """
    _require(update, "round", update.round == task.round, f"is {update.round}; the task's is {task.round}")
    _require(update, "loss", "loss" in update.metrics, "is missing from the metrics")
    for name, value in update.metrics.items():
        fine = abs(value) < LARGEST_METRIC  # not a number is not below anything
        _require(update, name, fine, f"is {value}; expected a finite number below {LARGEST_METRIC:g}")
    sent, back = task.start.tensors(), update.adapter.tensors() if update.adapter else {}
    for name in [*sent, *(name for name in back if name not in sent)]:
        _require(update, name, name in back, "is missing from the update")
        _require(update, name, name in sent, "was not asked for")
        if fault := _fault(name, sent[name], back[name], may_prune=may_prune):
            raise UpdateRejected(update.client, name, fault)


def _fault(name: str, sent: torch.Tensor, back: torch.Tensor, *, may_prune: bool) -> str | None:
    """What is wrong with a tensor that came back, if anything."""
    if back.dtype != sent.dtype:
        return f"has dtype {back.dtype}; expected {sent.dtype}"
    expected = list(sent.shape)
    slot_axis = {"A": 0, "B": 1}.get(name.partition("/")[0])
    if slot_axis is not None and back.ndim == 2:
        rank, planned = back.shape[slot_axis], sent.shape[slot_axis]
        if rank > planned:
            return f"has rank {rank}, above the planned {planned}"
        if rank != planned and not (may_prune and rank > 0):
            return f"has rank {rank}; planned was {planned}"
        expected[slot_axis] = rank
    if list(back.shape) != expected:
        return f"has shape {list(back.shape)}; expected {expected}"
    # A sum is finite only if all its terms are; it may overflow without that, and then every term is looked at.
    if not isfinite(back.sum()) and not bool(torch.isfinite(back).all()):
        return "holds a number that is not finite"
    return None


def norms(adapter: Adapter) -> dict[str, float]:
    """How large an adapter is.

    Returns:
        the Frobenius norms of each layer's product, by layer, and of each dense tensor, by flat name; of each factor, by flat
        name, the norm of its largest slot, since factors are averaged too: a product is as it should be if one of them is
        far too large, and the other far too small. Slots can be compared whatever the rank; without any, there are none.
    """
    alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, part in adapter.layers.items():
        if part.rank:
            alike.setdefault((part.A.shape, part.B.shape), []).append(name)
    found: dict[str, list[float]] = {}
    for names in alike.values():  # layers of one shape together: one after another takes twice as long
        parts = [adapter.layers[name] for name in names]
        A, B = torch.stack([part.A for part in parts]).double(), torch.stack([part.B for part in parts]).double()
        of_A, of_B = A @ A.mT, B.mT @ B
        largest = [of.diagonal(dim1=1, dim2=2).amax(1) for of in (of_A, of_B)]
        squares = torch.stack([(of_A * of_B).sum(dim=(1, 2)).clamp(min=0), *largest], dim=1)
        found |= zip(names, squares.sqrt().to(parts[0].A.dtype).tolist(), strict=True)
    in_factors = {}
    for name in (name for name in adapter.layers if name in found):
        in_factors[name], in_factors[f"A/{name}"], in_factors[f"B/{name}"] = found[name]
    # Of a tensor, not of its change: as with products, a change may be far above the others' where theirs is close to none.
    in_dense = {f"dense/{name}": torch.linalg.vector_norm(t.float()).item() for name, t in adapter.dense.items()}
    return in_factors | in_dense


def check_norms(norms: Mapping[str, Mapping[str, float]], limit: float) -> dict[str, UpdateRejected]:
    """The updates, by client, of which a norm is over `limit` times the round's median.

    A norm that overflows is rejected too, whatever the median. In a round of two none can be over twice the median.

    Args:
        norms: by client, what `norms` says of its update.
        limit: the largest multiple of the median that is let in.
    """
    by_name: dict[str, dict[str, float]] = {}
    for client, of_client in norms.items():
        for name, norm in of_client.items():
            by_name.setdefault(name, {})[client] = norm
    rejected = {}
    for name, by_client in by_name.items():
        middle = median(by_client.values())
        of = _OF_WHAT.get(name[: name.find("/") + 1], "the norm of its product")
        for client, norm in by_client.items():
            if not isfinite(norm):
                rejected.setdefault(client, UpdateRejected(client, name, f"{of} is not finite"))
            elif middle > 0 and norm > limit * middle:
                reason = f"{of}, {norm:.3g}, is over {limit:g} times the round's median {middle:.3g}"
                rejected.setdefault(client, UpdateRejected(client, name, reason))
    return rejected


_OF_WHAT = {"A/": "the norm of its largest slot", "B/": "the norm of its largest slot", "dense/": "its norm"}


def _require(update: Update, tensor: str, fine: bool, reason: str) -> None:
    if not fine:
        raise UpdateRejected(update.client, tensor, reason)
