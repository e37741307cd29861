"""Run folders as plain values: everything a report needs, checked while it is read. Knows files, not HTML."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from anyrank.errors import RecordError

__all__ = ["FORMAT", "Federated", "Member", "Metric", "Rejection", "Round", "Run", "read"]

FORMAT = 2
ACCURACY_ONLY = 1  # the format before there was a choice of metrics


@dataclass(frozen=True)
class Metric:
    """What a run is scored by.

    Args:
        name: such as accuracy or perplexity.
        higher_is_better: or lower is.
    """

    name: str
    higher_is_better: bool

    @property
    def advice(self) -> str:
        """What has to be said of a metric that is read against the habit."""
        return "" if self.higher_is_better else "lower is better"


@dataclass(frozen=True, kw_only=True)
class Federated:
    """Scores on the clients' own held-out data.

    Args:
        score: mean over clients, weighted by examples.
        std: standard deviation over clients.
        low: the least.
        high: the greatest.
        clients: how many were asked.
    """

    score: float
    std: float
    low: float
    high: float
    clients: int


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A client whose work a round had to do without.

    Args:
        client: who.
        stage: where it was lost: dropped, late, rejected, ...
        reason: in words.
    """

    client: str
    stage: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client of the fleet.

    Args:
        kind: device class.
        rank: of its adapter when the run began.
        num_examples: it holds.
    """

    kind: str
    rank: int
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """One line of `rounds.jsonl`. A number that was not measured, or is not finite, is None.

    Args:
        number: of the round; 0 is an evaluation before training.
        score: the run's metric on the server's test set.
        metrics: all metrics of that evaluation, by name.
        loss: of that evaluation.
        train_loss: mean over the clients.
        bytes_up: of this round.
        bytes_down: of this round.
        simulated_seconds: the virtual clock at the end of the round.
        real_seconds: of this round.
        planned_ranks: by client asked.
        returned_ranks: by client that replied.
        energy: share of the global product's squared singular values by band (`5-8`).
        class_scores: of what a client of a rank is sent, by rank.
        federated: the clients' own scores.
        rejected: who is missing, and why.
        target_seconds: what the virtual clock showed when the target was reached, if it was.
    """

    number: int
    score: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    simulated_seconds: float = 0.0
    real_seconds: float = 0.0
    planned_ranks: Mapping[str, int] = field(default_factory=dict)
    returned_ranks: Mapping[str, int] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    class_scores: Mapping[int, float] = field(default_factory=dict)
    federated: Federated | None = None
    rejected: tuple[Rejection, ...] = ()
    target_seconds: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run folder.

    Args:
        name: the folder's, long enough to be unique in the report.
        parent: name of the run that it is compared with by recipe; None if it was named itself.
        info: `run.json`.
        method: its name.
        metric: of its scores.
        references: what scores need no training, by name.
        remarks: what is worth knowing about it.
        fleet: by client.
        rounds: those that are over.
        planned: how many rounds the run is to have.
    """

    name: str
    parent: str | None
    info: Mapping[str, Any]
    method: str
    metric: Metric
    references: Mapping[str, float]
    remarks: tuple[str, ...]
    fleet: Mapping[str, Member]
    rounds: tuple[Round, ...]
    planned: int

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe."""
        return self.info["recipe"]

    @property
    def baseline(self) -> str | None:
        """The baseline that the run is, if it is one."""
        return self.recipe.get("baseline")

    @property
    def played(self) -> int:
        """Rounds of training so far."""
        return max((round.number for round in self.rounds), default=0)

    @property
    def evaluated(self) -> tuple[Round, ...]:
        """The rounds that have a score."""
        return tuple(round for round in self.rounds if round.score is not None)

    @property
    def final(self) -> float | None:
        """The newest score."""
        return self.newest("score")

    @property
    def best(self) -> Round | None:
        """The round of the best score, the first one at a tie."""
        best = max if self.metric.higher_is_better else min
        return best(self.evaluated, key=lambda round: round.score or 0.0, default=None)

    @property
    def simulated_seconds(self) -> float:
        """What the virtual clock shows."""
        return self.rounds[-1].simulated_seconds if self.rounds else 0.0

    @property
    def target(self) -> float | None:
        """The score that the run was to reach, if it had one."""
        return _finite(self.recipe.get("evaluate", {}).get("target"))

    @property
    def target_seconds(self) -> float | None:
        """Simulated time at which the target was reached."""
        return self.rounds[-1].target_seconds if self.rounds else None

    @property
    def stopped(self) -> bool:
        """Whether it ended early because it had reached its target."""
        stop = self.recipe.get("evaluate", {}).get("stop_at_target", False)
        return bool(stop) and self.target_seconds is not None

    @property
    def start(self) -> int:
        """The round after which the first record begins."""
        return max(0, self.rounds[0].number - 1) if self.rounds else 0

    @property
    def short(self) -> bool:
        """Whether it has fewer rounds than were planned."""
        return self.played < self.planned

    @property
    def unfinished(self) -> bool:
        """Whether rounds are still to come."""
        return self.short and not self.stopped

    @property
    def prunes(self) -> bool:
        """Whether a client came back at another rank than planned."""
        return any(
            rank != round.planned_ranks.get(client, rank)
            for round in self.rounds
            for client, rank in round.returned_ranks.items()
        )

    @property
    def kinds(self) -> list[str]:
        """Device classes from the smallest mean rank to the largest."""
        ranks: dict[str, list[int]] = {}
        for member in self.fleet.values():
            ranks.setdefault(member.kind, []).append(member.rank)
        return sorted(ranks, key=lambda kind: (fmean(ranks[kind]), kind))

    @property
    def bands(self) -> list[str]:
        """The energy bands of any round, from the lowest ranks up."""
        names = {band for round in self.rounds for band in round.energy}
        return sorted(names, key=lambda band: [int(number) for number in re.findall(r"\d+", band)])

    @property
    def first_ranks(self) -> dict[str, int]:
        """The rank that each client was first planned at.

        Clients that were never asked count with their device's rank, but only if the method follows the devices'
        ranks for everyone it did ask; otherwise nobody knows, and they are left out.
        """
        first: dict[str, int] = {}
        for round in reversed(self.rounds):
            first |= round.planned_ranks
        first = {client: rank for client, rank in first.items() if client in self.fleet}
        follows = all(self.fleet[client].rank == rank for client, rank in first.items())
        return {client: member.rank for client, member in self.fleet.items()} if follows else first

    def current_ranks(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Before the first round and after each one: its number, and the rank of every client by what it last returned."""
        ranks = {client: member.rank for client, member in self.fleet.items()} | self.first_ranks
        yield self.start, dict(ranks)
        for round in self.rounds:
            ranks |= {client: rank for client, rank in round.returned_ranks.items() if client in ranks}
            if round.number:
                yield round.number, dict(ranks)

    def total(self, key: str) -> int | float:
        """The sum of a field over the rounds."""
        return sum(getattr(round, key) for round in self.rounds)

    def newest(self, key: str) -> Any:
        """The last value of a field that not every round has; None if none has."""
        found = (value for round in reversed(self.rounds) if (value := getattr(round, key)) not in (None, {}))
        return next(found, None)


