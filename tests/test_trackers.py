"""What trackers are told of a run, of its baselines, and when it goes on; and that none of them can end it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from anyrank import trackers
from anyrank.errors import ConfigError
from anyrank.record import RunFolder
from anyrank.trackers import Trackers, numbers

RECIPE = {
    "seed": 0,
    "rounds": 4,
    "baseline": None,
    "compare": ["centralised"],
    "method": {"name": "hlora"},
    "train": {"learning_rate": 2e-3, "group_by_length": False},
    "devices": {f"device-{i}": {"forward_flops": 1e9, "up_bps": 1e6} for i in range(60)},  # more than 100 parameters
}


def record(round: int) -> dict:
    return {
        "round": round,
        "score": None if round == 1 else 0.5 + round / 100,
        "loss": 1 / round,
        "metrics": {"f1": 0.25, "recall@5": 0.75},
        "class_scores": {"1": 0.5, "4": 0.75},
        "federated": {"score": 0.5, "std": 0.125, "clients": 6},
        "train_loss": float("nan") if round == 2 else 1.5,
        "bytes_down": 2000,
        "bytes_up": 1000 * round,
        "examples": 64,
        "returned_ranks": {"client-0": 1, "client-1": 4},
        "simulated_seconds": 2.5,
        "real_seconds": 0.5,
        "planned_ranks": {"client-0": 1, "client-1": 4},
        "late_replies": {"client-1": 1},
        "rejected": [{"client": "client-1", "stage": "late", "reason": "too late"}],
    }


LOGGED = {
    "loss": 0.25,
    "score": 0.54,
    "metrics/f1": 0.25,
    "metrics/recall@5": 0.75,
    "class_scores/1": 0.5,
    "class_scores/4": 0.75,
    "federated/score": 0.5,
    "federated/std": 0.125,
    "federated/clients": 6,
    "train_loss": 1.5,
    "bytes_down": 2000,
    "bytes_up": 4000,
    "examples": 64,
    "simulated_seconds": 2.5,
    "real_seconds": 0.5,
    "rejected": 1,
}


def run_folder(path: Path) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path, {"recipe": RECIPE})


def play(folder: RunFolder, tracking: Trackers, upto: int) -> None:
    """Go on to so many rounds as the engine would: a round is on disk before anyone is told."""
    tracking.started(None, folder, None)
    for round in range(len(folder.records()) + 1, upto + 1):
        with (folder.path / "rounds.jsonl").open("a") as file:
            file.write(json.dumps({k: None if v != v else v for k, v in record(round).items()}) + "\n")
        tracking.finished_round(record(round))


@pytest.fixture
def remarks() -> list[str]:
    return []


@pytest.fixture
def fake(monkeypatch):
    """A tracker that keeps what it is told, and fails at `fails_at`."""

    class Fake:
        opened, rounds, closed, fails_at = [], [], [], None

        def __init__(self, curve):
            self.opened.append(curve)

        def log(self, values, *, round):
            if round == Fake.fails_at:
                raise TimeoutError("no answer\nfrom there")
            self.rounds.append(round)

        def close(self, *, complete):
            self.closed.append(complete)

    monkeypatch.setitem(trackers._OPEN, "fake", Fake)
    monkeypatch.setitem(trackers._NEEDED, "fake", ("json",))
    return Fake


def test_every_finite_number_has_a_flat_name():
    assert numbers(record(4)) == pytest.approx(LOGGED)
    assert set(LOGGED) - set(numbers(record(1))) == {"score"}
    assert set(LOGGED) - set(numbers(record(2))) == {"train_loss"}


def test_packages_that_are_missing_are_named_with_their_extra_before_a_run(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        Trackers(["wandb", "trackio"], noticed=print)
    assert [problem.split("`")[1] for problem in caught.value.problems] == [
        "pip install 'anyrank[wandb]'",
        "pip install 'anyrank[trackio]'",
    ]


def test_a_folder_with_the_name_of_a_package_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(trackers._NEEDED, "wandb", ("no_such_tracker",))
    assert find_spec("no_such_tracker")
    with pytest.raises(ConfigError, match=r"anyrank\[wandb\]"):
        Trackers(["wandb"], noticed=print)


def test_a_resumed_run_goes_on_where_its_curve_ended(tmp_path, fake, remarks):
    folder = run_folder(tmp_path / "run")
    play(folder, Trackers(["fake"], noticed=remarks.append), 2)  # killed: never ended
    with (folder.path / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(record(3)) + "\n")  # killed before its trackers were told
    tracking = Trackers(["fake"], noticed=remarks.append)
    play(folder, tracking, 5)
    tracking.ended(complete=True)
    assert fake.rounds == [1, 2, 3, 4, 5]
    first, second = fake.opened
    assert (first.run, first.rounds, second.rounds) == (second.run, 0, 2)
    assert fake.closed == [True]
    assert not remarks


def test_a_finished_run_is_not_opened_again(tmp_path, fake, remarks):
    folder = run_folder(tmp_path / "run")
    for _ in range(2):
        tracking = Trackers(["fake"], noticed=remarks.append)
        play(folder, tracking, 3)
        tracking.ended(complete=True)
    assert fake.rounds == [1, 2, 3]
    assert len(fake.opened) == 1


def test_a_tracker_that_is_added_later_is_told_everything(tmp_path, fake, remarks):
    folder = run_folder(tmp_path / "run")
    play(folder, Trackers([], noticed=remarks.append), 3)
    assert [path.name for path in folder.path.iterdir()] == ["rounds.jsonl"]
    play(folder, Trackers(["fake"], noticed=remarks.append), 4)
    assert fake.rounds == [1, 2, 3, 4]


def test_baselines_are_runs_of_their_own(tmp_path, fake, remarks):
    tracking = Trackers(["fake"], noticed=remarks.append)
    for path in (tmp_path / "hlora-1", tmp_path / "hlora-1" / "compare" / "centralised"):
        play(run_folder(path), tracking, 2)
        tracking.ended(complete=True)
    run, baseline = fake.opened
    assert (run.name, baseline.name) == ("hlora-1", "hlora-1/centralised")
    assert run.run != baseline.run
    assert run.group == baseline.group == "hlora-1"
    assert run.home == baseline.home == (tmp_path / "hlora-1").resolve()
    assert fake.rounds == [1, 2, 1, 2]


def test_a_tracker_that_fails_is_noticed_once_and_left_alone(tmp_path, fake, remarks, monkeypatch):
    monkeypatch.setattr(fake, "fails_at", 2)
    folder = run_folder(tmp_path / "run")
    tracking = Trackers(["fake", "tensorboard"], noticed=remarks.append)
    play(folder, tracking, 4)
    tracking.ended(complete=True)
    play(run_folder(tmp_path / "run" / "compare" / "centralised"), tracking, 2)
    tracking.ended(complete=True)
    assert fake.rounds == [1]
    assert fake.closed == []
    (remark,) = remarks
    assert "fake is switched off (TimeoutError: no answer)" in remark
    assert len(scalars(folder.path / "tensorboard")["loss"]) == 4  # the other one was told everything

    monkeypatch.setattr(fake, "fails_at", None)
    play(folder, Trackers(["fake"], noticed=remarks.append), 5)
    assert fake.rounds == [1, 2, 3, 4, 5]


def test_a_tracker_that_cannot_be_opened_or_closed_is_no_error(tmp_path, remarks, monkeypatch):
    class Broken:
        def __init__(self, curve):
            raise OSError(28, "No space left on device")

    class Unclosed:
        def __init__(self, curve):
            pass

        def log(self, values, *, round):
            pass

        def close(self, *, complete):
            raise ConnectionError

    for name, curves in {"broken": Broken, "unclosed": Unclosed}.items():
        monkeypatch.setitem(trackers._OPEN, name, curves)
        monkeypatch.setitem(trackers._NEEDED, name, ("json",))
    tracking = Trackers(["broken", "unclosed"], noticed=remarks.append)
    play(run_folder(tmp_path / "run"), tracking, 2)
    tracking.ended(complete=False)
    assert [remark.split(".")[0] for remark in remarks] == [
        "tracking by broken is switched off (OSError: [Errno 28] No space left on device)",
        "tracking by unclosed is switched off (ConnectionError: )",
    ]


def test_a_note_of_what_was_logged_that_cannot_be_read_begins_new_curves(tmp_path, fake, remarks):
    folder = run_folder(tmp_path / "run")
    (folder.path / "trackers.json").write_text('{"run": "ab')
    play(folder, Trackers(["fake"], noticed=remarks.append), 2)
    assert fake.rounds == [1, 2]


# The trackers themselves


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_round_once(tmp_path, remarks):
    pytest.importorskip("tensorboard")
    folder = run_folder(tmp_path / "run")
    play(folder, Trackers(["tensorboard"], noticed=remarks.append), 3)
    # Killed after the event of round 3 and before the note of it.
    note = json.loads((folder.path / "trackers.json").read_text())
    assert note["rounds"] == {"tensorboard": 3}
    (folder.path / "trackers.json").write_text(json.dumps(note | {"rounds": {"tensorboard": 2}}))
    tracking = Trackers(["tensorboard"], noticed=remarks.append)
    play(folder, tracking, 4)
    tracking.ended(complete=True)

    found = scalars(folder.path / "tensorboard")
    assert {tag: values[-1] for tag, values in found.items()} == {
        tag: (4, pytest.approx(value)) for tag, value in LOGGED.items()
    }
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["score"]] == [2, 3, 4]
    assert [step for step, _ in found["train_loss"]] == [1, 3, 4]
    assert not remarks


def test_tensorboard_has_the_recipe(tmp_path, remarks):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = run_folder(tmp_path / "run")
    tracking = Trackers(["tensorboard"], noticed=remarks.append)
    play(folder, tracking, 1)
    tracking.ended(complete=True)
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["method.name"].string_value == "hlora"
    assert shown["train.learning_rate"].number_value == 2e-3
    assert shown["compare"].string_value == '["centralised"]'
    assert "baseline" not in shown


def wandb_rounds(folder: Path) -> dict[int, dict[str, float]]:
    """What W&B's offline files hold, by step: blocks of 32 KiB with parts of records in them."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # a whole record, or its last part
                entry, whole = Record.FromString(whole), b""
                if entry.WhichOneof("record_type") == "history":
                    values = {item.key or "/".join(item.nested_key): item.value_json for item in entry.history.item}
                    step = int(values["_step"])
                    assert step not in found
                    found[step] = {k: float(v) for k, v in values.items() if not k.startswith("_")}
    return found


