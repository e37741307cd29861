"""Tasks and updates as messages: what travels between a server and clients that share nothing but the recipe.

    task:    header (round, plan, ...), what of `start` the client lacks, `frozen`, the folds that it does not hold
    update:  header (examples, metrics), what of the adapter travels back: as it is, or compressed

Compression is of the change since the start that was sent, so that client and server mean the same by it although the start
itself may have been rounded on its way. What compression loses of a change, the client adds to its next one (error feedback:
Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847).

A message is laid out as `wire.pack` does it, with its header deflated: names and shapes of many small tensors would be a tenth
of it. Its bytes are of foreign origin: whatever is wrong with them is a `RecordError`.
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from anyrank.adapter import NOTHING, Adapter
from anyrank.errors import RecordError, ShapeError
from anyrank.federation import Factors, Fold, Method, Plan, Spec, Task, Update, make_task
from anyrank.wire import pack, unpack

__all__ = ["Compression", "pack_task", "pack_update", "unpack_task", "unpack_update"]

Compression = Literal["none", "fp16", "int8"]
"""How numbers travel: as they are; as 16-bit floats; up as 8-bit integers with a scale for each slot, down as 16-bit floats."""

_SCALE = "scale of "
_LARGEST_HEADER = {"task": 64 * 2**20, "update": 4 * 2**20}
"""Bytes; a few deflated ones can become as many as one likes. That of a task names every tensor of every fold, which may be
hundreds; that of an update takes some 100 KB for a model of 64 blocks."""

_NOT_OURS = (ArithmeticError, AttributeError, LookupError, RuntimeError, ShapeError, TypeError, ValueError)
"""All that content of foreign origin can set off: infinite numbers, tensors without axes, lists of a thousand lists."""

_LARGEST_HALF = torch.finfo(torch.float16).max


def pack_task(task: Task, spec: Spec, *, compression: Compression = "none") -> bytes:
    """A task as bytes, without what the client has or works out by itself.

    Args:
        task: what is asked.
        spec: of the run.
        compression: of what is sent to start from.
    """
    plan, start = task.plan, _travelling(task.start.tensors(), task.plan.down)
    groups = {"start": start if compression == "none" else _halved(start)}
    if task.frozen.layers:
        groups["frozen"] = task.frozen.tensors()
    groups |= {f"fold {fold.number}": fold.adapter.tensors() for fold in task.folds if fold.number > task.held}
    header = {
        "kind": task.kind,
        "round": task.round,
        "phase": task.phase,
        "held": task.held,
        "folds": [fold.number for fold in task.folds],
        "ranks": [plan.ranks.get(layer.name, 0) for layer in spec.layers],
        "plan": {name: getattr(plan, name) for name in ("client", "steps", "slots", "scale", "train", "down", "up")},
    }
    return _deflated(pack(groups, header))


def unpack_task(packed: bytes, spec: Spec, method: Method, held: Mapping[int, Fold]) -> Task:
    """The whole task on the client's side.

    Args:
        packed: what `pack_task` made.
        spec: of the run.
        method: what does not travel is what it makes of the plan with the state before the first round, the round's number and
            the folds.
        held: the folds that the client holds, by number.

    Raises:
        RecordError: the message is broken, or refers to a fold that neither it nor the client holds.
    """
    groups, header = unpack(_inflated(packed, "task"))
    try:
        ranks = {layer.name: _whole(rank) for layer, rank in zip(spec.layers, header["ranks"], strict=True) if rank}
        plan = _plan(ranks, **header["plan"])
        came = {number: Fold(number, Adapter.from_tensors(group)) for number, group in _numbered(groups).items()}
        came |= {number: held[number] for number in held if number not in came}
        folds = tuple(came[number] for number in _wanted(header["folds"], header["held"], held))
        frozen = Adapter.from_tensors(groups["frozen"]) if "frozen" in groups else NOTHING
        if header["kind"] not in ("train", "evaluate", "test"):
            raise ValueError(f"its kind is {header['kind']!r}")
        numbers = {name: _whole(header[name]) for name in ("round", "held", "phase")}
        task = Task(header["kind"], plan=plan, start=NOTHING, frozen=frozen, folds=folds, **numbers)
        start = {
            name: tensor.float() if tensor.dtype == torch.float16 else tensor
            for name, tensor in groups["start"].items()
        }
        if plan.down != "AB":
            start = {**_known(task, spec, method).start.tensors(), **start}
        return replace(task, start=Adapter.from_tensors(start))
    except _NOT_OURS as error:
        raise RecordError(f"not a task of ours ({type(error).__name__}: {error})") from error


def _plan(ranks: Mapping[str, int], *, client: Any, steps: Any, slots: Any, scale: Any, **factors: Any) -> Plan:
    """The plan in a header, which may hold anything."""
    if set(factors) != {"train", "down", "up"} or any(value not in get_args(Factors) for value in factors.values()):
        raise ValueError(f"its factors are {factors}")
    slots = None if slots is None else tuple(_whole(slot) for slot in slots)
    return Plan(str(client), ranks, _whole(steps), slots, _number(scale), **factors)


def _known(task: Task, spec: Spec, method: Method) -> Task:
    """The task as the client can work it out: of factors that do not travel, what the method has drawn from the seed."""
    before = replace(method.init(spec), round=task.round - (task.kind == "train"), folds=task.folds)
    return make_task(method, before, task.plan, kind=task.kind)


def _wanted(folds: list[int], held: int, ours: Mapping[int, Fold]) -> list[int]:
    """The folds that are applied: a client that holds what was compressed on the server since keeps it as it has it."""
    if not folds or held < folds[0]:
        return folds
    if held not in ours:
        raise RecordError(f"fold {held} did not come, and is not held")
    return [*(number for number in sorted(ours) if number <= held), *(number for number in folds if number > held)]


def _numbered(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[int, Mapping[str, Tensor]]:
    return {int(name.removeprefix("fold ")): group for name, group in groups.items() if name.startswith("fold ")}


def pack_update(
    task: Task,
    update: Update,
    *,
    compression: Compression = "none",
    lost: Mapping[str, Tensor] | None = None,
) -> tuple[bytes, dict[str, Tensor]]:
    """An update as bytes, without the factors that the plan keeps back.

    Args:
        task: what was asked, as the client received it.
        update: what is to travel.
        compression: of the change since the task's start.
        lost: what compression lost of the client's last change, by tensor; of another shape, after a change of rank, it is
            dropped.

    Returns:
        the message, and what compression lost of this change.
    """
    header = {"round": update.round, "num_examples": update.num_examples, "metrics": dict(update.metrics)}
    if update.adapter is None:
        return _deflated(pack({}, header)), {}
    tensors = _travelling(update.adapter.tensors(), task.plan.up)
    if compression == "none" or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return _deflated(pack({"adapter": tensors}, header)), {}
    sent, before, lost, remains = dict[str, Tensor](), task.start.tensors(), lost or {}, dict[str, Tensor]()
    for name, tensor in tensors.items():
        change = tensor - _cut(name, before[name], tensor)
        if name in lost and lost[name].shape == change.shape:
            change = change + lost[name]
        packed = _halved({name: change}) if compression == "fp16" else _quantised(name, change)
        sent |= packed
        remains[name] = change - _restored(name, packed)
    return _deflated(pack({"change": sent}, header)), remains


def unpack_update(packed: bytes, task: Task) -> Update:
    """The update to a task on the server's side; factors that did not travel are as in the task.

    Args:
        packed: what `pack_update` made.
        task: what was asked, as the server asked it.

    Raises:
        RecordError: the message is broken. Whether an update fits its task is for `wire.check_update` to say.
    """
    groups, header = unpack(_inflated(packed, "update"))
    try:
        if groups.keys() - {"adapter", "change"} or len(groups) > 1:
            raise ValueError(f"it holds {', '.join(groups)}")
        before, adapter = task.start.tensors(), None
        if "change" in groups:
            changes = groups["change"]
            tensors = {name: _changed(name, before, changes) for name in changes if not name.startswith(_SCALE)}
        else:
            tensors = groups.get("adapter")
        if tensors is not None:
            adapter = Adapter.from_tensors({**_kept_back(before, tensors, task.plan.up), **tensors})
        metrics = {name: _number(value) for name, value in header["metrics"].items()}
        return Update(task.plan.client, _whole(header["round"]), adapter, _whole(header["num_examples"]), metrics)
    except _NOT_OURS as error:
        raise RecordError(f"not an update of ours ({type(error).__name__}: {error})") from error


def _whole(value: Any) -> int:
    """A whole number, 0 or more."""
    if type(value) is not int or value < 0:  # True is one of Python's, too
        raise ValueError(f"{value!r} where a whole number is expected")
    return value


def _number(value: Any) -> float:
    """Any number; it need not be finite."""
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} where a number is expected")
    return float(value)


# --- the header ---------------------------------------------------------------------------------------------------


def _deflated(packed: bytes) -> bytes:
    """What `wire.pack` made, that is the length of a header, the header, and numbers, with the header deflated."""
    end = 8 + int.from_bytes(packed[:8], "little")
    head = zlib.compress(packed[8:end])
    return len(head).to_bytes(8, "little") + head + packed[end:]


def _inflated(packed: bytes, kind: Literal["task", "update"]) -> bytes:
    end = 8 + int.from_bytes(packed[:8], "little")
    try:
        inflater = zlib.decompressobj()
        head = inflater.decompress(packed[8:end], _LARGEST_HEADER[kind])
        if not inflater.eof:
            raise zlib.error("it is too large, or not whole")
    except zlib.error as error:
        raise RecordError(f"not a complete message of ours (its header: {error})") from error
    return len(head).to_bytes(8, "little") + head + packed[end:]


# --- which tensors travel -----------------------------------------------------------------------------------------


def _travelling(tensors: Mapping[str, Tensor], factors: Factors) -> dict[str, Tensor]:
    """Without the factors that do not travel."""
    stays = tuple(f"{factor}/" for factor in "AB" if factor not in factors)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(stays)}


def _kept_back(before: Mapping[str, Tensor], came: Mapping[str, Tensor], factors: Factors) -> dict[str, Tensor]:
    """The factors that did not travel, as they were, of as many slots as their partners that came have now."""
    kept = {}
    for name, tensor in before.items():
        factor, _, layer = name.partition("/")
        if factor in ("A", "B") and factor not in factors:
            partner = came.get(f"{'B' if factor == 'A' else 'A'}/{layer}")
            rank = tensor.shape[factor == "B"] if partner is None else partner.shape[factor == "A"]
            if partner is not None or not factors:
                kept[name] = tensor.narrow(int(factor == "B"), 0, rank)
    return kept


def _cut(name: str, before: Tensor, now: Tensor) -> Tensor:
    """What a tensor was, of as many slots as it has now: a client may have pruned the last ones."""
    axis = {"A": 0, "B": 1}.get(name.partition("/")[0])
    return before if axis is None else before.narrow(axis, 0, now.shape[axis])


# --- compression --------------------------------------------------------------------------------------------------


def _halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As 16-bit floats; what is too large for them becomes the largest there is."""
    return {name: tensor.clamp(-_LARGEST_HALF, _LARGEST_HALF).half() for name, tensor in tensors.items()}


