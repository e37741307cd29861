"""The run folder: everything a run leaves behind, written so that a kill at any moment loses at most the running round.

run.json            resolved recipe, versions, machine, data, fleet; written before training
rounds.jsonl        one flat JSON object per round
checkpoint/         state.safetensors: server state, fleet, clock; replaced atomically after each round
memory/CLIENT/      what clients keep for themselves, with methods that have a private part
adapter/            the result as a PEFT directory, once the run has ended
classes/rank-R/     what a client of each rank is sent, likewise
clients/CLIENT/     of each client that took part, likewise: for methods that have no global adapter, or if asked for
compare/NAME/       run folders of the baselines that the recipe compares with
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.engine import Late, Progress
from anyrank.errors import RecordError
from anyrank.federation import Device, Fold, Plan, Spec, State, Task, Times
from anyrank.paths import replace_file, writing
from anyrank.wire import decode, encode

__all__ = ["FORMAT", "RunFolder"]

FORMAT = 2

_Kinds = Mapping[str, type | tuple[type, ...]]
_INFO: _Kinds = {
    "recipe": dict,
    "rounds": int,
    "method": str,
    "metric": dict,
    "references": dict,
    "versions": dict,
    "data": dict,
    "fleet": dict,
    "modules_to_save": list,
}
_NUMBER = (int, float, type(None))  # JSON has no number for a loss that is not finite
_RECORD: _Kinds = {
    "round": int,
    "score": _NUMBER,
    "metrics": (dict, type(None)),
    "class_scores": (dict, type(None)),
    "train_loss": _NUMBER,
    "bytes_down": int,
    "bytes_up": int,
    "examples": int,
    "planned_ranks": dict,
    "returned_ranks": dict,
    "late_replies": dict,
    "rejected": list,
    "simulated_seconds": _NUMBER,
    "real_seconds": _NUMBER,
}


class RunFolder:
    """Reads and writes one run folder.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        info: the content of `run.json`.
    """

    def __init__(self, path: Path, info: Mapping[str, Any]):
        """Use `create`, `open` or `check_free`; they look at what is there."""
        self.path = path
        self.info = dict(info)

    @staticmethod
    def check_free(path: Path) -> None:
        """Make sure that a new run may be written here.

        Raises:
            RecordError: the folder holds a run, or anything else.
        """
        if (path / "run.json").exists():
            raise RecordError(
                f"{path} already holds a run. Continue it with `anyrank run --resume {path}`, or choose another folder."
            )
        left_over = "run.json.tmp"  # from a run that was killed before it began
        if path.exists() and (not path.is_dir() or any(child.name != left_over for child in path.iterdir())):
            raise RecordError(f"{path} is not an empty folder. Choose another one.")

    @classmethod
    def create(cls, path: Path, info: Mapping[str, Any]) -> "RunFolder":
        """Start a run folder by writing `run.json`.

        Raises:
            RecordError: something is there already.
        """
        cls.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, {"format": FORMAT, **info})
        folder._write_info()
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run folder.

        Raises:
            RecordError: there is none, or one of another format.
        """
        try:
            info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(f"{path} holds no run: there is no run.json in it.") from None
        except (OSError, ValueError) as error:
            raise RecordError(f"{path / 'run.json'} cannot be read ({error}).") from error
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            found = info.get("format") if isinstance(info, dict) else "something else"
            shown = " `anyrank report` can still show it." if found == 1 else ""
            raise RecordError(f"{path / 'run.json'} is not a run of format {FORMAT}; it says {found!r}.{shown}")
        if missing := set(_INFO) - set(info):
            raise RecordError(f"{path / 'run.json'} lacks {', '.join(sorted(missing))}; it is not from anyrank.")
        if odd := _odd(info, _INFO):
            raise RecordError(f"{path / 'run.json'}: {odd}; the file was changed. Bring it back as it was.")
        return cls(path, info)

    def update_info(self, **changes: Any) -> None:
        """Replace entries of `run.json`, atomically."""
        self.info |= changes
        self._write_info()

    def _write_info(self) -> None:
        text = json.dumps(self.info, indent=2) + "\n"  # in order: the order of device classes decides who gets which
        replace_file(self.path / "run.json", text.encode())

    def records(self) -> list[dict[str, Any]]:
        """The rounds so far; a last line that a kill cut short is left out.

        Raises:
            RecordError: a line that is not the record of a round.
        """
        try:
            records = list(self._complete_lines())
        except ValueError as error:
            raise RecordError(f"{self.path / 'rounds.jsonl'} holds a line that is no round ({error}).") from error
        for record in records:
            odd = _odd(record, _RECORD) if isinstance(record, dict) else f"it is {record!r}"
            if odd:
                raise RecordError(
                    f"{self.path / 'rounds.jsonl'} holds a line that is no round: {odd}. Bring it back as it was, or start a "
                    "new run."
                )
        return records

    def _complete_lines(self) -> Iterator[Any]:
        file = self.path / "rounds.jsonl"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def save(self, progress: Progress, *, real_seconds: float) -> None:
        """Write a finished round: first its record, then the checkpoint, so that `load` can cut the records back."""
        records = self.path / "rounds.jsonl"
        with writing(records), records.open("a", encoding="utf-8") as file:
            file.write(_line({**progress.record, "real_seconds": real_seconds}))
            file.flush()
            os.fsync(file.fileno())
        states = {"": progress.state, **progress.peers}
        header = {
            "round": progress.state.round,
            "clients": len(progress.fleet),
            # A device without times has never replied, and is as the recipe has it.
            "fleet": {client: _learned(device) for client, device in progress.fleet.items() if device.times},
            "seconds": progress.seconds,
            "states": [[name, _outline(state)] for name, state in states.items()],
            "late": [_pending(late) for late in progress.late],
        }
        adapters = {f"{i} {part}": a for i, state in enumerate(states.values()) for part, a in _parts(state).items()}
        for late in progress.late:
            client = late.task.plan.client
            adapters |= {f"late start {client}": late.task.start, f"late frozen {client}": late.task.frozen}
        packed = encode(adapters, header)
        (self.path / "checkpoint").mkdir(exist_ok=True)
        replace_file(self.path / "checkpoint" / "state.safetensors", packed)

    def load(self, spec: Spec, fleet: Mapping[str, Device], *, target: float | None = None) -> Progress | None:
        """The last checkpoint, and `rounds.jsonl` cut back to it; None if no round was finished.

        Args:
            spec: of the run.
            fleet: the run's devices; what was learned of them is the checkpoint's.
            target: the value of the run's metric to reach, of which the records tell when it was reached.

        Raises:
            RecordError: a checkpoint that is truncated, foreign, or of another fleet.
        """
        file = self.path / "checkpoint" / "state.safetensors"
        records = self.records()
        if not file.exists():
            if len(records) > 1:  # a kill can leave one record before its checkpoint, not two
                raise RecordError(f"{file} is missing, though {len(records)} rounds are recorded. Start a new run.")
            self._keep(records[:0])
            return None
        try:
            adapters, header = decode(file.read_bytes())
        except RecordError as error:
            raise RecordError(f"{file}: {error}. Start the run anew in another folder.") from error
        learned = header["fleet"]
        clients = header.get("clients", len(learned))  # once, every device was in the checkpoint
        if clients > len(fleet) or not learned.keys() <= fleet.keys():  # one may have come since
            raise RecordError(
                f"{file}: its clients are not those of {self.path / 'run.json'}; the folder was mixed up."
            )
        records = [record for record in records if record["round"] <= header["round"]]
        if [record["round"] for record in records] != list(range(1, header["round"] + 1)):
            raise RecordError(
                f"{self.path / 'rounds.jsonl'} does not hold rounds 1 to {header['round']}, which the checkpoint is after; "
                "the folder was changed. Start a new run."
            )
        self._keep(records)
        reached = [r["simulated_seconds"] for r in records if target is not None and self._reaches(r["score"], target)]
        states = {
            name: _restored(spec, header["round"], outline, adapters, i)
            for i, (name, outline) in enumerate(header["states"])
        }
        devices = {**fleet, **{client: _reminded(fleet[client], known) for client, known in learned.items()}}
        state = states.pop("")
        late = tuple(_awaited(entry, adapters) for entry in header["late"])
        return Progress(state, devices, states, late, header["seconds"], reached[0] if reached else None)

    def _reaches(self, score: int | float | None, target: int | float) -> bool:
        if score is None:
            return False
        return score >= target if self.info["metric"]["higher_is_better"] else score <= target

    def _keep(self, records: list[dict[str, Any]]) -> None:
        if (self.path / "rounds.jsonl").exists():
            text = "".join(map(_line, records))
            replace_file(self.path / "rounds.jsonl", text.encode())

    def final_adapter(self) -> Adapter:
        """The global adapter of the last finished round.

        Raises:
            RecordError: no round was finished.
        """
        file = self.path / "checkpoint" / "state.safetensors"
        if not file.exists():
            raise RecordError(f"{self.path} has no finished round yet.")
        try:
            adapters, header = decode(file.read_bytes())
        except RecordError as error:
            raise RecordError(f"{file}: {error}.") from error
        folds = [adapters[f"0 fold {number}"] for number in header["states"][0][1]["folds"]]
        adapter = adapters["0 adapter"]
        return Adapter(lowrank.together([adapter, *folds]).layers, adapter.dense) if folds else adapter


