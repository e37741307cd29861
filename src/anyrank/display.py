"""What a person sees in the terminal: progress while a run goes on, tables at its end."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from anyrank.api import Demand, Observer
from anyrank.engine import Progress as RunProgress
from anyrank.federation import Failure, Update
from anyrank.job import Job
from anyrank.record import RunFolder

__all__ = ["LiveObserver", "demand_table", "summary"]


class LiveObserver(Observer):
    """A line per round, and on a terminal a bar that moves with the clients' replies.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console):
        """Prepare the bar; it starts with the run."""
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("clients"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._per_round = self._round = 0
        self._metric = ""
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "LiveObserver":
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing and leave the cursor where it belongs."""
        self._bar.stop()

    def started(self, job: Job, folder: RunFolder, progress: RunProgress) -> None:
        """Say what is about to run."""
        cohort, what = job.cohort, job.recipe.baseline or job.cohort.method
        self._metric = folder.info["metric"]["name"]
        ranks = ", ".join(str(level) for level in job.spec.levels)
        source = f" of {job.recipe.data.source}" if job.recipe.data.source else ""
        self._print(
            f"{what}: {job.outline.base} on {folder.info['data']['train']} examples{source}, "
            f"{len(cohort.fleet)} client{'s' * (len(cohort.fleet) > 1)} "
            f"({cohort.per_round} a round), rank{'s' * (len(job.spec.levels) > 1)} {ranks}",
            style="bold",
        )
        for remark in job.remarks:
            self.noticed(remark)
        played = progress.state.round
        if played == cohort.rounds:
            self._print(f"all {played} rounds are played")
        elif progress.target_seconds is not None and job.recipe.evaluate.stop_at_target:
            self._print(f"stopped at its target after round {played}; --set evaluate.stop_at_target=false goes on")
        elif played:
            self._print(f"continuing after round {played} of {cohort.rounds}")
        self._rounds, self._per_round, self._round = cohort.rounds, cohort.per_round, played
        total, done = cohort.rounds * cohort.per_round, played * cohort.per_round
        self._bar.reset(self._task, total=total, completed=done, description=what)

    def noticed(self, remark: str) -> None:
        """Print a remark."""
        self._print(f"note: {remark}")

    def replied(self, reply: Update | Failure) -> None:
        """Move the bar, up to the round's end: a client can reply more than once in a round."""
        if self._bar.tasks[0].completed < (self._round + 1) * self._per_round:
            self._bar.advance(self._task)

    def finished_round(self, record: Mapping[str, Any]) -> None:
        """Print the round's line, and who failed; the bar passes those who did not reply."""
        self._round = record["round"]
        self._bar.update(self._task, completed=self._round * self._per_round)
        score = "" if record["score"] is None else number(record["score"])
        self._print(
            f"round {record['round']:>3}/{self._rounds}  {self._metric} {score:>7}  train loss {record['train_loss']:.4f}  "
            f"down {megabytes(record['bytes_down'])}  up {megabytes(record['bytes_up'])}  "
            f"clock {duration(record['simulated_seconds'])}"
        )
        for failure in record["rejected"]:
            self._print(f"           {failure['client']} {failure['stage']}: {failure['reason']}", style="yellow")
        for client, asked in record["late_replies"].items():
            self._print(f"           {client} replied to round {asked}")

    def _print(self, text: str, *, style: str | None = None) -> None:
        # No markup: names of clients and files are the user's.
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def number(value: int | float) -> str:
    """The value of a metric."""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def megabytes(size: int) -> str:
    """Bytes as megabytes, small ones as kilobytes."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def summary(folder: RunFolder) -> list[Table]:
    """The tables at the end of a run: what it reached against what, what it cost, who trained at which rank."""
    records = folder.records()
    last = records[-1]
    return [_reached(folder, last), _spent(records), _classes(folder, records)]


def _reached(folder: RunFolder, last: Mapping[str, Any]) -> Table:
    metric = folder.info["metric"]["name"]
    table = Table("on the test set", metric, box=box.SIMPLE)
    baseline = folder.info["recipe"]["baseline"]
    table.add_row(baseline or folder.info["method"], _score(last), style="bold")
    for path in sorted(folder.path.glob("compare/*")):
        reached = RunFolder.open(path).records()
        if reached:
            table.add_row(f"{path.name} baseline", _score(reached[-1]))
    for label, value in folder.info["references"].items():
        table.add_row(label, _or_not_finite(value))
    own = last["federated"]
    if own:
        spread = f" ± {number(own['std'])}" if own["std"] is not None else ""
        table.add_row(f"on {own['clients']} clients' own data", _or_not_finite(own["score"]) + spread)
    further = {name: value for name, value in (last["metrics"] or {}).items() if name != metric}
    if further:
        table.add_section()
    for name, value in further.items():
        table.add_row(name, _or_not_finite(value))
    return table


def _score(record: Mapping[str, Any]) -> str:
    return "not evaluated" if record["metrics"] is None else _or_not_finite(record["score"])


def _or_not_finite(value: int | float | None) -> str:
    return "not finite" if value is None or not isfinite(value) else number(value)


def _spent(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("spent", "", box=box.SIMPLE)
    table.add_row("rounds", str(len(records)))
    table.add_row("down", megabytes(sum(record["bytes_down"] for record in records)))
    table.add_row("up", megabytes(sum(record["bytes_up"] for record in records)))
    table.add_row("simulated time", duration(records[-1]["simulated_seconds"]))
    table.add_row("real time", duration(sum(record["real_seconds"] for record in records)))
    if records[-1]["target_seconds"] is not None:
        table.add_row("simulated time to target", duration(records[-1]["target_seconds"]))
    return table


def _classes(folder: RunFolder, records: Sequence[Mapping[str, Any]]) -> Table:
    last = records[-1]
    scored_by = f"{folder.info['metric']['name']} at that rank"
    table = Table("device class", "device", "clients", "trained at rank", scored_by, box=box.SIMPLE)
    fleet, sent = folder.info["fleet"], last["class_scores"] or {}
    trained = {client: rank for record in records for client, rank in record["planned_ranks"].items()}
    for kind in dict.fromkeys(client["kind"] for client in fleet.values()):
        ranks = sorted({rank for client, rank in trained.items() if fleet[client]["kind"] == kind})
        scored = [f"{rank}: {_or_not_finite(sent[str(rank)])}" for rank in ranks if str(rank) in sent]
        known = folder.info["recipe"]["fleet"]["classes"].get(kind)
        table.add_row(
            kind or "of its own",
            known["device"] if known else "own profile",
            str(sum(client["kind"] == kind for client in fleet.values())),
            f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else ", ".join(map(str, ranks)),
            "  ".join(scored),
        )
    return table


def demand_table(demands: Sequence[Demand], source: Path | str) -> Table:
    """What a round asks of each device class."""
    table = Table(
        "device\nclass", "clients", "rank", "trainable", "memory, GB\nneeded/there", "down/up,\nMB", "steps", "seconds",
        title=f"{source}: the busiest client of each class, per round (simulated)", title_justify="left",
        box=box.SIMPLE, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for d in demands:
        table.add_row(
            d.kind,
            str(d.clients),
            str(d.rank),
            f"{d.trainable:,}",
            f"{d.memory_bytes / 1e9:.2f}/{d.available_bytes / 1e9:.0f}",
            f"{d.bytes_down / 1e6:.1f}/{d.bytes_up / 1e6:.1f}",
            str(d.steps),
            f"{d.seconds:.1f}",
        )
    return table