def _quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """As 8-bit integers, and a scale: of each slot, or of a whole dense tensor."""
    axis = {"A": 1, "B": 0}.get(name.partition("/")[0])
    largest = tensor.abs().amax() if axis is None else tensor.abs().amax(axis, keepdim=True)
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return {name: (tensor / scale).round().to(torch.int8), _SCALE + name: scale}


def _restored(name: str, packed: Mapping[str, Tensor]) -> Tensor:
    """What was compressed. A scale of another shape than ours could make much of little: a row and a column a matrix."""
    tensor, scale = packed[name], packed.get(_SCALE + name)
    if scale is None:
        return tensor.float()
    axis = {"A": 1, "B": 0}.get(name.partition("/")[0])
    expected = [] if axis is None else [1 if i == axis else size for i, size in enumerate(tensor.shape)]
    if list(scale.shape) != expected:
        raise ValueError(f"{_SCALE}{name} has shape {list(scale.shape)}; expected {expected}")
    return tensor.float() * scale


def _changed(name: str, before: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Tensor:
    """A tensor that has changed; of one that was not asked for, the change."""
    if name not in before:
        return _restored(name, changes)
    was, shape = _cut(name, before[name], changes[name]), list(changes[name].shape)
    if list(was.shape) != shape:
        raise ValueError(f"{name} has shape {shape}; expected {list(was.shape)}")
    return was + _restored(name, changes)