def read(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, each followed by what it is compared with.

    Raises:
        RecordError: no folder, one that holds no run, another format, or a file that cannot be understood.
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not paths:
        raise RecordError("No run folder was named. Name at least one: `anyrank report DIR`.")
    runs = {}
    for path, name in zip(paths, _names(paths), strict=True):
        runs[path] = _run(path, name, parent=None)
        for nested in sorted(path.glob("compare/*/run.json")):
            inner = nested.parent.name
            label = inner if len(paths) == 1 and inner != name else f"{name}: {inner}"
            runs.setdefault(nested.parent.resolve(), _run(nested.parent, label, parent=name))
    return list(runs.values())


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    longest = max(len(path.parts) for path in paths)
    names = []
    for depth in range(1, longest + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _run(path: Path, name: str, *, parent: str | None) -> Run:
    info = _info(path)
    try:
        recipe = info["recipe"]
        return Run(
            name=name,
            parent=parent,
            info=info,
            method=str(info.get("method") or recipe["method"]["name"]),
            metric=Metric(str(info["metric"]["name"]), bool(info["metric"]["higher_is_better"])),
            references=_numbers(info.get("references")),
            remarks=tuple(map(str, info.get("remarks") or [])),
            fleet={client: _member(entry) for client, entry in info.get("fleet", {}).items()},
            rounds=tuple(_rounds(path / "rounds.jsonl", info["format"])),
            planned=int(info.get("rounds") or recipe["rounds"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path / 'run.json'} is not the record of a run: {_said(error)}.") from error


def _info(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RecordError(f"{path} holds no run: there is no run.json in it.{_hint(path)}") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} cannot be read: {error}.") from error
    found = info.get("format") if isinstance(info, dict) else None
    if found not in (ACCURACY_ONLY, FORMAT):
        raise RecordError(
            f"{file} has format {found!r}; this anyrank reads formats {ACCURACY_ONLY} and {FORMAT}. "
            "Make the report with the version that wrote the run."
        )
    return _translated_info(info) if found == ACCURACY_ONLY else info


def _translated_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """A `run.json` of a run that could be scored by accuracy alone."""
    references = info.get("references") or {}
    named = {"majority class": references.get("majority"), "word overlap": references.get("overlap")}
    return {**info, "metric": {"name": "accuracy", "higher_is_better": True}, "references": named}


def _translated_round(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A round of such a run."""
    own = entry.get("federated")
    return {
        **entry,
        "score": entry.get("accuracy"),
        "class_scores": entry.get("class_accuracy"),
        "federated": own and {**own, "score": own["accuracy"]},
    }


def _hint(path: Path) -> str:
    """Someone who names the folder of all runs means the runs in it."""
    inside = sorted(file.parent.name for file in path.glob("*/run.json"))
    return f" Did you mean a folder in it: {', '.join(inside)}?" if inside else ""


def _rounds(file: Path, format: int) -> Iterator[Round]:
    lines = _lines(file)
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            yield _round(_translated_round(entry) if format == ACCURACY_ONLY else entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if number == len(lines) and not line.endswith("\n"):
                return  # a kill cut it short; its round is played again when the run is resumed
            raise RecordError(f"{file}, line {number}, is not the record of a round: {_said(error)}.") from error


def _lines(file: Path) -> list[str]:
    try:
        # A kill may have cut a letter in two; that line must not make the others unreadable.
        with file.open(encoding="utf-8", errors="replace") as stream:
            return list(stream)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error}.") from error


def _round(entry: Mapping[str, Any]) -> Round:
    return Round(
        number=int(entry["round"]),
        score=_finite(entry.get("score")),
        metrics=_numbers(entry.get("metrics")),
        loss=_finite(entry.get("loss")),
        train_loss=_finite(entry.get("train_loss")),
        bytes_up=int(entry["bytes_up"]),
        bytes_down=int(entry["bytes_down"]),
        simulated_seconds=float(entry["simulated_seconds"]),
        real_seconds=float(entry.get("real_seconds", 0.0)),
        planned_ranks={client: int(rank) for client, rank in entry.get("planned_ranks", {}).items()},
        returned_ranks={client: int(rank) for client, rank in entry.get("returned_ranks", {}).items()},
        energy=_numbers(entry.get("energy")),
        class_scores={int(rank): score for rank, score in _numbers(entry.get("class_scores")).items()},
        federated=_federated(entry.get("federated")),
        rejected=tuple(_rejection(item) for item in entry.get("rejected", [])),
        target_seconds=_finite(entry.get("target_seconds")),
    )


def _federated(entry: Mapping[str, Any] | None) -> Federated | None:
    if entry is None or entry["score"] is None:  # one client's score that is not finite makes the mean so
        return None
    score = float(entry["score"])
    return Federated(
        score=score,
        std=float(entry.get("std", 0.0)),
        low=float(entry.get("min", score)),
        high=float(entry.get("max", score)),
        clients=int(entry.get("clients", 0)),
    )


def _member(entry: Mapping[str, Any]) -> Member:
    return Member(kind=str(entry["kind"]), rank=int(entry["rank"]), num_examples=int(entry["num_examples"]))


def _rejection(entry: Mapping[str, Any]) -> Rejection:
    return Rejection(client=str(entry["client"]), stage=str(entry["stage"]), reason=str(entry["reason"]))


def _numbers(entry: Mapping[str, Any] | None) -> dict[str, float]:
    return {key: number for key, value in (entry or {}).items() if (number := _finite(value)) is not None}


def _finite(value: int | float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _said(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
