"""Curves of a run in TensorBoard, Weights & Biases, MLflow and Trackio, while it goes on.

The run folder stays the truth: a tracker is told what is in the records, and what it missed when a run goes on. None
waits for a network unless the user's environment names a server, and none can end a run: one that fails is switched
off.

`DIR/trackers.json` keeps the run's name in all trackers and the last round that each was told. The libraries are
imported when there is something to log.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from anyrank.errors import ConfigError
from anyrank.record import RunFolder

__all__ = ["Curve", "Curves", "Trackers", "numbers"]

# What each needs to be importable; an extra of anyrank with the same name brings it.
_NEEDED = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
_BY_CLIENT = ("planned_ranks", "planned_blocks", "returned_ranks", "late_replies")  # a curve for each client is no help
_PROJECT = "anyrank"


class Curve(NamedTuple):
    """What a tracker needs to begin or continue the curves of one run.

    Args:
        run: unique, and the same whenever this run goes on.
        name: for people; of a compared baseline with that of its run before it.
        group: name of the run that compared baselines belong to; its own for the run itself.
        folder: the run folder.
        home: the run folder of the group, where local stores are.
        recipe: the resolved recipe.
        rounds: how many were logged before.
    """

    run: str
    name: str
    group: str
    folder: Path
    home: Path
    recipe: Mapping[str, Any]
    rounds: int


class Curves(Protocol):
    """The curves of one run in one tracker, opened with a `Curve`."""

    def log(self, values: Mapping[str, float], *, round: int) -> None:
        """Add a round, so that a kill right after it does not lose it."""
        ...

    def close(self, *, complete: bool) -> None:
        """The run is over, or stopped before its end."""
        ...


class Trackers:
    """Tells trackers of a run, and of its compared baselines as runs of their own; with the methods of `api.Observer`.

    Args:
        names: of the trackers.
        noticed: is told of a tracker that fails, which is then left alone.

    Raises:
        ConfigError: packages that are not installed, and the extras that bring them.
    """

    def __init__(self, names: Sequence[str], *, noticed: Callable[[str], None]):
        """Look for the packages; nothing is imported or written yet."""
        if missing := [name for name in names if not all(map(_installed, _NEEDED[name]))]:
            raise ConfigError(
                [
                    f"track: {name} needs packages that are not installed. Install them with "
                    f"`pip install 'anyrank[{name}]'`, or leave it out of track."
                    for name in missing
                ]
            )
        self._noticed = noticed
        self._on = list(dict.fromkeys(names))
        self._open: dict[str, Curves] = {}
        self._home: Path | None = None

    def started(self, job: object, folder: RunFolder, progress: object) -> None:
        """A run or a baseline begins or goes on: log the rounds that a tracker has not been told of."""
        self._folder, self._home = folder, self._home or folder.path.resolve()
        self._run, self._logged = _read(folder.path)
        for record in folder.records() if self._on else ():
            self.finished_round(record)

    def noticed(self, remark: str) -> None:
        """Remarks are not tracked."""

    def replied(self, reply: object) -> None:
        """Replies are not tracked."""

    def finished_round(self, record: Mapping[str, Any]) -> None:
        """Log a round with every tracker that has not been told of it."""
        for name in [name for name in self._on if self._logged.get(name, 0) < record["round"]]:
            with self._guarded(name):
                if name not in self._open:
                    _write(self._folder.path, self._run, self._logged)  # the name first, to find the curves again
                    self._open[name] = _OPEN[name](self._curve(name))
                self._open[name].log(numbers(record), round=record["round"])
                self._logged[name] = record["round"]
                _write(self._folder.path, self._run, self._logged)

    def ended(self, *, complete: bool) -> None:
        """A run or a baseline is over, or stopped before its end: no tracker keeps threads or files open."""
        for name in list(self._open):
            with self._guarded(name):
                self._open.pop(name).close(complete=complete)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Leave a tracker that fails alone from then on, and say why."""
        try:
            yield
        except Exception as error:  # whatever a library of others, a network or a disk comes up with
            self._on.remove(name)
            self._open.pop(name, None)
            reason = next(iter(str(error).strip().splitlines()), "")
            self._noticed(
                f"tracking by {name} is switched off ({type(error).__name__}: {reason}). The run goes on; `anyrank run "
                "--resume` will log what is missing"
            )

    def _curve(self, name: str) -> Curve:
        assert self._home is not None
        folder, group = self._folder.path.resolve(), self._home.name
        return Curve(
            run=self._run,
            name=group if folder == self._home else f"{group}/{folder.name}",
            group=group,
            folder=folder,
            home=self._home,
            recipe=self._folder.info["recipe"],
            rounds=self._logged.get(name, 0),
        )