def test_wandb_keeps_a_killed_run_offline_and_goes_on(tmp_path, remarks):
    """Killed in a process of its own: what is in the memory of W&B's is lost."""
    pytest.importorskip("wandb")
    code = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
from test_trackers import Trackers, play, run_folder
rounds, end = int(sys.argv[3]), sys.argv[4]
tracking = Trackers(["wandb"], noticed=print)
play(run_folder(pathlib.Path(sys.argv[1])), tracking, rounds)
tracking.ended(complete=True) if end == "ended" else os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    for rounds, end in ((2, "killed"), (4, "ended")):
        arguments = [str(tmp_path / "run"), str(Path(__file__).parent), str(rounds), end]
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == (end == "ended"), done.stderr
        assert "switched off" not in done.stdout
    found = wandb_rounds(tmp_path / "run")
    assert list(found) == [1, 2, 3, 4]
    assert found[4] == pytest.approx(LOGGED)


@pytest.mark.filterwarnings("ignore")  # of what MLflow uses that will go
def test_mlflow_keeps_runs_in_the_run_folder(tmp_path, remarks, monkeypatch):
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path / "hlora-1"
    for rounds in (2, 4):
        tracking = Trackers(["mlflow"], noticed=remarks.append)
        play(run_folder(home), tracking, rounds)
        tracking.ended(complete=rounds == 4)
    play(run_folder(home / "compare" / "centralised"), tracking, 1)
    tracking.ended(complete=True)
    assert not remarks

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("anyrank").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"hlora-1", "hlora-1/centralised"}
    run = runs["hlora-1"]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.002"
    assert run.data.params["devices.device-59.up_bps"] == "1000000.0"
    assert run.data.metrics == pytest.approx({name.replace("@", "_"): value for name, value in LOGGED.items()})
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]


def test_trackio_keeps_runs_in_its_local_store(tmp_path, remarks, monkeypatch):
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    home = tmp_path / "hlora-1"
    for rounds in (2, 4):
        tracking = Trackers(["trackio"], noticed=remarks.append)
        play(run_folder(home), tracking, rounds)
        tracking.ended(complete=rounds == 4)
    play(run_folder(home / "compare" / "centralised"), tracking, 1)
    assert not remarks
    store = storage.SQLiteStorage
    assert {run["name"] for run in store.get_run_records("anyrank")} == {"hlora-1", "hlora-1/centralised"}
    run = json.loads((home / "trackers.json").read_text())["run"]
    logs = store.get_logs("anyrank", "hlora-1", run_id=run)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert {name: logs[-1][name] for name in LOGGED} == pytest.approx(LOGGED)
    config = store.get_run_config("anyrank", "hlora-1", run_id=run)
    assert config["train"]["learning_rate"] == 2e-3