def _odd(content: Mapping[str, Any], kinds: _Kinds) -> str:
    """The first entry that is not there or of another kind, in words; empty if all are as expected."""
    for key, kind in kinds.items():
        if key not in content:
            return f"{key} is not there"
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            return f"{key} is {content[key]!r}"
    return ""


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same with null for every number that is not finite, such as the loss of a model that diverged: JSON has none."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _parts(state: State) -> dict[str, Adapter]:
    """Every adapter of a state, by a name of its own."""
    folds = {f"fold {fold.number}": fold.adapter for fold in state.folds}
    return {"adapter": state.adapter, **folds, **{f"extra {name}": a for name, a in state.extra.items()}}


def _outline(state: State) -> dict[str, Any]:
    """What belongs to a state besides its adapters."""
    return {"folds": [fold.number for fold in state.folds], "extra": list(state.extra), "notes": dict(state.notes)}


def _restored(spec: Spec, round: int, outline: Any, adapters: Mapping[str, Adapter], i: int) -> State:
    return State(
        spec,
        adapters[f"{i} adapter"],
        round,
        folds=tuple(Fold(number, adapters[f"{i} fold {number}"]) for number in outline["folds"]),
        extra={name: adapters[f"{i} extra {name}"] for name in outline["extra"]},
        notes=outline["notes"],
    )


def _pending(late: Late) -> dict[str, Any]:
    """What belongs to a late task besides its adapters."""
    return {
        "round": late.task.round,
        "plan": asdict(late.task.plan),
        "weight": late.weight,
        "at": late.arrives,
    }


def _awaited(entry: Any, adapters: Mapping[str, Adapter]) -> Late:
    slots = entry["plan"]["slots"]
    plan = Plan(**entry["plan"] | {"slots": slots and tuple(slots)})
    start, frozen = (adapters[f"late {part} {plan.client}"] for part in ("start", "frozen"))
    return Late(Task("train", entry["round"], plan, start, frozen), entry["weight"], entry["at"])


def _learned(device: Device) -> dict[str, Any]:
    """What a run learns about a device."""
    return {"rank": device.rank, "folds": device.folds, "times": device.times and vars(device.times)}


def _reminded(device: Device, learned: Mapping[str, Any]) -> Device:
    times = Times(**learned["times"]) if learned["times"] else None
    return replace(device, rank=learned["rank"], folds=learned["folds"], times=times)