def _installed(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # a folder called `wandb` in the working directory has none


def _read(folder: Path) -> tuple[str, dict[str, int]]:
    """The run's name in all trackers, a new one if it has none, and the last round that each was told."""
    try:
        known = json.loads((folder / "trackers.json").read_text(encoding="utf-8"))
        return str(known["run"]), dict(known["rounds"])
    except (OSError, ValueError, KeyError):  # not there, or cut short by a power cut: curves can begin anew
        return secrets.token_hex(4), {}


def _write(folder: Path, run: str, logged: Mapping[str, int]) -> None:
    temporary = folder / "trackers.json.tmp"
    temporary.write_text(json.dumps({"run": run, "rounds": logged}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "trackers.json")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a round's record by flat name, such as `loss` or `class_scores/4`.

    Lists, such as `rejected`, count as their length. What is held by client is left to the records.
    """
    shown = {key: value for key, value in record.items() if key != "round" and key not in _BY_CLIENT}
    return dict(_numbers(shown, ""))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, len(value)
    elif isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        yield name, value


def _settings(recipe: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """The recipe's values by dotted key; lists as JSON. What was left out and has no default is left out."""
    for key, value in recipe.items():
        dotted = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            yield from _settings(value, dotted)
        elif value is not None:
            yield dotted, value if isinstance(value, bool | int | float | str) else json.dumps(value)


class _TensorBoard:
    def __init__(self, curve: Curve):
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        # A kill between a round's event and the note of it leaves the event; readers drop what is at a purged step.
        self._writer = SummaryWriter(str(curve.folder / "tensorboard"), purge_step=curve.rounds + 1)
        if not curve.rounds:
            for summary in hparams(dict(_settings(curve.recipe)), {"score": 0.0, "loss": 0.0}):
                self._writer.file_writer.add_summary(summary)  # pyright: ignore[reportOptionalMemberAccess]

    def log(self, values: Mapping[str, float], *, round: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self, *, complete: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, curve: Curve):
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would go over the network
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=curve.run,
            name=curve.name,
            group=curve.group,
            config=dict(curve.recipe),
            dir=str(curve.home),
            mode=mode,
            resume="allow",
            # Its own process writes what was logged only so often, and a kill may come before that.
            settings=wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=0.1),
        )

    def log(self, values: Mapping[str, float], *, round: int) -> None:
        self._run.log(dict(values), step=round, commit=True)

    def close(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class _MLflow:
    _at_once = 100  # parameters in one request, its limit

    def __init__(self, curve: Curve):
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would go over the network
            store = curve.home / "mlflow"
            store.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{store / 'mlflow.db'}", (store / "artifacts").as_uri()
        self._entities = import_module("mlflow.entities")
        self._client = import_module("mlflow").MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=artifacts)
        known = self._client.search_runs([experiment], filter_string=f"tags.`anyrank.run` = '{curve.run}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"anyrank.run": curve.run, "anyrank.group": curve.group}
        self._run = self._client.create_run(experiment, run_name=curve.name, tags=tags).info.run_id
        parameters = [self._entities.Param(_plain(key), str(value)[:6000]) for key, value in _settings(curve.recipe)]
        for at in range(0, len(parameters), self._at_once):
            self._client.log_batch(self._run, params=parameters[at : at + self._at_once])

    def log(self, values: Mapping[str, float], *, round: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_plain(name), value, now, round) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, complete: bool) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if complete else "KILLED")


def _plain(name: str) -> str:
    """A name in the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


class _Trackio:
    """Writes to Trackio's local store directly: its `init` asks the hub who is logged in, and waits for the answer."""

    def __init__(self, curve: Curve):
        self._store = import_module("trackio.sqlite_storage").SQLiteStorage
        self._curve = curve

    def log(self, values: Mapping[str, float], *, round: int) -> None:
        self._store.bulk_log(
            project=_PROJECT,
            run=self._curve.name,
            run_id=self._curve.run,
            metrics_list=[dict(values)],
            steps=[round],
            config={**self._curve.recipe, "_Group": self._curve.group},
            log_ids=[f"{self._curve.run}-{round}"],
        )

    def close(self, *, complete: bool) -> None:
        pass


_OPEN: dict[str, Callable[[Curve], Curves]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
